"""The same work as others do it: loops over images and regions, and the labellers that can be called."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bench.measure import Row
from hmg_gpu.data import ImageSet
from tests import reference

RADIUS = 30  # r of FAF in pixels
DISTANCE = 3.0  # between matching centroids in pixels


def installed(*packages: str) -> str:
    """Why rows that need these packages cannot run, or nothing."""
    absent = [package for package in packages if importlib.util.find_spec(package) is None]
    return f"{', '.join(absent)} not installed" if absent else ""


def peer(name: str, make: Callable[[], Callable[[], object]], *packages: str, **settings) -> Row:
    """A row whose packages may be absent; ``make`` imports them."""
    why = installed(*packages)
    return Row(name, None, why=why) if why else Row(name, make(), **settings)


def split_points(points: Tensor, images: int) -> list[NDArray]:
    """The (y, x) of each image, int64 [n, 2] each."""
    ends = torch.searchsorted(points[:, 0].contiguous(), torch.arange(images + 1)).tolist()
    return [points[a:b, 1:].numpy() for a, b in pairwise(ends)]


# ---- PMG ------------------------------------------------------------------------------------------------------------


def reference_masks(data: ImageSet, extent: int) -> Tensor:
    """PMG by tests/reference.py, one point at a time."""
    masks = torch.zeros(data.images.shape, dtype=torch.bool)
    for index, points in enumerate(split_points(data.points, len(data))):
        height, width = data.sizes[index].tolist()
        image = data.images[index, :height, :width].numpy()
        masks[index, :height, :width] = torch.from_numpy(reference.point_to_mask(image, points, extent))
    return masks


# ---- update ---------------------------------------------------------------------------------------------------------


def near(centroids: NDArray, points: NDArray) -> NDArray:
    """Which centroids lie within RADIUS (L1) of a point; the slack takes up rounding, far below 1 / area."""
    if len(points) == 0:
        return np.zeros(len(centroids), dtype=bool)
    return (np.abs(centroids[:, None] - points[None]).sum(2) <= RADIUS + 1e-9).any(1)


def reference_update(prediction: NDArray, initial: NDArray, points: Iterable[NDArray]) -> NDArray:
    triples = zip(prediction, initial, points, strict=True)
    return np.stack([reference.update(predicted, before, clicks, RADIUS) for predicted, before, clicks in triples])


def regionprops_update(prediction: NDArray, initial: NDArray, points: Iterable[NDArray]) -> NDArray:
    """As label updates of the field are written: label an image, walk its regions, paint those to keep."""
    from skimage.measure import label, regionprops

    hybrid = initial.copy()
    for index, clicks in enumerate(points):
        for region in regionprops(label(prediction[index], connectivity=2)):
            if near(np.array([region.centroid]), clicks)[0]:
                hybrid[index][tuple(region.coords.T)] = True
    return hybrid


def opencv_update(prediction: NDArray, initial: NDArray, points: Iterable[NDArray]) -> NDArray:
    """One call an image gives labels and centroids; a look-up by label keeps or erases."""
    import cv2

    hybrid = np.empty_like(initial)
    for index, clicks in enumerate(points):
        _, labels, _, centroids = cv2.connectedComponentsWithStats(prediction[index].view(np.uint8), connectivity=8)
        kept = np.concatenate(([False], near(centroids[1:, ::-1], clicks)))
        np.logical_or(initial[index], kept[labels], out=hybrid[index])
    return hybrid


# ---- labels: each gives a table of components, int64 rows (image, area, sum of y, sum of x) -------------------------


def table_of_labels(labels: Tensor) -> Tensor:
    """The table from label planes [B, H, W] of any numbering, 0 for background; rows sorted."""
    labels = labels.cpu().long()
    image, y, x = labels.nonzero(as_tuple=True)
    _, component = (image * (int(labels.max()) + 1) + labels[image, y, x]).unique(return_inverse=True)
    count = int(component.max()) + 1 if len(component) else 0
    sums = torch.zeros((count, 4), dtype=torch.int64)
    sums.index_add_(0, component, torch.stack((image, torch.ones_like(y), y, x), dim=1))
    sums[:, 0] //= sums[:, 1].clamp(min=1)
    return sorted_rows(sums)


def sorted_rows(table: Tensor) -> Tensor:
    return table.unique(dim=0) if len(table) else table


def scipy_labels(masks: NDArray) -> Tensor:
    """tests/reference.py: every component by itself."""
    rows = [
        (index, area, int(y * area), int(x * area))
        for index, mask in enumerate(masks)
        for area, y, x in reference.components(mask)
    ]
    return torch.tensor(rows, dtype=torch.int64).reshape(-1, 4)


def regionprops_labels(masks: NDArray) -> Tensor:
    from skimage.measure import label, regionprops

    rows = []
    for index, mask in enumerate(masks):
        for region in regionprops(label(mask, connectivity=2)):
            (y, x), area = region.centroid, int(region.area)
            rows.append((index, area, round(y * area), round(x * area)))
    return torch.tensor(rows, dtype=torch.int64).reshape(-1, 4)


def opencv_labels(masks: NDArray) -> Tensor:
    import cv2

    tables = []
    for index, mask in enumerate(masks):
        _, _, stats, centroids = cv2.connectedComponentsWithStats(mask.view(np.uint8), connectivity=8)
        area = stats[1:, cv2.CC_STAT_AREA, None].astype(np.int64)
        sums = np.rint(centroids[1:, ::-1] * area).astype(np.int64)
        tables.append(np.concatenate((np.full_like(area, index), area, sums), axis=1))
    return torch.from_numpy(np.concatenate(tables))


# ---- metrics --------------------------------------------------------------------------------------------------------

COUNTED = ("intersection", "union", "matched", "false_alarm_pixels")


def reference_metrics(prediction: NDArray, target: NDArray) -> Tensor:
    metrics = reference.detection_metrics(list(zip(prediction, target, strict=True)), DISTANCE)
    return torch.tensor([metrics[name] for name in COUNTED])


def regionprops_metrics(prediction: NDArray, target: NDArray) -> Tensor:
    """IoU, Pd and Fa as evaluation scripts of the field count them: two lists of regions an image, pair by pair."""
    from skimage.measure import label, regionprops

    intersection = union = matched = false_alarms = 0
    for predicted, truth in zip(prediction, target, strict=True):
        intersection += int(np.logical_and(predicted, truth).sum())
        union += int(np.logical_or(predicted, truth).sum())
        left = list(regionprops(label(predicted, connectivity=2)))
        for wanted in regionprops(label(truth, connectivity=2)):
            for candidate in left:
                if np.linalg.norm(np.array(candidate.centroid) - np.array(wanted.centroid)) < DISTANCE:
                    matched += 1
                    left.remove(candidate)
                    break
        false_alarms += sum(int(region.area) for region in left)
    return torch.tensor([intersection, union, matched, false_alarms])


# ---- batches --------------------------------------------------------------------------------------------------------


def loop_crops(data: ImageSet, masks: Tensor, plan: Tensor, patch_size: int) -> tuple[Tensor, Tensor]:
    """Crops as the field's data sets cut them: one image at a time in NumPy, stacked at the end; padded with zeros."""
    images, targets = [], []
    for index, top, left, flip_rows, flip_columns, transpose, *_ in plan.tolist():  # of draw_epoch without jitter
        height, width = data.sizes[index].tolist()
        window = np.s_[top : min(top + patch_size, height), left : min(left + patch_size, width)]
        image = (data.images[index].numpy()[window].astype(np.float32) - np.float32(data.mean)) / np.float32(data.std)
        target = masks[index].numpy()[window]
        room = [(0, patch_size - side) for side in image.shape]
        image, target = np.pad(image, room), np.pad(target, room)
        if flip_rows:
            image, target = image[::-1], target[::-1]
        if flip_columns:
            image, target = image[:, ::-1], target[:, ::-1]
        if transpose:
            image, target = image.T, target.T
        images.append(torch.from_numpy(np.ascontiguousarray(image)))
        targets.append(torch.from_numpy(np.ascontiguousarray(target)))
    return torch.stack(images)[:, None], torch.stack(targets)[:, None]
