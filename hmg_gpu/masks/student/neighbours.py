"""Two points are two targets: masks of neighbours that run into each other are taken apart.

A network sees one point's crop at a time, and takes two targets with a bridge of light between them for one. Both masks
then hold both targets, and a component with one centroid is left of two points. No ground truth decides here.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

NEAREST = 4  # points of its image that a mask is held against
SAME = 1  # pixels between two points of one target; two targets cannot lie so near
ROWS = 256  # points at a time


def take_apart(masks: Tensor, probabilities: Tensor, points: Tensor) -> Tensor:
    """Masks of one point each of which no two touch any more, also not at a corner: bool [P, K, K].

    A pixel of several masks stays with the one whose network is surest of it. Of two masks that touch then, the one of
    the lower point (or of the right one of two in a row) gives up the pixels at the border. Masks that stand alone stay
    as they are. The points' order does not matter.

    Args:
        masks: bool [P, K, K], each with its point at the centre, K odd.
        probabilities: float [P, K, K], of each pixel to belong to the mask.
        points: int64 [P, 3], rows (image, y, x).

    Points further than a pixel apart are taken for different targets. Nothing is read back from the device. The paper
    has no such step.

    Example:
        >>> import torch
        >>> from hmg_gpu.masks.student.neighbours import take_apart
        >>> masks = torch.zeros(2, 9, 9, dtype=torch.bool)
        >>> masks[0, 4, 4:8] = masks[1, 4, 1:5] = True  # both points have the pixels 10 to 13 of their row
        >>> probabilities = torch.zeros(2, 9, 9)
        >>> probabilities[:, 4, 4], probabilities[:, 4, [3, 5]] = 0.9, 0.5
        >>> points = torch.tensor([[0, 10, 10], [0, 10, 13]])
        >>> apart = take_apart(masks, probabilities, points)
        >>> apart[0, 4, 4:8].tolist(), apart[1, 4, 1:5].tolist()
        ([True, True, False, False], [False, False, False, True])
    """
    count = len(points)
    if count < 2:
        return masks
    own = masks.clone()
    for rows in torch.arange(count, device=points.device).split(ROWS):
        near, move, real = _neighbours(points, rows, masks.shape[1])
        theirs = _seen_from(masks, near, move) & real
        surer, own_values = _seen_from(probabilities, near, move), probabilities[rows, None]
        own[rows] &= ~(theirs & ((surer > own_values) | ((surer == own_values) & _above(move)))).any(1)
    result = own.clone()
    for rows in torch.arange(count, device=points.device).split(ROWS):
        near, move, real = _neighbours(points, rows, masks.shape[1])
        theirs = _seen_from(own, near, move) & real & _above(move)
        result[rows] &= F.max_pool2d(theirs.any(1).float()[:, None], 3, 1, 1)[:, 0] == 0
    return result


def _neighbours(points: Tensor, rows: Tensor, side: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of some points the nearest others: rows [p, M], way to them [p, M, 2], whether they count [p, M, 1, 1].

    They count where their masks, ``side`` pixels wide, may touch the point's.
    """
    image, place = points[:, 0], points[:, 1:]
    way = place - place[rows, None]  # [p, P, 2]
    most = way.abs().amax(2)
    counts = (image == image[rows, None]) & (most > SAME) & (most <= side)
    step = 2 * side + 1
    order = (way.square().sum(2) * step + way[:, :, 0]) * step + way[:, :, 1]  # no two places have the same
    order = torch.where(counts, order, torch.iinfo(order.dtype).max)
    near = order.topk(min(NEAREST, len(points)), largest=False).indices
    return near, place[near] - place[rows, None], counts.gather(1, near)[:, :, None, None]


def _above(move: Tensor) -> Tensor:
    """Which neighbours [p, M, 1, 1] lie above the point, or left of it in its row."""
    down, right = move.unbind(2)
    return ((down < 0) | ((down == 0) & (right < 0)))[:, :, None, None]


def _seen_from(values: Tensor, near: Tensor, move: Tensor) -> Tensor:
    """Windows [P, K, K] of the points ``near`` in the windows of the points that they are near to: [p, M, K, K].

    Beyond their own windows they are 0.
    """
    side = values.shape[1]
    offset = torch.arange(side, device=values.device)
    rows, columns = offset[:, None] - move[..., :1, None], offset - move[..., 1:, None]  # [p, M, K, 1], [p, M, 1, K]
    inside = (rows >= 0) & (rows < side) & (columns >= 0) & (columns < side)
    index = (near[..., None, None] * side + rows.clamp(0, side - 1)) * side + columns.clamp(0, side - 1)
    return torch.where(inside, values.reshape(-1)[index], torch.zeros((), dtype=values.dtype, device=values.device))
