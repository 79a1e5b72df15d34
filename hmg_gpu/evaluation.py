"""What eval.py measures: masks by kind, sweeps and detectors.

Everything works on an :class:`ImageSet` on its device. Metrics are LESPS's (``DetectionMetrics``); IoU by target size
is defined in :mod:`hmg_gpu.size_classes`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoints import load_model
from .data import NORMALISATION, ImageSet, load_points, read_mask
from .data.images import map_files
from .data.source import SYNTHETIC, default_extent, load_split
from .drawing import pick_examples
from .errors import InputError
from .inference import predict, predict_logits
from .metrics import DetectionMetrics
from .own_masks import global_mask
from .pmg import point_to_mask, point_to_probability
from .size_classes import joined_targets, size_classes, size_classes_of
from .student import Student
from .training import measure
from .update import false_alarm_filter, retrieve_missed, soft_update, update

SWEEPS = {  # settings that can be varied, and the values of the paper's Figs. 4(b) and 5
    "extent": (5, 8, 10, 13, 16, 17, 20, 25, 30, 40),
    "half_width": (0, 1, 2, 4, 6, 8),
    "alpha": (0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5),
    "radius": (0, 1, 2, 3, 5, 10, 20, 30, 50, 100, 1000),
}

Progress = Callable[[int], None]
Pmg = Mapping[str, float]  # extent, half_width, alpha


# --- data and networks -----------------------------------------------------------------------------------------------


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
    """
    from_path = points is not None and Path(points).exists() and (data == SYNTHETIC or Path(data).is_file())
    result = load_split(data, split, points=None if from_path else points, seed=seed)
    if from_path:
        result = replace(result, points=load_points(points, result.names, result.sizes))
    return result.to(device)


def at_least(bound: int, **values: int) -> int:
    """The (last) value, refused where it is below the bound."""
    for name, value in values.items():
        if value < bound:
            raise InputError(f"{name} {value}: expected at least {bound}")
    return value


def pmg_settings(dataset: str, extent: int | None, half_width: int, alpha: float) -> dict[str, float]:
    """PMG's settings, ``extent`` by default the paper's for this data set.

    Raises:
        InputError: one is out of its range.
    """
    extent = default_extent(dataset) if extent is None else extent
    if extent < 1 or half_width < 0 or not 0 <= alpha <= 1:
        raise InputError(
            f"extent {extent}, half_width {half_width}, alpha {alpha}: expected at least 1, at least 0, and 0 to 1"
        )
    return {"extent": extent, "half_width": half_width, "alpha": alpha}


@dataclass
class Network:
    """A trained network and how it is run."""

    model: nn.Module
    inference: dict[str, Any]  # mean, std, padding: arguments of predict_logits
    threshold: float
    path: str
    trained: dict[str, Any]  # what its checkpoint says about itself; empty for published weights

    def predict(self, data: ImageSet, progress: Progress | None = None) -> Tensor:
        """Masks of a set: bool [N, H, W]."""
        return predict(self.model, data, threshold=self.threshold, progress=progress, **self.inference)

    def predict_probabilities(self, data: ImageSet, progress: Progress | None = None) -> Tensor:
        """Probabilities of a set: float32 [N, H, W], 0 in the padding."""
        return predict(self.model, data, soft=True, progress=progress, **self.inference)

    @property
    def normalisation(self) -> tuple[float, float]:
        """(mean, std) of the images that it was trained on."""
        return self.inference["mean"], self.inference["std"]

    def about(self) -> dict[str, Any]:
        """What a result says about the network that it comes from."""
        trained = {key: self.trained.get(key) for key in ("dataset", "settings", "stage", "epoch", "versions")}
        return {
            "checkpoint": self.path,
            "model": type(self.model).__name__,
            "threshold": self.threshold,
            "normalisation": list(self.normalisation),
            "padding": self.inference["padding"],
            "trained": trained if self.trained else "not stated in the file",
        }


def load_network(
    path: str | Path,
    own: Callable[[], tuple[float, float]],
    *,
    normalisation: str = "auto",
    padding: str = "least",
    threshold: float = 0.5,
    device: str | torch.device = "cpu",
) -> Network:
    """A network from a weights file, ready to run.

    Args:
        path: our checkpoint or published weights.
        own: gives (mean, std) of the images, asked for only where the checkpoint has none.
        normalisation: "auto", the name of a data set, or "MEAN,STD".
        padding: "least", or "lesps" for weights trained with LESPS.
        threshold: probability above which a pixel is target.
    """
    if not 0 < threshold < 1:
        raise InputError(f"threshold {threshold}: expected a probability between 0 and 1")
    model, description = load_model(path)
    mean, std = choose_normalisation(normalisation, description, own)
    inference = {"mean": mean, "std": std, "padding": padding}
    return Network(model.to(device), inference, threshold, str(path), description)


def choose_normalisation(
    choice: str, description: Mapping[str, Any], own: Callable[[], tuple[float, float]]
) -> tuple[float, float]:
    """(mean, std) for a network: "auto": the checkpoint's, else the images' own; others by name or "MEAN,STD"."""
    if choice == "auto":
        mean, std = description.get("normalisation") or own()
        return float(mean), float(std)
    if choice in NORMALISATION:
        return NORMALISATION[choice]
    try:
        mean, std = map(float, choice.split(","))
        if math.isfinite(mean) and math.isfinite(std) and std > 0:
            return mean, std
    except ValueError:
        pass
    raise InputError(f"--normalisation {choice}: expected auto, {', '.join(NORMALISATION)}, or MEAN,STD such as 100,30")


def read_masks(folder: str | Path, data: ImageSet) -> Tensor:
    """Masks made elsewhere, one ``NAME.png`` for each image of a set: bool [N, H, W].

    Raises:
        InputError: a missing or unreadable file, or one whose size is not its image's.
    """
    jobs = [(Path(folder) / f"{name}.png", size) for name, size in zip(data.names, data.sizes.tolist(), strict=True)]
    masks = torch.zeros(data.images.shape, dtype=torch.bool)
    for index, mask in enumerate(map_files(lambda job: read_mask(*job), jobs)):
        masks[index, : mask.shape[0], : mask.shape[1]] = torch.from_numpy(mask)
    return masks.to(data.images.device)


# --- masks -----------------------------------------------------------------------------------------------------------


def initial_mask(data: ImageSet, pmg: Pmg, student: Student | None = None) -> Tensor:
    """The masks of a whole set's points, by PMG or by a student: bool [N, H, W]."""
    if student is not None:
        return student.masks(data, **pmg)
    return point_to_mask(data.images, data.points, sizes=data.sizes, **pmg)


def soft_initial(data: ImageSet, pmg: Pmg) -> Tensor:
    """P_f of PMG on a whole set: float32 [N, H, W]."""
    return point_to_probability(data.images, data.points, sizes=data.sizes, **pmg)


def updating_masks(
    network: Network,
    data: ImageSet,
    initial: Tensor,
    radius: int = 30,
    progress: Progress | None = None,
    soft: Tensor | None = None,
) -> dict[str, Tensor]:
    """Every mask of the updating process (HMG Sec. 3.2, Table 4): prediction, filtered, hybrid; bool [N, H, W] each.

    Args:
        initial: bool [N, H, W], the masks of the points.
        radius: r of FAF in pixels.
        soft: float32 [N, H, W], the probabilities behind ``initial``: the hybrid is then that of ``soft_update``.
    """
    if soft is None:
        prediction = network.predict(data, progress)
    else:
        probability = network.predict_probabilities(data, progress)
        prediction = probability > network.threshold
    filtered = false_alarm_filter(prediction, data.points, radius=radius, sizes=data.sizes)
    if soft is None:
        hybrid = retrieve_missed(initial, filtered)
    else:
        settings = {"radius": radius, "threshold": network.threshold, "sizes": data.sizes}
        hybrid = soft_update(probability, soft, data.points, **settings)
    return {"prediction": prediction, "filtered": filtered, "hybrid": hybrid}


def collect_masks(
    data: ImageSet,
    pmg: Pmg,
    folders: Sequence[str] = (),
    network: Network | None = None,
    radius: int = 30,
    progress: Progress | None = None,
    student: Student | None = None,
    fusion: str = "union",
) -> dict[str, Tensor]:
    """All masks of a set that can be had: PMG's from its points, others from folders, those of the updating process.

    With a student its masks are "learned", and the updating process starts from them. ``fusion``: "union" or "soft".

    Returns:
        name -> bool [N, H, W]; the last one is the furthest along the process.

    Raises:
        InputError: there is none.
    """
    masks = {"initial": initial_mask(data, pmg)} if len(data.points) else {}
    if student is not None and masks:
        masks["learned"] = student.masks(data, **pmg)
    start = list(masks)[-1:]
    masks |= {Path(folder).name: read_masks(folder, data) for folder in folders}
    if network is not None:
        initial = masks[start[0]] if start else torch.zeros_like(data.images, dtype=torch.bool)
        soft = None
        if fusion == "soft":
            soft = student.soft_masks(data, **pmg) if student else soft_initial(data, pmg)
        masks |= updating_masks(network, data, initial, radius, progress, soft)
    if not masks:
        raise InputError(
            f"{data.dataset} {data.split}: no mask to look at; give --points with labels, --masks or --checkpoint"
        )
    return masks


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


def measure_masks(data: ImageSet, pmg: Pmg, masks: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    """Rows of Tables 2 to 4 for the masks of :func:`collect_masks`, and P_g only where there are points.

    Returns:
        name -> what ``DetectionMetrics.compute`` gives, plus ``sizes``: the IoU by target size.
    """
    rows = {}
    for name, mask in masks.items():
        own = name == "initial"
        rows[name] = measure(mask, data) | {"sizes": size_classes(data, **pmg) if own else size_classes_of(mask, data)}
        if own:
            alone = measure(global_mask(data, **pmg), data)
            rows["P_g only"] = alone | {"sizes": size_classes(data, global_only=True, **pmg)}
    return rows


def check_values(name: str, values: Iterable[float]) -> list[float]:
    """The values of a sweep in ascending order, each once; whole numbers where pixels are meant."""
    values = sorted(set(values))
    if name == "alpha":
        if values[0] < 0 or values[-1] > 1:
            raise InputError(f"alpha {values}: expected numbers from 0 to 1")
        return values
    least = int(name == "extent")
    if any(value != int(value) or value < least for value in values):
        raise InputError(f"{name} {values}: expected whole numbers of pixels, at least {least}")
    return [int(value) for value in values]


def sweep(
    data: ImageSet,
    name: str,
    values: Iterable[float],
    pmg: Pmg,
    *,
    prediction: Tensor | None = None,
    progress: Progress = lambda _: None,
) -> list[dict[str, Any]]:
    """Masks over one setting: a row of metrics and ``sizes`` for each value.

    Over extent, half_width or alpha PMG's masks are measured (HMG Figs. 4b, 5a, 5b). Over radius it is the prediction
    after FAF (Fig. 5c); ``hybrid`` in each row then holds the metrics of the hybrid masks that follow.

    Args:
        name: one of ``SWEEPS``.
        prediction: bool [N, H, W], for a sweep over radius.
    """
    rows = []
    for value in values:
        if name == "radius":
            mask = false_alarm_filter(prediction, data.points, radius=value, sizes=data.sizes)
            hybrid = retrieve_missed(initial_mask(data, pmg), mask)
            more = {"sizes": size_classes_of(mask, data), "hybrid": measure(hybrid, data)}
        else:
            settings = dict(pmg) | {name: value}
            mask, more = initial_mask(data, settings), {"sizes": size_classes(data, **settings)}
        rows.append({name: value} | measure(mask, data) | more)
        progress(1)
    return rows


def measure_detector(
    network: Network,
    data: ImageSet,
    thresholds: Sequence[float],
    *,
    initial: Tensor | None = None,
    radius: int = 30,
    progress: Progress = lambda _: None,
) -> list[dict[str, float]]:
    """A network on a test set, at every threshold in one pass (HMG Tables 1 and 5).

    Args:
        thresholds: probabilities between 0 and 1; a pixel above is target.
        initial: bool [N, H, W]: masks of the points for the point prompt (Sec. 4.5.1: FAF, then MDR with these), or
            None for the network alone.
        radius: r of FAF in pixels, with ``initial``.

    Returns:
        For each threshold what ``DetectionMetrics.compute`` gives, with ``threshold`` and the pixels' ``precision`` and
        ``recall``.
    """
    if not all(0 < threshold < 1 for threshold in thresholds):
        raise InputError(f"thresholds {list(thresholds)}: expected probabilities between 0 and 1")
    metrics = [DetectionMetrics() for _ in thresholds]
    for chunk, logits in predict_logits(network.model, data, **network.inference):
        part = data.subset(chunk)
        _, height, width = part.images.shape
        for threshold, counter in zip(thresholds, metrics, strict=True):
            prediction = logits[:, :height, :width] > math.log(threshold / (1 - threshold))
            if initial is not None:
                start = initial[chunk, :height, :width]
                prediction = update(prediction, start, part.points, radius=radius, sizes=part.sizes)
            counter.update(prediction, part.masks, part.sizes)
        progress(len(chunk))
    return [
        {"threshold": threshold} | _with_precision(counter.compute())
        for threshold, counter in zip(thresholds, metrics, strict=True)
    ]


def _with_precision(metrics: dict[str, float]) -> dict[str, float]:
    hit, wrong = metrics["intersection"], metrics["pixel_false_alarms"]
    target = metrics["union"] - wrong
    return metrics | {
        "precision": hit / (hit + wrong) if hit + wrong else math.nan,
        "recall": hit / target if target else math.nan,
    }
