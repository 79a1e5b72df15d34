"""Scenes, point sets and masks that several test files share."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

Points = Sequence[tuple[int, int]]
SEEDS = int(os.environ.get("HMG_SEEDS", "6"))  # of the long random sweeps over kernels; 25 make a thousand cases


def sweep(values: Iterable[Any], *, fast: int = 1) -> list[Any]:
    """Values of a parameter, or tuples of several: the first few for every run, the others for the slow one."""
    values = [value if isinstance(value, tuple) else (value,) for value in values]
    return [pytest.param(*row, marks=[pytest.mark.slow] if index >= fast else []) for index, row in enumerate(values)]


# ---- from lists to the library's tensors ----------------------------------------------------------------------------


def pad(arrays: Sequence[NDArray], fill: float = 0) -> tuple[Tensor, Tensor]:
    """Arrays of different size as one batch [B, H, W], padded bottom and right with `fill`, and its sizes [B, 2]."""
    height, width = (max(array.shape[axis] for array in arrays) for axis in (0, 1))
    batch = np.full((len(arrays), height, width), fill, dtype=arrays[0].dtype)
    for row, array in zip(batch, arrays, strict=True):
        row[: array.shape[0], : array.shape[1]] = array
    return torch.from_numpy(batch), torch.tensor([array.shape for array in arrays])


def point_rows(points_of_images: Sequence[Points]) -> Tensor:
    """One list of (y, x) an image as int64 [P, 3], rows (image, y, x)."""
    rows = [(index, *point) for index, points in enumerate(points_of_images) for point in points]
    return torch.tensor(rows, dtype=torch.int64).reshape(-1, 3)


def cut(batch: Tensor, sizes: Tensor) -> list[NDArray]:
    """The valid part of each image of a padded batch."""
    return [image[:height, :width].numpy() for image, (height, width) in zip(batch, sizes.tolist(), strict=True)]


# ---- scenes ---------------------------------------------------------------------------------------------------------

INTEGER_KINDS = ("bytes", "deep", "steps", "rows", "columns", "flat")
FLOAT_KINDS = ("floats", "signed", "float rows", "float flat")

SCENE_SHAPES = (
    (1, 1),  # nothing but the point
    (1, 23),  # no room above and below
    (23, 1),
    (2, 2),  # profiles shorter than three pixels
    (3, 3),
    (5, 40),
    (31, 8),
    (32, 32),
    (47, 61),
    (90, 33),
)


def scene(rng: np.random.Generator, shape: tuple[int, int], kind: str) -> NDArray:
    """A float32 image of the given kind: what its intensities look like decides which ties occur."""
    height, width = shape
    y, x = np.mgrid[:height, :width]
    smooth = 60 + 20 * np.sin(y / 9 + rng.uniform(0, 6)) + 0.3 * x
    for _ in range(4):
        centre_y, centre_x, spread = rng.uniform(0, height), rng.uniform(0, width), rng.uniform(0.8, 4)
        smooth += rng.uniform(20, 150) * np.exp(-((y - centre_y) ** 2 + (x - centre_x) ** 2) / (2 * spread**2))
    noisy = smooth + rng.normal(0, 4, shape)
    match kind:
        case "bytes":  # what an 8-bit PNG gives
            image = noisy.round().clip(0, 255)
        case "deep":  # a 16-bit camera
            image = (noisy * 200).round().clip(0, 65535)
        case "steps":  # four levels: equal differences and equal means everywhere
            image = (noisy / 60).round().clip(0, 3)
        case "rows":  # flat profiles to the left and right
            image = np.broadcast_to(noisy.round()[:, :1], shape)
        case "columns":  # flat profiles up and down
            image = np.broadcast_to(noisy.round()[:1], shape)
        case "flat":
            image = np.full(shape, 77)
        case "floats":  # intensities scaled to about 0..1
            image = noisy / 255
        case "signed":  # after (x - mean) / std
            image = (noisy - 101.0) / 34.6
        case "float rows":  # constant parts whose mean need not be their value in floating point
            image = np.broadcast_to(noisy[:, :1] / 255, shape)
        case "float flat":
            image = np.full(shape, 0.1)
        case _:
            raise ValueError(kind)
    return np.ascontiguousarray(image, dtype=np.float32)


def scene_points(rng: np.random.Generator, shape: tuple[int, int], count: int = 10) -> list[tuple[int, int]]:
    """The four corners, the middle of the four borders, and `count` points anywhere (some fall together)."""
    bottom, right = shape[0] - 1, shape[1] - 1
    fixed = [(0, 0), (0, right), (bottom, 0), (bottom, right)]
    fixed += [(0, right // 2), (bottom, right // 2), (bottom // 2, 0), (bottom // 2, right)]
    anywhere = np.stack((rng.integers(0, shape[0], count), rng.integers(0, shape[1], count)), axis=1)
    return fixed + [tuple(row) for row in anywhere.tolist()]


# ---- masks ----------------------------------------------------------------------------------------------------------


def spiral(size: int) -> NDArray:
    """One component one pixel wide that winds to the centre: the longest path for anything that propagates labels."""
    mask = np.zeros((size, size), dtype=bool)
    y = x = 0
    dy, dx = 0, 1
    mask[0, 0] = True
    turns = 0
    while turns < 2:
        ahead_y, ahead_x = y + dy, x + dx
        beyond_y, beyond_x = ahead_y + dy, ahead_x + dx
        free = 0 <= ahead_y < size and 0 <= ahead_x < size and not mask[ahead_y, ahead_x]
        touches = 0 <= beyond_y < size and 0 <= beyond_x < size and mask[beyond_y, beyond_x]
        if free and not touches:
            y, x = ahead_y, ahead_x
            mask[y, x] = True
            turns = 0
        else:
            dy, dx = dx, -dy
            turns += 1
    return mask


def comb(height: int, width: int) -> NDArray:
    """Teeth that look separate until the last row joins them: every tooth's label changes at the end."""
    mask = np.zeros((height, width), dtype=bool)
    mask[:, ::2] = True
    mask[-1] = True
    return mask


def checkerboard(height: int, width: int) -> NDArray:
    """One component through diagonals only; with 4-connectivity every pixel would stand alone."""
    return np.add.outer(np.arange(height), np.arange(width)) % 2 == 0


def ring(size: int) -> NDArray:
    """Its centroid lies outside of it."""
    mask = np.ones((size, size), dtype=bool)
    mask[1:-1, 1:-1] = False
    return mask


def frame_and_dot(size: int) -> NDArray:
    """Two components with one centroid, one inside the other."""
    mask = ring(size)
    mask[size // 2, size // 2] = True
    return mask


def isolated(height: int, width: int) -> NDArray:
    """As many components as fit."""
    mask = np.zeros((height, width), dtype=bool)
    mask[::2, ::2] = True
    return mask


def single(height: int, width: int, y: int, x: int) -> NDArray:
    mask = np.zeros((height, width), dtype=bool)
    mask[y, x] = True
    return mask


def staircase(size: int, *, falling: bool) -> NDArray:
    """A diagonal: rising ones join right-to-left, which a raster scan meets late."""
    mask = np.eye(size, dtype=bool)
    return mask if falling else mask[:, ::-1].copy()


ADVERSARIAL_MASKS: dict[str, NDArray] = {
    "spiral": spiral(33),
    "spiral, even size": spiral(24),
    "spiral, transposed": spiral(21).T.copy(),
    "comb": comb(17, 40),
    "comb, upside down": comb(17, 40)[::-1].copy(),
    "comb, transposed": comb(17, 40).T.copy(),
    "checkerboard": checkerboard(19, 22),
    "full": np.ones((20, 27), dtype=bool),
    "empty": np.zeros((20, 27), dtype=bool),
    "one pixel image, set": np.ones((1, 1), dtype=bool),
    "one pixel image, empty": np.zeros((1, 1), dtype=bool),
    "single pixel": single(16, 16, 7, 9),
    "first pixel": single(16, 16, 0, 0),
    "last pixel": single(16, 16, 15, 15),
    "border": ring(18),
    "frame and dot": frame_and_dot(15),
    "isolated pixels": isolated(20, 21),
    "falling diagonal": staircase(23, falling=True),
    "rising diagonal": staircase(23, falling=False),
    "1 x N": np.arange(41)[None] % 5 < 3,
    "N x 1": np.arange(41)[:, None] % 4 < 3,
}


def random_mask(rng: np.random.Generator, shape: tuple[int, int]) -> NDArray:
    """Noise of any density, or blobs, or blobs that touch."""
    match rng.integers(3):
        case 0:
            return rng.random(shape) < rng.uniform(0, 1) ** 2
        case 1:
            return blobs(rng, shape, count=int(rng.integers(0, 6)), largest=4)
        case _:
            return blobs(rng, shape, count=int(rng.integers(4, 20)), largest=6)


def blobs(rng: np.random.Generator, shape: tuple[int, int], count: int, largest: int) -> NDArray:
    """Rectangles with ragged corners, anywhere, cut at the border."""
    mask = np.zeros(shape, dtype=bool)
    for _ in range(count):
        y, x = int(rng.integers(0, shape[0])), int(rng.integers(0, shape[1]))
        part = mask[y : y + int(rng.integers(1, largest + 1)), x : x + int(rng.integers(1, largest + 1))]
        part |= rng.random(part.shape) < 0.85
    return mask


def random_shape(rng: np.random.Generator, largest: int = 40) -> tuple[int, int]:
    """Mostly any size; often a single row or column."""
    height, width = rng.integers(1, largest + 1, 2).tolist()
    match rng.integers(8):
        case 0:
            return 1, width
        case 1:
            return height, 1
        case _:
            return height, width


def random_points(rng: np.random.Generator, shape: tuple[int, int]) -> list[tuple[int, int]]:
    """None, one or a few points inside an image."""
    count = int(rng.choice([0, 0, 1, 1, 2, 5]))
    return [(int(rng.integers(0, shape[0])), int(rng.integers(0, shape[1]))) for _ in range(count)]


# ---- real data ------------------------------------------------------------------------------------------------------


def read_training_set(folder: Path, name: str, labels: str) -> Iterator[tuple[NDArray, NDArray, list[tuple[int, int]]]]:
    """(image, mask, points) of a LESPS folder's training split; read here with Pillow alone, not by the library."""
    from PIL import Image

    def read(kind: str, stem: str) -> NDArray:
        with Image.open(folder / name / kind / f"{stem}.png") as file:
            return np.asarray(file.convert("L"))

    for stem in (folder / name / "img_idx" / f"train_{name}.txt").read_text().split():
        image = read("images", stem).astype(np.float32)
        points = [tuple(row) for row in np.argwhere(read(f"masks_{labels}", stem) > 127).tolist()]
        yield image, read("masks", stem) > 127, points
