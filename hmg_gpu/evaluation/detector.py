"""What is measured of a detector, and masks for images by a network, by points, or by both."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hmg_gpu.common.errors import InputError
from hmg_gpu.common.tensors import logit
from hmg_gpu.data import ImageSet
from hmg_gpu.evaluation.losses import LOSSES, lost_pixels
from hmg_gpu.evaluation.metrics import DetectionMetrics
from hmg_gpu.masks import Evidence, Maker, Rule, Union
from hmg_gpu.models.network import Network
from hmg_gpu.models.predict import predict_logits


def measure_detector(
    network: Network,
    data: ImageSet,
    thresholds: Sequence[float],
    *,
    maker: Maker | None = None,
    rule: Rule | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> list[dict[str, Any]]:
    """A network on a test set, at every threshold in one pass (HMG Tables 1 and 5).

    Args:
        thresholds: probabilities between 0 and 1; a pixel above is target.
        maker: of the points' masks for the point prompt (Sec. 4.5.1); None: the network alone.
        rule: of the point prompt; None: the paper's.

    Returns:
        For each threshold what ``DetectionMetrics.compute`` gives, with ``threshold``, the pixels' ``precision`` and
        ``recall``, and ``lost``: by each cause of :data:`hmg_gpu.evaluation.losses.LOSSES`, as shares of the union.

    Example:
        >>> import torch
        >>> from hmg_gpu.data.synthetic import make_split
        >>> scenes = make_split("test", count=2, size=64)
        >>> inference = {"mean": 0.0, "std": 1.0, "padding": "least"}
        >>> network = Network(torch.nn.Identity(), inference, 0.5, "no file", {})  # its logits are intensities
        >>> measure_detector(network, scenes, [0.5])[0]["recall"]
        1.0
    """
    if not all(0 < threshold < 1 for threshold in thresholds):
        raise InputError(f"thresholds {list(thresholds)}: expected probabilities between 0 and 1")
    rule = rule or Union()
    metrics = [DetectionMetrics() for _ in thresholds]
    lost = [torch.zeros(len(LOSSES), dtype=torch.int64, device=data.images.device) for _ in thresholds]
    for chunk in _predicted(network, data, maker, rule):
        for threshold, counter, pixels in zip(thresholds, metrics, lost, strict=True):
            compared = (chunk.masks(rule, threshold), chunk.part.masks, chunk.part.sizes)
            counter.update(*compared)
            pixels += lost_pixels(*compared)
        progress(len(chunk.rows))
    return [
        {"threshold": threshold} | _with_more(counter.compute(), pixels.tolist())
        for threshold, counter, pixels in zip(thresholds, metrics, lost, strict=True)
    ]


def predict_masks(
    batches: Iterable[ImageSet], network: Network | None, maker: Maker | None, rule: Rule | None = None
) -> Iterator[tuple[ImageSet, Tensor]]:
    """Masks for images with a network, with points, or with both (point prompt, HMG Sec. 4.5.1).

    Args:
        batches: sets on the device.
        network: None: the maker's masks from the points alone.
        maker: fitted; corrects the predictions by the points (an image without points then has an empty mask); None:
            the network alone.
        rule: of the correction; None: the paper's.

    Yields:
        Each set and bool [b, H, W].

    Example:
        >>> from hmg_gpu.data.synthetic import make_split
        >>> from hmg_gpu.masks import Pmg
        >>> scenes = make_split("test", points="masks_centroid", count=2, size=64)
        >>> for data, masks in predict_masks([scenes], None, Pmg(extent=10)):
        ...     print(masks.shape)
        torch.Size([2, 64, 64])
    """
    rule = rule or Union()
    for data in batches:
        if network is None:
            yield data, maker.masks(data)
            continue
        masks = torch.zeros(data.images.shape, dtype=torch.bool, device=data.images.device)
        for chunk in _predicted(network, data, maker, rule):
            predicted = chunk.masks(rule, network.threshold)
            masks[chunk.rows, : predicted.shape[1], : predicted.shape[2]] = predicted
        yield data, masks


class _Chunk(NamedTuple):
    """What a network gave for some images: their rows, the images, logits [b, H, W] and the masks of their points."""

    rows: list[int]
    part: ImageSet
    logits: Tensor
    initial: Tensor | None
    soft: Tensor | None

    def masks(self, rule: Rule, threshold: float) -> Tensor:
        """The prediction, corrected where there are masks of the points: bool [b, H, W]."""
        if self.initial is None:
            return self.logits > logit(threshold)
        points, sizes = self.part.points, self.part.sizes
        more = {"threshold": threshold, "soft": rule.by_probability}
        evidence = Evidence.from_logits(self.logits, points, sizes, self.initial, self.soft, **more)
        return rule.correct(evidence)


def _predicted(network: Network, data: ImageSet, maker: Maker | None, rule: Rule) -> Iterator[_Chunk]:
    initial, soft = (None, None) if maker is None else maker.masks_and(data, soft=rule.soft)
    for rows, logits in predict_logits(network.model, data, **network.inference):
        part = data.subset(rows)
        _, height, width = part.images.shape
        cut = (None if plane is None else plane[rows, :height, :width] for plane in (initial, soft))
        yield _Chunk(rows, part, logits[:, :height, :width], *cut)


def _with_more(metrics: dict[str, float], lost: list[int]) -> dict[str, Any]:
    hit, wrong, union = (metrics[name] for name in ("intersection", "pixel_false_alarms", "union"))
    target = union - wrong
    return metrics | {
        "precision": hit / (hit + wrong) if hit + wrong else math.nan,
        "recall": hit / target if target else math.nan,
        "lost": {name: pixels / union if union else math.nan for name, pixels in zip(LOSSES, lost, strict=True)},
    }
