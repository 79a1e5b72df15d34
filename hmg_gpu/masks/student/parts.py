"""Lessons in which a target has a second, dimmer part: what PMG cuts off, its own masks never show.

PMG ends a mask at the strongest edge on its way. A ship keeps its bright funnel and loses its dim hull, always, so that
no lesson shows a hull that belongs to a target. In a share of the crops another crop's target is pasted across the
crop's own, dimmer, and the lesson's mask is of both (copy-paste, Ghiasi et al., CVPR 2021; within masks of PMG).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

DIMMEST, BRIGHTEST = 0.3, 0.7  # of a part, against the crop's own target
DRAWS = 4  # random numbers that a crop takes


def add_parts(crops: Tensor, masks: Tensor, draws: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Paste into a share of the crops the target of the crop before, dimmer, so that it overlaps the crop's own.

    A pixel of the one mask comes to lie on a pixel of the other. Each pixel shows the brighter of both; on the rim,
    one pixel around the pasted mask, the part counts half. Crops whose mask, or the other's, is empty stay.

    Args:
        crops: float [P, S, S], their background 0 and their targets about 1, as the network sees them.
        masks: bool [P, S, S], or float, above 0.5 in the mask.
        draws: float [P, 4], uniform in 0 to 1: whether, how bright, which pixel of either mask.
        share: of the crops, 0 to 1.

    Returns:
        Crops and masks, as given but for the parts.

    Example:
        >>> import torch
        >>> from hmg_gpu.masks.student.parts import add_parts
        >>> crops = torch.zeros(2, 16, 16)
        >>> crops[0, 8, 4:12] = crops[1, 8, 8] = 1.0  # a long target and a pixel
        >>> draws = torch.tensor([[0.9, 0, 0, 0], [0.1, 1.0, 0.5, 0.5]])  # the second crop gets the long one
        >>> parts, masks = add_parts(crops, crops > 0, draws, share=0.3)
        >>> masks.sum((1, 2)).tolist(), round(parts[1, 8].sum().item(), 1)
        ([8, 8], 5.9)
    """
    others, theirs = crops.roll(1, 0), masks.roll(1, 0)
    some = (masks > 0.5).flatten(1).any(1)
    used = (draws[:, 0] < share) & some & some.roll(1, 0)
    move = _pixel_of(masks, draws[:, 2]) - _pixel_of(theirs, draws[:, 3])  # [P, 2]
    near = theirs.to(crops.dtype)
    near = (near + F.max_pool2d(near[:, None], 3, 1, 1)[:, 0]) / 2
    level = DIMMEST + (BRIGHTEST - DIMMEST) * draws[:, 1]
    part = _moved(level[:, None, None] * others * near, move)
    used = used[:, None, None]
    joined = torch.maximum(masks, _moved(theirs, move))
    return torch.where(used & (part > 0), torch.maximum(crops, part), crops), torch.where(used, joined, masks)


def _pixel_of(masks: Tensor, draw: Tensor) -> Tensor:
    """One pixel of each mask [P, S, S], all alike likely: int64 [P, 2], row and column; any where a mask is empty."""
    ranks = (masks > 0.5).flatten(1).long().cumsum(1)
    wanted = (draw * ranks[:, -1]).long()[:, None] + 1
    place = torch.searchsorted(ranks, wanted).clamp(max=ranks.shape[1] - 1)[:, 0]
    return torch.stack((place // masks.shape[2], place % masks.shape[2]), dim=1)


def _moved(values: Tensor, move: Tensor) -> Tensor:
    """Values [P, S, S] moved by whole pixels [P, 2] (down, across), 0 where nothing comes from."""
    side = values.shape[1]
    source = torch.arange(side, device=values.device) - move[:, :, None]  # [P, 2, S]
    inside = (source >= 0) & (source < side)
    rows, columns = source.clamp(0, side - 1).unbind(1)
    found = values.flatten(1).gather(1, (rows[:, :, None] * side + columns[:, None]).flatten(1)).view(values.shape)
    return found * (inside[:, 0, :, None] & inside[:, 1, None])
