"""Pseudo mask updating (HMG Sec. 3.2): a network's prediction corrects the initial masks.

prediction --false_alarm_filter (FAF)--> filtered --retrieve_missed (MDR)--> hybrid mask
"""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import check_mask, check_points, check_same, check_sizes
from .components import Components, backend_for, connected_components


@torch.no_grad()
def false_alarm_filter(prediction: Tensor, points: Tensor, *, radius: int = 30, sizes: Tensor | None = None) -> Tensor:
    """Erase the predicted components that lie far from every point label (HMG Sec. 3.2.1, FAF).

    A component (8-connected) is kept when the L1 distance from its centroid to some point of its image is at most r.
    Multiplied by the component's area the comparison is exact in integers, the same on every device:

        |sum_y - area * y| + |sum_x - area * x| <= r * area

    An image without points loses every component.

    Args:
        prediction: bool [B, H, W], the network's output after its threshold.
        points: int64 [P, 3], rows (image, y, x) in pixels, 0-based.
        radius: r in pixels, a whole number; 30 in the paper.
        sizes: int64 [B, 2], valid (height, width) of padded images; predictions outside come out False.

    Returns:
        bool [B, H, W], a subset of ``prediction``.

    Raises:
        TypeError: prediction is not bool. ValueError: a wrong shape or radius, or, on the CPU, a point outside its
            image (the row is named); on an accelerator such a point is ignored.
    """
    _check(prediction, points, radius, sizes)
    if backend_for(prediction) == "triton":
        from .kernels.update import false_alarm_filter as fused

        return fused(prediction, points, radius=radius, sizes=sizes)
    components = connected_components(prediction, sizes)
    return components.mask(near_a_point(components, points, radius, sizes))


@torch.no_grad()
def retrieve_missed(initial: Tensor, filtered: Tensor) -> Tensor:
    """Unite the point-derived mask with the filtered prediction (HMG Sec. 3.2.2, MDR).

    The network completes pixels beyond the P2B window; the initial mask brings back the targets that the network
    missed.

        hybrid = initial OR filtered

    Args:
        initial: bool [B, H, W], masks from :func:`hmg_gpu.point_to_mask`.
        filtered: bool [B, H, W], predictions after :func:`false_alarm_filter`.

    Returns:
        bool [B, H, W]; a superset of both arguments.

    Raises:
        TypeError: an argument is not bool; threshold logits with ``logits > 0`` first.
        ValueError: the shapes differ.
    """
    check_mask(initial, "initial")
    check_mask(filtered, "filtered")
    check_same(initial, filtered, "initial", "filtered")
    return initial | filtered


@torch.no_grad()
def update(
    prediction: Tensor, initial: Tensor, points: Tensor, *, radius: int = 30, sizes: Tensor | None = None
) -> Tensor:
    """Correct the initial masks by a prediction (HMG Sec. 3.2): FAF, then MDR.

    Args:
        prediction: bool [B, H, W], the network's output after its threshold.
        initial: bool [B, H, W], masks from :func:`hmg_gpu.point_to_mask`; not those of an earlier update.
        points, radius, sizes: as :func:`false_alarm_filter`.

    Returns:
        bool [B, H, W], the hybrid masks; a superset of ``initial``.

    Raises:
        TypeError, ValueError: as :func:`false_alarm_filter` and :func:`retrieve_missed`.
    """
    _check(prediction, points, radius, sizes)
    check_mask(initial, "initial")
    check_same(prediction, initial, "prediction", "initial")
    if backend_for(prediction) == "triton":
        from .kernels.update import update as fused

        return fused(prediction, initial, points, radius=radius, sizes=sizes)
    return retrieve_missed(initial, false_alarm_filter(prediction, points, radius=radius, sizes=sizes))


@torch.no_grad()
def soft_update(
    probability: Tensor,
    initial: Tensor,
    points: Tensor,
    *,
    radius: int = 30,
    weight: float = 0.7,
    threshold: float = 0.5,
    sizes: Tensor | None = None,
) -> Tensor:
    """Correct soft initial masks by a network's probabilities (beyond the paper, in the place of MDR's union).

        hybrid = weight * initial + (1 - weight) * probability >= 0.5    where initial > 0, that is inside a box
        hybrid = FAF(probability > threshold)                            elsewhere

    The union can only add to the initial masks; here a network that disagrees strongly can take a doubtful pixel away.
    Where ``initial`` is at least 0.5 / ``weight``, no prediction can.

    Args:
        probability: floating point [B, H, W] in 0 to 1, the network's output after a sigmoid; NaN counts as 0.
        initial: float32 [B, H, W] from :func:`hmg_gpu.point_to_probability`; 0 outside the boxes.
        points, radius, sizes: as :func:`false_alarm_filter`.
        weight: of ``initial``, 0 to 1.
        threshold: probability above which a pixel outside the boxes is foreground.

    Returns:
        bool [B, H, W]; nothing in the padding.

    Raises:
        TypeError: an argument is not floating point.
        ValueError: the shapes differ, weight or threshold lie outside 0 to 1, or as :func:`false_alarm_filter`.
    """
    for name, value in (("probability", probability), ("initial", initial)):
        if not value.is_floating_point():
            raise TypeError(f"{name}: expected floating point, got {value.dtype}; pass probabilities, not masks")
    check_same(probability, initial, "probability", "initial")
    if not (0 <= weight <= 1 and 0 <= threshold <= 1):
        raise ValueError(f"weight {weight}, threshold {threshold}: expected numbers from 0 to 1")
    probability, initial = probability.float(), initial.float()
    if backend_for(probability) == "triton":
        from .kernels.update import soft_update as fused

        _check_points(probability, points, radius, sizes)
        return fused(probability, initial, points, radius=radius, sizes=sizes, threshold=threshold, weight=weight)
    filtered = false_alarm_filter(probability > threshold, points, radius=radius, sizes=sizes)
    return fuse(probability, initial, filtered, weight)


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


def _check(prediction: Tensor, points: Tensor, radius: int, sizes: Tensor | None) -> None:
    check_mask(prediction, "prediction")
    _check_points(prediction, points, radius, sizes)


def _check_points(prediction: Tensor, points: Tensor, radius: int, sizes: Tensor | None) -> None:
    check_sizes(sizes, prediction)
    check_points(points, prediction, sizes)
    if not isinstance(radius, int) or radius < 0:
        raise ValueError(f"radius: expected a whole number of pixels, 0 or more, got {radius!r}")
