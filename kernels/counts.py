"""What IoU, Pd and Fa are made of, on the device; equals :func:`hmg_gpu.evaluation.metrics.detection_counts`.

Prediction and target are read once, together, and nothing is written where both are empty: about 2 bytes a pixel. The
components of both are then labelled as two planes of one image. No component gets a number: the roots of a plane
stand in a list, in any order, and the matching takes them by their first pixels.

Launches, in order; the union-find, and why its races do no harm, is in blocks.py:

    pair_kernel    reads both masks      adds to the pixel counts of the image; lists the tiles with foreground
    link_kernel, border_kernel, sum_kernel   areas, sums and first pixels at the roots, and the lists of the roots
    match_kernel   reads all of these    writes the counts

Why races do no harm: pixel counts are whole numbers, added by atomics, that nobody reads before the last launch. There,
one program has an image, and barriers stand between its steps.
"""

from __future__ import annotations

import struct

import torch
import triton
import triton.language as tl
from torch import Tensor

from hmg_gpu.kernels import blocks, stream, tiles
from hmg_gpu.kernels.blocks import valid_size
from hmg_gpu.kernels.stream import (
    any_set,
    as_bits,
    chunk_place,
    chunk_words,
    count_set,
    list_tiles,
    load_words,
    row_length,
    within,
)
from hmg_gpu.plain.matching import counts_on_host

MATCH_LANES = 256  # components that the matching looks at together
NONE = tl.constexpr(2**63 - 1)  # the key of no component


@triton.jit(do_not_specialize=["start", "height", "width"])
def pair_kernel(
    prediction, target, sizes, listed, listed_n, totals, start, height, width,
    HAS_SIZES: tl.constexpr, PACKED: tl.constexpr,
    CHUNK_H: tl.constexpr, CHUNK_W: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr,
):  # fmt: skip
    """Count predicted, true and shared pixels, and list the tiles of both masks: of the target as the odd planes."""
    width = row_length(width, PACKED)
    slot, top, left = chunk_place(height, width, CHUNK_H, CHUNK_W)
    image = (start + slot).to(tl.int64)
    base = image * height * width
    y, w = chunk_words(top, left, CHUNK_H, CHUNK_W)
    found = load_words(prediction, base, y, w, height, width, PACKED)
    truth = load_words(target, base, y, w, height, width, PACKED)
    if any_set(found | truth):
        found, truth = as_bits(found), as_bits(truth)
        if HAS_SIZES:
            rows, columns = valid_size(sizes, image, height, width, True)
            found, truth = within(found, y, w, rows, columns), within(truth, y, w, rows, columns)
        totals += 3 * image
        tl.atomic_add(totals, count_set(found), sem="relaxed")
        tl.atomic_add(totals + 1, count_set(truth), sem="relaxed")
        tl.atomic_add(totals + 2, count_set(found & truth), sem="relaxed")
        list_tiles(found, listed, listed_n, 2 * slot, top, left, height, width, CHUNK_H, CHUNK_W, TILE_H, TILE_W)
        list_tiles(truth, listed, listed_n, 2 * slot + 1, top, left, height, width, CHUNK_H, CHUNK_W, TILE_H, TILE_W)


@triton.jit(do_not_specialize=["start", "height", "width", "distance_bits"])
def match_kernel(
    roots, roots_n, areas, sums, first, totals, sizes, out, start, height, width, distance_bits,
    HAS_SIZES: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """One program an image: greedy matching in raster order, and the image's row of counts.

    The key of a component is its first pixel and, below, its root: keys ascend in raster order. A predicted component
    that is taken gets its area negated. Distances of centroids are multiplied by both areas, in whole numbers, and
    compared as float64 squares.
    """
    slot = tl.program_id(0).to(tl.int64)
    image = start + slot
    blocks_n = ((height + 1) // 2) * ((width + 1) // 2)
    distance = distance_bits.to(tl.int64).to(tl.float64, bitcast=True)  # a double, as in the plain path
    # Workspace of the prediction; that of the target follows.
    roots += 2 * slot * blocks_n
    first += 2 * slot * blocks_n
    areas += 2 * slot * blocks_n
    sums += 4 * slot * blocks_n
    n, targets = tl.load(roots_n + 2 * slot), tl.load(roots_n + 2 * slot + 1)
    matched = 0
    last = tl.full((), -1, tl.int64)
    # What a target takes is lost for the next, so targets go one after another; candidates are looked at side by side.
    for _ in range(targets):
        key = tl.full((), NONE, tl.int64)
        for begin in range(0, targets, LANES):
            lane = begin + tl.arange(0, LANES)
            root = tl.load(roots + blocks_n + lane, mask=lane < targets, other=0)
            pixel = tl.load(first + blocks_n + root, mask=lane < targets, other=0).to(tl.int64)
            keys = (pixel << 32) | root
            key = tl.minimum(key, tl.min(tl.where((lane < targets) & (keys > last), keys, NONE), axis=0))
        last = key
        true_root = (key & 0xFFFFFFFF).to(tl.int32)
        area = tl.load(areas + blocks_n + true_root).to(tl.int64)
        sum_y = tl.load(sums + 2 * blocks_n + true_root).to(tl.int64)
        sum_x = tl.load(sums + 3 * blocks_n + true_root).to(tl.int64)
        chosen = tl.full((), NONE, tl.int64)
        for begin in range(0, n, LANES):
            lane = begin + tl.arange(0, LANES)
            root = tl.load(roots + lane, mask=lane < n, other=0)
            own = tl.load(areas + root, mask=lane < n, other=0).to(tl.int64)
            free = (lane < n) & (own > 0)
            dy = (tl.load(sums + root, mask=free, other=0).to(tl.int64) * area - sum_y * own).to(tl.float64)
            dx = (tl.load(sums + blocks_n + root, mask=free, other=0).to(tl.int64) * area - sum_x * own).to(tl.float64)
            reach = distance * (own * area).to(tl.float64)
            close = free & (dy * dy + dx * dx < reach * reach)
            keys = (tl.load(first + root, mask=close, other=0).to(tl.int64) << 32) | root
            chosen = tl.minimum(chosen, tl.min(tl.where(close, keys, NONE), axis=0))
        if chosen != NONE:
            taken = areas + (chosen & 0xFFFFFFFF).to(tl.int32)
            tl.store(taken, -tl.load(taken))
            matched += 1
        tl.debug_barrier()  # the next target must see what is taken
    lost = tl.zeros((LANES,), tl.int64)
    for begin in range(0, n, LANES):
        lane = begin + tl.arange(0, LANES)
        root = tl.load(roots + lane, mask=lane < n, other=0)
        lost += tl.maximum(tl.load(areas + root, mask=lane < n, other=0), 0).to(tl.int64)
    rows, columns = height.to(tl.int64), width.to(tl.int64)
    if HAS_SIZES:
        rows, columns = tl.load(sizes + 2 * image), tl.load(sizes + 2 * image + 1)
    found = tl.load(totals + 3 * image).to(tl.int64)
    truth = tl.load(totals + 3 * image + 1).to(tl.int64)
    both = tl.load(totals + 3 * image + 2).to(tl.int64)
    out += 7 * image
    tl.store(out, both)
    tl.store(out + 1, found + truth - both)
    tl.store(out + 2, matched.to(tl.int64))
    tl.store(out + 3, targets.to(tl.int64))
    tl.store(out + 4, tl.sum(lost, axis=0))
    tl.store(out + 5, found - both)
    tl.store(out + 6, rows * columns)


def launch(prediction: Tensor, target: Tensor, sizes: Tensor | None, distance: float) -> Tensor:
    """:func:`detection_counts` by the kernels.

    Workspace: 12 bytes a pixel (16 beyond 1 625 x 1 625), for as many images at a time as a GiB holds.
    """
    images, height, width = prediction.shape
    device = prediction.device
    counts = torch.empty((images, 7), dtype=torch.int64, device=device)
    if not prediction.numel():
        return counts.zero_()
    found, truth = (mask.contiguous().view(torch.uint8) for mask in (prediction, target))
    packed, words = stream.as_words(found, truth)
    chunk = stream.chunk_options(width, packed, by_pixel=not packed)
    chunks_n = stream.chunk_count(height, width, chunk)
    group = tiles.group_size(images, height, width, planes=2, extra=2)
    space = tiles.make_space(2 * group, height, width, device, first=True, roots=True)
    counters = tiles.make_counters(blocks.ceil_div(images, group), 2 * group, device)
    totals = torch.zeros((images, 3), dtype=torch.int32, device=device)
    sizes = None if sizes is None else sizes.contiguous()
    limits, flags = counters if sizes is None else sizes, {"HAS_SIZES": sizes is not None}
    # Triton passes Python floats as float32; the bits keep the distance a double.
    (distance_bits,) = struct.unpack("<q", struct.pack("<d", distance))
    with torch.cuda.device_of(prediction):
        for number, start in enumerate(range(0, images, group)):
            count, counted = min(group, images - start), counters[number]
            pair_kernel[(count * chunks_n,)](
                *words, limits, space.listed, counted, totals, start, height, width, **flags, **chunk
            )
            tiles.label_tiles(found, truth, sizes, space, counted, start, count, first=True, roots=True)
            match_kernel[(count,)](
                space.roots, counted[4:], space.areas, space.sums, space.first, totals, limits, counts,
                start, height, width, distance_bits,
                LANES=MATCH_LANES, enable_fp_fusion=False, **flags, **blocks.launch_options(4),
            )  # fmt: skip
    return counts


@torch.library.custom_op("hmg_gpu::detection_counts", mutates_args=(), device_types="cuda")
def _detection_counts(prediction: Tensor, target: Tensor, sizes: Tensor | None, distance: float) -> Tensor:
    return launch(prediction, target, sizes, distance)


@_detection_counts.register_kernel("cpu")
def _(prediction, target, sizes, distance):
    return (launch if blocks.INTERPRETED else counts_on_host)(prediction, target, sizes, distance)


@_detection_counts.register_fake
def _(prediction, target, sizes, distance):
    return prediction.new_empty((prediction.shape[0], 7), dtype=torch.int64)


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
        >>> from hmg_gpu.kernels.counts import detection_counts
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
    run = launch if blocks.may_launch(prediction, target, sizes) else _detection_counts
    return run(prediction, target, sizes, float(distance))
