"""What is timed on the CPU: each case builds its input, checks that all its rows agree, and hands over the callables.

The first row of a case is the baseline; ratios are baseline / row.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hmg_gpu import false_alarm_filter, point_to_mask
from hmg_gpu.data import ImageSet
from hmg_gpu.data.batches import cut_crops, draw_epoch
from hmg_gpu.data.source import default_extent, load_split
from hmg_gpu.losses import soft_iou_loss
from hmg_gpu.metrics import DetectionMetrics
from hmg_gpu.models import build_model
from tests import reference

Calls = dict[str, Callable[[], object]]


@dataclass(frozen=True)
class Case:
    """``build`` gives the callables after it has checked them against each other; ``goal`` is the ratio asked for."""

    name: str
    what: str
    build: Callable[[], Calls]
    goal: float | None = None
    share: bool = False  # report the last row as a share of the first instead of a speed-up


def _agree(name: str, first: object, second: object) -> None:
    same = torch.equal(first, second) if isinstance(first, Tensor) else first == second
    if not same:
        raise RuntimeError(f"{name}: the rows disagree, so nothing is timed")


def _training_set(name: str) -> ImageSet:
    """The real set where HMG_DATA has it, else as many synthetic scenes."""
    root = os.environ.get("HMG_DATA")
    if root and (Path(root) / name).is_dir():
        return load_split(str(Path(root) / name), "train")
    return load_split("synthetic", "train")


def _numpy_images(data: ImageSet) -> list[tuple[np.ndarray, np.ndarray]]:
    pairs = []
    for index, (height, width) in enumerate(data.sizes.tolist()):
        points = data.points[data.points[:, 0] == index, 1:].numpy()
        pairs.append((data.images[index, :height, :width].numpy(), points))
    return pairs


def build_pmg(extent: int | None = None) -> Calls:
    data = _training_set("NUDT-SIRST")
    extent = extent or default_extent(data.dataset)
    images = data.images.float()
    pairs = _numpy_images(data)

    def loop() -> Tensor:
        masks = torch.zeros(images.shape, dtype=torch.bool)
        for index, (image, points) in enumerate(pairs):
            height, width = image.shape
            masks[index, :height, :width] = torch.from_numpy(reference.point_to_mask(image, points, extent))
        return masks

    def batched() -> Tensor:
        return point_to_mask(images, data.points, extent=extent, sizes=data.sizes)

    _agree("PMG", loop(), batched())
    return {"NumPy, one point at a time": loop, "hmg_gpu, torch": batched}


def build_faf(images: int = 64, side: int = 256, blobs: int = 20) -> Calls:
    prediction, points = blob_scene(images, side, blobs)

    def loop() -> Tensor:
        """What label updates of the field do: label and measure one image at a time, then walk its regions."""
        from skimage.measure import label, regionprops

        kept = np.zeros((images, side, side), dtype=bool)
        for index in range(images):
            own = points[points[:, 0] == index, 1:].numpy()
            for region in regionprops(label(prediction[index].numpy(), connectivity=2)):
                if len(own) and (np.abs(own - np.array(region.centroid)).sum(1) <= 30).any():
                    kept[index][tuple(region.coords.T)] = True
        return torch.from_numpy(kept)

    def batched() -> Tensor:
        return false_alarm_filter(prediction, points)

    _agree("FAF", loop(), batched())
    return {"scikit-image regionprops, image by image": loop, "hmg_gpu, SciPy": batched}


def blob_scene(images: int, side: int, blobs: int) -> tuple[Tensor, Tensor]:
    """Sparse predictions: discs of radius 1 to 4 px, and two points an image, one of them on a disc."""
    rng = np.random.default_rng(0)
    grid = np.mgrid[:side, :side]
    prediction = np.zeros((images, side, side), dtype=bool)
    points = []
    for index in range(images):
        centres = rng.integers(6, side - 6, (blobs, 2))
        for centre, radius in zip(centres, rng.integers(1, 5, blobs), strict=True):
            prediction[index] |= ((grid - centre[:, None, None]) ** 2).sum(0) <= radius**2
        points += [(index, *centres[0]), (index, *rng.integers(0, side, 2))]
    return torch.from_numpy(prediction), torch.tensor(points)


def build_metrics(images: int = 64, side: int = 256) -> Calls:
    prediction, _ = blob_scene(images, side, 6)
    target = torch.roll(prediction, (1, 1), (1, 2))
    pairs = [(p.numpy(), t.numpy()) for p, t in zip(prediction, target, strict=True)]

    def loop() -> tuple[int, ...]:
        found = reference.detection_metrics(pairs)
        return tuple(found[name] for name in ("intersection", "union", "matched", "false_alarm_pixels"))

    def batched() -> tuple[int, ...]:
        metrics = DetectionMetrics()
        metrics.update(prediction, target)
        found = metrics.compute()
        return tuple(found[name] for name in ("intersection", "union", "matched", "false_alarm_pixels"))

    _agree("metrics", loop(), batched())
    return {"NumPy/SciPy, image by image": loop, "hmg_gpu, SciPy": batched}


def build_data_path(batch_size: int = 8, patch_size: int = 256) -> Calls:
    data = _training_set("NUAA-SIRST")
    masks = point_to_mask(data.images, data.points, sizes=data.sizes)
    plan = draw_epoch(data.sizes, batch_size, patch_size, seed=0, epoch=0)[0]
    model = build_model("acm").to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    torch.set_flush_denormal(True)

    def crops() -> tuple[Tensor, Tensor]:
        return cut_crops(data, masks, plan, patch_size)

    def step() -> None:
        images, targets = crops()
        optimizer.zero_grad(set_to_none=True)
        soft_iou_loss(model(images.contiguous(memory_format=torch.channels_last)), targets).backward()
        optimizer.step()

    return {"whole ACM training step": step, "crops, flips, transposes, normalisation": crops}


CASES = (
    Case("pmg", "initial masks of the NUDT-SIRST training set, 918 points, extent 10", build_pmg, goal=5),
    Case("faf", "64 predictions of 256 x 256, 20 blobs each", build_faf, goal=5),
    Case("metrics", "IoU, Pd, Fa of 64 pairs of 256 x 256, 6 targets each", build_metrics),
    Case("data", "8 crops of 256 x 256 from NUAA-SIRST against one ACM step", build_data_path, goal=0.1, share=True),
)
