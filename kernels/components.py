"""Connected components with moments, and the matching behind Pd and Fa, on the device (8-connected).

:func:`components` numbers components by their first pixel in raster order, as SciPy does, and sums their moments
into a table of fixed capacity; :func:`detection_counts` equals
:func:`hmg_gpu.evaluation.metrics.detection_counts`. Both have shapes that depend on the arguments' shapes alone
and a constant number of launches.

Phases, one launch each; the union-find, and why its races do no harm, is in blocks.py:

    scan_kernel         reads mask, sizes            writes plane, filled (tiles with foreground), each block's first
                                                     pixel, parents inside the tile
    link_border_kernel  reads plane                  unions across the tiles' borders
    first_kernel        reads parents                writes each block's root as its parent, the component's first
                                                     pixel at the root
    rank_kernel         reads plane, parents, first  writes ranks at the roots, counts, the neutral start of table rows
    moments_kernel      reads parents, ranks         adds into the table rows, writes labels
    match_kernel        reads two tables             writes matched, targets, false-alarm pixels (detection_counts)

Numbers need a pass of their own: which root comes first is known only when every root has its first pixel, that
is at a launch boundary. One program counts through an image, since a counter that all programs raise would number
components in the order of their arrival.

Why races do no harm: the atomics are sums, minima and maxima of whole numbers, which give the same bits in any
order, and nobody reads them before the next launch (but see first_kernel). Every other store is by the one program,
or the one lane, that owns the place.
"""

from __future__ import annotations

import struct

import torch
import triton
import triton.language as tl
from torch import Tensor

from hmg_gpu.kernels import blocks
from hmg_gpu.kernels.blocks import (
    NUM_WARPS,
    TILE_H,
    TILE_W,
    all_max,
    all_min,
    all_sum,
    block_lanes,
    block_pixels,
    find,
    link_border_kernel,
    link_tile,
    scan_tile,
    valid_size,
)
from hmg_gpu.plain.matching import counts_on_host

CHUNK = 4096  # pixels that the ranking looks at together
MATCH_LANES = 256  # predicted components that the matching looks at together
COLUMNS = ("area", "sum_y", "sum_x", "y0", "x0", "y1", "x1")  # of the table; the box is half open
FAR = tl.constexpr(2147483647)  # beyond every pixel, block, rank and coordinate: the neutral element of minima


@triton.jit(do_not_specialize=["height"])
def scan_kernel(
    mask, plane, sizes, parents, first, filled, height, width,
    HAS_SIZES: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr,
):  # fmt: skip
    """Foreground inside the valid area as bit 1 of the plane; blocks of a tile linked; each block's first pixel."""
    blocks_x = (width + 1) // 2
    blocks_n = ((height + 1) // 2) * blocks_x
    tiles_x = tl.cdiv(width, TILE_W)
    tiles_n = tl.cdiv(height, TILE_H) * tiles_x
    image = (tl.program_id(0) // tiles_n).to(tl.int64)
    tile = tl.program_id(0) % tiles_n
    base = image * height * width
    rows, columns = valid_size(sizes, image, height, width, HAS_SIZES)
    is_filled = scan_tile(
        mask + base, mask, plane + base, tile, rows, columns, height, width, 0.0, 0.0, 0.0, False, False, False,
        TILE_H, TILE_W,
    )  # fmt: skip
    tl.store(filled + tl.program_id(0), is_filled)
    if is_filled > 0:
        tl.debug_barrier()  # blocks are laid out over the lanes otherwise than the pixels that were just written
        by, bx = block_lanes(tile, tiles_x, TILE_H, TILE_W)
        p00, p01, p10, p11 = block_pixels(plane + base, by, bx, height, width)
        some = p00 | p01 | p10 | p11
        corner = 2 * by * width + 2 * bx
        pixel = tl.where(p00, corner, tl.where(p01, corner + 1, tl.where(p10, corner + width, corner + width + 1)))
        tl.store(first + image * blocks_n + by * blocks_x + bx, pixel, mask=some)
        link_tile(plane + base, parents + image * blocks_n, by, bx, p00, p01, p10, some, height, width, TILE_H, TILE_W)


@triton.jit(do_not_specialize=["height"])
def first_kernel(plane, parents, first, filled, height, width, TILE_H: tl.constexpr, TILE_W: tl.constexpr):
    """Leave each block's parent at its root and the component's first pixel at the root."""
    blocks_x = (width + 1) // 2
    blocks_n = ((height + 1) // 2) * blocks_x
    tiles_n = tl.cdiv(height, TILE_H) * tl.cdiv(width, TILE_W)
    image = (tl.program_id(0) // tiles_n).to(tl.int64)
    if tl.load(filled + tl.program_id(0)) > 0:
        parents += image * blocks_n
        first += image * blocks_n
        by, bx = block_lanes(tl.program_id(0) % tiles_n, tl.cdiv(width, TILE_W), TILE_H, TILE_W)
        p00, p01, p10, p11 = block_pixels(plane + image * height * width, by, bx, height, width)
        some = p00 | p01 | p10 | p11
        block = by * blocks_x + bx
        root = find(parents, block, some)
        tl.store(parents + block, root, mask=some)
        # The pixel may be read while another program lowers it, if this block is the root of its component.
        # Only roots are lowered by others, and a lowered value still is a pixel of the same component.
        pixel = tl.load(first + block, mask=some, other=0)
        lowest = all_min(tl.where(some, root, FAR))
        if lowest == all_max(tl.where(some, root, -1)):  # one component in the tile: one atomic, not one a block
            tl.atomic_min(first + lowest, all_min(tl.where(some, pixel, FAR)), sem="relaxed")
        else:
            tl.atomic_min(first + root, pixel, mask=some, sem="relaxed")


@triton.jit(do_not_specialize=["height", "capacity"])
def rank_kernel(
    plane, parents, first, ranks, counts, table, height, width, capacity, COLUMNS: tl.constexpr, CHUNK: tl.constexpr
):
    """One program an image: number the roots by their first pixel in raster order and begin their table rows."""
    blocks_x = (width + 1) // 2
    image = tl.program_id(0).to(tl.int64)
    plane += image * height * width
    blocks_n = ((height + 1) // 2) * blocks_x
    parents += image * blocks_n
    first += image * blocks_n
    ranks += image * blocks_n
    table += image * capacity * COLUMNS
    count = 0
    # width >= 1, so height * width < 2**31 leaves no room for overflow but in masked lanes of the last chunk.
    for start in range(0, height * width, CHUNK):
        at = start + tl.arange(0, CHUNK)
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
            # Begun here and not by clearing the table: with room for every component it is larger than the masks.
            zero = tl.zeros((CHUNK,), tl.int64)
            tl.store(row, zero, mask=listed)
            tl.store(row + 1, zero, mask=listed)
            tl.store(row + 2, zero, mask=listed)
            if COLUMNS == 7:
                tl.store(row + 3, zero + FAR, mask=listed)
                tl.store(row + 4, zero + FAR, mask=listed)
                tl.store(row + 5, zero, mask=listed)
                tl.store(row + 6, zero, mask=listed)
            count += tl.sum(begins.to(tl.int32), axis=0)
    tl.store(counts + image, count)


@triton.jit(do_not_specialize=["height", "capacity"])
def moments_kernel(
    plane, parents, ranks, filled, labels, table, height, width, capacity,
    LABELS: tl.constexpr, COLUMNS: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr,
):  # fmt: skip
    """Labels of every pixel, and area, sums and box of every component within the table's capacity."""
    blocks_x = (width + 1) // 2
    blocks_n = ((height + 1) // 2) * blocks_x
    tiles_x = tl.cdiv(width, TILE_W)
    tiles_n = tl.cdiv(height, TILE_H) * tiles_x
    image = (tl.program_id(0) // tiles_n).to(tl.int64)
    tile = tl.program_id(0) % tiles_n
    plane += image * height * width
    parents += image * blocks_n
    ranks += image * blocks_n
    table += image * capacity * COLUMNS
    some_here = tl.load(filled + tl.program_id(0)) > 0
    if LABELS:
        y = (tile // tiles_x) * TILE_H + tl.arange(0, TILE_H)[:, None]
        x = (tile % tiles_x) * TILE_W + tl.arange(0, TILE_W)[None, :]
        inside = (y < height) & (x < width)
        at = y * width + x
        label = tl.zeros((TILE_H, TILE_W), tl.int32)
        if some_here:
            is_set = (tl.load(plane + at, mask=inside, other=0) & 2) != 0
            root = tl.load(parents + (y // 2) * blocks_x + x // 2, mask=is_set, other=0)
            label = tl.load(ranks + root, mask=is_set, other=-1) + 1
        tl.store(labels + image * height * width + at, label, mask=inside)
    if some_here:
        by, bx = block_lanes(tile, tiles_x, TILE_H, TILE_W)
        p00, p01, p10, p11 = block_pixels(plane, by, bx, height, width)
        some = p00 | p01 | p10 | p11
        root = tl.load(parents + by * blocks_x + bx, mask=some, other=0)
        rank = tl.load(ranks + root, mask=some, other=0)
        some = some & (rank < capacity)
        # int64: sums of coordinates pass 2**31 in a component of a few million pixels.
        bottom = p10.to(tl.int64) + p11.to(tl.int64)
        right = p01.to(tl.int64) + p11.to(tl.int64)
        area = tl.where(some, bottom + p00.to(tl.int64) + p01.to(tl.int64), 0)
        sum_y = tl.where(some, 2 * by * area + bottom, 0)
        sum_x = tl.where(some, 2 * bx * area + right, 0)
        y0 = tl.where(p00 | p01, 2 * by, 2 * by + 1)
        x0 = tl.where(p00 | p10, 2 * bx, 2 * bx + 1)
        y1 = tl.where(p10 | p11, 2 * by + 2, 2 * by + 1)
        x1 = tl.where(p01 | p11, 2 * bx + 2, 2 * bx + 1)
        lowest = all_min(tl.where(some, rank, FAR))
        if lowest == all_max(tl.where(some, rank, -1)):  # one component in the tile
            row = table + lowest.to(tl.int64) * COLUMNS
            tl.atomic_add(row, all_sum(area), sem="relaxed")
            tl.atomic_add(row + 1, all_sum(sum_y), sem="relaxed")
            tl.atomic_add(row + 2, all_sum(sum_x), sem="relaxed")
            if COLUMNS == 7:
                tl.atomic_min(row + 3, all_min(tl.where(some, y0, FAR)).to(tl.int64), sem="relaxed")
                tl.atomic_min(row + 4, all_min(tl.where(some, x0, FAR)).to(tl.int64), sem="relaxed")
                tl.atomic_max(row + 5, all_max(tl.where(some, y1, 0)).to(tl.int64), sem="relaxed")
                tl.atomic_max(row + 6, all_max(tl.where(some, x1, 0)).to(tl.int64), sem="relaxed")
        else:
            rows = table + rank.to(tl.int64) * COLUMNS
            tl.atomic_add(rows, area, mask=some, sem="relaxed")
            tl.atomic_add(rows + 1, sum_y, mask=some, sem="relaxed")
            tl.atomic_add(rows + 2, sum_x, mask=some, sem="relaxed")
            if COLUMNS == 7:
                tl.atomic_min(rows + 3, y0.to(tl.int64), mask=some, sem="relaxed")
                tl.atomic_min(rows + 4, x0.to(tl.int64), mask=some, sem="relaxed")
                tl.atomic_max(rows + 5, y1.to(tl.int64), mask=some, sem="relaxed")
                tl.atomic_max(rows + 6, x1.to(tl.int64), mask=some, sem="relaxed")


@triton.jit(do_not_specialize=["capacity", "distance_bits"])
def match_kernel(found, found_n, truth, truth_n, out, capacity, distance_bits, LANES: tl.constexpr):
    """One program an image: greedy matching in raster order; matched, targets and false-alarm pixels.

    Tables have rows (area, sum_y, sum_x). A predicted component that is taken gets its area negated. Distances of
    centroids are multiplied by both areas, in whole numbers, and compared as float64 squares.
    """
    image = tl.program_id(0).to(tl.int64)
    distance = distance_bits.to(tl.int64).to(tl.float64, bitcast=True)  # a double, as in the plain path
    found += image * capacity * 3
    truth += image * capacity * 3
    n, targets = tl.load(found_n + image), tl.load(truth_n + image)
    matched = 0
    row = truth
    # What a target takes is lost for the next, so targets go one after another; candidates are looked at side by side.
    for _ in range(targets):
        area, sum_y, sum_x = tl.load(row), tl.load(row + 1), tl.load(row + 2)
        start = 0
        while start < n:
            candidate = start + tl.arange(0, LANES)
            rows = found + candidate.to(tl.int64) * 3
            areas = tl.load(rows, mask=candidate < n, other=0)
            free = areas > 0
            dy = (tl.load(rows + 1, mask=free, other=0) * area - sum_y * areas).to(tl.float64)
            dx = (tl.load(rows + 2, mask=free, other=0) * area - sum_x * areas).to(tl.float64)
            reach = distance * (areas * area).to(tl.float64)
            close = free & (dy * dy + dx * dx < reach * reach)
            chosen = tl.min(tl.where(close, candidate, n), axis=0)
            tl.store(rows, -areas, mask=close & (candidate == chosen))
            matched += tl.where(chosen < n, 1, 0)
            start = tl.where(chosen < n, n, start + LANES)  # Triton has no break
        row += 3
        tl.debug_barrier()  # the next target must see what is taken
    lost = tl.zeros((LANES,), tl.int64)
    for start in range(0, n, LANES):
        candidate = start + tl.arange(0, LANES)
        areas = tl.load(found + candidate.to(tl.int64) * 3, mask=candidate < n, other=0)
        lost += tl.maximum(areas, 0)
    tl.store(out + 3 * image, matched.to(tl.int64))
    tl.store(out + 3 * image + 1, targets.to(tl.int64))
    tl.store(out + 3 * image + 2, tl.sum(lost, axis=0))


def launch(
    mask: Tensor, sizes: Tensor | None, capacity: int, labels: Tensor | None, table: Tensor, counts: Tensor
) -> None:
    """Run the five kernels; must equal ``hmg_gpu.plain.components.connected_components``.

    Args:
        mask: bool [B, H, W]. sizes: int64 [B, 2] or None. capacity: rows of the table an image.
        labels: int32 [B, H, W], written whole; None: not wanted.
        table: int64 [B, capacity, 7] or [B, capacity, 3]: the first columns of :data:`COLUMNS`; rows of existing
            components are written, others left alone.
        counts: int32 [B], written.

    Workspace: 12 bytes a block of 2 x 2 pixels and 1 byte a pixel, 4 bytes a pixel in all, and tile flags.
    """
    images, height, width = mask.shape
    device = mask.device
    bits = mask.contiguous().view(torch.uint8)
    plane = torch.empty(mask.shape, dtype=torch.uint8, device=device)  # [B, H, W]
    space = (images * blocks.block_count(height, width),)
    parents, first, ranks = (torch.empty(space, dtype=torch.int32, device=device) for _ in range(3))
    grid = (images * blocks.tile_count(height, width),)
    filled = torch.empty(grid, dtype=torch.int32, device=device)
    limits = counts if sizes is None else sizes.contiguous()  # any tensor serves where none is read
    tile = {"TILE_H": TILE_H, "TILE_W": TILE_W, **blocks.launch_options(NUM_WARPS)}
    columns = table.shape[2]
    with torch.cuda.device_of(mask):
        scan_kernel[grid](
            bits, plane, limits, parents, first, filled, height, width, HAS_SIZES=sizes is not None, **tile
        )
        link_border_kernel[grid](plane, parents, filled, height, width, **tile)
        first_kernel[grid](plane, parents, first, filled, height, width, **tile)
        rank_kernel[(images,)](
            plane, parents, first, ranks, counts, table, height, width, capacity,
            COLUMNS=columns, CHUNK=CHUNK, **blocks.launch_options(NUM_WARPS),
        )  # fmt: skip
        moments_kernel[grid](
            plane, parents, ranks, filled, counts if labels is None else labels, table, height, width, capacity,
            LABELS=labels is not None, COLUMNS=columns, **tile,
        )  # fmt: skip


def launch_components(mask: Tensor, sizes: Tensor | None, capacity: int) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`components` by the kernels."""
    labels = torch.empty(mask.shape, dtype=torch.int32, device=mask.device)  # [B, H, W]
    # Zeros, as callers see every row; the kernels would begin those of components alone.
    table = torch.zeros((mask.shape[0], capacity, len(COLUMNS)), dtype=torch.int64, device=mask.device)
    counts = torch.empty(mask.shape[0], dtype=torch.int32, device=mask.device)  # [B]
    if mask.numel():
        launch(mask, sizes, capacity, labels, table, counts)
    return labels, counts.zero_() if not mask.numel() else counts, table


def launch_counts(prediction: Tensor, target: Tensor, sizes: Tensor | None, distance: float) -> Tensor:
    """:func:`detection_counts` by the kernels."""
    images, height, width = prediction.shape
    device = prediction.device
    capacity = blocks.block_count(height, width)  # more components than blocks cannot be
    tables, counts = [], []
    for mask in (prediction, target):
        tables.append(torch.empty((images, capacity, 3), dtype=torch.int64, device=device))
        counts.append(torch.empty(images, dtype=torch.int32, device=device))
        launch(mask, sizes, capacity, None, tables[-1], counts[-1])
    matching = torch.empty((images, 3), dtype=torch.int64, device=device)
    # Triton passes Python floats as float32; the bits keep the distance a double.
    (distance_bits,) = struct.unpack("<q", struct.pack("<d", distance))
    with torch.cuda.device_of(prediction):
        match_kernel[(images,)](
            tables[0], counts[0], tables[1], counts[1], matching, capacity, distance_bits,
            LANES=MATCH_LANES, enable_fp_fusion=False, **blocks.launch_options(4),
        )  # fmt: skip
    return _with_pixel_counts(prediction, target, sizes, matching)


def _with_pixel_counts(prediction: Tensor, target: Tensor, sizes: Tensor | None, matching: Tensor) -> Tensor:
    images, height, width = prediction.shape
    pixels = torch.full((images,), height * width, dtype=torch.int64, device=prediction.device)
    if sizes is not None:
        rows = torch.arange(height, device=prediction.device)[None, :, None] < sizes[:, 0, None, None]
        columns = torch.arange(width, device=prediction.device)[None, None, :] < sizes[:, 1, None, None]
        prediction, target = prediction & rows & columns, target & rows & columns
        pixels = sizes[:, 0] * sizes[:, 1]
    both = (prediction & target).sum((1, 2))
    either = (prediction | target).sum((1, 2))
    wrong = (prediction & ~target).sum((1, 2))
    matched, targets, false_alarms = matching.unbind(1)
    return torch.stack((both, either, matched, targets, false_alarms, wrong, pixels), dim=1)


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


def counts_without_triton(prediction: Tensor, target: Tensor, sizes: Tensor | None, distance: float) -> Tensor:
    """The op on CPU tensors where Triton does not interpret: the library's own CPU path."""
    return counts_on_host(prediction, target, sizes, distance)


@torch.library.custom_op("hmg_gpu::components", mutates_args=(), device_types="cuda")
def _components(mask: Tensor, sizes: Tensor | None, capacity: int) -> tuple[Tensor, Tensor, Tensor]:
    return launch_components(mask, sizes, capacity)


@_components.register_kernel("cpu")
def _(mask, sizes, capacity):
    return (launch_components if blocks.INTERPRETED else components_without_triton)(mask, sizes, capacity)


@_components.register_fake
def _(mask, sizes, capacity):
    return (
        mask.new_empty(mask.shape, dtype=torch.int32),
        mask.new_empty(mask.shape[0], dtype=torch.int32),
        mask.new_empty((mask.shape[0], capacity, len(COLUMNS)), dtype=torch.int64),
    )


@torch.library.custom_op("hmg_gpu::detection_counts", mutates_args=(), device_types="cuda")
def _detection_counts(prediction: Tensor, target: Tensor, sizes: Tensor | None, distance: float) -> Tensor:
    return launch_counts(prediction, target, sizes, distance)


@_detection_counts.register_kernel("cpu")
def _(prediction, target, sizes, distance):
    return (launch_counts if blocks.INTERPRETED else counts_without_triton)(prediction, target, sizes, distance)


@_detection_counts.register_fake
def _(prediction, target, sizes, distance):
    return prediction.new_empty((prediction.shape[0], 7), dtype=torch.int64)


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
    return _components(mask, sizes, most if capacity is None else capacity)


@torch.no_grad()
def detection_counts(
    prediction: Tensor, target: Tensor, *, sizes: Tensor | None = None, distance: float = 3.0
) -> Tensor:
    """What IoU, Pd and Fa are made of, image by image; equals :func:`hmg_gpu.evaluation.metrics.detection_counts`.

    For each ground-truth component in raster order, the first predicted component still free whose centroid lies
    strictly closer than ``distance`` matches and is taken (LESPS). Nothing here is differentiable.

    Args:
        prediction, target: bool [B, H, W].
        sizes: int64 [B, 2], rows (height, width) of the valid area; what lies beyond it counts nowhere.
        distance: in pixels (L2).

    Returns:
        int64 [B, 7]: intersection, union, matched, targets, false-alarm pixels (of unmatched predicted components),
        predicted pixels outside the target, valid pixels.

    Raises:
        TypeError, ValueError: dtypes, shapes or devices that do not belong together.

    Example:
        >>> import torch
        >>> from hmg_gpu.kernels.components import detection_counts
        >>> prediction = torch.tensor([[[1, 1, 0, 0, 0, 0, 1]]]).bool()
        >>> target = torch.tensor([[[0, 1, 1, 0, 0, 0, 0]]]).bool()  # centroids 1 pixel apart: they match
        >>> detection_counts(prediction, target)[0].tolist()
        [1, 4, 1, 1, 1, 2, 7]
    """
    blocks.check_plane("prediction", prediction, (torch.bool,))
    blocks.check_plane("target", target, (torch.bool,))
    if prediction.shape != target.shape or prediction.device != target.device:
        raise ValueError(
            f"prediction and target: expected one shape and device, got {list(prediction.shape)} on "
            f"{prediction.device} and {list(target.shape)} on {target.device}"
        )
    blocks.check_sizes(sizes, prediction.shape[0], prediction.device)
    return _detection_counts(prediction, target, sizes, float(distance))
