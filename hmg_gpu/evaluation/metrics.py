"""IoU, Pd and Fa as the field counts them (LESPS's definitions), in exact integers on the device of the masks."""

from __future__ import annotations

import torch
from torch import Tensor

from hmg_gpu.common.backend import backend_for
from hmg_gpu.common.checks import check_mask, check_same, check_sizes
from hmg_gpu.data.sets import ImageSet
from hmg_gpu.plain.matching import counts_on_host

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

    Example:
        >>> import torch
        >>> from hmg_gpu.evaluation.metrics import COUNTS, detection_counts
        >>> prediction = torch.tensor([[[1, 1, 0, 0, 0, 0, 1]]]).bool()
        >>> target = torch.tensor([[[0, 1, 1, 0, 0, 0, 0]]]).bool()  # centroids 1 pixel apart: they match
        >>> for name, count in zip(COUNTS, detection_counts(prediction, target)[0].tolist()):
        ...     print(name, count)
        intersection 1
        union 4
        matched 1
        targets 1
        false_alarm_pixels 1
        pixel_false_alarms 2
        pixels 7
    """
    check_mask(prediction, "prediction")
    check_mask(target, "target")
    check_same(prediction, target, "prediction", "target")
    check_sizes(sizes, prediction)
    if backend_for(prediction) == "triton":
        from hmg_gpu.kernels.counts import detection_counts as on_device

        return on_device(prediction, target, sizes=sizes, distance=distance)
    return counts_on_host(prediction, target, sizes, distance)


class DetectionMetrics:
    """IoU, nIoU, Pd and Fa accumulated over batches on the device of the masks; nothing is read before ``compute``.

    The first update makes the sums, and all later calls, ``reset`` included, work on them in place: after one update
    ``update`` can be captured in a CUDA graph.

    Args:
        distance: how close two centroids must be to match, in pixels (strictly less).

    Example:
        >>> import torch
        >>> from hmg_gpu.evaluation.metrics import DetectionMetrics
        >>> metrics = DetectionMetrics()
        >>> metrics.update(torch.tensor([[[1, 1, 0, 0]]]).bool(), torch.tensor([[[1, 1, 0, 0]]]).bool())
        >>> metrics.update(torch.tensor([[[0, 0, 0, 0]]]).bool(), torch.tensor([[[0, 0, 1, 1]]]).bool())  # missed
        >>> [metrics.compute()[name] for name in ("iou", "niou", "pd", "fa")]
        [0.5, 0.5, 0.5, 0.0]
    """

    def __init__(self, distance: float = 3.0):
        self.distance = distance
        self._counts: Tensor | None = None  # int64 [7], sums over the images
        self._iou: Tensor | None = None  # float64 [2], sum of the images' IoU and how many have one

    def reset(self) -> None:
        """Forget everything counted so far."""
        if self._counts is not None:
            self._counts.zero_()
            self._iou.zero_()

    def update(self, prediction: Tensor, target: Tensor, sizes: Tensor | None = None) -> None:
        """Add a batch; arguments and errors as :func:`detection_counts`."""
        self.add(detection_counts(prediction, target, sizes=sizes, distance=self.distance))

    def add(self, counts: Tensor) -> None:
        """Add counts that :func:`detection_counts` gave, int64 [B, 7]."""
        intersection, union = counts[:, 0].double(), counts[:, 1]
        filled = union > 0
        iou = torch.where(filled, intersection / union.clamp(min=1), 0)
        if self._counts is None:
            with torch.inference_mode(False):  # or later calls outside of it could not add
                self._counts, self._iou = counts.new_zeros(len(COUNTS)), iou.new_zeros(2)
        self._counts.add_(counts.sum(0))
        self._iou.add_(torch.stack((iou, filled.double())).sum(1))

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
        iou_sum, images = (0.0, 0.0) if self._iou is None else self._iou.tolist()
        result["iou"] = _ratio(result["intersection"], result["union"])
        result["niou"] = _ratio(iou_sum, images)
        result["pd"] = _ratio(result["matched"], result["targets"])
        result["fa"] = _ratio(result["false_alarm_pixels"], result["pixels"])
        result["pixel_fa"] = _ratio(result["pixel_false_alarms"], result["pixels"])
        return result


def _ratio(part: float, total: float) -> float:
    return part / total if total else float("nan")


def measure(masks: Tensor, data: ImageSet) -> dict[str, int | float]:
    """IoU, Pd, Fa and their counts of masks [N, H, W] against the ground truth of a set; see ``DetectionMetrics``.

    Example:
        >>> from hmg_gpu.data.synthetic import make_split
        >>> from hmg_gpu.evaluation.metrics import measure
        >>> data = make_split("test", count=2, size=64)
        >>> measure(data.masks, data)["iou"], measure(~data.masks, data)["iou"]
        (1.0, 0.0)
    """
    metrics = DetectionMetrics()
    for rows in torch.arange(len(data), device=masks.device).split(256):
        metrics.update(masks[rows], data.masks[rows], data.sizes[rows])
    return metrics.compute()
