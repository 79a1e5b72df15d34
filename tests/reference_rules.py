"""Rules of label evolution in NumPy: one image, one region, one pixel's average at a time. Slow and obvious on purpose.

    label   uint8 [H, W], 255 is 1      probability   float [H, W] in 0 to 1

Labels come from scipy.ndimage.label, which numbers components by their first pixel in raster order. What an update
averages is kept in float64 in units of 1 / 255; the float32 probabilities of the tests make that exact.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

EIGHT = np.ones((3, 3), dtype=bool)


def regions(label: NDArray) -> Iterator[tuple[int, int, int, tuple[int, int]]]:
    """Area, truncated centroid and (height, width) of the regions above 0.5 in raster order."""
    numbered, count = ndimage.label(label > 127, EIGHT)
    for number in range(1, count + 1):
        rows, columns = np.nonzero(numbered == number)
        height, width = (int(np.ptp(values)) + 1 for values in (rows, columns))
        yield len(rows), int(rows.mean()), int(columns.mean()), (height, width)


def square(shape: tuple[int, int], y: int, x: int, reach: int) -> NDArray:
    """The pixels of a square of side 2 reach + 1, cut at the border."""
    mask = np.zeros(shape, dtype=bool)
    mask[max(y - reach, 0) : y + reach + 1, max(x - reach, 0) : x + reach + 1] = True
    return mask


def keep_touching(candidates: NDArray, seeds: NDArray, *, single: bool) -> NDArray:
    """The components of ``candidates`` with a pixel in ``seeds``; with ``single`` also one that is alone."""
    numbered, count = ndimage.label(candidates, EIGHT)
    kept = np.zeros_like(candidates)
    for number in range(1, count + 1):
        component = numbered == number
        if (component & seeds).any() or (single and count == 1):
            kept |= component
    return kept


def confident(
    label: NDArray, probability: NDArray, base: float, slope: float, share: float, reach: int, *, single: bool
) -> Iterator[NDArray]:
    """The candidates of every region of LESPS and PAL."""
    height, width = label.shape
    for area, y, x, _ in regions(label):
        near = square(label.shape, y, x, reach)
        level = probability[near].max() * (base + slope * (1 - base) * area / (height * width * share))
        yield keep_touching(near & (probability > level), square(label.shape, y, x, 1), single=single)


def lesps(
    label: NDArray,
    probability: NDArray,
    base: float = 0.5,
    slope: float = 0.5,
    share: float = 0.0015,
    reach: int = 16,
) -> NDArray:
    """One update of LESPS: the labels after it, truncated to 8 bits."""
    probability = np.nan_to_num(probability.astype(np.float64), nan=0.0).clip(0, 1)
    evolved = label.astype(np.float64)
    for candidates in confident(label, probability, base, slope, share, reach, single=True):
        evolved[candidates] = (evolved[candidates] + 255 * probability[candidates]) / 2
    evolved[label == 255] = 255
    return np.floor(evolved).astype(np.uint8)


def pal(
    label: NDArray,
    probability: NDArray,
    base: float = 0.5,
    slope: float = 0.5,
    share: float = 0.0015,
    reach: int = 16,
    decay: float = 0.97,
) -> NDArray:
    """One update of PAL: the labels after it, rounded to 8 bits."""
    probability = np.nan_to_num(probability.astype(np.float64), nan=0.0).clip(0, 1)
    united = np.zeros(label.shape, dtype=bool)
    for candidates in confident(label, probability, base, slope, share, reach, single=False):
        united |= candidates
    evolved = np.where(united, (label + 255 * probability) / 2, label * decay)
    evolved[label == 255] = 255
    return np.round(evolved).astype(np.uint8)


def pal_entry(
    prediction: NDArray, points: list[tuple[int, int]], rho: float, spurious: float = 5.0
) -> tuple[bool, NDArray]:
    """Whether an image that waits may enter PAL's pool, and its label then."""
    marks = np.zeros(prediction.shape, dtype=bool)
    for point in points:
        marks[tuple(point)] = True
    # Outer contours, filled; SciPy sees no path out of an image whose border is foreground.
    filled = ndimage.binary_fill_holes(np.pad(prediction, 1))[1:-1, 1:-1]
    contours, found = ndimage.label(filled, EIGHT)
    groups, count = ndimage.label(marks, EIGHT)
    hit = sum(bool(filled[groups == number].any()) for number in range(1, count + 1))
    label = marks.copy()
    for number in range(1, found + 1):
        if (marks & (contours == number)).any():
            label |= contours == number
    good = count == 0 or ((count - hit) / count <= rho and (found - hit) / count <= spurious)
    return good, label * np.uint8(255)


def lelcm(label: NDArray, probability: NDArray, contrast: float = 0.5) -> NDArray:
    """One update of LELCM: the labels after it, truncated to 8 bits. Means are of probabilities in steps of 2^-32."""
    probability = np.nan_to_num(probability.astype(np.float64), nan=0.0).clip(0, 1)
    steps = np.floor(probability * 2**32) / 2**32
    old = label > 127
    touching = ndimage.binary_dilation(old, EIGHT)
    evolved = label.astype(np.float64)
    for area, y, x, (height, width) in regions(label):
        near = square(label.shape, y, x, max(height, width))
        core, around = (
            np.sort(np.append(steps[near & where], np.zeros(count)))[::-1][:count].mean()
            for where, count in ((old, max(1, area // 2)), (~old, 2 * area))
        )
        if core == 0:
            continue
        candidates = near & (probability > probability[y, x] * (contrast * around / core))
        candidates = keep_touching(candidates, touching, single=True)
        evolved[candidates] = (evolved[candidates] + 255 * probability[candidates]) / 2
    evolved[old] = 255
    return np.floor(evolved).astype(np.uint8)
