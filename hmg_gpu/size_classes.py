"""Targets by size (HMG Fig. 4) and each target's own mask: what needs more than one mask an image."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from .components import Components, connected_components
from .data import ImageSet
from .pmg import box_to_mask, point_to_box

SIZE_CLASSES = {"Point": 9, "Spot": 81, "Extended": None}  # largest target of each class, pixels
_GROUP_PIXELS = 1 << 22  # of the windows held at a time


def size_classes(data: ImageSet, *, global_only: bool = False, **pmg: float) -> dict[str, dict[str, float]]:
    """IoU of PMG's masks by target size (HMG Fig. 4): Point up to 9 pixels, Spot 10 to 81, Extended beyond.

    For each target (8-connected component of the ground truth) the mask made from its own point alone is compared with
    that component alone; intersections and unions are summed over the class. A target's own point is the one on it, or
    the one whose nearest centroid it is (a bent target's centroid lies outside); of several the closest to the
    centroid. A target without a point counts with an empty mask.

    Args:
        data: a set with points and ground truth.
        global_only: measure P_g instead of P_f.
        pmg: extent, half_width, alpha.

    Returns:
        For each class ``targets, intersection, union`` (counts) and ``iou`` (a fraction; NaN without targets).
    """
    truth = connected_components(data.masks, data.sizes)
    own = _own_points(data, truth)  # [K], -1 where there is none
    having = (own >= 0).nonzero()[:, 0]
    intersection, covered = torch.zeros_like(truth.area), torch.zeros_like(truth.area)
    plane = data.images.shape[1] * data.images.shape[2]
    done = 0
    for points, position, masks in own_masks(data, data.points[own[having]], **pmg, global_only=global_only):
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
    """
    truth, found = connected_components(data.masks, data.sizes), connected_components(masks, data.sizes)
    target = _component_at(truth, found.pixels)
    both = target >= 0
    pairs, overlap = torch.stack((target[both], found.component[both])).unique(dim=1, return_counts=True)
    intersection = torch.zeros_like(truth.area).index_add_(0, pairs[0], overlap)
    covered = torch.zeros_like(truth.area).index_add_(0, pairs[0], found.area[pairs[1]])
    return _sum_classes(truth, intersection, covered)


def joined_targets(masks: Tensor, data: ImageSet) -> list[int]:
    """Images in which one component of the mask covers two or more targets (HMG Fig. 9)."""
    truth, found = connected_components(data.masks, data.sizes), connected_components(masks, data.sizes)
    target = _component_at(truth, found.pixels)
    both = target >= 0
    pairs = torch.stack((target[both], found.component[both])).unique(dim=1)
    touched = torch.bincount(pairs[1], minlength=len(found))
    return found.image[touched > 1].unique().tolist()


def _component_at(components: Components, position: Tensor) -> Tensor:
    """The component that owns each flat position, -1 where that pixel is background."""
    if len(components.pixels) == 0:
        return torch.full_like(position, -1)
    slot = torch.searchsorted(components.pixels, position).clamp(max=len(components.pixels) - 1)
    return torch.where(components.pixels[slot] == position, components.component[slot], -1)


def _own_points(data: ImageSet, truth: Components) -> Tensor:
    """For each target its own row of ``data.points``, or -1: int64 [K]."""
    points, own = data.points, torch.full_like(truth.area, -1)
    if len(points) == 0 or len(truth) == 0:
        return own
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
    rank = torch.arange(len(rows), device=own.device)
    nearest = own.scatter_reduce(0, target[rows], rank, "amax")  # [K]
    return torch.where(nearest >= 0, rows[nearest.clamp(min=0)], -1) if len(rows) else own


def _sum_classes(truth: Components, intersection: Tensor, covered: Tensor) -> dict[str, dict[str, float]]:
    union = truth.area + covered - intersection
    bounds = truth.area.new_tensor([bound for bound in SIZE_CLASSES.values() if bound])
    kind = torch.bucketize(truth.area, bounds)  # bounds[kind - 1] < area <= bounds[kind]
    result = {}
    for index, name in enumerate(SIZE_CLASSES):
        chosen = kind == index
        part, whole = int(intersection[chosen].sum()), int(union[chosen].sum())
        result[name] = {
            "targets": int(chosen.sum()),
            "intersection": part,
            "union": whole,
            "iou": part / whole if whole else math.nan,
        }
    return result


# --- one mask a point -----------------------------------------------------------------------------------------------


def global_mask(data: ImageSet, *, extent: int, half_width: int, alpha: float) -> Tensor:
    """The ablation of HMG Sec. 3.1.2: P_g alone, without the directional maps; bool [N, H, W]."""
    count, height, width = data.images.shape
    canvas = torch.zeros(count * height * width, dtype=torch.bool, device=data.images.device)
    for points, position, masks in own_masks(data, data.points, extent, half_width, alpha, global_only=True):
        canvas[(points[:, 0, None, None] * height * width + position)[masks]] = True
    return canvas.view(count, height, width)


def own_masks(
    data: ImageSet, points: Tensor, extent: int, half_width: int, alpha: float, *, global_only: bool = False
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The mask of each point by itself, in a window that holds every pixel PMG looks at for it.

    Args:
        points: int64 [P, 3], rows (image, y, x).
        global_only: threshold P_g instead of P_f.

    Yields:
        Some of the points [p, 3]; int64 [p, S, S] the positions y * W + x of their windows' pixels in the image; bool
        [p, S, S] their masks. Positions outside the image are held to it and never in a mask.
    """
    _, height, width = data.images.shape
    radius = max(extent, half_width)
    side = 2 * radius + 1
    steps = torch.arange(side, device=points.device)
    for group in points.split(max(1, _GROUP_PIXELS // side**2)):
        image = group[:, 0]
        corner = (group[:, 1:] - radius).clamp(min=0)  # [p, 2]
        rows = (corner[:, :1] + steps).clamp(max=height - 1)[:, :, None]  # [p, S, 1]
        columns = (corner[:, 1:] + steps).clamp(max=width - 1)[:, None]  # [p, 1, S]
        windows = data.images[image[:, None, None], rows, columns]  # [p, S, S]
        sizes = (data.sizes[image] - corner).clamp(max=side)
        local = torch.cat((torch.arange(len(group), device=points.device)[:, None], group[:, 1:] - corner), dim=1)
        boxes = point_to_box(windows, local, extent=extent, half_width=half_width, sizes=sizes)
        make = _threshold_global if global_only else box_to_mask
        yield group, rows * width + columns, make(windows, local, boxes, extent=extent, alpha=alpha)


def _threshold_global(windows: Tensor, points: Tensor, boxes: Tensor, *, extent: int, alpha: float) -> Tensor:
    """P_g >= 0.5, which eq. (2) makes the same as I >= sigma, in the box of each window's one point."""
    steps = torch.arange(windows.shape[1], device=windows.device)
    y0, x0, y1, x1 = boxes[:, :, None].unbind(1)  # [p, 1]
    inside = ((steps >= y0) & (steps < y1))[:, :, None] & ((steps >= x0) & (steps < x1))[:, None]  # [p, S, S]
    values = windows.float()
    wide = torch.float32 if values.device.type == "mps" else torch.float64
    mean = torch.where(inside, values, 0).sum((1, 2), dtype=wide) / inside.sum((1, 2)).clamp(min=1)
    sigma = (alpha * values[points.unbind(1)].to(wide) + (1 - alpha) * mean).float()
    return inside & (values >= sigma[:, None, None])
