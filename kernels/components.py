"""Connected components with moments on the device (8-connected).

:func:`components` numbers components by their first pixel in raster order, as SciPy does, and sums their moments
into a table of fixed capacity. Shapes depend on the arguments' shapes alone, and so does the number of launches.

Launches, in order; the union-find, and why its races do no harm, is in blocks.py:

    stream_kernel, link_kernel, border_kernel, sum_kernel   as of the update: a plane with the foreground in bit 1,
                                                            parents, areas, sums and first pixels at the roots
    rank_kernel      reads plane, parents, first   writes ranks at the roots, counts, the neutral start of boxes
    moments_kernel   reads parents, ranks, sums    writes labels and the table, adds to the boxes

Numbers need a pass of their own: which root comes first is known only when every root has its first pixel, that
is at a launch boundary. One program counts through an image, since a counter that all programs raise would number
components in the order of their arrival.

Why races do no harm: the atomics are minima and maxima of whole numbers, which give the same bits in any order, and
nobody reads them before the next launch. Every other store is by the one program, or the one lane, that owns the place.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hmg_gpu.kernels import blocks, stream, tiles
from hmg_gpu.kernels.blocks import FAR, NUM_WARPS, all_max, all_min, block_lanes, block_pixels
from hmg_gpu.kernels.stream import stream_kernel
from hmg_gpu.kernels.tiles import listed_tile

CHUNK = 4096  # pixels that the ranking looks at together
COLUMNS = ("area", "sum_y", "sum_x", "y0", "x0", "y1", "x1")  # of the table; the box is half open


@triton.jit(do_not_specialize=["start", "height", "width", "capacity"])
def rank_kernel(
    plane, parents, first, ranks, counts, table, start, height, width, capacity,
    COLUMNS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One program an image: number the roots by their first pixel in raster order and begin the boxes of their rows."""
    blocks_x = (width + 1) // 2
    slot = tl.program_id(0).to(tl.int64)
    image = start + slot
    plane += image * height * width
    blocks_n = ((height + 1) // 2) * blocks_x
    parents += slot * blocks_n
    first += slot * blocks_n
    ranks += slot * blocks_n
    table += image * capacity * COLUMNS
    count = 0
    for begin in range(0, height * width, CHUNK):
        at = begin + tl.arange(0, CHUNK)
        is_set = (tl.load(plane + at, mask=(at >= 0) & (at < height * width), other=0) & 2) != 0
        if tl.max(is_set.to(tl.int32), axis=0) > 0:
            block = (at // width // 2) * blocks_x + (at % width) // 2
            root = tl.load(parents + block, mask=is_set, other=0)
            # One pixel of a component is its first: each root gets one number, from one lane.
            begins = is_set & (tl.load(first + root, mask=is_set, other=-1) == at)
            number = count + tl.cumsum(begins.to(tl.int32), axis=0) - 1
            tl.store(ranks + root, number, mask=begins)
            listed = begins & (number < capacity)
            row = table + number.to(tl.int64) * COLUMNS
            # Neutral elements of the minima and maxima to come.
            far = tl.full((CHUNK,), FAR, tl.int64)
            tl.store(row + 3, far, mask=listed)
            tl.store(row + 4, far, mask=listed)
            tl.store(row + 5, far - FAR, mask=listed)
            tl.store(row + 6, far - FAR, mask=listed)
            count += tl.sum(begins.to(tl.int32), axis=0)
    tl.store(counts + image, count)


@triton.jit(do_not_specialize=["start", "height", "width", "capacity"])
def moments_kernel(
    plane, listed, listed_n, parents, areas, sums, ranks, labels, table, start, height, width, capacity,
    COLUMNS: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr,
):  # fmt: skip
    """Labels of every foreground pixel, and area, sums and box of every component within the table's capacity."""
    blocks_x = (width + 1) // 2
    blocks_n = ((height + 1) // 2) * blocks_x
    tiles_x = tl.cdiv(width, TILE_W)
    for i in range(tl.program_id(0), tl.load(listed_n), tl.num_programs(0)):
        here, image, slot, tile, _rows, _columns = listed_tile(
            listed, i, plane, plane, plane, start, height, width, False, False, TILE_H, TILE_W
        )
        own_parents, own_ranks = parents + slot * blocks_n, ranks + slot * blocks_n
        rows = table + image * capacity * COLUMNS
        y = (tile // tiles_x) * TILE_H + tl.arange(0, TILE_H)[:, None]
        x = (tile % tiles_x) * TILE_W + tl.arange(0, TILE_W)[None, :]
        at = y * width + x
        is_set = (tl.load(here + at, mask=(y < height) & (x < width), other=0) & 2) != 0
        root = tl.load(own_parents + (y // 2) * blocks_x + x // 2, mask=is_set, other=0)
        label = tl.load(own_ranks + root, mask=is_set, other=-1) + 1
        tl.store(labels + image * height * width + at, label, mask=is_set)

        by, bx = block_lanes(tile, tiles_x, TILE_H, TILE_W)
        p00, p01, p10, p11 = block_pixels(here, by, bx, height, width, width, 2)
        some = p00 | p01 | p10 | p11
        block = by * blocks_x + bx
        root = tl.load(own_parents + block, mask=some, other=0)
        rank = tl.load(own_ranks + root, mask=some, other=0)
        some = some & (rank < capacity)
        row = rows + rank.to(tl.int64) * COLUMNS
        is_root = some & (root == block)  # one lane has the sums of a component
        own_sums = sums + slot * 2 * blocks_n + block
        tl.store(row, tl.load(areas + slot * blocks_n + block, mask=is_root, other=0).to(tl.int64), mask=is_root)
        tl.store(row + 1, tl.load(own_sums, mask=is_root, other=0).to(tl.int64), mask=is_root)
        tl.store(row + 2, tl.load(own_sums + blocks_n, mask=is_root, other=0).to(tl.int64), mask=is_root)
        y0 = tl.where(p00 | p01, 2 * by, 2 * by + 1)
        x0 = tl.where(p00 | p10, 2 * bx, 2 * bx + 1)
        y1 = tl.where(p10 | p11, 2 * by + 2, 2 * by + 1)
        x1 = tl.where(p01 | p11, 2 * bx + 2, 2 * bx + 1)
        lowest = all_min(tl.where(some, rank, FAR))
        if lowest == all_max(tl.where(some, rank, -1)):  # one component in the tile
            only = rows + lowest.to(tl.int64) * COLUMNS
            tl.atomic_min(only + 3, all_min(tl.where(some, y0, FAR)).to(tl.int64), sem="relaxed")
            tl.atomic_min(only + 4, all_min(tl.where(some, x0, FAR)).to(tl.int64), sem="relaxed")
            tl.atomic_max(only + 5, all_max(tl.where(some, y1, 0)).to(tl.int64), sem="relaxed")
            tl.atomic_max(only + 6, all_max(tl.where(some, x1, 0)).to(tl.int64), sem="relaxed")
        else:
            tl.atomic_min(row + 3, y0.to(tl.int64), mask=some, sem="relaxed")
            tl.atomic_min(row + 4, x0.to(tl.int64), mask=some, sem="relaxed")
            tl.atomic_max(row + 5, y1.to(tl.int64), mask=some, sem="relaxed")
            tl.atomic_max(row + 6, x1.to(tl.int64), mask=some, sem="relaxed")


def launch(mask: Tensor, sizes: Tensor | None, capacity: int) -> tuple[Tensor, Tensor, Tensor]:
    """Run the kernels; must equal ``hmg_gpu.plain.components.connected_components``. Arguments as :func:`components`.

    Workspace: a byte a pixel, and 6 bytes a pixel (8 beyond 1 625 x 1 625) for as many images at a time as a GiB holds.
    """
    images, height, width = mask.shape
    device = mask.device
    labels = torch.zeros(mask.shape, dtype=torch.int32, device=device)  # [B, H, W]
    # Zeros, as callers see every row; the kernels begin those of components alone.
    table = torch.zeros((images, capacity, len(COLUMNS)), dtype=torch.int64, device=device)
    counts = torch.zeros(images, dtype=torch.int32, device=device)  # [B]
    if not mask.numel():
        return labels, counts, table
    bits = mask.contiguous().view(torch.uint8)
    plane = torch.empty(mask.shape, dtype=torch.uint8, device=device)  # [B, H, W]
    limits = counts if sizes is None else sizes.contiguous()  # any tensor serves where none is read
    packed, (bits, words) = stream.as_words(bits, plane)
    chunk = stream.chunk_options(width, packed, by_pixel=not packed)
    chunks_n = stream.chunk_count(height, width, chunk)
    group = tiles.group_size(images, height, width, extra=2)
    space = tiles.make_space(group, height, width, device, first=True, roots=True)
    ranks = space.roots  # a number a block either way
    counters = tiles.make_counters(blocks.ceil_div(images, group), 0, device)
    flags = {"HAS_INITIAL": False, "HAS_SIZES": sizes is not None, "LOGITS": False, "SOFT": False, "JUDGE": False}
    with torch.cuda.device_of(mask):
        for number, start in enumerate(range(0, images, group)):
            count, listed_n = min(group, images - start), counters[number]
            stream_kernel[(count * chunks_n,)](
                bits, bits, words, limits, space.listed, listed_n, listed_n, start, height, width,
                0.0, 0.0, 0.0, 0.0, 0.0, **flags, **chunk,
            )  # fmt: skip
            grid, tile = tiles.label_tiles(plane, None, None, space, listed_n, start, count, first=True)
            rank_kernel[(count,)](
                plane, space.parents, space.first, ranks, counts, table, start, height, width, capacity,
                COLUMNS=len(COLUMNS), CHUNK=CHUNK, **blocks.launch_options(NUM_WARPS),
            )  # fmt: skip
            moments_kernel[grid](
                plane, space.listed, listed_n, space.parents, space.areas, space.sums, ranks, labels, table,
                start, height, width, capacity, COLUMNS=len(COLUMNS), **tile,
            )  # fmt: skip
    return labels, counts, table


def components_without_triton(mask: Tensor, sizes: Tensor | None, capacity: int) -> tuple[Tensor, Tensor, Tensor]:
    """The op on CPU tensors where Triton does not interpret: SciPy, one image at a time."""
    from scipy import ndimage

    labels = torch.zeros(mask.shape, dtype=torch.int32)
    table = torch.zeros((mask.shape[0], capacity, len(COLUMNS)), dtype=torch.int64)
    counts = torch.zeros(mask.shape[0], dtype=torch.int32)
    for b in range(mask.shape[0]):
        rows, columns = mask.shape[1:] if sizes is None else sizes[b].tolist()
        numbered, count = ndimage.label(mask[b, :rows, :columns].numpy(), [[1, 1, 1]] * 3)
        labels[b, :rows, :columns] = torch.from_numpy(numbered)
        counts[b] = count
        for k, (span_y, span_x) in enumerate(ndimage.find_objects(numbered)[:capacity]):
            y, x = (numbered[span_y, span_x] == k + 1).nonzero()
            moments = (len(y), y.sum() + len(y) * span_y.start, x.sum() + len(x) * span_x.start)
            table[b, k] = torch.tensor((*moments, span_y.start, span_x.start, span_y.stop, span_x.stop))
    return labels, counts, table


@torch.library.custom_op("hmg_gpu::components", mutates_args=(), device_types="cuda")
def _components(mask: Tensor, sizes: Tensor | None, capacity: int) -> tuple[Tensor, Tensor, Tensor]:
    return launch(mask, sizes, capacity)


@_components.register_kernel("cpu")
def _(mask, sizes, capacity):
    return (launch if blocks.INTERPRETED else components_without_triton)(mask, sizes, capacity)


@_components.register_fake
def _(mask, sizes, capacity):
    return (
        mask.new_empty(mask.shape, dtype=torch.int32),
        mask.new_empty(mask.shape[0], dtype=torch.int32),
        mask.new_empty((mask.shape[0], capacity, len(COLUMNS)), dtype=torch.int64),
    )


@torch.no_grad()
def components(
    mask: Tensor, *, sizes: Tensor | None = None, capacity: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Label 8-connected components and sum their moments, with shapes known beforehand. No gradient.

    Args:
        mask: bool [B, H, W].
        sizes: int64 [B, 2], rows (height, width) of the valid area; foreground beyond it is ignored.
        capacity: rows of the table for each image; None: as many as there can be, one for every 2 x 2 block
            (14 bytes a pixel). Components past it keep their label but have no row.

    Returns:
        labels int32 [B, H, W]: 0 background, 1, 2, ... in raster order of the components' first pixels;
        counts int32 [B]: components of each image;
        table int64 [B, capacity, 7]: columns :data:`COLUMNS` (area, sum_y, sum_x and the box y0, x0, y1, x1, half
        open, in pixels), row k for label k + 1, zeros where there is none.

    Raises:
        TypeError, ValueError: dtypes, shapes or devices that do not belong together.

    Example:
        >>> import torch
        >>> from hmg_gpu.kernels.components import components
        >>> labels, counts, table = components(torch.tensor([[[1, 0, 0, 1], [0, 1, 0, 0]]]).bool())
        >>> labels[0].tolist(), counts.tolist()
        ([[1, 0, 0, 2], [0, 1, 0, 0]], [2])
        >>> table[0, 0].tolist()  # area, sum_y, sum_x, y0, x0, y1, x1 of component 1
        [2, 1, 1, 0, 0, 2, 2]
    """
    blocks.check_plane("mask", mask, (torch.bool,))
    blocks.check_sizes(sizes, mask.shape[0], mask.device)
    most = blocks.block_count(*mask.shape[1:])
    if capacity is not None and capacity < 1:
        raise ValueError(f"capacity: expected at least 1, got {capacity}")
    run = launch if blocks.may_launch(mask, sizes) else _components
    return run(mask, sizes, most if capacity is None else capacity)
