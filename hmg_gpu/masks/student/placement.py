"""Where a set's annotators put their masks, against what its images show: told by the points alone.

A point is the centroid of a mask, or lies about it. If the masks of many targets have their centroids beside the
points, all on the same side, then the annotation of such targets is displaced in the image (resampled images, masks
that were made apart from them), and masks have to follow. Targets of a set may differ in that by their size.

An image that was resampled by half a pixel shows each target a pixel too wide, as half of its border's light falls on
the next pixel. A student's threshold lies low because PMG leaves pixels out; here it does not, so a displaced target's
threshold is 0.5. That choice saw the ground truth of NUDT-SIRST, the one set of ours that is displaced.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hmg_gpu.common.tensors import logit

CLASSES, LEAST = 8, 30  # of the areas of masks, with equal parts of the targets; fewer where one had fewer targets
SURE = 4.0  # standard errors that a displacement has to have
FAR = 0.75  # pixels, too far for a displaced annotation
BETWEEN = 0.5  # threshold of masks that lie between the pixels that show them

Placement = tuple[tuple[float, float, float], ...]  # rows (largest area, down, across) in pixels, areas rising


def centroids(masks: Tensor) -> Tensor:
    """Centroids against the centre, pixels down and across: float32 [P, 2] of masks [P, K, K]; 0 where it is empty."""
    offset = torch.arange(masks.shape[1], device=masks.device) - masks.shape[1] // 2
    area = masks.sum((1, 2)).clamp(min=1)
    return torch.stack([(masks.sum(axis) * offset).sum(1) / area for axis in (2, 1)], dim=1)


def find_placement(masks: Tensor) -> Placement:
    """By how much masks have to move for their centroids to be where the points are, by area of the mask.

    Points are whole pixels: centroids rounded down, as the field's sets have them, or to the nearest pixel, whichever
    explains a set's points better. A displacement is what neither rounding of exact centroids nor rounding of points
    that scatter about them explains; the smaller of both. One of about half a pixel counts as half a pixel. A larger
    one tells where people click, not where they draw, and does not count.

    Args:
        masks: bool [P, K, K], as images show them, each with its point at the centre.

    Returns:
        One row for each class of areas; none where there are too few points or no class is displaced.

    Example:
        >>> import torch
        >>> from hmg_gpu.masks.student.placement import find_placement
        >>> masks = torch.zeros(40, 9, 9, dtype=torch.bool)
        >>> masks[:, 3:6, 3:6] = True  # centred on their points
        >>> find_placement(masks)
        ()
    """
    count = min(CLASSES, len(masks) // LEAST)
    if not count:
        return ()
    centre, area = centroids(masks).cpu().double(), masks.sum((1, 2)).cpu()
    classes = area.argsort(stable=True).tensor_split(count)
    down, nearest = ([_unexplained(centre[rows], rounded) for rows in classes] for rounded in (0.5, 0.0))
    best = min(down, nearest, key=lambda found: sum(float(move.abs().sum()) for move, _ in found))
    moves = [
        torch.where((move.abs() > SURE * error) & (move.abs() > 0.25) & (move.abs() < FAR), move.sign() / 2, 0)
        for move, error in best
    ]
    if not any(bool(move.any()) for move in moves):
        return ()
    bounds = [float(area[rows].max()) for rows in classes]
    return tuple((bound, *(move + 0.0).tolist()) for bound, move in zip(bounds, moves, strict=True))


def _unexplained(centre: Tensor, rounded: float) -> tuple[Tensor, Tensor]:
    """Mean displacement (down, across) of points from centroids [n, 2] that rounding leaves, and its standard error.

    Args:
        rounded: how far a point that scatters lies before its centroid on average, in pixels.
    """
    exact = -(centre + (0.5 - rounded) + 1e-4).floor().mean(0)
    scattered = rounded - centre.mean(0)
    same = exact.sign() == scattered.sign()
    error = centre.std(0) / len(centre) ** 0.5
    return torch.where(same, exact.sign() * torch.minimum(exact.abs(), scattered.abs()), 0), error


def place(probabilities: Tensor, areas: Tensor, placement: Placement, threshold: float = 0.5) -> Tensor:
    """Move probabilities [P, K, K] as :func:`find_placement` says for masks of these areas, int64 [P].

    Half a pixel is the mean of two pixels' logits; what moves so passes ``threshold`` where it passed ``BETWEEN``.
    """
    if not placement:
        return probabilities
    table = torch.tensor(placement, device=probabilities.device)
    moves = table[torch.bucketize(areas.float(), table[:-1, 0].contiguous()), 1:]  # [P, 2]
    side = probabilities.shape[1]
    steps = (2 * torch.arange(side, device=probabilities.device) + 1) / side - 1  # of grid_sample
    down, across = (steps - moves[:, None].mT * 2 / side).unbind(1)
    grid = torch.stack((across[:, None].expand(-1, side, -1), down[:, :, None].expand(-1, -1, side)), dim=3)
    logits = probabilities.logit(1e-4)[:, None]
    moved = F.grid_sample(logits, grid, align_corners=False, padding_mode="border")[:, 0]
    between = (moves != moves.round()).any(1)[:, None, None]
    moved = torch.where(between, moved + logit(threshold) - logit(BETWEEN), moved).sigmoid()
    return torch.where(moves.any(1)[:, None, None], moved, probabilities)
