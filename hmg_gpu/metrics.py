"""IoU, Pd and Fa as the field counts them (LESPS's definitions), in exact integers on the device of the masks."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import check_mask, check_same, check_sizes
from .components import Components, backend_for, connected_components

COUNTS = ("intersection", "union", "matched", "targets", "false_alarm_pixels", "pixel_false_alarms", "pixels")


@torch.no_grad()
def detection_counts(
    prediction: Tensor, target: Tensor, *, sizes: Tensor | None = None, distance: float = 3.0
) -> Tensor:
    """Count what IoU, Pd and Fa are made of, image by image.

    Components are 8-connected and ordered by their first pixel in raster order. For each ground-truth component in that
    order, the first predicted component still free whose centroid lies strictly closer than ``distance`` (L2) matches
    and is taken. The pixels of predicted components that match nothing are false-alarm pixels.

    Args:
        prediction, target: bool [B, H, W].
        sizes: int64 [B, 2], valid (height, width) of padded images; what lies outside counts nowhere.
        distance: in pixels; 3 in the field.

    Returns:
        int64 [B, 7], columns as :data:`COUNTS`: pixels of the intersection and the union, matched and all ground-truth
        components, pixels of unmatched predicted components, predicted pixels outside the target (the pixel-level
        count), valid pixels.

    Raises:
        TypeError: a mask is not bool. ValueError: the shapes differ.
    """
    check_mask(prediction, "prediction")
    check_mask(target, "target")
    check_same(prediction, target, "prediction", "target")
    check_sizes(sizes, prediction)
    if backend_for(prediction) == "triton":
        from .kernels.components import detection_counts as on_device

        return on_device(prediction, target, sizes=sizes, distance=distance)
    return counts_on_host(prediction, target, sizes, distance)


def counts_on_host(prediction: Tensor, target: Tensor, sizes: Tensor | None, distance: float) -> Tensor:
    """:func:`detection_counts` without the kernels; the number of components decides what Python does."""
    batch, height, width = prediction.shape
    found, truth = connected_components(prediction, sizes), connected_components(target, sizes)
    # Foreground is sparse: the counts follow from its pixels, no plane is read again.
    predicted_pixels, target_pixels = _per_image(found, found.area), _per_image(truth, truth.area)
    shared = target.reshape(-1)[found.pixels]  # [F], where the prediction lies on the target
    intersection = torch.bincount(found.pixels[shared] // (height * width), minlength=batch)
    union = predicted_pixels + target_pixels - intersection
    pixels = torch.full_like(union, height * width) if sizes is None else sizes.prod(1)

    match = _match(found, truth, distance)  # [ground-truth components], -1 where none
    hit = match >= 0
    unmatched = torch.ones(len(found), dtype=torch.bool, device=match.device)
    unmatched[match[hit]] = False
    targets, matched = _per_image(truth, torch.ones_like(truth.area)), _per_image(truth, hit.long())
    false_alarms = _per_image(found, found.area * unmatched)
    columns = (intersection, union, matched, targets, false_alarms, predicted_pixels - intersection, pixels)
    return torch.stack(columns, dim=1)


def _per_image(components: Components, values: Tensor) -> Tensor:
    """Sum int64 values [K] of components over each image: int64 [B]."""
    return values.new_zeros(components.shape[0]).index_add_(0, components.image, values)


def _match(found: Components, truth: Components, distance: float) -> Tensor:
    """Greedy matching in raster order: int64 [ground-truth components], the predicted component or -1."""
    # Pair every ground-truth component with every predicted one of its image; only close pairs remain.
    per_image = torch.bincount(found.image, minlength=found.shape[0])
    pairs = per_image[truth.image]
    first = (per_image.cumsum(0) - per_image)[truth.image]
    left = torch.repeat_interleave(pairs)
    right = torch.arange(len(left), device=left.device) - (pairs.cumsum(0) - pairs - first)[left]
    # Centroid distance times both areas, in whole numbers: exact where a distance of exactly 3 px must not match (up to
    # areas of 4,700 pixels each; beyond that the squares round).
    area, true_area = found.area[right], truth.area[left]
    offset_y = found.sum_y[right] * true_area - truth.sum_y[left] * area
    offset_x = found.sum_x[right] * true_area - truth.sum_x[left] * area
    close = offset_y.double() ** 2 + offset_x.double() ** 2 < (distance * (area * true_area).double()) ** 2

    match = torch.full((len(truth),), -1)
    taken: set[int] = set()
    # About one pair a target is left: the order of the field's loop is kept by walking them.
    for target, candidate in zip(left[close].tolist(), right[close].tolist(), strict=True):
        if match[target] < 0 and candidate not in taken:
            match[target] = candidate
            taken.add(candidate)
    return match.to(found.area.device)


class DetectionMetrics:
    """IoU, nIoU, Pd and Fa accumulated over batches on the device of the masks; nothing is read before ``compute``.

    Args:
        distance: how close two centroids must be to match, in pixels (strictly less).
    """

    def __init__(self, distance: float = 3.0):
        self.distance = distance
        self.reset()

    def reset(self) -> None:
        """Forget everything counted so far."""
        self._counts: Tensor | None = None
        self._iou_sum: Tensor | None = None
        self._iou_images: Tensor | None = None

    def update(self, prediction: Tensor, target: Tensor, sizes: Tensor | None = None) -> None:
        """Add a batch; arguments and errors as :func:`detection_counts`."""
        self.add(detection_counts(prediction, target, sizes=sizes, distance=self.distance))

    def add(self, counts: Tensor) -> None:
        """Add counts that :func:`detection_counts` gave, int64 [B, 7]."""
        intersection, union = counts[:, 0].double(), counts[:, 1]
        filled = union > 0
        iou_sum = torch.where(filled, intersection / union.clamp(min=1), 0).sum()
        if self._counts is None:
            self._counts = counts.sum(0)
            self._iou_sum, self._iou_images = iou_sum, filled.sum()
        else:
            self._counts = self._counts + counts.sum(0)
            self._iou_sum, self._iou_images = self._iou_sum + iou_sum, self._iou_images + filled.sum()

    def compute(self) -> dict[str, int | float]:
        """Everything counted since the last reset.

        Returns:
            ``intersection, union, matched, targets, false_alarm_pixels, pixels``: exact counts;
            ``iou`` = intersection / union over the set (the field's mIoU); ``niou``: mean of the images' IoU, images
            without target and prediction left out; ``pd`` = matched / targets; ``fa`` = false_alarm_pixels / pixels
            (LESPS); ``pixel_fa``: the share of pixels predicted outside the target. All are fractions; a division by
            zero (no target, no image) is NaN.
        """
        totals = [0] * len(COUNTS) if self._counts is None else self._counts.tolist()
        result: dict[str, int | float] = dict(zip(COUNTS, totals, strict=True))
        iou_sum, images = (0.0, 0) if self._counts is None else (float(self._iou_sum), int(self._iou_images))
        result["iou"] = _ratio(result["intersection"], result["union"])
        result["niou"] = _ratio(iou_sum, images)
        result["pd"] = _ratio(result["matched"], result["targets"])
        result["fa"] = _ratio(result["false_alarm_pixels"], result["pixels"])
        result["pixel_fa"] = _ratio(result["pixel_false_alarms"], result["pixels"])
        return result


def _ratio(part: float, whole: int) -> float:
    return part / whole if whole else float("nan")
