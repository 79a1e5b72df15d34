"""The soft-IoU loss (HMG Sec. 4.1) on logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor


def soft_iou_loss(
    logits: Tensor | Sequence[Tensor],
    target: Tensor,
    *,
    reduction: Literal["image", "batch"] = "image",
    smooth: float = 1.0,
    total: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """One minus the intersection over union of probabilities and mask (HMG Sec. 4.1).

        p = sigmoid(logits);  I = sum(p * target);  U = sum(p) + sum(target) - I
        loss = 1 - (I + smooth) / (U + smooth)

    Several heads (DNANet in training) give the mean of their losses. Half-precision logits are summed in float32: the
    sums over an image exceed what bf16 and fp16 can count.

    Args:
        logits: float [B, 1, H, W], or a tuple or list of such, one per head.
        target: bool or float in [0, 1], [B, 1, H, W] or [B, H, W].
        reduction: "image" (default) is the mean of one loss per image, where a small target counts as much as a large
            one and which left the all-foreground start sooner in a trial (ACM, NUAA-SIRST, 40 epochs: test IoU 10.2
            against 6.0); "batch" sums I and U over the whole batch, as BasicIRSTD does.
        smooth: pixels added to I and U; keeps the loss defined where an image has no target.
        total: for "batch": sums [2], of I and U, over the processes that share the batch; None: there are no others.

    Returns:
        float32 scalar in [0, 1) (float64 for float64 logits).

    Raises:
        TypeError: logits are not floating point, or target is neither bool nor floating point; divide an 8-bit mask
            by its maximum or threshold it.
        ValueError: the shapes differ, there is no head, or reduction is unknown.

    Example:
        >>> import torch
        >>> from hmg_gpu.models.losses import soft_iou_loss
        >>> logits = torch.zeros(1, 1, 1, 2)  # p = 0.5 at both pixels
        >>> target = torch.tensor([[[[True, False]]]])  # I = 0.5, U = 1 + 1 - 0.5
        >>> soft_iou_loss(logits, target, smooth=0)  # 1 - 0.5 / 1.5
        tensor(0.6667)
    """
    if reduction not in ("image", "batch"):
        raise ValueError(f'reduction must be "image" or "batch", got {reduction!r}')
    if isinstance(logits, Tensor):
        return _loss(logits, target, reduction, smooth, total)
    if len(logits) == 0:
        raise ValueError("logits must be a tensor or at least one head, got an empty sequence")
    return torch.stack([_loss(head, target, reduction, smooth, total) for head in logits]).mean()


def _loss(
    logits: Tensor, target: Tensor, reduction: str, smooth: float, total: Callable[[Tensor], Tensor] | None
) -> Tensor:
    if not logits.is_floating_point():
        raise TypeError(f"logits must be floating point, got {logits.dtype}; do not threshold them")
    if target.dtype != torch.bool and not target.is_floating_point():
        raise TypeError(f"target must be bool or floating point in [0, 1], got {target.dtype}; use mask > 127 or so")
    if target.ndim == 3:
        target = target[:, None]  # [B, 1, H, W]
    if logits.ndim != 4 or logits.shape[1] != 1 or logits.shape != target.shape:
        raise ValueError(
            f"logits must be [B, 1, H, W] and target the same or [B, H, W], "
            f"got {list(logits.shape)} and {list(target.shape)}"
        )
    probability = logits.to(torch.promote_types(logits.dtype, torch.float32)).sigmoid()
    target = target.to(probability.dtype)
    axes = (1, 2, 3) if reduction == "image" else (0, 1, 2, 3)
    intersection = (probability * target).sum(axes)  # [B] or scalar
    union = probability.sum(axes) + target.sum(axes) - intersection
    if total is not None and reduction == "batch":
        intersection, union = total(torch.stack((intersection, union)))
    return (1 - (intersection + smooth) / (union + smooth)).mean()
