"""The decision of FAF and the last step of soft fusion in plain torch; ``kernels/update.py`` must equal them."""

from __future__ import annotations

import torch
from torch import Tensor

from hmg_gpu.plain.components import Components


def fuse(probability: Tensor, initial: Tensor, filtered: Tensor, weight: float) -> Tensor:
    """The last step of :func:`soft_update`: bool [B, H, W] of float32 probabilities and FAF's result."""
    fused = weight * initial + (1 - weight) * probability.nan_to_num(nan=0.0) >= 0.5
    return torch.where(initial > 0, fused, filtered)


def near_a_point(components: Components, points: Tensor, radius: int, sizes: Tensor | None = None) -> Tensor:
    """Which components FAF keeps: bool [K]."""
    batch, height, width = components.shape
    image, y, x = points.unbind(1)
    # A point outside its image (possible on accelerators only) counts for no component.
    inside = (image >= 0) & (image < batch)
    if batch:
        limits = points.new_tensor([height, width]).expand(batch, 2) if sizes is None else sizes
        limits = limits[image.clamp(0, batch - 1)]
        inside &= (points[:, 1:] >= 0).all(1) & (points[:, 1:] < limits).all(1)
    points = points[inside]
    points = points[points[:, 0].argsort(stable=True)]
    counts = torch.bincount(points[:, 0], minlength=batch)  # points of each image

    # Pair every component with every point of its image.
    pairs = counts[components.image]  # [K]
    component = torch.repeat_interleave(pairs)  # [pairs]
    start = (counts.cumsum(0) - counts)[components.image]
    point = torch.arange(len(component), device=points.device) - (pairs.cumsum(0) - pairs - start)[component]
    _, y, x = points[point].unbind(1)
    area = components.area[component]
    distance = (components.sum_y[component] - area * y).abs() + (components.sum_x[component] - area * x).abs()
    kept = torch.zeros(len(components), dtype=torch.bool, device=points.device)
    kept[component[distance <= radius * area]] = True
    return kept
