"""Small helpers on tensors that many modules need."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def valid_area(sizes: Tensor | None, batch: Tensor) -> Tensor | None:
    """bool [B, H, W], True inside each image's valid size; None where the whole batch is valid.

    Args:
        sizes: int64 [B, 2], rows (height, width), or None.
        batch: [B, H, W], of which the shape and the device are taken.
    """
    if sizes is None:
        return None
    _, height, width = batch.shape
    rows = torch.arange(height, device=batch.device)[None, :, None] < sizes[:, 0, None, None]
    columns = torch.arange(width, device=batch.device)[None, None, :] < sizes[:, 1, None, None]
    return rows & columns


def byte_range(images: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
    """What counts as black and as white in each image: 0 and 255, or its own range where it is no image of 8 bits.

    An image of 8 bits holds whole numbers of 0 to 255, whatever the batch is stored as.

    Args:
        images: uint8 or float [N, H, W]; values that are not finite do not count.
        sizes: int64 [N, 2], rows (height, width).

    Returns:
        low, high: float32 [N] each, high > low.

    Example:
        >>> byte_range(torch.tensor([[[3.0, 200.0]], [[0.5, 2.5]]]), torch.tensor([[1, 2], [1, 2]]))
        (tensor([0.0000, 0.5000]), tensor([255.0000,   2.5000]))
    """
    low = torch.zeros(len(images), device=images.device)
    high = torch.full_like(low, 255)
    if images.dtype == torch.uint8:
        return low, high
    inside = valid_area(sizes, images) & images.isfinite()
    values = torch.where(inside, images, 0)
    bytes_ = ((values >= 0) & (values <= 255) & (values == values.round())).flatten(1).all(1)
    least = torch.where(inside, values, torch.inf).amin((1, 2)).nan_to_num(posinf=0)
    most = torch.where(inside, values, -torch.inf).amax((1, 2)).nan_to_num(neginf=0)
    most = torch.where(most > least, most, least + least.abs().clamp(min=1))  # a flat image is black
    return torch.where(bytes_, low, least), torch.where(bytes_, high, most)


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """A small CPU tensor on a device, without waiting for what the device is doing."""
    return (values.pin_memory() if device.type == "cuda" else values).to(device, non_blocking=True)


def logit(threshold: float) -> float:
    """The logit above which a probability exceeds a threshold between 0 and 1, exclusive."""
    return math.log(threshold / (1 - threshold))


def last_head(output: Any) -> Any:
    """Of a list or tuple of heads (DNANet in training) the last, which is the one used at inference."""
    return output[-1] if isinstance(output, (tuple, list)) else output
