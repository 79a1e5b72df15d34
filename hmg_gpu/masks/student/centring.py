"""The threshold of each target by its point: a mask whose centroid is not where the point is has the wrong pixels.

People click at the middle of a target. Where the masks of a set have their centroids against the points, and how far
they scatter about that, is told by the set itself (:func:`find_centring`). A mask that grew into clutter, or lost a
part, has its centroid elsewhere, and often another threshold brings it back. So each target takes the threshold that is
most likely together with its point: the usual one, but for a normal deviation of a third in its logit, and a centroid
that lies about the place as those of the set do. No ground truth decides; the width of a third saw that of NUAA-SIRST
and NUDT-SIRST.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hmg_gpu.common.tensors import logit
from hmg_gpu.masks.student.crops import own_pixels
from hmg_gpu.masks.student.placement import LEAST, centroids

DEVIATION = 1 / 3  # of a threshold's logit, normal
STEPS = tuple(0.2 * step for step in range(-9, 10))  # that a threshold's logit may move by
LEAST_VARIANCE = 1 / 12  # of points that are rounded to pixels, in each direction

Centring = tuple[float, float, float]  # centroids against the points: down, across, their variance in pixels^2


def find_centring(masks: Tensor) -> Centring | None:
    """Where masks have their centroids against their points, and their variance about it in each direction.

    Medians, so that masks that went wrong do not count; of normal deviations the median of the squared distance is
    2 ln 2 variances.

    Args:
        masks: bool [P, K, K], each with its point at the centre.

    Returns:
        None where there are too few points.

    Example:
        >>> import torch
        >>> from hmg_gpu.masks.student.centring import find_centring
        >>> masks = torch.zeros(40, 9, 9, dtype=torch.bool)
        >>> masks[:20, 4, 4:6] = masks[20:, 4, 5] = True  # centroids half a pixel and a pixel to the right
        >>> [round(value, 3) for value in find_centring(masks)]
        [0.0, 0.5, 0.083]
    """
    found = centroids(masks)[masks.flatten(1).any(1)].cpu()
    if len(found) < LEAST:
        return None
    place = found.median(0).values
    variance = (found - place).square().sum(1).median() / (2 * math.log(2))
    return (*place.tolist(), max(float(variance), LEAST_VARIANCE))


def deviations(masks: Tensor, centring: Centring) -> Tensor:
    """Squared distances of masks' centroids from where the set has them, in variances: float32 [P]."""
    down, across, variance = centring
    y, x = centroids(masks).unbind(1)
    return ((y - down).square() + (x - across).square()) / variance


def find_levels(probabilities: Tensor, threshold: float, link: float, centring: Centring | None) -> Tensor:
    """The threshold of each target, before it falls with the area: float32 [P, 1, 1].

    Args:
        probabilities: [P, K, K], where annotators have their masks.
        threshold, link: as :func:`hmg_gpu.masks.student.crops.own_pixels`.
        centring: of the set; None: one threshold for all.
    """
    best = torch.full_like(probabilities[:, :1, :1], threshold)
    if centring is None:
        return best
    lowest = torch.full_like(best[:, 0, 0], torch.inf)
    for step in sorted(STEPS, key=abs):  # of two that are alike the nearer one
        level = 1 / (1 + math.exp(-logit(threshold) - step)) if step else threshold
        pixels, usable, _ = own_pixels(probabilities, level, link)
        cost = deviations(pixels, centring) + (step / DEVIATION) ** 2
        better = (usable | (step == 0)) & (cost < lowest)
        lowest = torch.where(better, cost, lowest)
        best = torch.where(better[:, None, None], level, best)
    return best
