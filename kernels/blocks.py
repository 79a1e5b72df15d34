"""Union-find over 2 x 2 pixel blocks: the device functions that update.py and components.py share.

All foreground pixels of a 2 x 2 block touch one another, so under 8-connectivity a block belongs to one
component at most and one int32 parent a block is enough: a quarter of the entries that pixels would need.
A plane of bytes carries the foreground as bit 1 (value 2); bit 0 belongs to the caller. Parents, and whatever
a caller accumulates, are read and written only at blocks that hold foreground: nothing is cleared beforehand.

Phases, for whoever calls. Scan and link of a tile may share a launch, since they look at nothing beyond the tile;
between the others every program must have finished (a launch boundary, or a barrier where one program has the image).

    scan_tile      reads mask, initial            writes every pixel of its tile of the plane, once
    link_tile      reads its tile of the plane    writes the parents of its own blocks, then unions inside the tile
    link_border    reads the plane around a tile  unions with the tiles to the left and above
    find           reads parents                  the caller stores the root as the block's own parent

Why races do no harm. ``parents[i] <= i`` always, a value ever stored there is an ancestor of i, and links only
ever go to a smaller index. A stale read therefore gives an older ancestor, never a wrong one. A union trusts
no read: it ends only when ``atomic_min`` returns that the entry still was a root, else it goes on with what
came back, which is strictly smaller; so it ends, and no link is lost. Compressing stores race with nothing but
reads, because a barrier or a kernel boundary separates them from the unions. Phases inside one program are
separated by ``tl.debug_barrier()``, which orders global memory among the threads of a program.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE_H, TILE_W = (16, 128)  # pixels; on 8 warps 8 pixels a thread while scanning, then 2 blocks a thread
NUM_WARPS = 8
WORKSPACE_BYTES = 256 * 2**20
MAX_REGISTERS = 128  # a thread, on CUDA
LARGEST = tl.constexpr(torch.finfo(torch.float32).max)

INTERPRETED = bool(triton.knobs.runtime.interpret)  # kernels run on CPU tensors, in Triton's interpreter


@triton.jit
def foreground(plane, y, x, height, width, where):
    # Outside the image a pixel is background, so neighbours need no special case at the border.
    inside = where & (y >= 0) & (y < height) & (x >= 0) & (x < width)
    return (tl.load(plane + y * width + x, mask=inside, other=0) & 2) != 0


@triton.jit
def block_lanes(tile, tiles_x, TILE_H: tl.constexpr, TILE_W: tl.constexpr):
    """Row and column of each block of a tile: two [TILE_H // 2, TILE_W // 2] tensors."""
    lanes = tl.zeros((TILE_H // 2, TILE_W // 2), tl.int32)
    by = (tile // tiles_x) * (TILE_H // 2) + tl.arange(0, TILE_H // 2)[:, None] + lanes
    bx = (tile % tiles_x) * (TILE_W // 2) + tl.arange(0, TILE_W // 2)[None, :] + lanes
    return by, bx


@triton.jit
def block_pixels(plane, by, bx, height, width):
    """The four foreground flags of each block: top left, top right, bottom left, bottom right."""
    everywhere = by >= 0
    p00 = foreground(plane, 2 * by, 2 * bx, height, width, everywhere)
    p01 = foreground(plane, 2 * by, 2 * bx + 1, height, width, everywhere)
    p10 = foreground(plane, 2 * by + 1, 2 * bx, height, width, everywhere)
    p11 = foreground(plane, 2 * by + 1, 2 * bx + 1, height, width, everywhere)
    return p00, p01, p10, p11


@triton.jit
def block_edges(
    plane, by, bx, p00, p01, p10, height, width, BORDER: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr
):
    """Which of the blocks NW, N, NE and W each block is connected to: across the tile's border, or inside it."""
    # The other four directions are those of the neighbours: every edge is looked at once, from its later block.
    y, x = 2 * by, 2 * bx
    top = by % (TILE_H // 2) == 0
    left = bx % (TILE_W // 2) == 0
    right = bx % (TILE_W // 2) == TILE_W // 2 - 1
    in_nw, in_n, in_ne, in_w = p00, p00 | p01, p01, p00 | p10
    if BORDER:
        in_nw, in_n, in_ne, in_w = in_nw & (top | left), in_n & top, in_ne & (top | right), in_w & left
    else:
        in_nw, in_n, in_ne, in_w = in_nw & ~(top | left), in_n & ~top, in_ne & ~(top | right), in_w & ~left
    nw = foreground(plane, y - 1, x - 1, height, width, in_nw)
    n = foreground(plane, y - 1, x, height, width, in_n) | foreground(plane, y - 1, x + 1, height, width, in_n)
    ne = foreground(plane, y - 1, x + 2, height, width, in_ne)
    w = foreground(plane, y, x - 1, height, width, in_w) | foreground(plane, y + 1, x - 1, height, width, in_w)
    return nw, n, ne, w


@triton.jit
def union(parents, a, b, active):
    """Join the sets of a and b wherever active; see the module's note on races."""
    # Triton has no loop per lane: all go round together until the last has arrived.
    while tl.max(tl.max(active.to(tl.int32), axis=1), axis=0) > 0:
        above_a = tl.load(parents + a, mask=active, other=0)
        above_b = tl.load(parents + b, mask=active, other=0)
        arrived = active & (above_a == a) & (above_b == b)
        a = tl.where(active, above_a, a)
        b = tl.where(active, above_b, b)
        active = active & (a != b)  # they have met: one set already
        # The larger root goes below the smaller, whoever asks: so parents[i] <= i and no cycle can close.
        high, low = tl.maximum(a, b), tl.minimum(a, b)
        attempt = active & arrived
        # relaxed: one entry decides, nothing else is published by it. Where another lane was first, old is the smaller
        # parent that stood there; min has kept the lesser of both, and the loop joins it with the other.
        old = tl.atomic_min(parents + high, low, mask=attempt, sem="relaxed")
        a = tl.where(attempt, old, a)
        b = tl.where(attempt, low, b)
        active = active & ~(attempt & (old == high))


@triton.jit
def union_edges(parents, start, block, nw, n, ne, w, blocks_x):
    """Join each block's set, reached from start, with those of its connected neighbours: one direction at a time."""
    edges = nw.to(tl.int32) + 2 * n.to(tl.int32) + 4 * ne.to(tl.int32) + 8 * w.to(tl.int32)
    for direction in range(4):  # a loop of the program: unrolled it takes far more registers
        other = block + tl.where(direction == 3, -1, direction - 1 - blocks_x)
        union(parents, start, other, ((edges >> direction) & 1) != 0)


@triton.jit
def find(parents, block, some):
    """Root of each block; the caller may store it back over the block's own parent."""
    root = tl.load(parents + block, mask=some, other=0)
    moving = some
    while tl.max(tl.max(moving.to(tl.int32), axis=1), axis=0) > 0:
        above = tl.load(parents + root, mask=moving, other=0)
        moving = moving & (above != root)
        root = tl.where(moving, above, root)
    return root


@triton.jit
def link_tile(plane, parents, by, bx, p00, p01, p10, some, height, width, TILE_H: tl.constexpr, TILE_W: tl.constexpr):
    """Set up the blocks of one tile and join those that are connected inside it; tiles do not depend on each other."""
    blocks_x = (width + 1) // 2
    block = by * blocks_x + bx
    nw, n, ne, w = block_edges(plane, by, bx, p00, p01, p10, height, width, False, TILE_H, TILE_W)
    # The first edge is taken without an atomic: each block writes only its own parent. The later line wins, so the
    # edge taken is the first there is of nw, n, ne, w.
    parent = tl.where(w, block - 1, block)
    parent = tl.where(ne, block - blocks_x + 1, parent)
    parent = tl.where(n, block - blocks_x, parent)
    parent = tl.where(nw, block - blocks_x - 1, parent)
    tl.store(parents + block, parent, mask=some)
    tl.debug_barrier()
    # Pointer doubling: the depth of a tile's chains halves in each round. Lanes read parents that others shorten at the
    # same time; whichever value they get is an ancestor.
    moving = some
    while tl.max(tl.max(moving.to(tl.int32), axis=1), axis=0) > 0:
        above = tl.load(parents + parent, mask=moving, other=0)
        moving = moving & (above != parent)
        parent = tl.where(moving, above, parent)
        tl.store(parents + block, parent, mask=moving)
    tl.debug_barrier()
    # What is left are the edges after the first: never nw (all False, in the shape wanted), n only beside nw, ...
    union_edges(parents, parent, block, nw & ~nw, n & nw, ne & (nw | n), w & (nw | n | ne), blocks_x)


@triton.jit
def link_border(plane, parents, tile, height, width, TILE_H: tl.constexpr, TILE_W: tl.constexpr):
    """Join the blocks of one tile with those of its neighbours; every tile has been linked inside before."""
    blocks_x = (width + 1) // 2
    by, bx = block_lanes(tile, tl.cdiv(width, TILE_W), TILE_H, TILE_W)
    p00, p01, p10, _p11 = block_pixels(plane, by, bx, height, width)
    nw, n, ne, w = block_edges(plane, by, bx, p00, p01, p10, height, width, True, TILE_H, TILE_W)
    block = by * blocks_x + bx
    union_edges(parents, block, block, nw, n, ne, w, blocks_x)


@triton.jit
def all_max(x):
    """Over both axes of a tile, as :func:`all_min` and :func:`all_sum`: one number for the program, to branch on."""
    return tl.max(tl.max(x, axis=1), axis=0)


@triton.jit
def all_min(x):
    return tl.min(tl.min(x, axis=1), axis=0)


@triton.jit
def all_sum(x):
    return tl.sum(tl.sum(x, axis=1), axis=0)


@triton.jit
def valid_size(sizes, image, height, width, HAS_SIZES: tl.constexpr):
    """Height and width of an image's valid area, never more than the plane's."""
    rows, columns = height, width
    if HAS_SIZES:
        rows = tl.minimum(tl.load(sizes + 2 * image), height).to(tl.int32)
        columns = tl.minimum(tl.load(sizes + 2 * image + 1), width).to(tl.int32)
    return rows, columns


@triton.jit
def scan_tile(
    mask, initial, out, tile, rows, columns, height, width, threshold, weight, rest,
    HAS_INITIAL: tl.constexpr, LOGITS: tl.constexpr, SOFT: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr,
):  # fmt: skip
    """Write initial + 2 * foreground to the output; returns 1 where the tile holds foreground, else 0.

    SOFT: both are probabilities, and where the initial one is not 0 its weighted sum with the other takes its place;
    foreground there has bit 2 as well, which tells the end to keep out.
    """
    tiles_x = tl.cdiv(width, TILE_W)
    y = (tile // tiles_x) * TILE_H + tl.arange(0, TILE_H)[:, None]
    x = (tile % tiles_x) * TILE_W + tl.arange(0, TILE_W)[None, :]
    inside = (y < height) & (x < width)
    at = y * width + x
    value = tl.load(mask + at, mask=inside, other=0)  # [TILE_H, TILE_W]
    is_set = value.to(tl.float32) > threshold if LOGITS else value != 0
    is_set = is_set & inside & (y < rows) & (x < columns)
    bits = is_set.to(tl.uint8) * 2
    # Initial masks count beyond the valid area too: the result is a superset of them.
    if SOFT:
        first = tl.load(initial + at, mask=inside, other=0)
        second = tl.minimum(tl.maximum(tl.where(value == value, value, 0.0), -LARGEST), LARGEST)  # as nan_to_num
        in_box = first > 0
        bits = bits | (in_box & (weight * first + rest * second >= 0.5)).to(tl.uint8)
        bits = bits | (in_box & is_set).to(tl.uint8) * 4
    elif HAS_INITIAL:
        bits = bits | (tl.load(initial + at, mask=inside, other=0) != 0).to(tl.uint8)
    tl.store(out + at, bits, mask=inside)
    return all_max(is_set.to(tl.int32))


# do_not_specialize: one binary for all heights. The width stays specialised: whether 16 divides it decides how wide the
# loads of a row can be.
@triton.jit(do_not_specialize=["height"])
def link_border_kernel(plane, parents, filled, height, width, TILE_H: tl.constexpr, TILE_W: tl.constexpr):
    tiles_n = tl.cdiv(height, TILE_H) * tl.cdiv(width, TILE_W)
    # An image has less than 2**31 pixels (check_plane), a batch may have more: int64 across images, int32 inside one.
    image = (tl.program_id(0) // tiles_n).to(tl.int64)
    if tl.load(filled + tl.program_id(0)) > 0:
        parents += image * (((height + 1) // 2) * ((width + 1) // 2))
        link_border(plane + image * height * width, parents, tl.program_id(0) % tiles_n, height, width, TILE_H, TILE_W)


def launch_options(num_warps: int, backend: str = "") -> dict[str, int]:
    """Compiler options of every launch; ``backend`` "cuda" or "hip", "" for what this torch is built for.

    On CUDA the bound of 128 registers also keeps ptxas from spilling for the sake of more resident programs.

    Example:
        >>> from hmg_gpu.kernels.blocks import launch_options
        >>> launch_options(8, "cuda"), launch_options(8, "hip")
        ({'num_warps': 8, 'num_stages': 1, 'maxnreg': 128}, {'num_warps': 8, 'num_stages': 1})
    """
    hip = backend == "hip" or (not backend and torch.version.hip is not None)
    return {"num_warps": num_warps, "num_stages": 1} | ({} if hip else {"maxnreg": MAX_REGISTERS})


def block_count(height: int, width: int) -> int:
    """Blocks of 2 x 2 pixels that cover an image.

    Example:
        >>> from hmg_gpu.kernels.blocks import block_count
        >>> block_count(4, 5)
        6
    """
    return ((height + 1) // 2) * ((width + 1) // 2)


def tile_count(height: int, width: int) -> int:
    """Tiles that cover an image.

    Example:
        >>> from hmg_gpu.kernels.blocks import TILE_H, TILE_W, tile_count
        >>> tile_count(TILE_H, TILE_W), tile_count(TILE_H + 1, TILE_W)
        (1, 2)
    """
    return triton.cdiv(height, TILE_H) * triton.cdiv(width, TILE_W)


def check_plane(name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    """Refuse what the kernels cannot address: wrong dtype, wrong rank, 2**31 pixels or more in one image."""
    if tensor.dtype not in dtypes:
        allowed = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        cure = "threshold logits with `logits > 0` first" if torch.bool in dtypes else "convert with .float()"
        raise TypeError(f"{name}: expected {allowed}, got {tensor.dtype}; {cure}")
    if tensor.ndim != 3:
        raise ValueError(f"{name}: expected [B, H, W], got {list(tensor.shape)}; drop the channel axis with squeeze(1)")
    if tensor.shape[1] * tensor.shape[2] >= 2**31:
        raise ValueError(f"{name}: an image of 2**31 pixels or more, {list(tensor.shape)}; cut it into parts")


def check_points(points: Tensor, device: torch.device) -> None:
    """Refuse points that are not int64 [P, 3] on the device; values are not looked at, that would synchronise."""
    if points.dtype != torch.int64 or points.ndim != 2 or points.shape[1] != 3 or points.device != device:
        raise ValueError(
            f"points: expected int64 [P, 3] rows (image, y, x) on {device}, "
            f"got {points.dtype} {list(points.shape)} on {points.device}"
        )


def check_sizes(sizes: Tensor | None, images: int, device: torch.device) -> None:
    """Refuse sizes that are not int64 [B, 2] on the device; values are not looked at, the kernels bound them."""
    if sizes is None:
        return
    if sizes.dtype != torch.int64 or sizes.shape != (images, 2) or sizes.device != device:
        raise ValueError(
            f"sizes: expected int64 [{images}, 2] rows (height, width) on {device}, "
            f"got {sizes.dtype} {list(sizes.shape)} on {sizes.device}"
        )
