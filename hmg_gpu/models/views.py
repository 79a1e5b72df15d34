"""Test-time flips: a network's prediction averaged over mirrored and transposed views of an image."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hmg_gpu.common.errors import InputError
from hmg_gpu.common.tensors import last_head

VIEWS = (1, 2, 4, 8)  # the image; and mirrored across; and down; and all of these transposed


class Views(nn.Module):
    """The mean probability of several views, as a logit.

    Args:
        model: gives logits [B, 1, H, W], or a tuple of heads whose last one is taken.
        count: of ``VIEWS``; a prediction takes so many times as long.

    Raises:
        InputError: another count.

    Example:
        >>> Views(nn.Conv2d(1, 1, 3, padding=1), 8)(torch.zeros(2, 1, 32, 64)).shape
        torch.Size([2, 1, 32, 64])
    """

    def __init__(self, model: nn.Module, count: int) -> None:
        super().__init__()
        if count not in VIEWS:
            raise InputError(f"views = {count}: expected one of {', '.join(map(str, VIEWS))}")
        self.model, self.count = model, count

    def forward(self, images: Tensor) -> Tensor:
        total = torch.zeros_like(images[:, :1], dtype=torch.float32)
        for view in range(self.count):
            total += _turned_back(last_head(self.model(_turned(images, view))).float().sigmoid(), view)
        return torch.logit(total / self.count, eps=1e-7)


def _turned(images: Tensor, view: int) -> Tensor:
    axes = [axis for axis, bit in ((-1, 1), (-2, 2)) if view & bit]
    images = images.flip(axes)
    return images.transpose(-1, -2).contiguous() if view & 4 else images


def _turned_back(values: Tensor, view: int) -> Tensor:
    values = values.transpose(-1, -2) if view & 4 else values
    return values.flip([axis for axis, bit in ((-1, 1), (-2, 2)) if view & bit])
