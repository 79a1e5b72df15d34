"""Square crops around points: the component at a pixel of each, and all of them united in the images again."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hmg_gpu.common.checks import can_read
from hmg_gpu.plain.components import connected_components


def wide(values: Tensor) -> torch.dtype:
    """The type of sums and thresholds: float64, in which those of 16-bit images are exact; Apple's GPUs have none."""
    return torch.float32 if values.device.type == "mps" else torch.float64


def component_at(masks: Tensor, seeds: Tensor) -> Tensor:
    """The 8-connected component that holds each mask's seed.

    Args:
        masks: bool [P, S, S].
        seeds: int64 [P, 2], rows (y, x) in 0..S - 1.

    Returns:
        bool [P, S, S]; empty where the seed is not in its mask. Nothing waits for an accelerator: there it takes as
        many steps as the longest path through a square has.

    Example:
        >>> import torch
        >>> from hmg_gpu.plain.crops import component_at
        >>> component_at(torch.tensor([[[1, 0, 1], [0, 1, 0], [0, 0, 0]]]).bool(), torch.tensor([[0, 0]])).int()
        tensor([[[1, 0, 1],
                 [0, 1, 0],
                 [0, 0, 0]]], dtype=torch.int32)
    """
    count, height, width = masks.shape
    place = (seeds[:, 0] * width + seeds[:, 1])[:, None]  # [P, 1]
    if can_read(masks):
        labels = connected_components(masks).labels().flatten(1)  # [P, S * S]
        return ((labels == labels.gather(1, place)) & (labels > 0)).view(masks.shape)
    inside = masks.half()
    found = torch.zeros_like(inside).flatten(1).scatter(1, place, 1).view(masks.shape) * inside
    for _ in range(height * width // 2 if count else 0):
        found = F.max_pool2d(found, 3, stride=1, padding=1) * inside
    return found > 0


def unite(shape: torch.Size, image: Tensor, position: Tensor, masks: Tensor) -> Tensor:
    """The union of the masks of crops in their images: bool [N, H, W].

    Args:
        shape: (N, H, W).
        image: int64 [P], the image of each crop.
        position: int64 [P, S, S], y * W + x of each of its pixels.
        masks: bool [P, S, S].

    Example:
        >>> import torch
        >>> from hmg_gpu.plain.crops import unite
        >>> unite((1, 2, 2), torch.tensor([0]), torch.tensor([[[1]]]), torch.tensor([[[True]]])).int()
        tensor([[[0, 1],
                 [0, 0]]], dtype=torch.int32)
    """
    count, height, width = shape
    pixels = count * height * width
    canvas = torch.zeros(pixels + 1, dtype=torch.bool, device=masks.device)  # the last is for what is in no mask
    place = torch.where(masks, image[:, None, None] * (height * width) + position, pixels)
    return canvas.index_fill_(0, place.flatten(), True)[:pixels].view(shape)
