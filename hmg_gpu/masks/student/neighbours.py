"""Two points are two targets: masks of neighbours that run into each other are taken apart.

A network sees one point's crop at a time, and takes two targets with a bridge of light between them for one. Both masks
then hold both targets, and a component with one centroid is left of two points. No ground truth decides here.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hmg_gpu.common.checks import can_read
from hmg_gpu.masks.regions import touched

NEAREST = 8  # points of its image that a mask is held against
SAME = 2  # pixels between two points of one target; the masks of two hardly have room there
ROWS = 256  # points at a time


def take_apart(masks: Tensor, points: Tensor) -> Tensor:
    """Masks of one point each of which no two neighbours touch any more, also not at a corner: bool [P, K, K].

    A pixel of several masks stays with the nearest of their points, and with none where two are. Of two masks that
    touch then, the one of the lower point (or of the right one of two in a row) gives up the pixels at the border. What
    that cuts off from a point goes, too. A mask of which nothing is left keeps its pixels next to the point, even where
    they touch. Masks that stand alone stay as they are. The points' order does not matter.

    Args:
        masks: bool [P, K, K], each with its point at the centre, K odd.
        points: int64 [P, 3], rows (image, y, x).

    Points further than two pixels apart are taken for different targets. A mask is held against its eight nearest
    neighbours. Nothing is read back from a GPU. The paper has no such step.

    Example:
        >>> import torch
        >>> from hmg_gpu.masks.student.neighbours import take_apart
        >>> masks = torch.zeros(2, 9, 9, dtype=torch.bool)
        >>> masks[0, 4, 4:8] = masks[1, 4, 1:5] = True  # both points have the pixels 10 to 13 of their row
        >>> points = torch.tensor([[0, 10, 10], [0, 10, 13]])
        >>> apart = take_apart(masks, points)
        >>> apart[0, 4, 4:8].tolist(), apart[1, 4, 1:5].tolist()
        ([True, True, False, False], [False, False, False, True])
    """
    framed = F.pad(masks, (1, 1, 1, 1))  # a neighbour may begin where a window ends
    side = framed.shape[1]
    parts = [rows for rows in torch.arange(len(points), device=points.device).split(ROWS) if len(points) > 1]
    if can_read(masks):  # few points have neighbours
        parts = [rows[_neighbours(points, rows, side)[2].any(1).flatten()] for rows in parts]
    offset = torch.arange(side, device=points.device) - side // 2
    own_distance = offset[:, None] ** 2 + offset**2
    own = framed.clone()
    for rows in parts:
        near, move, real = _neighbours(points, rows, side)
        down, right = offset[:, None] - move[..., :1, None], offset - move[..., 1:, None]
        distance = down**2 + right**2  # [p, M, K, K]
        own[rows] &= ~(_seen_from(framed, near, move) & real & (distance <= own_distance)).any(1)
    result = own.clone()
    centre = slice(side // 2 - 1, side // 2 + 2)
    for rows in parts:
        near, move, real = _neighbours(points, rows, side)
        theirs = (_seen_from(own, near, move) & real & _above(move)).any(1)
        kept = own[rows] & (F.max_pool2d(theirs.float()[:, None], 3, 1, 1)[:, 0] == 0)
        seeds = torch.zeros_like(kept)
        seeds[:, centre, centre] = True
        changed = (kept != framed[rows]).any(2).any(1)[:, None, None]
        kept = torch.where(changed, touched(kept, seeds), kept)
        result[rows] = torch.where(kept.any(2).any(1)[:, None, None], kept, framed[rows] & seeds)
    return result[:, 1:-1, 1:-1]


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


def _seen_from(windows: Tensor, near: Tensor, move: Tensor) -> Tensor:
    """Windows bool [P, K, K] of the points ``near`` in those of the points that they are near to: [p, M, K, K]."""
    side = windows.shape[1]
    offset = torch.arange(side, device=windows.device)
    rows, columns = offset[:, None] - move[..., :1, None], offset - move[..., 1:, None]  # [p, M, K, 1], [p, M, 1, K]
    inside = (rows >= 0) & (rows < side) & (columns >= 0) & (columns < side)
    index = (near[..., None, None] * side + rows.clamp(0, side - 1)) * side + columns.clamp(0, side - 1)
    return windows.reshape(-1)[index] & inside
