"""Initial masks as their authors' tools make them: one target at a time, with the packages of the field."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bench.peers import split_points
from hmg_gpu.data import ImageSet
from tests import reference_makers as reference

Loop = Callable[[NDArray, Iterable[Sequence[int]]], NDArray]  # (image uint8 [H, W], points (y, x)) -> mask bool [H, W]

CROP, REPEATS, SALT = 21, 50, 0.05  # of MCLC


def mclc_loop(data: ImageSet) -> Tensor:
    """MCLC with scikit-image's ``slic``, one copy of one crop at a time, and a CRF of all pairs in NumPy.

    Returns:
        bool [N, H, W], the union of the targets' masks.
    """
    rng = np.random.default_rng(0)
    masks = np.zeros(data.images.shape, dtype=bool)
    sizes = data.host_sizes.tolist()
    for image, y, x in data.points.tolist():
        height, width = sizes[image]
        y0, x0 = max(y - CROP // 2, 0), max(x - CROP // 2, 0)
        window = np.s_[y0 : min(y + CROP // 2 + 1, height), x0 : min(x + CROP // 2 + 1, width)]
        crop = data.images[image].numpy()[window].astype(np.float64)
        masks[image][window] |= all_pairs_crf(mclc_probability(crop / 255, (y - y0, x - x0), rng), crop)
    return torch.from_numpy(masks)


def mclc_probability(crop: NDArray, point: tuple[int, int], rng: np.random.Generator) -> NDArray:
    from skimage.segmentation import slic

    total = np.zeros(crop.shape)
    colours = np.repeat(crop[:, :, None], 3, axis=2)
    for _ in range(REPEATS):
        noisy = np.where(rng.random(colours.shape) < SALT, 1.0, colours)
        labels = slic(noisy, n_segments=9, compactness=20)
        total += labels == labels[point]
    return total / total.max()


def all_pairs_crf(probability: NDArray, crop: NDArray) -> NDArray:
    """One step of mean field over all pairs of pixels, two labels."""
    shares = np.clip(np.stack((1 - probability, probability)), 1e-5, 1).reshape(2, -1)
    pull = 2 * shares[1] / shares.sum(0) - 1
    places = np.argwhere(np.ones(crop.shape))
    distance = np.square(places[:, None] - places).sum(2)
    shades = crop.reshape(-1)
    unlike = 3 * np.square(shades[:, None] - shades)
    energy = np.log(shares[1] / shares[0])
    for weight, kernel in ((3, np.exp(-distance / 18)), (10, np.exp(-distance / 2048 - unlike / 338))):
        scale = 1 / np.sqrt(kernel.sum(1))
        energy += weight * scale * (kernel @ (scale * pull))
    return (energy > 0).reshape(crop.shape)


def lelcm_loop(image: NDArray, points: Iterable[Sequence[int]]) -> NDArray:
    """LELCM's first labels."""
    return reference.union_of(reference.lelcm_mask, image, points)


def com_loop(image: NDArray, points: Iterable[Sequence[int]], half: int = 20) -> NDArray:
    """COM's evolution without the term that changes nothing, and the component at the point."""
    return reference.union_of(lambda image, point: reference.com_mask(image, point, half), image, points)


def com_script_loop(image: NDArray, points: Iterable[Sequence[int]], half: int = 20) -> NDArray:
    """COM as its script runs it: the band's pixels listed one by one, matplotlib's line, a fill from the corner."""
    return reference.com_script_masks(image, points, half)


def over_images(loop: Loop) -> Callable[[ImageSet], Tensor]:
    """A loop over the targets of an image as one over a set: bool [N, H, W]."""

    def masks_of(data: ImageSet) -> Tensor:
        masks = np.zeros(data.images.shape, dtype=bool)
        for index, points in enumerate(split_points(data.points, len(data))):
            height, width = data.sizes[index].tolist()
            masks[index, :height, :width] = loop(data.images[index, :height, :width].numpy(), points)
        return torch.from_numpy(masks)

    return masks_of
