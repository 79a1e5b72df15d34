"""Targets by size (HMG Fig. 4): each target is compared with the mask of its own point."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hmg_gpu.data import ImageSet
from hmg_gpu.masks import Maker
from hmg_gpu.masks.components import connected_components
from hmg_gpu.plain.components import Components

SIZE_CLASSES = {"Point": 9, "Spot": 81, "Extended": None}  # largest target of each class, pixels
_GROUP_PIXELS = 1 << 22  # of the windows held at a time


def size_classes(data: ImageSet, maker: Maker) -> dict[str, dict[str, float]]:
    """IoU of a maker's masks by target size (HMG Fig. 4): Point up to 9 pixels, Spot 10 to 81, Extended beyond.

    For each target (8-connected component of the ground truth) the mask made from its own point alone is compared with
    that component alone; intersections and unions are summed over the class. A target's own point is the one on it, or
    the one whose nearest centroid it is (a bent target's centroid lies outside); of several the closest to the
    centroid. A target without a point counts with an empty mask.

    Args:
        data: a set with points and ground truth.
        maker: one that knows each point's mask by itself (``Maker.each``), such as ``Pmg``.

    Returns:
        For each class ``targets, intersection, union`` (counts) and ``iou`` (a fraction; NaN without targets).

    Example:
        >>> import torch
        >>> from hmg_gpu.data import ImageSet
        >>> from hmg_gpu.evaluation.size_classes import size_classes
        >>> from hmg_gpu.masks import Pmg
        >>> image = torch.nn.functional.pad(torch.ones(1, 3, 3), (3, 3, 3, 3))  # 9 x 9 around a target of 9 pixels
        >>> data = ImageSet(["a"], image, torch.tensor([[9, 9]]), torch.tensor([[0, 4, 4]]), image > 0)
        >>> size_classes(data, Pmg())["Point"]
        {'targets': 1, 'intersection': 9, 'union': 9, 'iou': 1.0}
    """
    truth = connected_components(data.masks, data.sizes)
    point_rows = _own_points(data, truth)  # [K], -1 where there is none
    having = (point_rows >= 0).nonzero()[:, 0]
    intersection, covered = torch.zeros_like(truth.area), torch.zeros_like(truth.area)
    plane = data.images.shape[1] * data.images.shape[2]
    done = 0
    for points, position, masks in maker.each(data, data.points[point_rows[having]]):
        targets = having[done : done + len(points)]
        done += len(points)
        hit = _component_at(truth, points[:, 0, None, None] * plane + position) == targets[:, None, None]
        intersection[targets] = (masks & hit).sum((1, 2))
        covered[targets] = masks.sum((1, 2))
    return _sum_classes(truth, intersection, covered)


def size_classes_of(masks: Tensor, data: ImageSet) -> dict[str, dict[str, float]]:
    """The same for masks that belong to no point: a target is compared with all components of the mask that touch it.

    Args:
        masks: bool [N, H, W], for example predictions.

    Example:
        >>> import torch
        >>> from hmg_gpu.data import ImageSet
        >>> from hmg_gpu.evaluation.size_classes import size_classes_of
        >>> truth = torch.tensor([[[1, 1, 0, 0, 0, 0]]]).bool()
        >>> data = ImageSet(["a"], truth.float(), torch.tensor([[1, 6]]), torch.zeros(0, 3).long(), truth)
        >>> size_classes_of(torch.tensor([[[0, 1, 1, 0, 0, 1]]]).bool(), data)["Point"]  # the last touches none
        {'targets': 1, 'intersection': 1, 'union': 3, 'iou': 0.3333333333333333}
    """
    truth, components = connected_components(data.masks, data.sizes), connected_components(masks, data.sizes)
    target = _component_at(truth, components.pixels)
    both = target >= 0
    pairs, overlap = torch.stack((target[both], components.component[both])).unique(dim=1, return_counts=True)
    intersection = torch.zeros_like(truth.area).index_add_(0, pairs[0], overlap)
    covered = torch.zeros_like(truth.area).index_add_(0, pairs[0], components.area[pairs[1]])
    return _sum_classes(truth, intersection, covered)


def joined_targets(masks: Tensor, data: ImageSet) -> list[int]:
    """Images in which one component of the mask covers two or more targets (HMG Fig. 9).

    Example:
        >>> import torch
        >>> from hmg_gpu.data import ImageSet
        >>> from hmg_gpu.evaluation.size_classes import joined_targets
        >>> truth = torch.tensor([[[1, 0, 1]], [[1, 0, 0]]]).bool()  # two images: two targets, one target
        >>> data = ImageSet(["a", "b"], truth.float(), torch.tensor([[1, 3]] * 2), torch.zeros(0, 3).long(), truth)
        >>> joined_targets(torch.ones(2, 1, 3).bool(), data)
        [0]
    """
    truth, components = connected_components(data.masks, data.sizes), connected_components(masks, data.sizes)
    target = _component_at(truth, components.pixels)
    both = target >= 0
    pairs = torch.stack((target[both], components.component[both])).unique(dim=1)
    touched = torch.bincount(pairs[1], minlength=len(components))
    return components.image[touched > 1].unique().tolist()


def _component_at(components: Components, position: Tensor) -> Tensor:
    """The component that owns each flat position, -1 where that pixel is background."""
    if len(components.pixels) == 0:
        return torch.full_like(position, -1)
    slot = torch.searchsorted(components.pixels, position).clamp(max=len(components.pixels) - 1)
    return torch.where(components.pixels[slot] == position, components.component[slot], -1)


def _own_points(data: ImageSet, truth: Components) -> Tensor:
    """For each target its own row of ``data.points``, or -1: int64 [K]."""
    points, point_rows = data.points, torch.full_like(truth.area, -1)
    if len(points) == 0 or len(truth) == 0:
        return point_rows
    _, height, width = data.images.shape
    target = _component_at(truth, (points[:, 0] * height + points[:, 1]) * width + points[:, 2])  # [P]
    # Images further apart than any two pixels, so that the nearest centroid is one of the point's image if it has any.
    apart = torch.cat((truth.image[:, None] * 4.0 * (height + width), truth.centroids), dim=1)  # [K, 3]
    lost = (target < 0).nonzero()[:, 0]
    for rows in lost.split(max(1, _GROUP_PIXELS // len(truth))):
        spot = points[rows].to(apart.dtype) * apart.new_tensor([4.0 * (height + width), 1, 1])
        nearest = torch.cdist(spot, apart).argmin(1)
        target[rows] = torch.where(truth.image[nearest] == points[rows, 0], nearest, -1)
    rows = (target >= 0).nonzero()[:, 0]
    distance = (points[rows, 1:] - truth.centroids[target[rows]]).square().sum(1)
    rows = rows[distance.argsort(descending=True, stable=True)]  # from far to near
    rank = torch.arange(len(rows), device=point_rows.device)
    nearest = point_rows.scatter_reduce(0, target[rows], rank, "amax")  # [K]
    return torch.where(nearest >= 0, rows[nearest.clamp(min=0)], -1) if len(rows) else point_rows


def _sum_classes(truth: Components, intersection: Tensor, covered: Tensor) -> dict[str, dict[str, float]]:
    union = truth.area + covered - intersection
    bounds = truth.area.new_tensor([bound for bound in SIZE_CLASSES.values() if bound])
    kind = torch.bucketize(truth.area, bounds)  # bounds[kind - 1] < area <= bounds[kind]
    result = {}
    for index, name in enumerate(SIZE_CLASSES):
        chosen = kind == index
        part, total = int(intersection[chosen].sum()), int(union[chosen].sum())
        result[name] = {
            "targets": int(chosen.sum()),
            "intersection": part,
            "union": total,
            "iou": part / total if total else math.nan,
        }
    return result
