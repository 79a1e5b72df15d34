"""What IoU loses, and by what: targets that were missed, false alarms, targets drawn too small or too large."""

from __future__ import annotations

import torch
from torch import Tensor

from hmg_gpu.common.checks import check_mask, check_same
from hmg_gpu.masks.components import connected_components
from hmg_gpu.plain.components import Components

LOSSES = {
    "missed": "missed targets",
    "false": "false alarms",
    "small": "targets drawn too small",
    "large": "too large",
}


@torch.no_grad()
def lost_pixels(prediction: Tensor, target: Tensor, sizes: Tensor | None = None) -> Tensor:
    """Pixels that are in one of two masks, sorted by cause; together they are union - intersection.

    A target (8-connected) is missed where no predicted pixel touches it, a predicted component a false alarm where it
    touches no target: they share no pixel. Pd and Fa ask for the distance of centroids instead, so counts differ.

    Args:
        prediction, target: bool [B, H, W].
        sizes: int64 [B, 2], valid (height, width) of padded images; what lies outside counts nowhere.

    Returns:
        int64 [4], in the order of :data:`LOSSES`. On an accelerator this synchronises.

    Raises:
        TypeError: a mask is not bool. ValueError: the shapes differ.

    Example:
        >>> import torch
        >>> from hmg_gpu.evaluation.losses import LOSSES, lost_pixels
        >>> prediction = torch.tensor([[[1, 1, 0, 0, 1, 0, 0, 0, 0]]]).bool()
        >>> target = torch.tensor([[[0, 1, 1, 0, 0, 0, 1, 1, 1]]]).bool()
        >>> dict(zip(LOSSES, lost_pixels(prediction, target).tolist()))
        {'missed': 3, 'false': 1, 'small': 1, 'large': 1}
    """
    check_mask(prediction, "prediction")
    check_mask(target, "target")
    check_same(prediction, target, "prediction", "target")
    missed, small = _without(connected_components(target, sizes), prediction)
    false, large = _without(connected_components(prediction, sizes), target)
    return torch.stack((missed, false, small, large))


def _without(components: Components, other: Tensor) -> tuple[Tensor, Tensor]:
    """Pixels of components that another mask lacks: of those that share none with it, and of the others."""
    shared = other.flatten()[components.pixels]  # [F]: foreground alone, which is sparse
    touching = torch.zeros(len(components), dtype=torch.bool, device=other.device)
    touching[components.component[shared]] = True
    alone = components.area[~touching].sum()
    return alone, (~shared).sum() - alone
