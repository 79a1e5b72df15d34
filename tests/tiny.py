"""A set so small that a training run takes a second: one bright blob an image, sizes below, at and above the crop."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from hmg_gpu.data import ImageSet, write_mask

SIZES = ((32, 32), (40, 33), (24, 45), (32, 48), (48, 32), (29, 30))
POISON = 201  # what the tests put into the padding: nothing may depend on it


def blob(rng: np.random.Generator, size: tuple[int, int]) -> tuple[NDArray, NDArray, tuple[int, int]]:
    """uint8 image, bool mask and the point (y, x) of one target in noise."""
    height, width = size
    y, x = int(rng.integers(4, height - 4)), int(rng.integers(4, width - 4))
    rows, columns = np.mgrid[:height, :width]
    profile = np.exp(-((rows - y) ** 2 + (columns - x) ** 2) / (2 * rng.uniform(1.2, 2) ** 2))
    image = 60 + 120 * profile + rng.normal(0, 3, size)
    return image.round().clip(0, 255).astype(np.uint8), profile > 0.4, (y, x)


def tiny_set(sizes: tuple[tuple[int, int], ...] = SIZES, *, seed: int = 0, split: str = "train") -> ImageSet:
    """The images of :func:`blob` as an ImageSet whose padding is poisoned."""
    rng = np.random.default_rng(seed)
    parts = [blob(rng, size) for size in sizes]
    height, width = (max(size[axis] for size in sizes) for axis in (0, 1))
    images = torch.full((len(sizes), height, width), POISON, dtype=torch.uint8)
    masks = torch.zeros(images.shape, dtype=torch.bool)
    for index, ((h, w), (image, mask, _)) in enumerate(zip(sizes, parts, strict=True)):
        images[index, :h, :w] = torch.from_numpy(image)
        masks[index, :h, :w] = torch.from_numpy(mask)
    points = torch.tensor([(index, *point) for index, (_, _, point) in enumerate(parts)])
    names = [f"{split}{index}" for index in range(len(sizes))]
    return ImageSet(names, images, torch.tensor(sizes), points, masks, 63.0, 21.0, dataset="tiny", split=split)


def write_folder(root: Path, *, name: str = "tiny") -> Path:
    """Six training and two test images on disk in the layout of LESPS."""
    rng = np.random.default_rng(1)
    for folder in ("images", "masks", "masks_centroid", "img_idx"):
        (root / folder).mkdir(parents=True)
    for split, count in (("train", 6), ("test", 2)):
        stems = [f"{split}{index}" for index in range(count)]
        for stem, size in zip(stems, SIZES, strict=False):
            image, mask, (y, x) = blob(rng, size)
            point = np.zeros_like(mask)
            point[y, x] = True
            Image.fromarray(image).save(root / "images" / f"{stem}.png")
            write_mask(root / "masks" / f"{stem}.png", mask)
            write_mask(root / "masks_centroid" / f"{stem}.png", point)
        (root / "img_idx" / f"{split}_{name}.txt").write_text("\n".join(stems) + "\n")
    return root


def small_network(name: str, *, output_bias: float) -> nn.Module:
    """Stands in for ACM where only what is around it matters; a step takes a tenth of the time."""
    network = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.1), nn.Conv2d(4, 1, 1)
    )
    nn.init.constant_(network[-1].bias, output_bias)
    return network
