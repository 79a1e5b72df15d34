"""PMG's mask of each point by itself, before the masks of an image are united."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .data.sets import ImageSet
from .pmg import box_to_mask, point_to_box

_GROUP_PIXELS = 1 << 22  # of the windows held at a time


def own_masks(
    data: ImageSet, points: Tensor, extent: int, half_width: int, alpha: float, *, global_only: bool = False
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The mask of each point by itself, in a window that holds every pixel PMG looks at for it.

    Args:
        points: int64 [P, 3], rows (image, y, x).
        global_only: threshold P_g instead of P_f.

    Yields:
        Some of the points [p, 3]; int64 [p, S, S] the positions y * W + x of their windows' pixels in the image; bool
        [p, S, S] their masks. Positions outside the image are held to it and never in a mask.
    """
    _, height, width = data.images.shape
    radius = max(extent, half_width)
    side = 2 * radius + 1
    steps = torch.arange(side, device=points.device)
    for group in points.split(max(1, _GROUP_PIXELS // side**2)):
        image = group[:, 0]
        corner = (group[:, 1:] - radius).clamp(min=0)  # [p, 2]
        rows = (corner[:, :1] + steps).clamp(max=height - 1)[:, :, None]  # [p, S, 1]
        columns = (corner[:, 1:] + steps).clamp(max=width - 1)[:, None]  # [p, 1, S]
        windows = data.images[image[:, None, None], rows, columns]  # [p, S, S]
        sizes = (data.sizes[image] - corner).clamp(max=side)
        local = torch.cat((torch.arange(len(group), device=points.device)[:, None], group[:, 1:] - corner), dim=1)
        boxes = point_to_box(windows, local, extent=extent, half_width=half_width, sizes=sizes)
        make = _threshold_global if global_only else box_to_mask
        yield group, rows * width + columns, make(windows, local, boxes, extent=extent, alpha=alpha)


def masks_around(
    data: ImageSet,
    radius: int,
    *,
    extent: int = 25,
    half_width: int = 4,
    alpha: float = 0.15,
    centres: Tensor | None = None,
) -> Tensor:
    """The masks of :func:`own_masks`, each in a window around its point: bool [P, 2 R + 1, 2 R + 1].

    Args:
        data: images and points; the masks come in the points' order.
        radius: R in pixels; what a mask has further from the window's centre is cut off.
        extent, half_width, alpha: of PMG.
        centres: int64 [P, 2], (y, x) of the windows' centres where they are not the points.
    """
    reach = torch.arange(-radius, radius + 1, device=data.points.device)
    parts = [torch.zeros(0, 2 * radius + 1, 2 * radius + 1, dtype=torch.bool, device=data.points.device)]
    done = 0
    for points, _, masks in own_masks(data, data.points, extent, half_width, alpha):
        side = masks.shape[1]
        centre = torch.minimum(points[:, 1:], torch.full_like(points[:, 1:], side // 2))  # windows are held to row 0
        if centres is not None:
            centre = centre + centres[done : done + len(points)] - points[:, 1:]
        done += len(points)
        rows, columns = centre[:, :1, None] + reach[:, None], centre[:, 1:, None] + reach  # [p, K, 1], [p, 1, K]
        there = (rows >= 0) & (rows < side) & (columns >= 0) & (columns < side)  # [p, K, K]
        index = rows.clamp(0, side - 1) * side + columns.clamp(0, side - 1)
        parts.append(masks.flatten(1).gather(1, index.flatten(1)).view(there.shape) & there)
    return torch.cat(parts)


def global_mask(data: ImageSet, *, extent: int, half_width: int, alpha: float) -> Tensor:
    """The ablation of HMG Sec. 3.1.2: P_g alone, without the directional maps; bool [N, H, W]."""
    count, height, width = data.images.shape
    canvas = torch.zeros(count * height * width, dtype=torch.bool, device=data.images.device)
    for points, position, masks in own_masks(data, data.points, extent, half_width, alpha, global_only=True):
        canvas[(points[:, 0, None, None] * height * width + position)[masks]] = True
    return canvas.view(count, height, width)


def _threshold_global(windows: Tensor, points: Tensor, boxes: Tensor, *, extent: int, alpha: float) -> Tensor:
    """P_g >= 0.5, which eq. (2) makes the same as I >= sigma, in the box of each window's one point."""
    steps = torch.arange(windows.shape[1], device=windows.device)
    y0, x0, y1, x1 = boxes[:, :, None].unbind(1)  # [p, 1]
    inside = ((steps >= y0) & (steps < y1))[:, :, None] & ((steps >= x0) & (steps < x1))[:, None]  # [p, S, S]
    values = windows.float()
    wide = torch.float32 if values.device.type == "mps" else torch.float64
    mean = torch.where(inside, values, 0).sum((1, 2), dtype=wide) / inside.sum((1, 2)).clamp(min=1)
    sigma = (alpha * values[points.unbind(1)].to(wide) + (1 - alpha) * mean).float()
    return inside & (values >= sigma[:, None, None])
