"""The paper in NumPy: one image, one point, one component at a time.

Slow and obvious on purpose. The library is held against these functions by the tests and timed against them by
bench/. Same names as in hmg_gpu, but everything here takes a single image:

    image   [H, W] intensities          mask, prediction, initial, target   bool [H, W]
    point   (y, x), 0-based             box   (y0, x0, y1, x1), half open

Labels come from scipy.ndimage.label, which numbers components by their first pixel in raster order.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Point = Sequence[int]
Box = tuple[int, int, int, int]
EIGHT = np.ones((3, 3), dtype=bool)


# ---- Sec. 3.1.1, point to box ---------------------------------------------------------------------------------------


def boundary_index(strip: NDArray) -> int:
    """How far the target reaches along one direction; column 0 of `strip` [across, along] holds the point."""
    length = strip.shape[1]
    if length < 3:
        return length - 1
    # The paper compares means; the counts are the same on both sides, so sums decide alike, and exactly for integers.
    across_sum = strip.sum(axis=0)
    peak = strip.max(axis=0)
    change = np.abs(peak[1:] - peak[:-1])  # D
    large = change * change.size > change.sum()  # D > T
    if not large.any():
        return 0
    edge = int(change.argmax())
    while edge + 1 < large.size and large[edge + 1]:
        edge += 1
    return int((across_sum <= across_sum[edge + 1]).argmax())  # the first; edge + 1 itself always qualifies


def point_to_box(image: NDArray, point: Point, extent: int = 25, half_width: int = 4) -> Box:
    """P2B: the box around the target under `point`."""
    y, x = int(point[0]), int(point[1])
    near_y, near_x = max(y - extent, 0), max(x - extent, 0)  # where the search regions begin
    rows = image[max(y - half_width, 0) : y + half_width + 1, near_x : x + extent + 1].astype(np.float64)
    columns = image[near_y : y + extent + 1, max(x - half_width, 0) : x + half_width + 1].astype(np.float64).T
    up = boundary_index(columns[:, y - near_y :: -1])
    down = boundary_index(columns[:, y - near_y :])
    left = boundary_index(rows[:, x - near_x :: -1])
    right = boundary_index(rows[:, x - near_x :])
    return y - up, x - left, y + down + 1, x + right + 1


# ---- Sec. 3.1.2, box to mask ----------------------------------------------------------------------------------------


def part_probability(part: NDArray, at_point: float, alpha: float) -> NDArray:
    """Equations (1) and (2) on one part of the box, with the part's own minimum, maximum and mean."""
    low, high = float(part.min()), float(part.max())
    # Rounded to the image's own float32, or a constant part could come out a hair above or below its own sigma.
    sigma = float(np.float32(alpha * at_point + (1 - alpha) * float(part.sum()) / part.size))
    below = 0.5 * (part - low) / (sigma - low) if sigma > low else 0.5
    above = 1 - 0.5 * (high - part) / (high - sigma) if high > sigma else 1.0
    return np.where(part <= sigma, below, above)


def box_to_probability(image: NDArray, point: Point, box: Box, alpha: float = 0.15) -> NDArray:
    """P_f of equation (3) inside the box, float64 [y1 - y0, x1 - x0]."""
    y0, x0, y1, x1 = box
    inside = image[y0:y1, x0:x1].astype(np.float64)
    row, column = int(point[0]) - y0, int(point[1]) - x0
    at_point = float(inside[row, column])

    def joined(box_part: NDArray, k: int) -> NDArray:
        """The parts before and after row k; row k belongs to both and gets the mean of its two values."""
        before = part_probability(box_part[: k + 1], at_point, alpha)
        after = part_probability(box_part[k:], at_point, alpha)
        return np.concatenate((before[:-1], 0.5 * (before[-1:] + after[:1]), after[1:]))

    whole = part_probability(inside, at_point, alpha)
    vertical = joined(inside, row)
    horizontal = joined(inside.T, column).T
    return (whole + vertical + horizontal) / 3


def box_to_mask(image: NDArray, points: Iterable[Point], boxes: Iterable[Box], alpha: float = 0.15) -> NDArray:
    """B2M, equation (4): the union of the masks of all points of one image."""
    mask = np.zeros(image.shape, dtype=bool)
    for point, box in zip(points, boxes, strict=True):
        y0, x0, y1, x1 = box
        mask[y0:y1, x0:x1] |= box_to_probability(image, point, box, alpha) >= 0.5
    return mask


def point_to_probability(
    image: NDArray, points: Iterable[Point], extent: int = 25, half_width: int = 4, alpha: float = 0.15
) -> NDArray:
    """P_f of all points of one image, float64 [H, W]: zero outside the boxes, the maximum where boxes overlap."""
    probability = np.zeros(image.shape)
    for point in points:
        y0, x0, y1, x1 = box = point_to_box(image, point, extent, half_width)
        inside = probability[y0:y1, x0:x1]
        np.maximum(inside, box_to_probability(image, point, box, alpha), out=inside)
    return probability


def point_to_mask(
    image: NDArray, points: Sequence[Point], extent: int = 25, half_width: int = 4, alpha: float = 0.15
) -> NDArray:
    """PMG: P2B, then B2M, for all points of one image."""
    boxes = [point_to_box(image, point, extent, half_width) for point in points]
    return box_to_mask(image, points, boxes, alpha)


# ---- Sec. 3.2, pseudo mask updating ---------------------------------------------------------------------------------


def false_alarm_filter(prediction: NDArray, points: Iterable[Point], radius: int = 30) -> NDArray:
    """FAF: keep a component when the L1 distance of its centroid to some point is at most `radius`."""
    points = [(int(y), int(x)) for y, x in points]
    labels, count = ndimage.label(prediction, EIGHT)
    filtered = np.zeros(prediction.shape, dtype=bool)
    for label in range(1, count + 1):
        ys, xs = np.nonzero(labels == label)
        area, sum_y, sum_x = len(ys), int(ys.sum()), int(xs.sum())
        # Distance and radius are multiplied by the area, which leaves whole numbers only.
        if any(abs(sum_y - area * y) + abs(sum_x - area * x) <= radius * area for y, x in points):
            filtered[ys, xs] = True
    return filtered


def retrieve_missed(initial: NDArray, filtered: NDArray) -> NDArray:
    """MDR: the filtered prediction, and the initial mask for what the network missed."""
    return initial | filtered


def update(prediction: NDArray, initial: NDArray, points: Iterable[Point], radius: int = 30) -> NDArray:
    """The hybrid mask: FAF, then MDR."""
    return retrieve_missed(initial, false_alarm_filter(prediction, points, radius))


# ---- detection metrics, as LESPS defines them -----------------------------------------------------------------------


def components(mask: NDArray) -> list[tuple[int, Fraction, Fraction]]:
    """(area, centroid y, centroid x) of each 8-connected component, in raster order of the first pixel."""
    labels, count = ndimage.label(mask, EIGHT)
    found = []
    for label in range(1, count + 1):
        ys, xs = np.nonzero(labels == label)
        found.append((len(ys), Fraction(int(ys.sum()), len(ys)), Fraction(int(xs.sum()), len(xs))))
    return found


def detection_metrics(pairs: Iterable[tuple[NDArray, NDArray]], distance: float = 3.0) -> dict[str, float]:
    """IoU, nIoU, Pd and Fa over (prediction, target) pairs; fractions, not percent. Undefined ratios are NaN."""
    intersection = union = matched = targets = false_alarm_pixels = pixels = wrong_pixels = 0
    image_ious = []
    for prediction, target in pairs:
        both, either = int((prediction & target).sum()), int((prediction | target).sum())
        intersection += both
        union += either
        pixels += target.size
        wrong_pixels += int((prediction & ~target).sum())
        if either > 0:
            image_ious.append(both / either)

        remaining = components(prediction)
        for _, target_y, target_x in components(target):
            targets += 1
            for candidate in remaining:
                _, y, x = candidate
                if (y - target_y) ** 2 + (x - target_x) ** 2 < Fraction(distance) ** 2:
                    matched += 1
                    remaining.remove(candidate)
                    break
        false_alarm_pixels += sum(area for area, _, _ in remaining)

    def ratio(part: float, whole: float) -> float:
        return part / whole if whole else float("nan")

    return {
        "intersection": intersection,
        "union": union,
        "iou": ratio(intersection, union),
        "niou": ratio(sum(image_ious), len(image_ious)),
        "matched": matched,
        "targets": targets,
        "pd": ratio(matched, targets),
        "false_alarm_pixels": false_alarm_pixels,
        "pixels": pixels,
        "fa": ratio(false_alarm_pixels, pixels),
        "pixel_fa": ratio(wrong_pixels, pixels),
    }


# ---- beyond the paper -----------------------------------------------------------------------------------------------


def soft_update(
    probability: NDArray,
    initial: NDArray,
    points: Iterable[Point],
    radius: int = 30,
    weight: float = 0.7,
    threshold: float = 0.5,
) -> NDArray:
    """Inside a box (initial > 0) the two probabilities are averaged, elsewhere the prediction is filtered."""
    filtered = false_alarm_filter(probability > threshold, points, radius)
    hybrid = filtered.copy()
    for y, x in zip(*np.nonzero(initial > 0), strict=True):
        hybrid[y, x] = weight * initial[y, x] + (1 - weight) * probability[y, x] >= 0.5
    return hybrid
