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


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """A small CPU tensor on a device, without waiting for what the device is doing."""
    return (values.pin_memory() if device.type == "cuda" else values).to(device, non_blocking=True)


def logit(threshold: float) -> float:
    """The logit above which a probability exceeds a threshold between 0 and 1, exclusive."""
    return math.log(threshold / (1 - threshold))


def last_head(output: Any) -> Any:
    """Of a list or tuple of heads (DNANet in training) the last, which is the one used at inference."""
    return output[-1] if isinstance(output, (tuple, list)) else output
