"""PMG's mask of each point in a window around it, before the masks of an image are united."""

from __future__ import annotations

import torch
from torch import Tensor

from hmg_gpu.data.sets import ImageSet
from hmg_gpu.masks.makers.pmg import Pmg


def masks_around(
    data: ImageSet,
    radius: int,
    pmg: Pmg,
    *,
    centres: Tensor | None = None,
) -> Tensor:
    """PMG's mask of each point by itself, each in a window around its point: bool [P, 2 R + 1, 2 R + 1].

    Args:
        data: images and points; the masks come in the points' order.
        radius: R in pixels; what a mask has further from the window's centre is cut off.
        pmg: the maker.
        centres: int64 [P, 2], (y, x) of the windows' centres where they are not the points.
    """
    reach = torch.arange(-radius, radius + 1, device=data.points.device)
    parts = [torch.zeros(0, 2 * radius + 1, 2 * radius + 1, dtype=torch.bool, device=data.points.device)]
    done = 0
    for points, _, masks in pmg.each(data, data.points):
        side = masks.shape[1]
        centre = torch.minimum(points[:, 1:], torch.full_like(points[:, 1:], side // 2))  # windows are held to row 0
        if centres is not None:
            centre = centre + centres[done : done + len(points)] - points[:, 1:]
        done += len(points)
        rows, columns = centre[:, :1, None] + reach[:, None], centre[:, 1:, None] + reach  # [p, K, 1], [p, 1, K]
        inside = (rows >= 0) & (rows < side) & (columns >= 0) & (columns < side)  # [p, K, K]
        index = rows.clamp(0, side - 1) * side + columns.clamp(0, side - 1)
        parts.append(masks.flatten(1).gather(1, index.flatten(1)).view(inside.shape) & inside)
    return torch.cat(parts)
