"""Pseudo mask generation, PMG (HMG Sec. 3.1): from one point per target to its initial mask.

    point --point_to_box (P2B)--> box --box_to_mask (B2M)--> initial mask

Everything is batched over the points: one gather makes the four search regions of every point, one more its window. The
loops that remain run over fixed-size groups of points and bound the memory.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .checks import can_read, check_images, check_points, check_sizes
from .components import backend_for

# Pixels that one group of points may gather: small enough for a CPU's cache, large enough to fill a GPU.
_GROUP_PIXELS = {"cpu": 1 << 17}
_GROUP_PIXELS_ACCELERATOR = 1 << 25


@torch.no_grad()
def point_to_box(
    images: Tensor, points: Tensor, *, extent: int = 25, half_width: int = 4, sizes: Tensor | None = None
) -> Tensor:
    """Search the target's border in four directions around each point (HMG Sec. 3.1.1, P2B).

    In each direction the region of interest gives two profiles, index 0 being the point:

        vmax[k], vavg[k] = maximum and mean over the 2 * half_width + 1 pixels across
        D[k] = |vmax[k + 1] - vmax[k]|, T = mean(D)
        e = outer end of the contiguous run of D > T that holds the largest D
        boundary = first k with vavg[k] <= vavg[e + 1], included in the box

    A flat profile (no D > T) ends at the point, and so does a region that holds NaN or Inf; one of fewer than three
    pixels (point at the border) ends at its last pixel.
    Where the text leaves room these are the readings that gave the best masks on real data. Both comparisons are
    made without division (D * n > sum of D, sums in place of means), so integer intensities decide exactly on every
    device.

    Args:
        images: float32 or uint8 [B, H, W], intensities as they come.
        points: int64 [P, 3], rows (image, y, x) in pixels, 0-based.
        extent: L_ep, how far to search in pixels: 10 for NUDT-SIRST, 25 for the other sets.
        half_width: L_dp, pixels looked at to each side across the direction.
        sizes: int64 [B, 2], rows (height, width) of the valid area of images padded at the bottom and the right;
            the padding is never read. None: the whole image.

    Returns:
        int64 [P, 4], rows (y0, x0, y1, x1) in pixels, half open; each box holds its point.

    Raises:
        TypeError: a wrong dtype. ValueError: a wrong shape or setting, or a point outside its image (the row is named);
            points are looked at only on the CPU. On an accelerator, where looking would synchronise, such a point is
            ignored: its box is (0, 0, 0, 0) and it makes no mask.
    """
    _check(images, points, sizes, extent=extent, half_width=half_width)
    if backend_for(images) == "triton":
        from .kernels.pmg import point_to_box as fused

        return fused(images, points, extent=extent, half_width=half_width, sizes=sizes)
    return _point_to_box(images, points, extent, half_width, sizes)


@torch.no_grad()
def box_to_mask(images: Tensor, points: Tensor, boxes: Tensor, *, extent: int = 25, alpha: float = 0.15) -> Tensor:
    """Grow each point to a mask inside its box by directional normalisation (HMG Sec. 3.1.2, B2M).

        sigma = alpha * I(u0) + (1 - alpha) * mean(I)                              (1)
        P(u)  = 0.5 * (I - Min) / (sigma - Min)       where I <= sigma              (2)
              = 1 - 0.5 * (Max - I) / (Max - sigma)   where I >  sigma
        P_f   = (P_g + P_v + P_h) / 3, mask = P_f >= 0.5                          (3, 4)

    P_g takes the whole box; P_v the parts above and below the point, P_h those to its left and right, each part with
    its own Min, Max and sigma. The row (column) of the point belongs to both parts and gets the mean of the two values.
    A part without contrast gives 0.5. A box that holds NaN or Inf makes a mask of its point alone. Points of one image
    are united.

    Args:
        images: float32 or uint8 [B, H, W], intensities as they come.
        points: int64 [P, 3], rows (image, y, x) in pixels, 0-based.
        boxes: int64 [P, 4] from :func:`point_to_box`, rows (y0, x0, y1, x1), half open, each around its point.
        extent: L_ep in pixels; no box reaches further from its point. It bounds the window, so that no size has to be
            read from the boxes; on an accelerator a box is cut to it.
        alpha: weight of the point's own intensity in sigma, 0 to 1.

    Returns:
        bool [B, H, W].

    Raises:
        TypeError, ValueError: as :func:`point_to_box`; on the CPU also a box that leaves the image, misses its point
            or reaches beyond ``extent`` (the row is named).
    """
    _check(images, points, None, extent=extent, alpha=alpha)
    _check_boxes(images, points, boxes, extent)
    if backend_for(images) == "triton":
        from .kernels.pmg import box_to_mask as fused

        return fused(images, points, boxes, extent=extent, alpha=alpha)
    return _paint(images, points, boxes, extent, alpha, soft=False)


@torch.no_grad()
def point_to_mask(
    images: Tensor,
    points: Tensor,
    *,
    extent: int = 25,
    half_width: int = 4,
    alpha: float = 0.15,
    sizes: Tensor | None = None,
) -> Tensor:
    """Make the initial pseudo masks of a batch from its points (HMG Sec. 3.1, PMG): P2B, then B2M.

    Args:
        images: float32 or uint8 [B, H, W], intensities as they come.
        points: int64 [P, 3], rows (image, y, x) in pixels, 0-based; P may be 0.
        extent: L_ep in pixels: 10 for NUDT-SIRST, 25 for the other sets.
        half_width: L_dp in pixels.
        alpha: weight of the point's own intensity in sigma.
        sizes: int64 [B, 2], valid (height, width) of padded images; None: the whole image.

    Returns:
        bool [B, H, W], the union over the points of each image.

    Raises:
        TypeError, ValueError: as :func:`point_to_box`.
    """
    _check(images, points, sizes, extent=extent, half_width=half_width, alpha=alpha)
    if backend_for(images) == "triton":
        from .kernels.pmg import point_to_mask as fused

        return fused(images, points, extent=extent, half_width=half_width, alpha=alpha, sizes=sizes)
    boxes = _point_to_box(images, points, extent, half_width, sizes)
    return _paint(images, points, boxes, extent, alpha, soft=False)


@torch.no_grad()
def point_to_probability(
    images: Tensor,
    points: Tensor,
    *,
    extent: int = 25,
    half_width: int = 4,
    alpha: float = 0.15,
    sizes: Tensor | None = None,
) -> Tensor:
    """The soft mask P_f behind :func:`point_to_mask` (HMG eq. 3); ``point_to_mask`` is ``P_f >= 0.5``.

    Args and errors as :func:`point_to_mask`.

    Returns:
        float32 [B, H, W] in 0 to 1; 0 outside the boxes, the maximum where boxes overlap.
    """
    _check(images, points, sizes, extent=extent, half_width=half_width, alpha=alpha)
    boxes = _point_to_box(images, points, extent, half_width, sizes)
    return _paint(images, points, boxes, extent, alpha, soft=True)


# --- P2B -------------------------------------------------------------------------------------------------------------


def _point_to_box(images: Tensor, points: Tensor, extent: int, half_width: int, sizes: Tensor | None) -> Tensor:
    if len(points) == 0:
        return points.new_zeros((0, 4))
    group = max(1, _group_pixels(images) // (4 * (extent + 1) * (2 * half_width + 1)))
    return torch.cat([_search(images, rows, extent, half_width, sizes) for rows in points.split(group)])


def _search(images: Tensor, points: Tensor, extent: int, half_width: int, sizes: Tensor | None) -> Tensor:
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
        values = images.reshape(-1)[position].float()  # [P, J, S]
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
    return boxes * inside[:, None]


# --- B2M -------------------------------------------------------------------------------------------------------------


def _paint(images: Tensor, points: Tensor, boxes: Tensor, extent: int, alpha: float, *, soft: bool) -> Tensor:
    """B2M over all points, united per image: bool masks, or with ``soft`` float32 probabilities."""
    pixels = images.numel()
    # One slot past the end takes the writes of pixels outside the boxes, so that no shape depends on the data.
    canvas = _zeros(pixels + 1, torch.float32 if soft else torch.bool, images)
    for rows, frames, radius in _groups(images, points, boxes, extent):
        score, inside, position = _normalise_directions(images, rows, frames, radius, alpha)
        if soft:
            probability = 0.5 + score / 6
            canvas.scatter_reduce_(0, torch.where(inside, position, pixels).flatten(), probability.flatten(), "amax")
        else:
            canvas.scatter_(0, torch.where(inside & (score >= 0), position, pixels).flatten(), True)
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
    limit = _group_pixels(images)
    if not can_read(boxes):
        for group in torch.arange(len(points), device=points.device).split(max(1, limit // (2 * extent + 1) ** 2)):
            yield points[group], boxes[group], extent
        return
    reach = _reach(points, boxes)
    order = reach.argsort(descending=True)
    reach = reach[order].tolist()
    start = 0
    while start < len(order):
        radius = max(reach[start], 0)
        group = order[start : start + max(1, limit // (2 * radius + 1) ** 2)]
        yield points[group], boxes[group], radius
        start += len(group)


def _reach(points: Tensor, boxes: Tensor) -> Tensor:
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
    window = images.reshape(-1)[position].float()  # [P, S, S]

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
    whole = part(by_row, in_columns)
    score = _excess(window, *(value[:, None, None] for value in whole))  # q_g
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
    own = window[:, radius]  # [P, S]
    first, second = (_excess(own, *(value[:, None] for value in part)) for part in (before, after))
    result[:, radius] = 0.5 * (first + second)
    return result


# --- shared ----------------------------------------------------------------------------------------------------------


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


def _wide(values: Tensor) -> torch.dtype:
    """The type that sums are made in: float64, so that their order does not matter; Apple's GPUs have none."""
    return torch.float32 if values.device.type == "mps" else torch.float64


def _group_pixels(images: Tensor) -> int:
    return _GROUP_PIXELS.get(images.device.type, _GROUP_PIXELS_ACCELERATOR)


def _check(images: Tensor, points: Tensor, sizes: Tensor | None, **settings: float) -> None:
    check_images(images)
    check_sizes(sizes, images)
    check_points(points, images, sizes)
    for name, value in settings.items():
        if name == "alpha":
            if not 0 <= value <= 1:
                raise ValueError(f"alpha: expected a number from 0 to 1, got {value}")
        elif not isinstance(value, int) or value < (name == "extent"):
            raise ValueError(
                f"{name}: expected a whole number of pixels, at least {int(name == 'extent')}, got {value}"
            )


def _check_boxes(images: Tensor, points: Tensor, boxes: Tensor, extent: int) -> None:
    if boxes.dtype != torch.int64 or boxes.shape != (len(points), 4):
        raise ValueError(
            f"boxes: expected int64 [{len(points)}, 4], one row (y0, x0, y1, x1) for each point, "
            f"got {boxes.dtype} {list(boxes.shape)}"
        )
    if not can_read(boxes) or len(boxes) == 0:
        return
    _, height, width = images.shape
    _, y, x = points.unbind(1)
    y0, x0, y1, x1 = boxes.unbind(1)
    fits = (y0 >= 0) & (x0 >= 0) & (y1 <= height) & (x1 <= width)
    fits &= (y0 <= y) & (y < y1) & (x0 <= x) & (x < x1) & (_reach(points, boxes) <= extent)
    if not bool(fits.all()):
        row = int((~fits).nonzero()[0])
        raise ValueError(
            f"boxes row {row}: {boxes[row].tolist()} must lie in the {height} x {width} image, hold its point "
            f"{points[row].tolist()} and reach at most extent = {extent} pixels from it"
        )
