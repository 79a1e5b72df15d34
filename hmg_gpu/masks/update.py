"""Pseudo mask updating (HMG Sec. 3.2): a network's prediction corrects the initial masks.

prediction --false_alarm_filter (FAF)--> filtered --retrieve_missed (MDR)--> hybrid mask

FAF's decision and soft fusion are in ``hmg_gpu/plain/update.py`` and, on GPUs with Triton, in ``kernels/update.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hmg_gpu.common.backend import backend_for
from hmg_gpu.common.checks import (
    can_read,
    check_batch,
    check_mask,
    check_offsets,
    check_points,
    check_same,
    check_sizes,
)
from hmg_gpu.masks.components import connected_components
from hmg_gpu.plain import update as plain


@torch.no_grad()
def false_alarm_filter(
    prediction: Tensor,
    points: Tensor,
    *,
    radius: int = 30,
    sizes: Tensor | None = None,
    offsets: Tensor | None = None,
    threshold: float = 0.0,
) -> Tensor:
    """Erase the predicted components that lie far from every point label (HMG Sec. 3.2.1, FAF).

    A component (8-connected) is kept when the L1 distance from its centroid to some point of its image is at most r.
    Multiplied by the component's area the comparison is exact in integers, the same on every device:

        |sum_y - area * y| + |sum_x - area * x| <= r * area

    An image without points loses every component.

    Args:
        prediction: bool [B, H, W], the network's output after its threshold; or its logits, float32, float16 or
            bfloat16 [B, H, W], foreground where they are above ``threshold``.
        points: int64 [P, 3], rows (image, y, x) in pixels, 0-based.
        radius: r in pixels, a whole number; 30 in the paper.
        sizes: int64 [B, 2], valid (height, width) of padded images; predictions outside come out False.
        offsets: int64 [B + 1], where ``points`` are ordered by image: rows ``offsets[b]`` to ``offsets[b + 1]`` are
            image b's, as in :attr:`hmg_gpu.data.ImageSet.offsets`. The kernels sort the points each time without.
        threshold: of logits; a bool prediction has none.

    Returns:
        bool [B, H, W], a subset of the prediction.

    Raises:
        TypeError: prediction is neither bool nor logits. ValueError: a wrong shape or radius, or, on the CPU, a point
            outside its image (the row is named); on an accelerator such a point is ignored.

    Example:
        >>> import torch
        >>> from hmg_gpu import false_alarm_filter
        >>> prediction = torch.tensor([[[1, 1, 0, 0, 0, 0, 1]]]).bool()  # one image of one row, two components
        >>> false_alarm_filter(prediction, torch.tensor([[0, 0, 0]]), radius=3)[0].int()
        tensor([[1, 1, 0, 0, 0, 0, 0]], dtype=torch.int32)
    """
    _check(prediction, points, radius, sizes, offsets)
    if backend_for(prediction) == "triton":
        from hmg_gpu.kernels.update import false_alarm_filter as fused

        return fused(prediction, points, radius=radius, sizes=sizes, offsets=offsets, threshold=threshold)
    prediction = prediction if prediction.dtype == torch.bool else prediction > threshold
    components = connected_components(prediction, sizes)
    return components.mask(plain.near_a_point(components, points, radius, sizes))


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

    Example:
        >>> import torch
        >>> from hmg_gpu import retrieve_missed
        >>> initial = torch.tensor([[[0, 1, 0, 0, 1]]]).bool()
        >>> filtered = torch.tensor([[[1, 1, 1, 0, 0]]]).bool()  # the second target was missed
        >>> retrieve_missed(initial, filtered)[0].int()
        tensor([[1, 1, 1, 0, 1]], dtype=torch.int32)
    """
    check_mask(initial, "initial")
    check_mask(filtered, "filtered")
    check_same(initial, filtered, "initial", "filtered")
    if can_read(initial):  # NumPy stays on one thread: too little work for several
        return torch.from_numpy(initial.numpy() | filtered.numpy())
    return initial | filtered


@torch.no_grad()
def update(
    prediction: Tensor,
    initial: Tensor,
    points: Tensor,
    *,
    radius: int = 30,
    sizes: Tensor | None = None,
    offsets: Tensor | None = None,
    threshold: float = 0.0,
) -> Tensor:
    """Correct the initial masks by a prediction (HMG Sec. 3.2): FAF, then MDR.

    Args:
        prediction, points, radius, sizes, offsets, threshold: as :func:`false_alarm_filter`.
        initial: bool [B, H, W], masks from :func:`hmg_gpu.point_to_mask`; not those of an earlier update.

    Returns:
        bool [B, H, W], the hybrid masks; a superset of ``initial``.

    Raises:
        TypeError, ValueError: as :func:`false_alarm_filter` and :func:`retrieve_missed`.

    Example:
        >>> import torch
        >>> from hmg_gpu import update
        >>> initial = torch.tensor([[[0, 1, 0, 0, 0, 0, 0, 0]]]).bool()
        >>> prediction = torch.tensor([[[1, 1, 1, 0, 0, 0, 0, 1]]]).bool()  # a whole target and a false alarm
        >>> update(prediction, initial, torch.tensor([[0, 0, 1]]), radius=3)[0].int()
        tensor([[1, 1, 1, 0, 0, 0, 0, 0]], dtype=torch.int32)
    """
    _check(prediction, points, radius, sizes, offsets)
    check_mask(initial, "initial")
    check_same(prediction, initial, "prediction", "initial")
    if backend_for(prediction) == "triton":
        from hmg_gpu.kernels.update import update as fused

        return fused(prediction, initial, points, radius=radius, sizes=sizes, offsets=offsets, threshold=threshold)
    filtered = false_alarm_filter(prediction, points, radius=radius, sizes=sizes, threshold=threshold)
    return retrieve_missed(initial, filtered)


@torch.no_grad()
def corrections(
    prediction: Tensor, initial: Tensor, points: Tensor, *, radius: int = 30, sizes: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Where FAF and MDR correct a prediction, to train on as hard examples: false alarms, and missed targets.

    The number of components decides the results' sizes, so on an accelerator this synchronises.

    Args:
        prediction: bool [B, H, W].
        initial: bool [B, H, W], as for :func:`retrieve_missed`.
        points, radius, sizes: as :func:`false_alarm_filter`.

    Returns:
        Two int64 [A, 3], rows (image, y, x) of centroids rounded to pixels, ordered by image: the components that
        :func:`false_alarm_filter` erases, and the initial ones that no pixel of the filtered prediction touches.

    Raises:
        TypeError, ValueError: as :func:`false_alarm_filter` and :func:`retrieve_missed`.

    Example:
        >>> import torch
        >>> from hmg_gpu.masks.update import corrections
        >>> prediction = torch.tensor([[[1, 1, 0, 0, 0, 0, 1, 1, 1]]]).bool()  # one image of one row
        >>> initial = torch.tensor([[[0, 1, 0, 1, 0, 0, 0, 0, 0]]]).bool()  # two targets
        >>> corrections(prediction, initial, torch.tensor([[0, 0, 1], [0, 0, 3]]), radius=3)
        (tensor([[0, 0, 7]]), tensor([[0, 0, 3]]))
    """
    _check(prediction, points, radius, sizes, None)
    check_mask(initial, "initial")
    check_same(initial, prediction, "initial", "prediction")
    predicted, targets = connected_components(prediction, sizes), connected_components(initial, sizes)
    kept = plain.near_a_point(predicted, points, radius, sizes)
    touched = torch.zeros(len(targets), dtype=torch.bool, device=kept.device)
    touched[targets.component[predicted.mask(kept).view(-1)[targets.pixels]]] = True
    return predicted.places[~kept], targets.places[~touched]


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
    offsets: Tensor | None = None,
) -> Tensor:
    """Correct soft initial masks by a network's probabilities (beyond the paper, in the place of MDR's union).

        hybrid = weight * initial + (1 - weight) * probability >= 0.5    where initial > 0, that is inside a box
        hybrid = FAF(probability > threshold)                            elsewhere

    The union can only add to the initial masks; here a network that disagrees strongly can take a doubtful pixel away.
    Where ``initial`` is at least 0.5 / ``weight``, no prediction can.

    Args:
        probability: floating point [B, H, W] in 0 to 1, the network's output after a sigmoid; NaN counts as 0.
        initial: float32 [B, H, W] from :func:`hmg_gpu.point_to_probability`; 0 outside the boxes.
        points, radius, sizes, offsets: as :func:`false_alarm_filter`.
        weight: of ``initial``, 0 to 1.
        threshold: probability above which a pixel outside the boxes is foreground.

    Returns:
        bool [B, H, W]; nothing in the padding.

    Raises:
        TypeError: an argument is not floating point.
        ValueError: the shapes differ, weight or threshold lie outside 0 to 1, or as :func:`false_alarm_filter`.

    Example:
        >>> import torch
        >>> from hmg_gpu import soft_update
        >>> initial = torch.tensor([[[0.9, 0.6, 0.6, 0.0, 0.0, 0.0, 0.0]]])  # a box of three pixels
        >>> network = torch.tensor([[[0.1, 0.1, 0.9, 0.9, 0.0, 0.0, 0.9]]])  # doubts the second, sees a fourth
        >>> soft_update(network, initial, torch.tensor([[0, 0, 0]]), radius=3)[0].int()
        tensor([[1, 0, 1, 1, 0, 0, 0]], dtype=torch.int32)
    """
    for name, value in (("probability", probability), ("initial", initial)):
        if not value.is_floating_point():
            raise TypeError(f"{name}: expected floating point, got {value.dtype}; pass probabilities, not masks")
    check_same(probability, initial, "probability", "initial")
    if not (0 <= weight <= 1 and 0 <= threshold <= 1):
        raise ValueError(f"weight {weight}, threshold {threshold}: expected numbers from 0 to 1")
    probability, initial = probability.float(), initial.float()
    if backend_for(probability) == "triton":
        from hmg_gpu.kernels.update import soft_update as fused

        _check_points(probability, points, radius, sizes, offsets)
        settings = {"radius": radius, "sizes": sizes, "offsets": offsets, "threshold": threshold, "weight": weight}
        return fused(probability, initial, points, **settings)
    filtered = false_alarm_filter(probability > threshold, points, radius=radius, sizes=sizes, offsets=offsets)
    return plain.fuse(probability, initial, filtered, weight)


def _check(prediction: Tensor, points: Tensor, radius: int, sizes: Tensor | None, offsets: Tensor | None) -> None:
    if prediction.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        check_mask(prediction, "prediction")
    else:
        check_batch(prediction, "prediction")
    _check_points(prediction, points, radius, sizes, offsets)


def _check_points(
    prediction: Tensor, points: Tensor, radius: int, sizes: Tensor | None, offsets: Tensor | None
) -> None:
    check_sizes(sizes, prediction)
    check_points(points, prediction, sizes)
    check_offsets(offsets, points, prediction)
    if not isinstance(radius, int) or radius < 0:
        raise ValueError(f"radius: expected a whole number of pixels, 0 or more, got {radius!r}")
