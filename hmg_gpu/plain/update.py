"""The decision of FAF and the last step of soft fusion in plain torch; ``kernels/update.py`` must equal them."""

from __future__ import annotations

import torch
from torch import Tensor

from hmg_gpu.plain.components import Components, pairs_of


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
    component, number = pairs_of(counts.index_select(0, components.image))  # [pairs]
    start = (counts.cumsum(0) - counts).index_select(0, components.image)  # [K]
    _, y, x = points.index_select(0, number + start.index_select(0, component)).unbind(1)
    moments = (components.area, components.sum_y, components.sum_x)
    area, sum_y, sum_x = (each.index_select(0, component) for each in moments)
    distance = (sum_y - area * y).abs() + (sum_x - area * x).abs()
    kept = torch.zeros(len(components), dtype=torch.bool, device=points.device)
    kept[component[distance <= radius * area]] = True
    return kept
