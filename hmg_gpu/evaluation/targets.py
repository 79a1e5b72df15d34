"""Where masks lose: targets by size, contrast, shape and more, and how well a confidence tells which masks are good."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hmg_gpu.data import ImageSet
from hmg_gpu.evaluation.size_classes import _component_at, _own_points
from hmg_gpu.masks.components import connected_components
from hmg_gpu.masks.student.crops import full_sizes, gather, window_positions

RADIUS = 31  # of the windows around points in which targets are described, pixels
GROUP = 1024  # windows held at a time
BOUNDS: dict[str, tuple[float, ...]] = {  # of the classes: the largest value of each but the last
    "size": (9, 20, 40, 81, 200),
    "contrast": (2, 4, 8, 16),
    "shape": (1.3, 2),
    "neighbours": (0, 1),
    "reach": (4, 8, 12, 16, 23),
    "border": (0.3, 0.4, 0.5, 0.6),
    "teacher": (0.5, 0.7, 0.8, 0.9),
}
MEANING = {
    "size": "pixels of the target",
    "contrast": "its mean above its surroundings' median, in their standard deviations",
    "shape": "longer side of its box by the shorter one",
    "neighbours": f"other targets within {RADIUS} pixels",
    "reach": "its farthest row or column from its point, pixels: a crop of 48 ends at 23",
    "border": "brightness of its outermost pixels, from 0 (surroundings) to 1 (its peak): how wide it was drawn",
    "teacher": "IoU of the first maker's mask",
}


@dataclass
class Targets:
    """What is known of each target that has a point of its own, in columns of length K.

    Attributes:
        rows: int64, each target's row of ``data.points``.
        described: float32 by the names of :data:`BOUNDS`, but ``teacher``.
        numbers: int64, components of the ground truth.
    """

    rows: Tensor
    numbers: Tensor
    described: dict[str, Tensor]


def describe_targets(data: ImageSet) -> Targets:
    """Describe each target by ground truth and image; a target without a point of its own is left out.

    Example:
        >>> from hmg_gpu.data.synthetic import make_split
        >>> found = describe_targets(make_split("test", points="masks_centroid", count=2, size=64))
        >>> sorted(found.described)
        ['border', 'contrast', 'neighbours', 'reach', 'shape', 'size']
    """
    truth = connected_components(data.masks, data.sizes)
    own = _own_points(data, truth)
    numbers = (own >= 0).nonzero()[:, 0]
    parts: list[dict[str, Tensor]] = [_describe(data, truth, own[some], some) for some in numbers.split(GROUP)]
    described = {name: torch.cat([part[name] for part in parts]) for name in BOUNDS if name != "teacher" and parts}
    return Targets(own[numbers], numbers, described)


def _describe(data: ImageSet, truth: Any, rows: Tensor, numbers: Tensor) -> dict[str, Tensor]:
    points, side = data.points[rows], 2 * RADIUS + 1
    position, inside = window_positions(points, side, data.images.shape, data.sizes)
    owner = torch.where(
        inside, _component_at(truth, torch.where(inside, position, 0).flatten()).view(position.shape), -1
    )
    target = owner == numbers[:, None, None]  # [k, S, S]
    straight = torch.zeros(len(points), 3, dtype=torch.int64, device=points.device)
    sizes = full_sizes(data.images) if data.sizes is None else data.sizes
    image = gather(data.images, points, sizes, side + 1, straight)[:, 1:, 1:]
    around = (owner < 0) & inside & (F.max_pool2d(target[:, None].float(), 5, 1, 2)[:, 0] == 0)
    values = torch.where(around, image, torch.nan).flatten(1)
    ground = values.nanmedian(1).values.nan_to_num()
    mean = values.nanmean(1)
    deviation = (values - mean[:, None]).square().nanmean(1).sqrt().nan_to_num().clamp(min=1e-3)
    area = target.sum((1, 2)).clamp(min=1)
    level = torch.where(target, image, 0).sum((1, 2)) / area
    peak = torch.where(target, image, -torch.inf).amax((1, 2))
    inner = F.max_pool2d((~target)[:, None].float(), 3, 1, 1)[:, 0] == 0
    edge = target & ~inner
    at_edge = torch.where(edge, image, 0).sum((1, 2)) / edge.sum((1, 2)).clamp(min=1)
    offset = torch.arange(side, device=points.device) - RADIUS
    tall, wide = target.any(2), target.any(1)
    height, width = tall.sum(1), wide.sum(1)
    far = torch.maximum((tall * offset.abs()).amax(1), (wide * offset.abs()).amax(1))
    ordered = owner.flatten(1).sort(1).values
    seen = ((ordered[:, 1:] != ordered[:, :-1]) & (ordered[:, 1:] >= 0)).sum(1) + (ordered[:, 0] >= 0)
    columns = {
        "size": truth.area[numbers],
        "contrast": (level - ground) / deviation,
        "shape": torch.maximum(height, width) / torch.minimum(height, width).clamp(min=1),
        "neighbours": seen - 1,
        "reach": far,
        "border": (at_edge - ground) / (peak - ground).clamp(min=1e-3),
    }
    return {name: value.float() for name, value in columns.items()}


def compared(masks: Tensor, data: ImageSet, targets: Targets) -> tuple[Tensor, Tensor]:
    """Pixels that each target shares with masks [N, H, W], and its union with all components that touch it: int64 [K].

    A component that touches several targets counts with each of them.
    """
    truth, found = connected_components(data.masks, data.sizes), connected_components(masks, data.sizes)
    target = _component_at(truth, found.pixels)
    both = target >= 0
    pairs, overlap = torch.stack((target[both], found.component[both])).unique(dim=1, return_counts=True)
    hit = torch.zeros_like(truth.area).index_add_(0, pairs[0], overlap)
    covered = torch.zeros_like(truth.area).index_add_(0, pairs[0], found.area[pairs[1]])
    return hit[targets.numbers], (truth.area + covered - hit)[targets.numbers]


def by_class(values: Tensor, bounds: Sequence[float], size: Tensor, hit: Tensor, union: Tensor) -> list[dict[str, Any]]:
    """IoU, and what is lost, of targets by class of a value: one row for each class that has targets.

    Args:
        values: float [K]. size: pixels of the targets [K].
        bounds: rising; the largest value of each class but the last.
        hit, union: as :func:`compared` gives them.

    Returns:
        ``upto`` (None: beyond the last bound), ``targets``; as fractions ``iou``, ``missed`` (of the targets' pixels),
        ``extra`` (pixels beyond the targets, by the targets' pixels) and ``lost`` (the class's part of all pixels
        missed and extra).

    Example:
        >>> import torch
        >>> one, two = by_class(
        ...     torch.tensor([3.0, 30.0]), (9,), *(torch.tensor(row) for row in ([4, 40], [3, 40], [5, 42]))
        ... )
        >>> one["iou"], one["missed"], one["extra"], one["lost"], two["upto"]
        (0.6, 0.25, 0.25, 0.5, None)
    """
    kinds = torch.bucketize(values, torch.tensor(bounds, device=values.device, dtype=values.dtype))
    total = int((union - hit).sum())
    rows = []
    for kind, upto in enumerate((*bounds, None)):
        chosen = kinds == kind
        pixels, shared, joined = (int(column[chosen].sum()) for column in (size, hit, union))
        if pixels:
            row = {"upto": upto, "targets": int(chosen.sum()), "iou": shared / joined, "missed": 1 - shared / pixels}
            rows.append(row | {"extra": (joined - pixels) / pixels, "lost": (joined - shared) / max(total, 1)})
    return rows


def sureness(confidence: Tensor, hit: Tensor, union: Tensor, share: float = 0.8) -> dict[str, float]:
    """How well a confidence tells good masks: Spearman's rank correlation with IoU, and IoU of the surest targets.

    Args:
        confidence: float [K]. hit, union: as :func:`compared` gives them.
        share: of the targets that are the surest.

    Returns:
        ``rank_correlation`` (NaN where all are the same), ``iou`` of all and ``iou_surest`` of the share.

    Example:
        >>> import torch
        >>> sureness(torch.tensor([0.1, 0.5, 0.9]), torch.tensor([1, 2, 4]), torch.tensor([4, 4, 5]), share=2 / 3)
        {'rank_correlation': 1.0, 'iou': 0.5384615384615384, 'iou_surest': 0.6666666666666666}
    """
    first, second = (_ranks(column) for column in (confidence, hit / union.clamp(min=1)))
    spread = float(first.norm() * second.norm())
    surest = confidence.argsort(descending=True, stable=True)[: round(share * len(confidence))]
    return {
        "rank_correlation": round(float((first * second).sum()) / spread, 6) if spread else math.nan,
        "iou": int(hit.sum()) / max(int(union.sum()), 1),
        "iou_surest": int(hit[surest].sum()) / max(int(union[surest].sum()), 1),
    }


def _ranks(values: Tensor) -> Tensor:
    """Centred ranks, float64 [K]; equal values share theirs."""
    _, place, count = values.double().unique(return_inverse=True, return_counts=True)
    rank = (count.cumsum(0) - (count - 1) / 2).double()[place]
    return rank - rank.mean()


def describe_class(name: str, upto: float | None, bounds: Mapping[str, Sequence[float]] = BOUNDS) -> str:
    """A class in words: "up to 9" or "more than 200"."""
    return f"more than {bounds[name][-1]:g}" if upto is None else f"up to {upto:g}"
