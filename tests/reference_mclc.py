"""MCLC once more, slowly: one crop, one copy and one pixel at a time, in NumPy and plain Python.

The random numbers are those of the library, worked out here with Python's whole numbers.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
from numpy.typing import NDArray

# ---- random numbers -------------------------------------------------------------------------------------------------


def mix(state: int) -> int:
    state ^= state >> 16
    state = state * 0x7FEB352D % 2**32
    state ^= state >> 15
    return state * 0x846CA68B % 2**32


def stream(*words: int) -> int:
    """The name of a stream, 32 bits without sign."""
    state = 0
    for word in words:
        state = mix(((state ^ word % 2**32) + 0x9E3779B9) % 2**32)
        state ^= state >> 16
    return state


def drawn(name: int, position: int, probability: float) -> bool:
    mixed = mix(name ^ position)
    signed = mixed - 2**32 if mixed >= 2**31 else mixed
    return signed < round(probability * 2**32) - 2**31


def name_word(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=4).digest(), "big")


def salt_of(shape: tuple[int, int], seed: int, name: str, point: tuple[int, int], copy: int, share: float) -> NDArray:
    """bool [h, w, 3]: the salted values of one copy of the crop around a point of an image."""
    own = stream(stream(seed, seed >> 32, name_word(name), *point), copy)
    salt = np.zeros((*shape, 3), dtype=bool)
    for y, x, channel in np.ndindex(salt.shape):
        salt[y, x, channel] = drawn(own, stream(y, x, channel), share)
    return salt


# ---- SLIC -----------------------------------------------------------------------------------------------------------


def lab_of(colours: NDArray, rescale: bool) -> NDArray:
    """float64 [h, w, 3] of 0 to 1, red, green, blue, as L, a, b."""
    if rescale:
        colours = colours - colours.min()
        colours = colours / (colours.max() or 1.0)
    lab = np.zeros(colours.shape)
    white = (0.95047, 1.0, 1.08883)
    weights = ((0.412453, 0.357580, 0.180423), (0.212671, 0.715160, 0.072169), (0.019334, 0.119193, 0.950227))
    for place in np.ndindex(colours.shape[:2]):
        linear = [((v + 0.055) / 1.055) ** 2.4 if v > 0.04045 else v / 12.92 for v in colours[place]]
        xyz = [sum(w * v for w, v in zip(row, linear, strict=True)) / t for row, t in zip(weights, white, strict=True)]
        x, y, z = (v ** (1 / 3) if v > 0.008856 else 7.787 * v + 16 / 116 for v in xyz)
        lab[place] = 116 * y - 16, 500 * (x - y), 200 * (y - z)
    return lab


def steps(height: int, width: int, segments: int) -> list[float]:
    """Between rows and between columns of centres."""
    if height * width <= segments:
        return [1.0, 1.0]
    step = math.sqrt(height * width / segments)
    if height <= width and height < step:
        return [height, width / segments]
    if width < height and width < step:
        return [height / segments, width]
    return [step, step]


def grid(height: int, width: int) -> tuple[list[tuple[int, int]], int, list[int]]:
    """The first centres (y, x), S, and how far a centre reaches in rows and in columns."""
    lines = [
        range(int(s // 2), side, round(s)) for s, side in zip(steps(height, width, 9), (height, width), strict=True)
    ]
    centres = [(y, x) for y in lines[0] for x in lines[1]]
    reach = [2 * round(s) for s in steps(height, width, len(centres))]
    return centres, max(round(s) for s in steps(height, width, 9)), reach


def slic(lab: NDArray) -> NDArray:
    """int [h, w]: the centre of each pixel after 10 rounds; small pieces stay."""
    height, width, _ = lab.shape
    places, step, reach = grid(height, width)
    centres = [(float(y), float(x), np.zeros(3)) for y, x in places]
    rows, columns = np.mgrid[:height, :width]
    labels = np.zeros((height, width), dtype=int)
    for _ in range(10):
        nearest = np.full((height, width), np.inf)
        for k, (yk, xk, colour) in enumerate(centres):
            if np.isnan(yk):  # had no pixels once
                continue
            window = np.zeros((height, width), dtype=bool)
            y0, y1 = int(max(yk - reach[0], 0)), int(min(yk + reach[0] + 1, height))
            x0, x1 = int(max(xk - reach[1], 0)), int(min(xk + reach[1] + 1, width))
            window[y0:y1, x0:x1] = True
            distance = ((rows - yk) ** 2 + (columns - xk) ** 2) / step**2 + ((lab / 20 - colour) ** 2).sum(2)
            closer = window & (distance < nearest)
            nearest[closer], labels[closer] = distance[closer], k
        for k in range(len(centres)):
            mine = labels == k
            if mine.any():
                centres[k] = rows[mine].mean(), columns[mine].mean(), lab[mine].mean(0) / 20
            else:
                centres[k] = math.nan, math.nan, lab[0, 0]
    return labels


# ---- small pieces ---------------------------------------------------------------------------------------------------


def neighbours(y: int, x: int, height: int, width: int) -> list[tuple[int, int]]:
    around = [(y, x + 1), (y, x - 1), (y + 1, x), (y - 1, x)]
    return [(a, b) for a, b in around if 0 <= a < height and 0 <= b < width]


def merge_in_order(labels: NDArray, segments: int) -> NDArray:
    """As scikit-image: in raster order a small piece takes the label of the piece seen last before it."""
    height, width = labels.shape
    least, most = int(0.5 * labels.size / segments), int(3 * labels.size / segments)
    result = np.full(labels.shape, -1)
    fresh = 0
    for start in np.ndindex(labels.shape):
        if result[start] >= 0:
            continue
        result[start], adjacent, piece = fresh, 0, [start]
        for place in piece:  # grows while it is walked
            for other in neighbours(*place, height, width):
                if len(piece) < most and labels[other] == labels[start] and result[other] < 0:
                    result[other] = fresh
                    piece.append(other)
                elif len(piece) < most and result[other] >= 0 and result[other] != fresh:
                    adjacent = int(result[other])
        if len(piece) < least:
            for place in piece:
                result[place] = adjacent
        else:
            fresh += 1
    return result


def components(labels: NDArray) -> NDArray:
    """int [h, w]: 4-connected components of equal label by the raster position of their first pixel."""
    height, width = labels.shape
    result = np.full(labels.shape, -1)
    for start in np.ndindex(labels.shape):
        if result[start] < 0:
            result[start], piece = start[0] * width + start[1], [start]
            for place in piece:
                for other in neighbours(*place, height, width):
                    if labels[other] == labels[start] and result[other] < 0:
                        result[other] = result[start]
                        piece.append(other)
    return result


def merge_by_border(labels: NDArray, segments: int, turns: int = 3) -> NDArray:
    """Small pieces join the large piece that they share most border with, those that touch none in a later turn."""
    height, width = labels.shape
    pieces = components(labels)
    numbers, sizes = np.unique(pieces, return_counts=True)
    owner = {
        n: (n if size >= int(0.5 * labels.size / segments) else None) for n, size in zip(numbers, sizes, strict=True)
    }
    for _ in range(turns):
        before = dict(owner)
        for small in (n for n in numbers if before[n] is None):
            border: dict[int, int] = {}
            for place in np.argwhere(pieces == small):
                for other in neighbours(*place, height, width):
                    theirs = before[pieces[other]]
                    if theirs is not None:
                        border[theirs] = border.get(theirs, 0) + 1
            if border:
                owner[small] = min(border, key=lambda large: (-border[large], large))
    return np.vectorize(lambda n: n if owner[n] is None else owner[n])(pieces)


# ---- the mask -------------------------------------------------------------------------------------------------------


def mean_field(probability: NDArray, grey: NDArray) -> NDArray:
    """The energy of the target, below the background's where positive, by all pairs; float64 [h, w]."""
    height, width = grey.shape
    p1, p0 = np.clip(probability, 1e-5, 1), np.clip(1 - probability, 1e-5, 1)
    pull = 2 * p1 / (p1 + p0) - 1
    energy = np.log(p1 / p0)
    rows, columns = np.mgrid[:height, :width]

    def kernels(y: int, x: int) -> tuple[NDArray, NDArray]:
        apart = (rows - y) ** 2 + (columns - x) ** 2
        return np.exp(-apart / 3**2 / 2), np.exp(-apart / 32**2 / 2 - 3 * (grey - grey[y, x]) ** 2 / 13**2 / 2)

    sums = np.zeros((2, height, width))
    for place in np.ndindex(grey.shape):
        sums[(slice(None), *place)] = [kernel.sum() for kernel in kernels(*place)]
    for place in np.ndindex(grey.shape):
        for weight, kernel, total in zip((3, 10), kernels(*place), sums, strict=True):
            energy[place] += weight * (kernel * pull / np.sqrt(total)).sum() / math.sqrt(total[place])
    return energy


def probability_of(
    crop: NDArray, point: tuple[int, int], salts: list[NDArray], *, rescale: bool = True, in_order: bool = False
) -> NDArray:
    """How often each pixel shares the superpixel of the point; ``crop`` float64 of 0 to 1."""
    total = np.zeros(crop.shape)
    segments = len(grid(*crop.shape)[0])
    for salt in salts:
        colours = np.where(salt, 1.0, crop[:, :, None])
        labels = slic(lab_of(colours, rescale))
        regions = merge_in_order(labels, segments) if in_order else merge_by_border(labels, segments)
        total += regions == regions[point]
    return total / total.max()
