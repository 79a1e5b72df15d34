"""What eval.py measures: masks by kind and by target size, sweeps, detectors, and predictions on images without masks.

Everything works on an :class:`ImageSet` on its device. Metrics are LESPS's (``DetectionMetrics``); the IoU of a size
class is defined at :func:`size_classes`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .components import Components, connected_components
from .data import NORMALISATION, ImageSet, find_images, load_images, load_points, read_image, read_mask
from .data.images import map_files
from .data.source import SYNTHETIC, load_split
from .errors import InputError
from .inference import predict, predict_logits
from .metrics import DetectionMetrics
from .pmg import box_to_mask, point_to_box, point_to_mask
from .training import measure
from .update import false_alarm_filter, retrieve_missed, update

SIZE_CLASSES = {"Point": 9, "Spot": 81, "Extended": None}  # largest target of each class, pixels (HMG Fig. 4)
_GROUP_PIXELS = 1 << 22  # of the windows held at a time

Progress = Callable[[int], None]


# --- data ------------------------------------------------------------------------------------------------------------


def load_set(data: str, split: str, *, points: str | None = "masks_centroid", seed: int = 0) -> ImageSet:
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
    return result


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


def initial_mask(data: ImageSet, **pmg: float) -> Tensor:
    """PMG on a whole set: bool [N, H, W]. ``pmg``: extent, half_width, alpha."""
    return point_to_mask(data.images, data.points, sizes=data.sizes, **pmg)


def global_mask(data: ImageSet, *, extent: int, half_width: int, alpha: float) -> Tensor:
    """The ablation of HMG Sec. 3.1.2: P_g alone, without the directional maps; bool [N, H, W]."""
    count, height, width = data.images.shape
    canvas = torch.zeros(count * height * width, dtype=torch.bool, device=data.images.device)
    for points, position, masks in own_masks(data, data.points, extent, half_width, alpha, global_only=True):
        canvas[(points[:, 0, None, None] * height * width + position)[masks]] = True
    return canvas.view(count, height, width)


def updating_masks(
    model: nn.Module, data: ImageSet, initial: Tensor, *, radius: int = 30, **settings: Any
) -> dict[str, Tensor]:
    """Every mask of the updating process (HMG Sec. 3.2, Table 4): prediction, filtered, hybrid; bool [N, H, W] each.

    Args:
        initial: bool [N, H, W], the masks of the points.
        radius: r of FAF in pixels.
        settings: as :func:`hmg_gpu.inference.predict`.
    """
    prediction = predict(model, data, **settings)
    filtered = false_alarm_filter(prediction, data.points, radius=radius, sizes=data.sizes)
    return {"prediction": prediction, "filtered": filtered, "hybrid": retrieve_missed(initial, filtered)}


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


# --- by target size --------------------------------------------------------------------------------------------------


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


# --- tables ----------------------------------------------------------------------------------------------------------


def require_truth(data: ImageSet) -> None:
    """Refuse a set that nothing can be measured on."""
    if data.masks is None:
        raise InputError(
            f"{data.dataset} {data.split}: no ground truth to measure against; supply masks/NAME.png, "
            "or use `eval.py predict` to get masks without measuring"
        )


def measure_masks(data: ImageSet, pmg: Mapping[str, float], others: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    """Rows of Tables 2 to 4: PMG, P_g only, and other masks of the same images.

    Args:
        data: a set with points and ground truth.
        pmg: extent, half_width, alpha.
        others: name -> bool [N, H, W].

    Returns:
        name -> what ``DetectionMetrics.compute`` gives, plus ``sizes``: the IoU by target size.
    """
    rows = {}
    if len(data.points):
        rows["initial (PMG)"] = measure(initial_mask(data, **pmg), data) | {"sizes": size_classes(data, **pmg)}
        alone = measure(global_mask(data, **pmg), data)
        rows["P_g only"] = alone | {"sizes": size_classes(data, global_only=True, **pmg)}
    for name, masks in others.items():
        rows[name] = measure(masks, data) | {"sizes": size_classes_of(masks, data)}
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


def sweep_pmg(
    data: ImageSet, name: str, values: Iterable[float], pmg: Mapping[str, float], progress: Progress
) -> list[dict[str, Any]]:
    """PMG's masks over one of its settings (HMG Figs. 4b, 5a, 5b): a row of metrics and ``sizes`` for each value."""
    rows = []
    for value in values:
        settings = dict(pmg) | {name: value}
        metrics = measure(initial_mask(data, **settings), data)
        rows.append({name: value} | metrics | {"sizes": size_classes(data, **settings)})
        progress(1)
    return rows


def sweep_radius(
    data: ImageSet, initial: Tensor, prediction: Tensor, values: Iterable[int], progress: Progress
) -> list[dict[str, Any]]:
    """The hybrid masks over the radius of FAF (HMG Fig. 5c): a row of metrics and ``sizes`` for each value."""
    rows = []
    for value in values:
        hybrid = update(prediction, initial, data.points, radius=value, sizes=data.sizes)
        rows.append({"radius": value} | measure(hybrid, data) | {"sizes": size_classes_of(hybrid, data)})
        progress(1)
    return rows


def measure_detector(
    model: nn.Module,
    data: ImageSet,
    thresholds: Sequence[float],
    *,
    initial: Tensor | None = None,
    radius: int = 30,
    progress: Progress = lambda _: None,
    **settings: Any,
) -> list[dict[str, float]]:
    """A network on a test set, at every threshold in one pass (HMG Tables 1 and 5).

    Args:
        thresholds: probabilities between 0 and 1; a pixel above is target.
        initial: bool [N, H, W]: masks of the points for the point prompt (Sec. 4.5.1: FAF, then MDR with these), or
            None for the network alone.
        radius: r of FAF in pixels, with ``initial``.
        settings: as :func:`hmg_gpu.inference.predict_logits`.

    Returns:
        For each threshold what ``DetectionMetrics.compute`` gives, with ``threshold`` and the pixels' ``precision`` and
        ``recall``.
    """
    if not all(0 < threshold < 1 for threshold in thresholds):
        raise InputError(f"thresholds {list(thresholds)}: expected probabilities between 0 and 1")
    metrics = [DetectionMetrics() for _ in thresholds]
    for chunk, logits in predict_logits(model, data, **settings):
        part = data.subset(chunk.to(data.images.device))
        _, height, width = part.images.shape
        for threshold, counter in zip(thresholds, metrics, strict=True):
            prediction = logits[:, :height, :width] > math.log(threshold / (1 - threshold))
            if initial is not None:
                start = initial[chunk.to(initial.device), :height, :width]
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


# --- images without masks --------------------------------------------------------------------------------------------


def collect_images(sources: Sequence[str]) -> list[Path]:
    """Image files from files and folders (of a data set its ``images``), in order, each stem once."""
    paths: list[Path] = []
    for source in sources:
        path = Path(source)
        if path.is_dir():
            paths += find_images(path / "images" if (path / "images").is_dir() else path)
        else:
            paths.append(path)
    seen: dict[str, Path] = {}
    for path in paths:
        if seen.setdefault(path.stem, path) is not path:
            raise InputError(f"{path} and {seen[path.stem]} have the same stem, so one mask would replace the other")
    return paths


def image_batches(
    paths: Sequence[Path], points: Mapping[str, Any] | None, normalisation: tuple[float, float], count: int
) -> Iterator[ImageSet]:
    """The images of a long list, ``count`` at a time: memory does not grow with the list."""
    for first in range(0, len(paths), count):
        yield load_images(paths[first : first + count], points=points, normalisation=normalisation)


def dataset_name(paths: Sequence[Path]) -> str:
    """The name of the folder that holds the images (of ``NAME/images``: NAME)."""
    folder = paths[0].absolute().parent
    return (folder.parent if folder.name == "images" else folder).name


def images_normalisation(paths: Sequence[Path]) -> tuple[float, float]:
    """The data set's constants where the folder's name is a known one, else the mean of per-image means and stds."""
    name = dataset_name(paths)
    if name in NORMALISATION:
        return NORMALISATION[name]
    mean = std = 0.0
    for pixels in map(read_image, paths):  # one at a time: a set may be larger than memory
        mean, std = mean + float(pixels.mean(dtype="float64")), std + float(pixels.std(dtype="float64"))
    return mean / len(paths), std / len(paths) or 1.0


def predict_masks(
    batches: Iterable[ImageSet],
    model: nn.Module | None,
    *,
    prompt: bool,
    pmg: Mapping[str, float],
    radius: int,
    **settings: Any,
) -> Iterator[tuple[ImageSet, Tensor]]:
    """Masks for images with a network, with points, or with both (point prompt, HMG Sec. 4.5.1).

    Args:
        batches: sets on the device.
        model: the network, or None: PMG from the points alone.
        prompt: correct the predictions by the points; an image without points then has an empty mask.
        pmg: extent, half_width, alpha.
        radius: r of FAF in pixels.
        settings: as :func:`hmg_gpu.inference.predict`.

    Yields:
        Each set and bool [b, H, W].
    """
    for data in batches:
        if model is None:
            yield data, initial_mask(data, **pmg)
            continue
        masks = predict(model, data, **settings)
        if prompt:
            masks = update(masks, initial_mask(data, **pmg), data.points, radius=radius, sizes=data.sizes)
        yield data, masks
