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


# ---- COM, a level set in a crop around the point --------------------------------------------------------------------


def com_crop(image: NDArray, point: Point, half: int) -> tuple[int, int, NDArray]:
    """First row, first column and the crop around a point, stretched to 0..255; all 0 where it is flat."""
    y, x = int(point[0]), int(point[1])
    y0, x0 = max(y - half, 0), max(x - half, 0)
    crop = image[y0 : y + half, x0 : x + half].astype(np.float64)
    span = crop.max() - crop.min()
    return y0, x0, (crop - crop.min()) * 255 / span if span > 0 else np.zeros_like(crop)


def com_level_set(crop: NDArray, blocks: int, difference: bool) -> NDArray:
    """The level set after `blocks` of five iterations; inside where it is at most 0."""
    smooth = ndimage.gaussian_filter(crop.astype(np.float32), 1.5)
    slope_y, slope_x = slopes(smooth)
    edge = 1 / (1 + slope_y**2 + slope_x**2)
    phi = np.where(crop > 50 + 1e-9, -1.0, 1.0)  # 50 itself, which rounds either way, is outside
    for _ in range(blocks):
        best = 0.0
        for _ in range(5):
            phi = mirrored(phi)
            dy, dx = slopes(phi)
            speed = np.sqrt(dy**2 + dx**2)
            inside = phi <= 0
            mean = crop[inside].mean() if inside.any() else 0.0
            push, best = (1.5, mean) if mean > best else (-0.1, best)
            p = np.where(speed <= 1, np.sin(2 * np.pi * speed) / (2 * np.pi), speed - 1)
            d = np.where(p == 0, 1, p) / np.where(speed == 0, 1, speed)
            regular = divergence(d * dy - dy, d * dx - dx) + ndimage.laplace(phi, mode="nearest")
            dirac = np.where(np.abs(phi) <= 1.5, (1 + np.cos(np.pi * phi / 1.5)) / 3, 0)
            change = 0.04 * regular + push * dirac * edge
            if difference:
                bend = divergence(dy / (speed + 1e-10), dx / (speed + 1e-10))
                change += 10 * 1e-10 * dirac * bend / ((mean - com_band_mean(phi > 0, crop)) ** 2 + 1e-10)
            phi = phi + 5 * change
    return phi


def slopes(field: NDArray) -> tuple[NDArray, NDArray]:
    """numpy.gradient, and no slope along a side of one pixel."""
    return tuple(np.gradient(field, axis=axis) if field.shape[axis] > 1 else np.zeros_like(field) for axis in (0, 1))


def divergence(dy: NDArray, dx: NDArray) -> NDArray:
    return slopes(dy)[0] + slopes(dx)[1]


def mirrored(phi: NDArray) -> NDArray:
    """The outermost rows and columns take the values two pixels further in (or of the last there are)."""
    height, width = phi.shape
    result = phi.copy()
    result[0], result[-1] = phi[min(2, height - 1)], phi[max(height - 3, 0)]
    left, right = result[:, min(2, width - 1)].copy(), result[:, max(width - 3, 0)].copy()
    result[:, 0], result[:, -1] = left, right
    return result


def com_band_mean(outside: NDArray, crop: NDArray) -> float:
    """The mean of the crop over a band outside the contour; pixels by flat index, some of them more than once."""
    rows, columns = outside.shape
    flat, values = outside.ravel().tolist(), crop.ravel()
    size = len(flat)
    band: list[int] = []
    for p in range(4 * columns + 1, min(columns * (columns - 4), size)):
        if not flat[p]:
            continue
        at_right = p + 1 < size and not flat[p + 1]
        at_left = not flat[p - 1]
        corner = flat[p - columns] and p + columns < size and not flat[p + columns]
        if at_right:
            band += [p - j for j in range(4)]
            band += [p - k * rows - j for k in range(1, 4) for j in range(4)] if corner else []
        if at_left:
            band += [p + j for j in range(4)]
            band += [p + k * rows + j for k in range(1, 4) for j in range(4)] if corner else []
        if not flat[p - columns]:
            band += [p + j * rows for j in range(4)]
    band = [p % size for p in band if p < size]
    return float(values[band].mean()) if band else 0.0


def com_mask(image: NDArray, point: Point, half: int = 20) -> NDArray:
    """The component of the level set's inside at the point or nearest to it."""
    y0, x0, crop = com_crop(image, point, half)
    mask = np.zeros(image.shape, dtype=bool)
    inside = com_level_set(crop, half // 2, difference=False) <= 0
    if crop.any() and inside.any():
        labels, _ = ndimage.label(inside, EIGHT)
        ys, xs = np.nonzero(inside)
        nearest = ((ys - (point[0] - y0)) ** 2 + (xs - (point[1] - x0)) ** 2).argmin()  # the first of equal ones
        mask[y0 : y0 + crop.shape[0], x0 : x0 + crop.shape[1]] = labels == labels[ys[nearest], xs[nearest]]
    return mask


def com_script_mask(phi: NDArray) -> NDArray:
    """What the script makes of a level set: matplotlib's line, its vertices cut to pixels, a fill from the corner."""
    import contourpy
    import matplotlib.ticker

    ticks = matplotlib.ticker.MaxNLocator(1, min_n_ticks=1).tick_values(phi.min(), phi.max())
    if len(ticks) < 2:
        return np.zeros(phi.shape, dtype=bool)
    begin = max([index for index, tick in enumerate(ticks) if tick < phi.min()], default=0)
    end = min([index + 1 for index, tick in enumerate(ticks) if tick > phi.max()], default=len(ticks))
    levels = ticks[begin:end] if end - begin >= 3 else ticks
    lines, _ = contourpy.contour_generator(z=phi, name="mpl2014", line_type="SeparateCode").lines(levels[1])
    if not lines:
        return np.zeros(phi.shape, dtype=bool)
    x, y = lines[0].astype(int).T
    line = np.zeros(phi.shape, dtype=bool)
    line[y, x] = True
    labels, _ = ndimage.label(~line)
    reached = labels == labels[0, 0] if not line[0, 0] else line
    return ~reached & ~line


def com_script_masks(image: NDArray, points: Iterable[Point], half: int = 20) -> NDArray:
    """COM as its authors' script runs it, a click after the other: later crops overwrite earlier ones."""
    mask = np.zeros(image.shape, dtype=bool)
    for point in points:
        y0, x0, crop = com_crop(image, point, half)
        inside = com_script_mask(com_level_set(crop, half // 2, difference=True))
        mask[y0 : y0 + crop.shape[0], x0 : x0 + crop.shape[1]] = inside & crop.any()
    return mask
