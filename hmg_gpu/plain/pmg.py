"""PMG in plain torch (HMG Sec. 3.1): what ``kernels/pmg.py`` must equal, and the path of every other device."""

from __future__ import annotations

from threading import Lock
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hmg_gpu.common.checks import can_read
from hmg_gpu.common.threads import map_groups

# Pixels that one group of points may gather: small enough for a CPU's cache, large enough to fill a GPU.
_GROUP_PIXELS = {"cpu": 1 << 18}
_GROUP_PIXELS_ACCELERATOR = 1 << 25


class Search(NamedTuple):
    """What P2B saw on its way to a box. Directions: left, right, up, down; K = extent + 1, index 0 is the point.

    Attributes:
        vmax: float32 [P, 4, K], the largest of the pixels across; beyond ``reach`` a value repeats.
        vsum: float64 [P, 4, K], their sums.
        reach: int64 [P, 4], how far the region goes before the image ends.
        border: int64 [P, 4], e + 1, where the strongest change ends.
        boxes: int64 [P, 4], rows (y0, x0, y1, x1), half open.
    """

    vmax: Tensor
    vsum: Tensor
    reach: Tensor
    border: Tensor
    boxes: Tensor


def point_to_box(images: Tensor, points: Tensor, extent: int, half_width: int, sizes: Tensor | None) -> Tensor:
    if len(points) == 0:
        return points.new_zeros((0, 4))
    pixels = 4 * (extent + 1) * (2 * half_width + 1)
    groups = points.split(max(1, _group_pixels(images) // pixels))
    return torch.cat(map_groups(lambda rows: search(images, rows, extent, half_width, sizes).boxes, groups, images))


def search(images: Tensor, points: Tensor, extent: int, half_width: int, sizes: Tensor | None) -> Search:
    """P2B for one group of points: the four directions are one more axis of the tensors."""
    image, y, x, height, width, inside = _locate(images, points, sizes)
    along = torch.arange(-extent, extent + 1, device=points.device)  # [S], both ways at once
    across = torch.arange(-half_width, half_width + 1, device=points.device)  # [J]

    def profiles(centre: Tensor, last: Tensor, beside: Tensor, beside_last: Tensor, rows_first: bool) -> tuple:
        """vmax and the sums behind vavg along one axis, both ways: each [P, 2, K], index 0 at the point."""
        line = _hold(centre[:, None] + along, last[:, None])  # [P, S]
        wanted = beside[:, None] + across
        held = _hold(wanted, beside_last[:, None])  # [P, J]
        if rows_first:
            position = _flat(images, image[:, None, None], held[:, :, None], line[:, None, :])
        else:
            position = _flat(images, image[:, None, None], line[:, None, :], held[:, :, None])
        values = _read(images, position)  # [P, J, S]
        # Held to the image a position repeats a border pixel that the region holds anyway: the maximum needs no mask.
        vmax = values.amax(1)
        vsum = torch.where((held == wanted)[:, :, None], values, 0).sum(1, dtype=_wide(values))

        def both_ways(profile: Tensor) -> Tensor:
            return torch.stack((profile[:, : extent + 1].flip(1), profile[:, extent:]), dim=1)

        return both_ways(vmax), both_ways(vsum)  # equal counts along a direction: the sums decide like the means

    max_x, sum_x = profiles(x, width - 1, y, height - 1, rows_first=True)
    max_y, sum_y = profiles(y, height - 1, x, width - 1, rows_first=False)
    vmax, vsum = torch.cat((max_x, max_y), dim=1), torch.cat((sum_x, sum_y), dim=1)  # [P, 4, K]

    # Along a direction the region ends `reach` pixels away; what lies beyond is left out from here on.
    reach = torch.stack((x, width - 1 - x, y, height - 1 - y), dim=1).clamp(0, extent)[..., None]  # [P, 4, 1]
    steps = along[extent:]  # 0..extent
    difference = (vmax[..., 1:] - vmax[..., :-1]).abs() * (steps[:-1] < reach)  # [P, 4, K - 1], D
    total = difference.sum(-1, keepdim=True, dtype=_wide(difference))
    transition = difference * reach.to(total.dtype) > total  # D > mean(D)
    largest = difference.amax(-1, keepdim=True)
    peak = torch.where(difference == largest, steps[:-1], extent).amin(-1, keepdim=True)
    border = torch.where(~transition & (steps[:-1] > peak), steps[:-1], extent).amin(-1, keepdim=True)  # e + 1
    border = torch.minimum(border, reach)

    threshold = vsum.gather(-1, border)
    boundary = torch.where((vsum <= threshold) & (steps <= reach), steps, extent).amin(-1)  # [P, 4]
    flat = largest * reach.to(total.dtype) <= total
    flat |= ~vsum.sum(-1, keepdim=True).isfinite()  # beyond `reach` vsum repeats what the region holds
    boundary = torch.where(flat[..., 0], 0, boundary)
    boundary = torch.where(reach[..., 0] < 2, reach[..., 0], boundary)

    left, right, up, down = boundary.unbind(1)
    boxes = torch.stack((y - up, x - left, y + down + 1, x + right + 1), dim=1)
    return Search(vmax, vsum, reach[..., 0], border[..., 0], boxes * inside[:, None])


def paint(images: Tensor, points: Tensor, boxes: Tensor, extent: int, alpha: float, *, soft: bool) -> Tensor:
    """B2M over all points, united per image: bool masks, or with ``soft`` float32 probabilities."""
    pixels = images.numel()
    # One slot past the end takes the writes of pixels outside the boxes, so that no shape depends on the data.
    canvas = _zeros(pixels + 1, torch.float32 if soft else torch.bool, images)
    turn = Lock()  # groups may overlap on the canvas

    def paint_group(group: tuple[Tensor, Tensor, int]) -> None:
        score, inside, position = _normalise_directions(images, *group, alpha)
        chosen = torch.where(inside if soft else inside & (score >= 0), position, pixels).flatten()
        with turn:
            if soft:
                canvas.scatter_reduce_(0, chosen, (0.5 + score / 6).flatten(), "amax")
            else:
                canvas.scatter_(0, chosen, True)

    map_groups(paint_group, _groups(images, points, boxes, extent), images)
    return canvas[:pixels].view(images.shape)


def _zeros(count: int, dtype: torch.dtype, like: Tensor) -> Tensor:
    """A flat tensor of zeros; on the CPU from memory that the system zeroes page by page as it is touched."""
    if not can_read(like):
        return torch.zeros(count, dtype=dtype, device=like.device)
    return torch.from_numpy(np.zeros(count, dtype=np.float32 if dtype == torch.float32 else np.bool_))


def _groups(images: Tensor, points: Tensor, boxes: Tensor, extent: int):
    """Yield groups (points, boxes, radius of their window).

    Where values may be read, points with boxes of like size go together and the window fits the largest of them;
    elsewhere every window has the radius ``extent``.
    """
    if not can_read(boxes):
        limit = _group_pixels(images)
        for group in torch.arange(len(points), device=points.device).split(max(1, limit // (2 * extent + 1) ** 2)):
            yield points[group], boxes[group], extent
        return
    distance = reach(points, boxes)
    limit = _group_pixels(images)
    order = distance.argsort(descending=True)
    distance = distance[order].tolist()
    start = 0
    while start < len(order):
        radius = max(distance[start], 0)
        group = order[start : start + max(1, limit // (2 * radius + 1) ** 2)]
        yield points[group], boxes[group], radius
        start += len(group)


def reach(points: Tensor, boxes: Tensor) -> Tensor:
    """How far each box reaches from its point: int64 [P], pixels."""
    centre = points[:, 1:]
    return torch.maximum(centre - boxes[:, :2], boxes[:, 2:] - 1 - centre).amax(1)


def _normalise_directions(
    images: Tensor, points: Tensor, boxes: Tensor, radius: int, alpha: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Eqs. (1) to (3) on the square window of each point; each result [P, S, S].

    Both branches of eq. (2) are 0.5 + 0.5 * q with q = (I - sigma) / (sigma - Min) below sigma and
    (I - sigma) / (Max - sigma) above it. So P_f = 0.5 + (q_g + q_v + q_h) / 6, and P_f >= 0.5 is a sign.

    Returns:
        q_g + q_v + q_h (float32), inside the box (bool), flat position in the batch (int64).
    """
    image, y, x, _, _, valid = _locate(images, points, None)
    offsets = torch.arange(-radius, radius + 1, device=points.device)
    rows, columns = y[:, None] + offsets, x[:, None] + offsets  # [P, S]
    y0, x0, y1, x1 = boxes[:, :, None].unbind(1)  # [P, 1]
    in_rows, in_columns = (rows >= y0) & (rows < y1) & valid[:, None], (columns >= x0) & (columns < x1)
    inside = in_rows[:, :, None] & in_columns[:, None, :]  # [P, S, S]
    # Held to the box the window repeats its border pixels: minima and maxima of the parts need no mask.
    rows = torch.minimum(torch.maximum(rows, y0), torch.maximum(y1 - 1, y0))
    columns = torch.minimum(torch.maximum(columns, x0), torch.maximum(x1 - 1, x0))
    position = _flat(images, image[:, None, None], rows[:, :, None], columns[:, None, :])  # [P, S, S]
    window = _read(images, position)  # [P, S, S]

    # Minimum, maximum and sum of every row and column of the box, from which those of its five parts follow.
    held = torch.where(inside, window, 0)
    by_row = window.amin(2), window.amax(2), held.sum(2, dtype=_wide(held)), in_rows  # [P, S]
    by_column = window.amin(1), window.amax(1), held.sum(1, dtype=_wide(held)), in_columns
    centre = window[:, radius, radius].to(by_row[2].dtype)

    def part(lines: tuple[Tensor, ...], other: Tensor, span: slice = slice(None)) -> tuple[Tensor, Tensor, Tensor]:
        minima, maxima, sums, counted = (line[:, span] for line in lines)
        mean = sums.sum(1) / (counted.sum(1) * other.sum(1))
        sigma = (alpha * centre + (1 - alpha) * mean).float()
        # A part without contrast has I = sigma everywhere: any span but zero gives q = 0, that is P = 0.5.
        rise, fall = sigma - minima.amin(1), maxima.amax(1) - sigma
        return sigma, torch.where(rise > 0, rise, 1), torch.where(fall > 0, fall, 1)  # [P] each

    before, after = slice(None, radius + 1), slice(radius, None)  # both hold the point's own row or column
    full_box = part(by_row, in_columns)
    score = _excess(window, *(value[:, None, None] for value in full_box))  # q_g
    score += _two_parts(window, part(by_row, in_columns, before), part(by_row, in_columns, after), radius)  # q_v
    left, right = part(by_column, in_rows, before), part(by_column, in_rows, after)
    score += _two_parts(window.mT, left, right, radius).mT  # q_h
    finite = by_row[2].sum(1).isfinite()  # [P]
    if not can_read(finite) or not bool(finite.all()):
        # All of such a box is NaN by now: P = 0.5 at the point, 0 elsewhere.
        is_point = ((offsets == 0)[:, None] & (offsets == 0)).to(score.dtype)
        score = torch.where(finite[:, None, None], score, 3 * (is_point - 1))
    return score, inside, position


def _excess(values: Tensor, sigma: Tensor, rise: Tensor, fall: Tensor) -> Tensor:
    """q of a part, -1 at its Min, 0 at sigma, 1 at its Max."""
    above = values - sigma
    return above / torch.where(above <= 0, rise, fall)


def _two_parts(window: Tensor, before: tuple[Tensor, ...], after: tuple[Tensor, ...], radius: int) -> Tensor:
    """q of a window [P, S, S]: rows up to the point by ``before``, the others by ``after``, its own row by both."""
    is_before = torch.arange(window.shape[1], device=window.device) <= radius  # [S]
    lines = (torch.where(is_before, a[:, None], b[:, None])[:, :, None] for a, b in zip(before, after, strict=True))
    result = _excess(window, *lines)  # [P, S, S] by [P, S, 1]
    middle = window[:, radius]  # [P, S]
    first, second = (_excess(middle, *(value[:, None] for value in part)) for part in (before, after))
    result[:, radius] = 0.5 * (first + second)
    return result


def _locate(images: Tensor, points: Tensor, sizes: Tensor | None) -> tuple[Tensor, ...]:
    """Columns of the points held inside the batch, the valid size of their images, and whether they were inside."""
    batch, height, width = images.shape
    image, y, x = points.unbind(1)
    held = _hold(image, batch - 1)
    if sizes is None:
        heights, widths = torch.full_like(y, height), torch.full_like(x, width)
    else:
        heights, widths = sizes[held].unbind(1)
    inside = (image == held) & (y >= 0) & (y < heights) & (x >= 0) & (x < widths)
    return held, _hold(y, heights - 1), _hold(x, widths - 1), heights, widths, inside


def _hold(index: Tensor, last: Tensor | int) -> Tensor:
    """The index moved into 0..last, or to 0 where there is none."""
    if isinstance(last, int):
        return index.clamp(0, max(last, 0))
    return torch.minimum(index, last).clamp(min=0)


def _flat(images: Tensor, image: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    _, height, width = images.shape
    return (image * height + rows) * width + columns


def _read(images: Tensor, position: Tensor) -> Tensor:
    """float32 intensities at flat positions. On a CPU index_select takes a third of the time of indexing."""
    return images.reshape(-1).index_select(0, position.flatten()).view(position.shape).float()


def _wide(values: Tensor) -> torch.dtype:
    """The type that sums are made in: float64, so that their order does not matter; Apple's GPUs have none."""
    return torch.float32 if values.device.type == "mps" else torch.float64


def _group_pixels(images: Tensor) -> int:
    """Pixels of a group. How many threads there are does not count: groups decide last bits."""
    return _GROUP_PIXELS.get(images.device.type, _GROUP_PIXELS_ACCELERATOR)
