"""Counts behind IoU, Pd and Fa without the kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from hmg_gpu.common.checks import can_read
from hmg_gpu.plain.components import Components, connected_components, pairs_of


def counts_on_host(prediction: Tensor, target: Tensor, sizes: Tensor | None, distance: float) -> Tensor:
    """:func:`detection_counts` without the kernels; the number of components decides what Python does."""
    batch, height, width = prediction.shape
    predicted, truth = connected_components(prediction, sizes), connected_components(target, sizes)
    # Foreground is sparse: the counts follow from its pixels, no plane is read again.
    predicted_pixels, target_pixels = _per_image(predicted, predicted.area), _per_image(truth, truth.area)
    if can_read(target):  # NumPy stays on one thread: too little work for several
        found = predicted.pixels.numpy()  # [F]
        shared = torch.from_numpy(found[target.reshape(-1).numpy()[found]] // (height * width))
    else:
        shared = predicted.pixels[target.reshape(-1)[predicted.pixels]] // (height * width)
    intersection = torch.bincount(shared, minlength=batch)  # where the prediction lies on the target
    union = predicted_pixels + target_pixels - intersection
    pixels = torch.full_like(union, height * width) if sizes is None else sizes.prod(1)

    match = _match(predicted, truth, distance)  # [ground-truth components], -1 where none
    hit = match >= 0
    unmatched = torch.ones(len(predicted), dtype=torch.bool, device=match.device)
    unmatched[match[hit]] = False
    targets, matched = _per_image(truth, torch.ones_like(truth.area)), _per_image(truth, hit.long())
    false_alarms = _per_image(predicted, predicted.area * unmatched)
    columns = (intersection, union, matched, targets, false_alarms, predicted_pixels - intersection, pixels)
    return torch.stack(columns, dim=1)


def _per_image(components: Components, values: Tensor) -> Tensor:
    """Sum int64 values [K] of components over each image: int64 [B]."""
    return values.new_zeros(components.shape[0]).index_add_(0, components.image, values)


def _match(predicted: Components, truth: Components, distance: float) -> Tensor:
    """Greedy matching in raster order: int64 [ground-truth components], the predicted component or -1."""
    # Pair every ground-truth component with every predicted one of its image; only close pairs remain.
    per_image = torch.bincount(predicted.image, minlength=predicted.shape[0])
    left, number = pairs_of(per_image.index_select(0, truth.image))
    first = (per_image.cumsum(0) - per_image).index_select(0, truth.image)
    right = number + first.index_select(0, left)
    # Centroid distance times both areas, in whole numbers: exact where a distance of exactly 3 px must not match (up to
    # areas of 4,700 pixels each; beyond that the squares round).
    area, sum_y, sum_x = (each.index_select(0, right) for each in (predicted.area, predicted.sum_y, predicted.sum_x))
    true_area, true_y, true_x = (each.index_select(0, left) for each in (truth.area, truth.sum_y, truth.sum_x))
    offset_y, offset_x = sum_y * true_area - true_y * area, sum_x * true_area - true_x * area
    close = offset_y.double() ** 2 + offset_x.double() ** 2 < (distance * (area * true_area).double()) ** 2

    match = torch.full((len(truth),), -1)
    taken: set[int] = set()
    # About one pair a target is left: the order of the field's loop is kept by walking them.
    for target, candidate in zip(left[close].tolist(), right[close].tolist(), strict=True):
        if match[target] < 0 and candidate not in taken:
            match[target] = candidate
            taken.add(candidate)
    return match.to(predicted.area.device)
