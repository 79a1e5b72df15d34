"""Union-find over 2 x 2 pixel blocks, and what all kernels share on the host.

All foreground pixels of a 2 x 2 block touch one another, so under 8-connectivity a block belongs to one
component at most and one int32 parent a block is enough: a quarter of the entries that pixels would need.
A plane of bytes carries the foreground in the bits ``BITS``; the others belong to the caller.

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
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

if not hasattr(tl, "debug_barrier"):  # Triton after 3.9 has it as barrier (triton-lang/triton #11437)
    tl.debug_barrier = tl.barrier

TILE_H, TILE_W = (16, 128)  # pixels; on 8 warps 2 blocks a thread
NUM_WARPS = 8
MAX_REGISTERS = 128  # a thread, on CUDA
ONE_WARP_REGISTERS = 144  # where a program is one warp, which holds more of its state in each thread
MAX_PIXELS = 2**31 - 65536  # of an image: int32 offsets, with room for the lanes of a last chunk that are masked
FAR = tl.constexpr(2147483647)  # beyond every pixel, block, rank and coordinate: the neutral element of minima

INTERPRETED = bool(triton.knobs.runtime.interpret)  # kernels run on CPU tensors, in Triton's interpreter


@triton.jit
def foreground(plane, y, x, rows, columns, width, where, BITS: tl.constexpr):
    # Outside the valid area a pixel is background, so neighbours need no special case at the border.
    inside = where & (y >= 0) & (y < rows) & (x >= 0) & (x < columns)
    return (tl.load(plane + y * width + x, mask=inside, other=0) & BITS) != 0


@triton.jit
def block_lanes(tile, tiles_x, TILE_H: tl.constexpr, TILE_W: tl.constexpr):
    """Row and column of each block of a tile: two [TILE_H // 2, TILE_W // 2] tensors."""
    lanes = tl.zeros((TILE_H // 2, TILE_W // 2), tl.int32)
    by = (tile // tiles_x) * (TILE_H // 2) + tl.arange(0, TILE_H // 2)[:, None] + lanes
    bx = (tile % tiles_x) * (TILE_W // 2) + tl.arange(0, TILE_W // 2)[None, :] + lanes
    return by, bx


@triton.jit
def block_pixels(plane, by, bx, rows, columns, width, BITS: tl.constexpr):
    """The four foreground flags of each block: top left, top right, bottom left, bottom right."""
    everywhere = by >= 0
    p00 = foreground(plane, 2 * by, 2 * bx, rows, columns, width, everywhere, BITS)
    p01 = foreground(plane, 2 * by, 2 * bx + 1, rows, columns, width, everywhere, BITS)
    p10 = foreground(plane, 2 * by + 1, 2 * bx, rows, columns, width, everywhere, BITS)
    p11 = foreground(plane, 2 * by + 1, 2 * bx + 1, rows, columns, width, everywhere, BITS)
    return p00, p01, p10, p11


@triton.jit
def block_edges(
    plane, by, bx, p00, p01, p10, rows, columns, width,
    BORDER: tl.constexpr, BITS: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr,
):  # fmt: skip
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
    nw = foreground(plane, y - 1, x - 1, rows, columns, width, in_nw, BITS)
    n = foreground(plane, y - 1, x, rows, columns, width, in_n, BITS)
    n = n | foreground(plane, y - 1, x + 1, rows, columns, width, in_n, BITS)
    ne = foreground(plane, y - 1, x + 2, rows, columns, width, in_ne, BITS)
    w = foreground(plane, y, x - 1, rows, columns, width, in_w, BITS)
    w = w | foreground(plane, y + 1, x - 1, rows, columns, width, in_w, BITS)
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
def link_tile(parents, block, some, nw, n, ne, w, blocks_x):
    """Join the blocks of one tile that are connected inside it; tiles do not depend on each other."""
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


def launch_options(num_warps: int, backend: str = "") -> dict[str, int]:
    """Compiler options of every launch; ``backend`` "cuda" or "hip", "" for what this torch is built for.

    On CUDA the bound on registers also keeps ptxas from spilling for the sake of more resident programs.

    Example:
        >>> from hmg_gpu.kernels.blocks import launch_options
        >>> launch_options(8, "cuda"), launch_options(8, "hip")
        ({'num_warps': 8, 'num_stages': 1, 'maxnreg': 128}, {'num_warps': 8, 'num_stages': 1})
    """
    hip = backend == "hip" or (not backend and torch.version.hip is not None)
    limit = MAX_REGISTERS if num_warps > 1 else ONE_WARP_REGISTERS
    return {"num_warps": num_warps, "num_stages": 1} | ({} if hip else {"maxnreg": limit})


def tile_options(backend: str = "") -> dict[str, int]:
    """Tile and compiler options of the kernels that give each lane its own blocks.

    Raises:
        ValueError: there are more lanes than blocks. Warps would then share blocks, and leave a loop that holds
            barriers each for itself.

    Example:
        >>> from hmg_gpu.kernels.blocks import tile_options
        >>> tile_options("hip")
        {'TILE_H': 16, 'TILE_W': 128, 'num_warps': 8, 'num_stages': 1}
    """
    options = launch_options(NUM_WARPS, backend)
    lanes = NUM_WARPS * (32 if "maxnreg" in options else 64)
    if lanes > TILE_H * TILE_W // 4:
        raise ValueError(f"a tile of {TILE_H} x {TILE_W} pixels: fewer blocks than {lanes} lanes; take fewer warps")
    return {"TILE_H": TILE_H, "TILE_W": TILE_W, **options}


def ceil_div(number: int, by: int) -> int:
    """As ``triton.cdiv``, which costs the host a hundred times as much.

    Example:
        >>> from hmg_gpu.kernels.blocks import ceil_div
        >>> ceil_div(8, 4), ceil_div(9, 4)
        (2, 3)
    """
    return -(-number // by)


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
    return ceil_div(height, TILE_H) * ceil_div(width, TILE_W)


def may_launch(*tensors: Tensor | None) -> bool:
    """Whether a launcher may be called as it is: eager, on plain tensors that the kernels can run on.

    A custom op costs the host more than twice as much as its launcher, and only tracing and modes need it.
    """
    first = tensors[0]
    return (
        (first.device.type == "cuda" or (INTERPRETED and first.device.type == "cpu"))
        and not torch.compiler.is_compiling()
        and not is_in_torch_dispatch_mode()
        and all(tensor is None or type(tensor) is Tensor for tensor in tensors)
    )


def check_plane(name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    """Refuse what the kernels cannot address: wrong dtype, wrong rank, an image of more than MAX_PIXELS."""
    if tensor.dtype not in dtypes:
        allowed = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        cure = "threshold logits with `logits > 0` first" if torch.bool in dtypes else "convert with .float()"
        raise TypeError(f"{name}: expected {allowed}, got {tensor.dtype}; {cure}")
    if tensor.ndim != 3:
        raise ValueError(f"{name}: expected [B, H, W], got {list(tensor.shape)}; drop the channel axis with squeeze(1)")
    if tensor.shape[1] * tensor.shape[2] > MAX_PIXELS:
        raise ValueError(f"{name}: an image of more than {MAX_PIXELS} pixels, {list(tensor.shape)}; cut it into parts")


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
