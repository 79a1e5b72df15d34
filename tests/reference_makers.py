"""Makers of other papers in NumPy and SciPy: one image, one point at a time, as in reference.py.

    image   [H, W] intensities          point   (y, x), 0-based          mask   bool [H, W] of the image
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Point = Sequence[int]
EIGHT = np.ones((3, 3), dtype=bool)


def union_of(mask_of: Callable[[NDArray, Point], NDArray], image: NDArray, points: Iterable[Point]) -> NDArray:
    """The masks of all points of one image, united."""
    mask = np.zeros(image.shape, dtype=bool)
    for point in points:
        mask |= mask_of(image, point)
    return mask


# ---- LELCM, first labels --------------------------------------------------------------------------------------------


def lelcm_mask(image: NDArray, point: Point, ratio: float = 0.8, side: int = 15) -> NDArray:
    """The window grows until its border is darker than `ratio` times the point; over c - std, the point's component."""
    height, width = image.shape
    y, x = int(point[0]), int(point[1])
    centre = float(image[y, x])
    for reach in range(1, (side + 1) // 2 + 1):
        y0, x0 = max(y - reach, 0), max(x - reach, 0)
        window = image[y0 : min(y + reach + 1, height), x0 : min(x + reach + 1, width)].astype(np.float64)
        border = np.concatenate((window[0], window[-1], window[:, 0], window[:, -1]))
        if not (border > ratio * centre).any():
            break
    labels, _ = ndimage.label(window > centre - window.std(), EIGHT)
    label = labels[y - y0, x - x0]
    mask = np.zeros(image.shape, dtype=bool)
    mask[y, x] = True
    if label:
        mask[y0 : y0 + window.shape[0], x0 : x0 + window.shape[1]] = labels == label
    return mask
