"""The search length of P2B chosen for a data set, from its images and points alone."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .data.sets import ImageSet
from .pmg import point_to_mask

WEIGHTS = (0.4, 0.3, 0.2, 0.1)  # of the four steps of the grid from L to 2 L, the nearest first
TOLERANCE = 1.1
MAX_POINTS = 500  # more hardly change the choice
MIN_POINTS = 20
FALLBACK = 25  # the paper's length for most sets
_GROUP = 16  # images at a time


def choose_extent(data: ImageSet, *, half_width: int = 4, alpha: float = 0.15) -> int:
    """Choose L_ep without ground truth: where a longer search changes the masks least (HMG Sec. 4.2 sets it by hand).

    Below a target's size every longer search grows its mask. Far beyond it a search meets other structures, and masks
    run away to them. In between they hold still. With M(L) the masks of the whole set at length L,

        rate(L) = -ln IoU(M(L), M(L')) / ln(L' / L),   L' = the next length of the grid, about 2^(1/4) L
        change(L) = 0.4, 0.3, 0.2, 0.1 of the four rates from L to 2 L

    and the choice is the smallest L whose change is within a tenth of the least. Smallest, because a mask that ran away
    costs more than a border that is missing. IoU over the set counts pixels, as the quality of the masks does. Lengths
    beyond a quarter of the images' shorter side (median) are left out: the border holds masks still there, too.

    Args:
        data: images and points; of many images about ``MAX_POINTS`` points' worth, evenly spread, are looked at.
        half_width, alpha: L_dp and alpha of PMG.

    Returns:
        L_ep in pixels; ``FALLBACK`` where there are fewer than ``MIN_POINTS`` points.
    """
    if len(data.points) < MIN_POINTS:
        return FALLBACK
    changes = mask_changes(_sample(data), half_width=half_width, alpha=alpha)
    least = min(changes.values())
    return next(extent for extent, change in changes.items() if change <= TOLERANCE * least)


@torch.no_grad()
def mask_changes(data: ImageSet, *, half_width: int = 4, alpha: float = 0.15) -> dict[int, float]:
    """The change of :func:`choose_extent` at every length that it considers: extent -> change, ascending."""
    shorter = float(data.sizes.amin(1).double().median())
    grid = [round(5 * 2 ** (step / 4)) for step in range(40)]
    count = max(1, sum(extent <= shorter / 4 for extent in grid))
    grid = grid[: count + len(WEIGHTS)]
    overlap = torch.zeros(len(grid) - 1, 2, dtype=torch.int64, device=data.images.device)  # intersection, union
    for rows in torch.arange(len(data)).split(_GROUP):
        overlap += _overlap(data.subset(rows.to(data.images.device)), grid, half_width, alpha)
    rates = []
    for (both, either), low, high in zip(overlap.tolist(), grid, grid[1:], strict=False):
        lost = -math.log(both / either) if both else math.inf if either else 0.0
        rates.append(lost / math.log(high / low))
    return {
        grid[first]: sum(weight * rate for weight, rate in zip(WEIGHTS, rates[first:], strict=False))
        for first in range(count)
    }


def _overlap(data: ImageSet, grid: list[int], half_width: int, alpha: float) -> Tensor:
    """int64 [len(grid) - 1, 2]: intersection and union, in pixels, of the masks at neighbouring lengths."""
    rows, before = [], None
    for extent in grid:
        masks = point_to_mask(
            data.images, data.points, extent=extent, half_width=half_width, alpha=alpha, sizes=data.sizes
        )
        if before is not None:
            rows.append(torch.stack((torch.count_nonzero(before & masks), torch.count_nonzero(before | masks))))
        before = masks
    return torch.stack(rows)


def _sample(data: ImageSet) -> ImageSet:
    """Every k-th image, so that about ``MAX_POINTS`` points are left."""
    stride = max(1, round(len(data.points) / MAX_POINTS))
    return data if stride == 1 else data.subset(range(0, len(data), stride))
