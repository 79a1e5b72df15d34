"""FAF + MDR in one pass over the prediction (HMG Sec. 3.2): label, sum, decide and unite on the device.

Equal to :func:`hmg_gpu.masks.update.update` (and, without ``initial``, to ``false_alarm_filter``), bit for bit;
with a weight and probabilities to ``soft_update``.

The prediction and the initial mask are streamed once. The output plane holds bit 0 = initial and
bit 1 = prediction until the decision is made, so later phases never read the prediction again, and they visit
only the tiles that hold foreground. Soft fusion decides bit 0 in that one pass too; bit 2 marks a prediction
inside a box, which FAF may not touch.

Launches, in order; their number follows from the shape alone. The union-find, and why its races do no harm, is in
blocks.py.

    stream_kernel    reads prediction, initial     writes out; lists the tiles with foreground, the others are final
    link_kernel      reads out inside each tile    writes parents inside the tile, areas and sums as 0
    border_kernel    reads out around each tile    unions across the tiles' borders
    sum_kernel       reads out, parents            writes each block's root as its parent, adds to the root's area, sums
    decide_kernel    reads parents, areas, sums, points   writes out as the final mask
    restore_kernel   reads which images the guard refused  writes their masks as they were (:func:`correct` alone)

Deciding needs a pass of its own: a component is judged by its whole area and centroid, which are complete only when
every tile that it touches has added its part. One lane of one tile at most writes a pixel of out, and decide, which
overwrites it, looks at no pixel of another tile.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hmg_gpu.common.tensors import valid_area
from hmg_gpu.kernels import blocks, stream, tiles
from hmg_gpu.kernels.blocks import block_lanes, block_pixels
from hmg_gpu.kernels.stream import (
    as_bits,
    chunk_place,
    chunk_words,
    load_words,
    row_length,
    store_words,
    stream_kernel,
)
from hmg_gpu.kernels.tiles import listed_tile
from hmg_gpu.plain.components import connected_components
from hmg_gpu.plain.update import fuse, near_a_point


@triton.jit
def write_pixel(out, y, x, width, keep, where, KEPT: tl.constexpr):
    # Bit 2 (soft fusion, inside a box): bit 0 is decided already and FAF's word does not count.
    at = out + y * width + x
    old = tl.load(at, mask=where, other=0)
    tl.store(at, (old & KEPT) | (keep & ((old & 4) == 0)).to(tl.uint8), mask=where)


@triton.jit(do_not_specialize=["start", "height", "width", "radius"])
def decide_kernel(
    out, points, offsets, sizes, listed, listed_n, parents, areas, sums, start, height, width, radius,
    HAS_SIZES: tl.constexpr, KEPT: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr,
):  # fmt: skip
    """Keep a component when |sum_y - A*y| + |sum_x - A*x| <= radius * A for a point inside its image."""
    blocks_n = ((height + 1) // 2) * ((width + 1) // 2)
    for i in range(tl.program_id(0), tl.load(listed_n), tl.num_programs(0)):
        plane, image, slot, tile, rows, columns = listed_tile(
            listed, i, out, out, sizes, start, height, width, HAS_SIZES, False, TILE_H, TILE_W
        )
        by, bx = block_lanes(tile, tl.cdiv(width, TILE_W), TILE_H, TILE_W)
        p00, p01, p10, p11 = block_pixels(plane, by, bx, height, width, width, 2)
        some = p00 | p01 | p10 | p11
        root = tl.load(parents + slot * blocks_n + by * ((width + 1) // 2) + bx, mask=some, other=0)
        # From the second-level cache: on AMD nothing else promises that this program sees what others have added.
        own_sums = sums + slot * 2 * blocks_n + root
        area = tl.load(areas + slot * blocks_n + root, mask=some, other=0, cache_modifier=".cg").to(tl.int64)
        sum_y = tl.load(own_sums, mask=some, other=0, cache_modifier=".cg").to(tl.int64)
        sum_x = tl.load(own_sums + blocks_n, mask=some, other=0, cache_modifier=".cg").to(tl.int64)
        # int64 from here on: areas times coordinates, and areas times the radius, pass 2**31.
        reach = area * radius
        keep = some & ~some
        # A loop over the image's points, all blocks at once: an image has few, and each is the same for every lane.
        for row in range(tl.load(offsets + image), tl.load(offsets + image + 1)):
            y = tl.load(points + 3 * row + 1)
            x = tl.load(points + 3 * row + 2)
            known = (y >= 0) & (y < rows) & (x >= 0) & (x < columns)
            keep = keep | (known & (tl.abs(sum_y - area * y) + tl.abs(sum_x - area * x) <= reach))
        write_pixel(plane, 2 * by, 2 * bx, width, keep, p00, KEPT)
        write_pixel(plane, 2 * by, 2 * bx + 1, width, keep, p01, KEPT)
        write_pixel(plane, 2 * by + 1, 2 * bx, width, keep, p10, KEPT)
        write_pixel(plane, 2 * by + 1, 2 * bx + 1, width, keep, p11, KEPT)


@triton.jit(do_not_specialize=["height", "width"])
def restore_kernel(
    current, out, ignored, height, width,
    PACKED: tl.constexpr, CHUNK_H: tl.constexpr, CHUNK_W: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr,
):  # fmt: skip
    """Where an image's prediction is ignored, write its current mask."""
    width = row_length(width, PACKED)
    slot, top, left = chunk_place(height, width, CHUNK_H, CHUNK_W)
    image = slot.to(tl.int64)
    if tl.load(ignored + image) != 0:
        base = image * height * width
        y, w = chunk_words(top, left, CHUNK_H, CHUNK_W)
        words = load_words(current, base, y, w, height, width, PACKED)
        store_words(out, base, y, w, as_bits(words), height, width, PACKED)


def group_points(points: Tensor, images: int) -> tuple[Tensor, Tensor]:
    """Sort points by image and give each image's range of rows; no host synchronisation.

    Args:
        points: int64 [P, 3], rows (image, y, x) in any order.
        images: number of images B.

    Returns:
        points int64 [P, 3] ordered by image (stable), offsets int64 [B + 1]: rows offsets[b] to offsets[b + 1] are
        image b's. Build it once, with the labels.

    Example:
        >>> import torch
        >>> from hmg_gpu.kernels.update import group_points
        >>> points, offsets = group_points(torch.tensor([[1, 2, 2], [0, 4, 4], [1, 0, 0]]), images=3)
        >>> points.tolist(), offsets.tolist()  # image 1 has rows 1 and 2, image 2 has none
        ([[0, 4, 4], [1, 2, 2], [1, 0, 0]], [0, 1, 3, 3])
    """
    image, order = torch.sort(points[:, 0].contiguous(), stable=True)
    numbers = torch.arange(images + 1, device=points.device)
    return points[order].contiguous(), torch.searchsorted(image, numbers)


class Judged(NamedTuple):
    """What :func:`correct` wants to know about the values: whether they lie in low..high, and int32 [B, TOTALS]."""

    low: float
    high: float
    totals: Tensor


def launch(
    prediction: Tensor, initial: Tensor | None, points: Tensor, offsets: Tensor, sizes: Tensor | None,
    radius: int, threshold: float, weight: float | None = None, judged: Judged | None = None,
) -> Tensor:  # fmt: skip
    """Run the kernels; must equal ``hmg_gpu.masks.update.update``. Arguments as :func:`update`, already checked.

    With ``weight`` as :func:`soft_update`: ``prediction`` and ``initial`` are float32 probabilities. With ``judged`` as
    :func:`correct`: the result is uint8, with the prediction kept in bit 1.

    Workspace: 4 bytes a pixel up to images of 1 625 x 1 625, 6 beyond, for as many images at a time as a GiB holds;
    each group of images takes four launches and one.
    """
    images, height, width = prediction.shape
    device = prediction.device
    out = torch.empty(prediction.shape, dtype=torch.uint8, device=device)  # [B, H, W]
    if prediction.numel() == 0:
        return out if judged else out.view(torch.bool)
    logits, soft = prediction.dtype.is_floating_point, weight is not None
    if logits:  # compare as torch does: the threshold in the prediction's own precision
        threshold = float(torch.tensor(threshold, dtype=torch.float64).to(prediction.dtype))
    prediction = prediction.contiguous() if logits else prediction.contiguous().view(torch.uint8)
    # Where there is no initial mask, no sizes or nothing to judge any tensor serves: none is read.
    start = out if initial is None else initial.contiguous() if soft else initial.contiguous().view(torch.uint8)
    limits = offsets if sizes is None else sizes.contiguous()
    points, offsets = points.contiguous(), offsets.contiguous()

    packed, (values, first_bits, words) = stream.as_words(prediction, start, out)
    chunk = stream.chunk_options(width, packed, by_pixel=logits or not packed, judged=logits and judged is not None)
    chunks_n = stream.chunk_count(height, width, chunk)
    group = tiles.group_size(images, height, width)
    space = tiles.make_space(group, height, width, device)
    counters = tiles.make_counters(blocks.ceil_div(images, group), 0, device)
    flags = {"HAS_INITIAL": initial is not None, "HAS_SIZES": sizes is not None, "LOGITS": logits, "SOFT": soft}
    if soft:
        flags["enable_fp_fusion"] = False  # a fused multiply and add would round differently from the torch path
    parts = (weight, 1 - weight) if soft else (0.0, 0.0)
    low, high, totals = (judged.low, judged.high, judged.totals) if judged else (0.0, 0.0, counters)
    with torch.cuda.device_of(prediction):
        for number, first in enumerate(range(0, images, group)):
            count, listed_n = min(group, images - first), counters[number]
            stream_kernel[(count * chunks_n,)](
                values, first_bits, words, limits, space.listed, listed_n, totals,
                first, height, width, threshold, *parts, low, high, JUDGE=judged is not None, **flags, **chunk,
            )  # fmt: skip
            grid, tile = tiles.label_tiles(out, None, None, space, listed_n, first, count)
            decide_kernel[grid](
                out, points, offsets, limits, space.listed, listed_n, space.parents, space.areas, space.sums,
                first, height, width, radius, HAS_SIZES=sizes is not None, KEPT=3 if judged else 1, **tile,
            )  # fmt: skip
    return out if judged else out.view(torch.bool)


def without_triton(
    prediction: Tensor, initial: Tensor | None, points: Tensor, offsets: Tensor, sizes: Tensor | None,
    radius: int, threshold: float,
) -> Tensor:  # fmt: skip
    """The op on CPU tensors where Triton does not interpret: the library's own CPU path."""
    mask = prediction > threshold if prediction.dtype.is_floating_point else prediction
    components = connected_components(mask, sizes)
    filtered = components.mask(near_a_point(components, points, radius, sizes))
    return filtered if initial is None else initial | filtered


@torch.library.custom_op("hmg_gpu::update", mutates_args=(), device_types="cuda")
def _update(
    prediction: Tensor,
    initial: Tensor | None,
    points: Tensor,
    offsets: Tensor,
    sizes: Tensor | None,
    radius: int,
    threshold: float,
) -> Tensor:
    return launch(prediction, initial, points, offsets, sizes, radius, threshold)


@_update.register_kernel("cpu")
def _(prediction, initial, points, offsets, sizes, radius, threshold):
    run = launch if blocks.INTERPRETED else without_triton
    return run(prediction, initial, points, offsets, sizes, radius, threshold)


@_update.register_fake
def _(prediction, initial, points, offsets, sizes, radius, threshold):
    return torch.empty(prediction.shape, dtype=torch.bool, device=prediction.device)


def launch_correct(
    values: Tensor, initial: Tensor, current: Tensor, points: Tensor, offsets: Tensor, sizes: Tensor,
    radius: int, threshold: float, low: float, high: float, guard: float | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """:func:`correct` by the kernels."""
    totals = torch.zeros((len(values), stream.TOTALS), dtype=torch.int32, device=values.device)
    if values.dtype.is_floating_point:  # bounds in the values' own precision, as the threshold
        low, high = torch.tensor((low, high), dtype=torch.float64).to(values.dtype).tolist()
    judged = Judged(low, high, totals)
    planes = launch(values, initial, points, offsets, sizes, radius, threshold, judged=judged)
    ignored = too_much(totals, sizes, guard)
    if guard is not None and values.numel():
        height, width = values.shape[1:]
        packed, (before, after) = stream.as_words(current.contiguous().view(torch.uint8), planes)
        chunk = stream.chunk_options(width, packed, by_pixel=not packed)
        with torch.cuda.device_of(values):
            restore_kernel[(len(values) * stream.chunk_count(height, width, chunk),)](
                before, after, ignored, height, width, **chunk
            )
    return planes, totals, ignored


def too_much(totals: Tensor, sizes: Tensor, guard: float | None) -> Tensor:
    """bool [B]: the images of which more than a share is foreground."""
    foreground = totals[:, stream.FOREGROUND]
    return foreground < 0 if guard is None else foreground > guard * sizes.prod(1)


def correct_without_triton(
    values: Tensor, initial: Tensor, current: Tensor, points: Tensor, offsets: Tensor, sizes: Tensor,
    radius: int, threshold: float, low: float, high: float, guard: float | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The op on CPU tensors where Triton does not interpret."""
    valid = valid_area(sizes, values)
    prediction = valid & (values > threshold if values.is_floating_point() else values)
    columns = [values.new_zeros(len(values), dtype=torch.int64)] * 3
    if values.is_floating_point():
        outside = ((values < low) | (values > high)) & valid
        broken, positive = ~values.isfinite() & valid, (values > 0) & valid
        columns = [broken.sum((1, 2)), outside.flatten(1).any(1), positive.flatten(1).any(1)]
    totals = torch.stack([*(column.int() for column in columns), prediction.sum((1, 2)).int()], 1)
    ignored = too_much(totals, sizes, guard)
    hybrid = without_triton(prediction, initial, points, offsets, sizes, radius, 0.0)
    planes = hybrid.byte() + 2 * prediction.byte()
    return torch.where(ignored[:, None, None], current.byte(), planes), totals, ignored


@torch.library.custom_op("hmg_gpu::correct", mutates_args=(), device_types="cuda")
def _correct(
    values: Tensor,
    initial: Tensor,
    current: Tensor,
    points: Tensor,
    offsets: Tensor,
    sizes: Tensor,
    radius: int,
    threshold: float,
    low: float,
    high: float,
    guard: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    return launch_correct(values, initial, current, points, offsets, sizes, radius, threshold, low, high, guard)


@_correct.register_kernel("cpu")
def _(values, initial, current, points, offsets, sizes, radius, threshold, low, high, guard):
    run = launch_correct if blocks.INTERPRETED else correct_without_triton
    return run(values, initial, current, points, offsets, sizes, radius, threshold, low, high, guard)


@_correct.register_fake
def _(values, initial, current, points, offsets, sizes, radius, threshold, low, high, guard):
    planes = torch.empty(values.shape, dtype=torch.uint8, device=values.device)
    totals = values.new_empty((len(values), stream.TOTALS), dtype=torch.int32)
    return planes, totals, values.new_empty(len(values), dtype=torch.bool)


@torch.library.custom_op("hmg_gpu::soft_update", mutates_args=(), device_types="cuda")
def _soft_update(
    probability: Tensor,
    initial: Tensor,
    points: Tensor,
    offsets: Tensor,
    sizes: Tensor | None,
    radius: int,
    threshold: float,
    weight: float,
) -> Tensor:
    return launch(probability, initial, points, offsets, sizes, radius, threshold, weight=weight)


@_soft_update.register_kernel("cpu")
def _(probability, initial, points, offsets, sizes, radius, threshold, weight):
    if blocks.INTERPRETED:
        return launch(probability, initial, points, offsets, sizes, radius, threshold, weight=weight)
    filtered = without_triton(probability, None, points, offsets, sizes, radius, threshold)
    return fuse(probability, initial, filtered, weight)


@_soft_update.register_fake
def _(probability, initial, points, offsets, sizes, radius, threshold, weight):
    return torch.empty(probability.shape, dtype=torch.bool, device=probability.device)


@torch.no_grad()
def update(
    prediction: Tensor, initial: Tensor | None, points: Tensor, *, radius: int = 30, sizes: Tensor | None = None,
    offsets: Tensor | None = None, threshold: float = 0.0,
) -> Tensor:  # fmt: skip
    """Filter a prediction by its points and unite it with the initial mask (HMG Sec. 3.2, FAF + MDR).

    Nothing here is differentiable: the function runs under ``torch.no_grad`` and its result carries no graph.
    No host synchronisation, no shape that depends on data, a number of launches that the shape decides.

        keep component c:  |sum_y - A*y| + |sum_x - A*x| <= r*A  for some point (y, x) of its image
        hybrid = initial OR kept components

    Args:
        prediction: bool [B, H, W], or logits float32, float16 or bfloat16 [B, H, W], foreground where
            ``prediction > threshold``.
        initial: bool [B, H, W], masks from the points; None for the filtered prediction alone.
        points: int64 [P, 3], rows (image, y, x) in pixels; a point outside its image counts for nothing.
        radius: r in pixels (L1), an integer so that the rule is exact.
        sizes: int64 [B, 2], rows (height, width) of the valid area; the prediction beyond it counts as background.
        offsets: int64 [B + 1] from :func:`group_points`, whose points must then be given too; None: sorted here.
        threshold: in the units of the logits; ignored for a bool prediction.

    Returns:
        bool [B, H, W].

    Raises:
        TypeError: a dtype other than those above.
        ValueError: shapes or devices that do not belong together, a negative radius.

    Example:
        >>> import torch
        >>> from hmg_gpu.kernels.update import update
        >>> initial = torch.tensor([[[0, 1, 0, 0, 0, 0, 0, 0]]]).bool()
        >>> logits = torch.tensor([[[2.0, 4.0, 1.0, -9.0, -9.0, -9.0, -9.0, 3.0]]])  # a target and a false alarm
        >>> update(logits, initial, torch.tensor([[0, 0, 1]]), radius=3)[0].int()
        tensor([[1, 1, 1, 0, 0, 0, 0, 0]], dtype=torch.int32)
    """
    blocks.check_plane("prediction", prediction, (torch.bool, torch.float32, torch.float16, torch.bfloat16))
    points, offsets = _check(prediction, initial, torch.bool, points, radius, sizes, offsets)
    run = launch if blocks.may_launch(prediction, initial, points, offsets, sizes) else _update
    return run(prediction, initial, points, offsets, sizes, int(radius), float(threshold))


@torch.no_grad()
def soft_update(
    probability: Tensor, initial: Tensor, points: Tensor, *, radius: int = 30, sizes: Tensor | None = None,
    offsets: Tensor | None = None, threshold: float = 0.5, weight: float = 0.7,
) -> Tensor:  # fmt: skip
    """:func:`hmg_gpu.soft_update` in the launches of :func:`update`: soft fusion costs no pass of its own.

    Args:
        probability: float32 [B, H, W] in 0 to 1; NaN counts as 0.
        initial: float32 [B, H, W], 0 outside the boxes.
        points, radius, sizes, offsets: as :func:`update`.
        threshold: foreground outside the boxes where ``probability > threshold``.
        weight: of ``initial``, 0 to 1.

    Returns:
        bool [B, H, W].

    Raises:
        TypeError, ValueError: as :func:`update`.

    Example:
        >>> import torch
        >>> from hmg_gpu.kernels.update import soft_update
        >>> initial = torch.tensor([[[0.9, 0.6, 0.6, 0.0, 0.0, 0.0, 0.0]]])  # a box of three pixels
        >>> network = torch.tensor([[[0.1, 0.1, 0.9, 0.9, 0.0, 0.0, 0.9]]])  # doubts the second, sees a fourth
        >>> soft_update(network, initial, torch.tensor([[0, 0, 0]]), radius=3)[0].int()
        tensor([[1, 0, 1, 1, 0, 0, 0]], dtype=torch.int32)
    """
    blocks.check_plane("probability", probability, (torch.float32,))
    points, offsets = _check(probability, initial, torch.float32, points, radius, sizes, offsets)
    run = launch if blocks.may_launch(probability, initial, points, offsets, sizes) else _soft_update
    return run(probability, initial, points, offsets, sizes, int(radius), float(threshold), float(weight))


@torch.no_grad()
def correct(
    values: Tensor, initial: Tensor, current: Tensor, points: Tensor, *, sizes: Tensor, offsets: Tensor | None = None,
    radius: int = 30, threshold: float = 0.0, low: float = 0.0, high: float = 1.0, guard: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """:func:`update`, with what :class:`hmg_gpu.MaskUpdater` wants to know about the values and its guard.

    Args:
        values: as ``prediction`` of :func:`update`.
        initial, current: bool [B, H, W]; ``current`` is the result of images whose prediction the guard refuses.
        points, offsets, radius, threshold: as :func:`update`. sizes: int64 [B, 2].
        low, high: bounds of the values.
        guard: an image with more foreground than this share of its valid area is refused; None: none is.

    Returns:
        uint8 [B, H, W], bit 0 the hybrid masks, bit 1 the prediction (0 in refused images);
        int32 [B, 4], of each image: pixels that are not finite, whether some value lies outside the bounds, whether
        some is positive (these three are 0 for bool), pixels of foreground;
        bool [B], the images that were refused.

    Raises:
        TypeError, ValueError: as :func:`update`.

    Example:
        >>> import torch
        >>> from hmg_gpu.kernels.update import correct
        >>> masks = torch.zeros(2, 1, 5).bool()
        >>> logits = torch.tensor([[[-1.0, 0.5, -1.0, -1.0, -1.0]], [[3.0, 3.0, 3.0, 3.0, torch.nan]]])
        >>> sizes, points = torch.tensor([[1, 5], [1, 5]]), torch.tensor([[0, 0, 1], [1, 0, 1]])
        >>> planes, totals, refused = correct(logits, masks, masks, points, sizes=sizes, guard=0.5)
        >>> planes.flatten(1).tolist(), refused.tolist()
        ([[0, 3, 0, 0, 0], [0, 0, 0, 0, 0]], [False, True])
        >>> totals.tolist()
        [[0, 1, 1, 1], [1, 1, 1, 4]]
    """
    blocks.check_plane("values", values, (torch.bool, torch.float32, torch.float16, torch.bfloat16))
    points, offsets = _check(values, initial, torch.bool, points, radius, sizes, offsets)
    run = launch_correct if blocks.may_launch(values, initial, current, points, offsets, sizes) else _correct
    return run(
        values, initial, current, points, offsets, sizes, int(radius), float(threshold), float(low), float(high), guard
    )


def _check(
    prediction: Tensor, initial: Tensor | None, dtype: torch.dtype, points: Tensor, radius: int,
    sizes: Tensor | None, offsets: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Refuse what does not belong together; points and offsets, built where there are none."""
    images, device = prediction.shape[0], prediction.device
    if initial is not None:
        blocks.check_plane("initial", initial, (dtype,))
        if initial.shape != prediction.shape or initial.device != device:
            raise ValueError(
                f"initial: expected {list(prediction.shape)} on {device} like the prediction, "
                f"got {list(initial.shape)} on {initial.device}"
            )
    blocks.check_points(points, device)
    blocks.check_sizes(sizes, images, device)
    if int(radius) != radius or not 0 <= radius < 2**31:
        raise ValueError(f"radius: expected an integer number of pixels from 0 to 2**31 - 1, got {radius}")
    if offsets is None:
        return group_points(points, images)
    if offsets.dtype != torch.int64 or offsets.shape != (images + 1,) or offsets.device != device:
        raise ValueError(
            f"offsets: expected int64 [{images + 1}] on {device}, got {offsets.dtype} {list(offsets.shape)} on "
            f"{offsets.device}; build points and offsets with group_points(points, B)"
        )
    return points, offsets


def false_alarm_filter(
    prediction: Tensor, points: Tensor, *, radius: int = 30, sizes: Tensor | None = None,
    offsets: Tensor | None = None, threshold: float = 0.0,
) -> Tensor:  # fmt: skip
    """Erase the predicted components far from every point (HMG Sec. 3.2.1, FAF): :func:`update` without initial.

    Example:
        >>> import torch
        >>> from hmg_gpu.kernels.update import false_alarm_filter
        >>> prediction = torch.tensor([[[1, 1, 0, 0, 0, 0, 1]]]).bool()  # one image of one row, two components
        >>> false_alarm_filter(prediction, torch.tensor([[0, 0, 0]]), radius=3)[0].int()
        tensor([[1, 1, 0, 0, 0, 0, 0]], dtype=torch.int32)
    """
    return update(prediction, None, points, radius=radius, sizes=sizes, offsets=offsets, threshold=threshold)
