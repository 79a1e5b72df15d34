"""What eval.py measures: masks by kind, sweeps and detectors.

Everything works on an :class:`ImageSet` on its device. Metrics are LESPS's (``DetectionMetrics``); IoU by target size
is defined in :mod:`hmg_gpu.evaluation.size_classes`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hmg_gpu.common.errors import InputError
from hmg_gpu.data import ImageSet, load_points
from hmg_gpu.data.source import SYNTHETIC, load_split
from hmg_gpu.evaluation.metrics import measure
from hmg_gpu.evaluation.pictures import pick_examples
from hmg_gpu.evaluation.size_classes import joined_targets, size_classes, size_classes_of
from hmg_gpu.evaluation.targets import BOUNDS, by_class, compared, describe_targets, sureness
from hmg_gpu.masks import Evidence, Maker, Rule, Union
from hmg_gpu.models.network import Network
from hmg_gpu.updater import MaskUpdater

SWEEPS = {  # settings that can be varied, and the values of the paper's Figs. 4(b) and 5
    "extent": (5, 8, 10, 13, 16, 17, 20, 25, 30, 40),
    "half_width": (0, 1, 2, 4, 6, 8),
    "alpha": (0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5),
    "radius": (0, 1, 2, 3, 5, 10, 20, 30, 50, 100, 1000),
    "weight": (0.5, 0.6, 0.7, 0.8, 0.9, 1),
}

Progress = Callable[[int], None]


# --- data ------------------------------------------------------------------------------------------------------------


def load_set(
    data: str, split: str, *, points: str | None = "masks_centroid", seed: int = 0, device: str = "cpu"
) -> ImageSet:
    """One split, with point labels by name or from a file or folder of any format that ``read_points`` takes.

    Args:
        data: a data set's folder, a packed .h5 store, or "synthetic".
        points: the name of point labels that the data set has, a path, or None.
        seed: of the synthetic scenes.

    Raises:
        InputError: as :func:`hmg_gpu.data.source.load_split` and the readers of points.

    Example:
        >>> scenes = load_set("synthetic", "test")
        >>> len(scenes) > 0, scenes.masks is not None
        (True, True)
    """
    from_path = points is not None and Path(points).exists() and (data == SYNTHETIC or Path(data).is_file())
    result = load_split(data, split, points=None if from_path else points, seed=seed)
    if from_path:
        result = replace(result, points=load_points(points, result.names, result.sizes))
    return result.to(device)


# --- masks -----------------------------------------------------------------------------------------------------------


def row_names(makers: Sequence[Maker]) -> list[str]:
    """The makers' rows in tables: their labels, or all that is to say of one whose label is another row's, too."""
    taken = Counter([*(maker.label for maker in makers), "prediction", "filtered", "hybrid"])
    return [maker.label if taken[maker.label] == 1 else str(maker) for maker in makers]


def updating_masks(
    network: Network, data: ImageSet, maker: Maker, rule: Rule, progress: Progress | None = None
) -> dict[str, Tensor]:
    """Every mask of the updating process (HMG Sec. 3.2, Table 4).

    Args:
        maker: of the initial masks, fitted to the data.
        rule: of the correction.

    Returns:
        "initial", "prediction", "filtered" and "hybrid" -> bool [N, H, W] each.
    """
    mean, std = network.normalisation
    updater = MaskUpdater(replace(data, mean=mean, std=std), maker, rule, guard=None)
    settings = {"threshold": network.threshold, "padding": network.inference["padding"], "progress": progress}
    changes = updater.update(network.model, "logits", head=-1, check=False, **settings)
    masks = {"prediction": changes.prediction, "filtered": changes.filtered, "hybrid": updater.masks}
    return {"initial": updater.initial} | masks


def collect_masks(
    data: ImageSet,
    makers: Sequence[Maker],
    network: Network | None = None,
    rule: Rule | None = None,
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """All masks of a set that can be had: those of each maker, and with a network those of the updating process.

    Args:
        makers: fitted to the data; the updating process starts from the last one's masks. A maker that needs points is
            left out where the set has none.
        rule: of the correction; None: the paper's.

    Returns:
        name -> bool [N, H, W]; the last one is the furthest along the process.

    Raises:
        InputError: there is none.

    Example:
        >>> from hmg_gpu.data.synthetic import make_split
        >>> from hmg_gpu.masks import Pmg
        >>> list(collect_masks(make_split("train", count=2, size=64), [Pmg(extent=10)]))
        ['pmg']
    """
    makers = [maker for maker in makers if len(data.points) or not maker.needs_points]
    start = makers[-1] if makers and network is not None and len(data.points) else None
    names = row_names(makers)
    masks = {name: maker.masks(data) for name, maker in zip(names, makers, strict=True) if maker is not start}
    if start is not None:
        updated = updating_masks(network, data, start, rule or Union(), progress)
        masks |= {names[-1]: updated.pop("initial")} | updated
    elif network is not None:
        masks["prediction"] = network.predict(data, progress)
    if not masks:
        raise InputError(
            f"{data.dataset} {data.split}: no mask to look at; give --points with labels, --masks folder:PATH or "
            "--checkpoint"
        )
    return masks


def measure_targets(
    data: ImageSet, masks: Mapping[str, Tensor], makers: Sequence[Maker], by: Sequence[str] = ()
) -> dict[str, Any]:
    """What the last mask loses by class of targets, and what the confidence of makers that have one is worth.

    Args:
        masks: as :func:`collect_masks` gives them.
        by: names of :data:`hmg_gpu.evaluation.targets.BOUNDS`; the teacher is the first mask.

    Returns:
        ``by``: for each name the rows of ``by_class``; ``confidence``: for each maker with one ``sureness``. Only
        targets with a point of their own count.
    """
    result: dict[str, Any] = {"by": {}, "confidence": {}}
    sure = {name: maker.confidence(data) for name, maker in zip(row_names(makers), makers, strict=True)}
    sure = {name: found for name, found in sure.items() if found is not None and name in masks}
    if not by and not sure:
        return result
    targets = describe_targets(data)
    counted = {name: compared(mask, data, targets) for name, mask in masks.items()}
    first, last = (counted[name] for name in (next(iter(masks)), list(masks)[-1]))
    values = targets.described | {"teacher": first[0] / first[1].clamp(min=1)}
    for name in by:
        result["by"][name] = by_class(values[name], BOUNDS[name], targets.described["size"], *last)
    for name, (points, confidence) in sure.items():
        known = dict(zip(map(tuple, points.tolist()), confidence.tolist(), strict=True))
        own = torch.tensor([known.get(tuple(point), math.nan) for point in data.points[targets.rows].tolist()])
        rows = own.isfinite().to(last[0].device)
        hit, union = (column[rows] for column in counted[name])
        result["confidence"][name] = sureness(own.to(rows.device)[rows], hit, union)
    return result


def choose_images(data: ImageSet, mask: Tensor, pick: str, count: int, names: Sequence[str] | None) -> list[int]:
    """Images for a sheet: by name, by IoU of the mask ("spread", "worst", "best"), or "joined" targets (HMG Fig. 9)."""
    if names:
        missing = [name for name in names if name not in data.names]
        if missing:
            raise InputError(f"{data.dataset} {data.split}: no image {missing[0]}; names are file stems of this split")
        return [data.names.index(name) for name in names]
    if pick != "joined":
        return pick_examples(data, mask, count, pick)
    require_truth(data)
    chosen = joined_targets(mask, data)[:count]
    if not chosen:
        raise InputError(f"{data.dataset} {data.split}: no component covers two targets, so there is nothing to show")
    return chosen


# --- tables ----------------------------------------------------------------------------------------------------------


def require_truth(data: ImageSet) -> None:
    """Refuse a set that nothing can be measured on."""
    if data.masks is None:
        raise InputError(
            f"{data.dataset} {data.split}: no ground truth to measure against; supply masks/NAME.png, "
            "or use `eval.py predict` to get masks without measuring"
        )


def measure_masks(
    data: ImageSet, masks: Mapping[str, Tensor], makers: Sequence[Maker] = ()
) -> dict[str, dict[str, Any]]:
    """Rows of Tables 2 to 4 for the masks of :func:`collect_masks`, and the ablations of their makers.

    Returns:
        name -> what ``DetectionMetrics.compute`` gives, plus ``sizes``: the IoU by target size.

    Example:
        >>> from hmg_gpu.data.synthetic import make_split
        >>> scenes = make_split("train", count=2, size=64)
        >>> measure_masks(scenes, {"perfect": scenes.masks})["perfect"]["iou"]
        1.0
    """
    by_name = dict(zip(row_names(makers), makers, strict=True))
    rows = {}
    for name, mask in masks.items():
        maker = by_name.get(name)
        rows[name] = measure(mask, data) | {"sizes": sizes_by_maker(data, maker, mask)}
        for title, part in (maker.ablations() if maker else {}).items():
            mask = part.masks(data)
            row = title if name == maker.label else str(part)
            rows[row] = measure(mask, data) | {"sizes": sizes_by_maker(data, part, mask)}
    return rows


def sizes_by_maker(data: ImageSet, maker: Maker | None, mask: Tensor) -> dict[str, dict[str, float]]:
    """IoU by target size: of the mask of the target's own point where the maker knows it, else of ``mask``."""
    if maker is None or not maker.knows_each(data):
        return size_classes_of(mask, data)
    return size_classes(data, maker)


def check_values(of: Maker | Rule, name: str, values: Iterable[float]) -> list[float]:
    """The values of a sweep in ascending order, each once.

    Raises:
        InputError: the maker or rule has no such setting, or not with such a value.
    """
    values = sorted({int(value) if float(value).is_integer() and name != "alpha" else value for value in values})
    for value in values:
        of.change(name, value)
    return values


def sweep_maker(
    data: ImageSet,
    name: str,
    values: Iterable[float],
    maker: Maker,
    *,
    folder: Path | None = None,
    progress: Progress = lambda _: None,
) -> list[dict[str, Any]]:
    """Initial masks over one setting of their maker (HMG Figs. 4b, 5a, 5b): a row of metrics and ``sizes`` for each.

    ``maker`` in each row: what its maker says about itself.

    Args:
        folder: where a maker may keep files; each value gets a folder of its own in it.
    """
    rows = []
    for value in values:
        changed = maker.change(name, value).fit(data, folder=folder and folder / f"{name}-{value:g}")
        mask = changed.masks(data)
        more = {"sizes": sizes_by_maker(data, changed, mask), "maker": changed.about()}
        rows.append({name: value} | measure(mask, data) | more)
        progress(1)
    return rows


def sweep_rule(
    data: ImageSet,
    name: str,
    values: Iterable[float],
    rule: Rule,
    evidence: Evidence,
    *,
    progress: Progress = lambda _: None,
) -> list[dict[str, Any]]:
    """Filtered predictions over one setting of a rule (HMG Fig. 5c); ``hybrid`` in each row: of the corrected masks."""
    rows = []
    for value in values:
        changed = rule.change(name, value)
        mask, hybrid = changed.filtered(evidence), changed.correct(evidence)
        more = {"sizes": size_classes_of(mask, data), "hybrid": measure(hybrid, data)}
        rows.append({name: value} | measure(mask, data) | more)
        progress(1)
    return rows


def evidence_of(
    network: Network, data: ImageSet, maker: Maker, rule: Rule, progress: Progress | None = None
) -> Evidence:
    """All that a rule may look at, for a whole set."""
    probability = network.predict_probabilities(data, progress) if rule.by_probability else None
    prediction = network.predict(data, progress) if probability is None else probability > network.threshold
    initial, soft = maker.masks_and(data, soft=rule.soft)
    return Evidence(prediction, data.points, data.sizes, initial, initial, probability, soft, network.threshold)
