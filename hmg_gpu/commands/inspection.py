"""Looking a data set over before anybody trains on it: what is there, and what deserves a look."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from hmg_gpu.common.errors import InputError
from hmg_gpu.data.folder import find_images, split_names
from hmg_gpu.data.images import FORMATS, MASK_CODINGS, SUFFIXES, binarise, map_files, read_image
from hmg_gpu.data.points.read import PointArrays, check_points, read_points
from hmg_gpu.evaluation.size_classes import SIZE_CLASSES
from hmg_gpu.masks.components import connected_components

THUMBNAIL = 16  # side
SUSPECT = 0.95  # correlation of thumbnails above which two images are compared pixel by pixel
DUPLICATE = 0.9  # correlation of their gradients

FINDINGS = {  # in the order of the table, with what to do
    "unreadable": "copy or export again; the text says why",
    "mask of another size": "supply the mask drawn on this image; masks are never resized",
    "image without mask": "supply it, or leave all masks out",
    "listed but missing": "supply the image or take it off the list",
    "in two splits": "take it off one list",
    "near-duplicate of train and test": "measure without it: the test set has been seen in training",
    "mask not binary": "values above half of the coding's maximum count as target",
    "constant image": "replace it: there is nothing to see",
    "point outside its image": "correct or remove it",
    "point twice": "harmless; remove one",
    "point off target": "harmless for HMG if near; check the worst",
    "target without point": "add a point, or HMG takes it for background",
    "image without points": "harmless if it has no target",
}
NOT_COUNTED = {"image without points"}  # said, but no reason to stop


@dataclass
class Inspection:
    """What :func:`inspect_folder` saw.

    Attributes:
        splits: for each split the number of images, targets by size class, and points.
        sizes: smallest and largest (height, width). modes: number of images by Pillow mode.
        findings: kind -> image names, each with a note.
    """

    splits: dict[str, dict[str, int]] = field(default_factory=dict)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    modes: Counter[str] = field(default_factory=Counter)
    findings: dict[str, list[str]] = field(default_factory=dict)

    def find(self, kind: str, text: str) -> None:
        self.findings.setdefault(kind, []).append(text)

    @property
    def clean(self) -> bool:
        return not self.findings.keys() - NOT_COUNTED


@dataclass
class _Look:
    """What one image and its mask gave; small, so that a large set fits."""

    size: tuple[int, int] | None = None
    mode: str = ""
    thumbnail: np.ndarray | None = None  # float32 [256], zero mean, unit length
    findings: list[tuple[str, str]] = field(default_factory=list)
    areas: list[int] = field(default_factory=list)
    off_target: list[tuple[int, int]] = field(default_factory=list)
    untouched: int = 0


def inspect_folder(
    root: str | os.PathLike,
    *,
    points: str | os.PathLike | None = "masks_centroid",
) -> Inspection:
    """Look over a data set: a folder with ``images/`` (and ``masks/``, points, ``img_idx/``), or a folder of images.

    Every image is opened on its own, so memory does not grow with their number; a file that cannot be read is a
    finding, not an end.

    Args:
        points: a folder or file inside ``root``, a path, or None.

    Raises:
        InputError: there is no such folder or no image in it, or the points cannot be read at all.
    """
    root = Path(root)
    folder = root / "images" if (root / "images").is_dir() else root
    paths = {path.stem: path for path in find_images(folder)}
    masks = _by_stem(root / "masks")
    result = Inspection()
    lists = _lists(root, paths, result)
    coordinates = _read_points(root, points, result)
    stems = [stem for stem in paths if any(stem in names for names in lists.values())]

    looks: dict[str, _Look] = {}
    jobs = [(paths[stem], masks.get(stem), coordinates.get(stem)) for stem in stems]
    for stem, look in zip(stems, map_files(lambda job: _look(*job), jobs), strict=True):
        looks[stem] = look
        if masks and stem not in masks:
            look.findings.append(("image without mask", stem))
        for kind, text in look.findings:
            result.find(kind, text)
        if look.size is not None:
            result.sizes.append(look.size)
            result.modes[look.mode] += 1

    for split, names in lists.items():
        result.splits[split] = _count([looks[name] for name in names if name in looks], names, coordinates)
    if coordinates:
        _judge_points(result, {name: look for name, look in looks.items() if look.size is not None}, coordinates)
    if {"train", "test"} <= lists.keys():
        _find_duplicates(result, looks, paths, lists["train"], lists["test"])
    return result


def _look(path: Path, mask_path: Path | None, points: np.ndarray | None) -> _Look:
    look = _Look()
    try:
        image = read_image(path)
        with Image.open(path, formats=FORMATS) as handle:
            look.mode = handle.mode
    except InputError as error:
        look.findings.append(("unreadable", str(error)))
        return look
    look.size = image.shape
    if image.min() == image.max():
        look.findings.append(("constant image", f"{path.stem} ({image.flat[0]} everywhere)"))
    look.thumbnail = _thumbnail(image)
    if mask_path is None:
        return look
    try:
        values = read_image(mask_path)
    except InputError as error:
        look.findings.append(("unreadable", str(error)))
        return look
    kinds = np.unique(values)
    odd = [value for value in kinds.tolist() if value not in (0, *MASK_CODINGS)]
    if odd or len(kinds) > 2:
        shown = ", ".join(f"{value:g}" for value in kinds[:5].tolist())
        look.findings.append(
            ("mask not binary", f"{path.stem} ({len(kinds)} values: {shown}{' ...' * (len(kinds) > 5)})")
        )
    mask = binarise(values)
    if mask.shape != image.shape:
        text = f"{path.stem} (mask {mask.shape[0]} x {mask.shape[1]}, image {image.shape[0]} x {image.shape[1]})"
        look.findings.append(("mask of another size", text))
        return look
    components = connected_components(torch.from_numpy(mask)[None])
    look.areas = components.area.tolist()
    if points is not None:
        labels = components.labels()[0].numpy()
        inside = points[((points >= 0) & (points < mask.shape)).all(1)]
        hit = labels[inside[:, 0], inside[:, 1]]
        look.off_target = [tuple(point) for point in inside[hit == 0].tolist()]
        centroids = components.centroids.numpy()
        near = {int(label) - 1 for label in hit if label}
        for point in inside[hit == 0]:  # a centroid may fall beside its target
            if len(centroids):
                near.add(int(np.abs(centroids - point).sum(1).argmin()))
        look.untouched = len(components) - len(near)
    return look


def _thumbnail(image: np.ndarray) -> np.ndarray:
    """Block means in 16 x 16, zero mean, unit length (zeros for a constant image): float32 [256]."""
    small = Image.fromarray(image.astype(np.float32)).resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)
    values = np.asarray(small).reshape(-1)
    values = values - values.mean()
    length = np.linalg.norm(values)
    return values / length if length > 0 else values


def _count(looks: Sequence[_Look], names: Sequence[str], points: Mapping[str, np.ndarray]) -> dict[str, int]:
    areas = np.array([area for look in looks for area in look.areas], np.int64)
    row = {"images": len(looks), "targets": len(areas)}
    low = 0
    for name, high in SIZE_CLASSES.items():
        row[name] = int(((areas > low) & (areas <= (high or areas.max(initial=0)))).sum())
        low = high
    row["points"] = sum(len(points.get(name, ())) for name in names)
    return row


def _judge_points(result: Inspection, looks: Mapping[str, _Look], points: PointArrays) -> None:
    report = check_points(points, list(looks), [look.size for look in looks.values()])
    for kind, rows in (("point outside its image", report.outside), ("point twice", report.duplicates)):
        for name, y, x in rows:
            result.find(kind, f"{name} (y={y}, x={x})")
    for name in report.without_points:
        result.find("image without points", name)
    for name, look in looks.items():
        for y, x in look.off_target:
            result.find("point off target", f"{name} (y={y}, x={x})")
        if look.untouched:
            result.find("target without point", f"{name} ({look.untouched})")


def _find_duplicates(
    result: Inspection, looks: Mapping[str, _Look], paths: Mapping[str, Path], train: list[str], test: list[str]
) -> None:
    """Pairs whose thumbnails agree, confirmed on the images' gradients, where smooth skies no longer look alike."""
    train, test = ([name for name in names if name in looks and looks[name].size] for names in (train, test))
    if not train or not test:
        return
    first, second = (np.stack([looks[name].thumbnail for name in names]) for names in (train, test))
    for index, name in enumerate(test):
        likeness = first @ second[index]
        for other in np.argsort(-likeness)[:3]:
            if likeness[other] < SUSPECT or looks[train[other]].size != looks[name].size:
                continue
            value = _gradient_likeness(read_image(paths[train[other]]), read_image(paths[name]))
            if value > DUPLICATE:
                result.find("near-duplicate of train and test", f"{train[other]} and {name} ({value:.3f})")
                break


def _gradient_likeness(first: np.ndarray, second: np.ndarray) -> float:
    """Correlation of the differences between neighbouring pixels, along rows and columns."""
    gradients = []
    for image in (first.astype(np.float64), second.astype(np.float64)):
        gradients.append(np.concatenate([np.diff(image, axis=axis).reshape(-1) for axis in (0, 1)]))
    norm = np.linalg.norm(gradients[0]) * np.linalg.norm(gradients[1])
    return float(gradients[0] @ gradients[1] / norm) if norm > 0 else 0.0


def _lists(root: Path, paths: Mapping[str, Path], result: Inspection) -> dict[str, list[str]]:
    """The names of each split; without lists all images are one split."""
    if not (root / "img_idx").is_dir():
        return {"all": list(paths)}
    lists: dict[str, list[str]] = {}
    for split in split_names(root):
        for path in sorted((root / "img_idx").glob(f"{split}_*.txt")):
            try:
                lines = path.read_text(encoding="utf-8-sig").split()
            except (OSError, UnicodeDecodeError) as error:
                result.find("unreadable", f"{path}: {error}")
                continue
            lists.setdefault(split, []).extend(Path(line).stem if line not in paths else line for line in lines)
    seen: dict[str, str] = {}
    for split, names in lists.items():
        for name in names:
            if name not in paths:
                result.find("listed but missing", f"{name} ({split})")
            if seen.setdefault(name, split) != split:
                result.find("in two splits", f"{name} ({seen[name]} and {split})")
    return lists


def _read_points(root: Path, points: str | os.PathLike | None, result: Inspection) -> PointArrays:
    if points is None:
        return {}
    for path in (root / points, Path(points)):
        if path.exists():
            try:
                return read_points(path)
            except InputError as error:
                result.find("unreadable", str(error))
                return {}
    if os.fspath(points) != "masks_centroid":
        raise InputError(f"{root / points}: no such points; name a folder or file, or leave --points out")
    return {}


def _by_stem(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        return {}
    return {path.stem: path for path in sorted(folder.iterdir()) if path.suffix.lower() in SUFFIXES}
