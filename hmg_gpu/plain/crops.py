"""Square crops around points: the component at a pixel of each, and all of them united in the images again."""

from __future__ import annotations

from collections.abc import Iterable

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


def unite(images: Tensor, parts: Iterable[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """The union of the masks of crops in their images: bool [N, H, W].

    Args:
        images: [N, H, W], of which the shape and the device are taken.
        parts: what :meth:`hmg_gpu.masks.Maker.each` yields: points int64 [p, 3], rows (image, y, x); int64 [p, S, S],
            the position y * W + x of each pixel of their crops; bool [p, S, S], the masks.

    Example:
        >>> import torch
        >>> from hmg_gpu.plain.crops import unite
        >>> part = torch.tensor([[0, 0, 1]]), torch.tensor([[[1]]]), torch.tensor([[[True]]])
        >>> unite(torch.zeros(1, 2, 2), [part]).int()
        tensor([[[0, 1],
                 [0, 0]]], dtype=torch.int32)
    """
    pixels, plane = images.numel(), images.shape[1] * images.shape[2]
    canvas = torch.zeros(pixels + 1, dtype=torch.bool, device=images.device)  # the last is for what is in no mask
    for points, position, masks in parts:
        place = torch.where(masks, points[:, :1, None] * plane + position, pixels)
        canvas.index_fill_(0, place.flatten(), True)
    return canvas[:pixels].view(images.shape)
