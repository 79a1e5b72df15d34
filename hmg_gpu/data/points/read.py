"""Point labels from where people have them -> int64 pixels (y, x) by image name.

Images are matched by stem alone: the last part of whatever name or path an annotation holds, without an image suffix.
No file that an annotation names is ever opened. All results are 0-based pixels, (0, 0) the top left; each format's own
file says how it counts and how it rounds.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from torch import Tensor

from hmg_gpu.common.errors import InputError
from hmg_gpu.data.images import SUFFIXES, map_files
from hmg_gpu.data.points import csv_file
from hmg_gpu.data.points.formats import READERS, parse
from hmg_gpu.data.points.parsing import Entry, find_kind, load, show

ANNOTATION_SUFFIXES = (".json", ".xml", ".csv")

Sizes = np.ndarray | Tensor | Sequence[tuple[int, int]]
PointArrays = dict[str, np.ndarray]


@dataclass
class PointReport:
    """What :func:`check_points` found. Rows are (image name, y, x), in 0-based pixels.

    Args:
        outside: points beyond their image.
        duplicates: every repetition of a pixel that already has a point.
        without_points: images that have none.
        unknown: names that have points but no image.

    Example:
        >>> report = PointReport(duplicates=[("a", 3, 7)])
        >>> len(report.duplicates), report.outside
        (1, [])
    """

    outside: list[tuple[str, int, int]] = field(default_factory=list)
    duplicates: list[tuple[str, int, int]] = field(default_factory=list)
    without_points: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)


def read_points(
    path: str | os.PathLike,
    format: str | None = None,
    names: Sequence[str] | None = None,
    sizes: Sizes | None = None,
) -> PointArrays:
    r"""Read point labels of any supported format from one file or from a folder of files, one an image.

    Coordinates are taken from the outer corner of the top left pixel, whose centre is (0.5, 0.5), and floored: (y, x) =
    (3.2, 7.9) is pixel (3, 7). Three formats differ: a point PNG has whole pixels, Label Studio percent of the image,
    SIRST-V2 counts from 1 (the top left pixel is (1, 1)); all come out as 0-based pixels.

    A folder with JSON, XML or CSV files (LabelMe writes them beside the images) is read from those, any other from its
    images (LESPS point PNGs). With ``names``, only the files of a folder that are named like an image are opened, where
    there are any.

    Args:
        path: the file or folder.
        format: one of ``READERS``: "png", "csv", "labelme", "cvat", "coco", "labelstudio", "sirst-v2"; None looks at
            the content.
        names: N image stems to read points for; others in the file are left out. None takes every image in the file.
        sizes: int [N, 2], rows (height, width) of these images; every point and declared size is checked against them.

    Returns:
        int64 [n, 2], rows (y, x), in the file's order, for each name (an empty array where it has no points).

    Raises:
        InputError: not one of the formats, damaged, over the limits of ``parsing.py``, a number that is none, an image
            name met twice, a point outside its image, no image in common with ``names``, a point PNG missing for one of
            ``names``; the text names the file, the row or element and the cure.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "points.csv"
        ...     _ = path.write_text("image,y,x\na.png,3.2,7.9\nb.png,,\n")
        ...     points = read_points(path, names=["a", "b"], sizes=[(20, 30), (20, 30)])
        >>> points["a"].tolist(), points["b"].shape
        ([[3, 7]], (0, 2))
    """
    path = Path(path)
    if format is not None and format not in READERS:
        raise InputError(f"point format {format!r} is not known; expected one of {', '.join(READERS)}")
    if not path.is_dir():
        return _collect(path, parse(path, format), names, sizes)
    files = _folder_files(path, format, names)
    return _collect(
        path, (entry for part in map_files(lambda file: parse(file, format), files) for entry in part), names, sizes
    )


def read_extents(path: str | os.PathLike) -> dict[str, dict[tuple[int, int], int]]:
    r"""The search lengths that single points have: L_ep in pixels by pixel (y, x), by image stem.

    They stand in the column ``extent`` of a CSV, or of the CSV files of a folder. Of a pixel given twice the last one
    counts.

    Raises:
        InputError: as :func:`read_points`, or an extent that is no whole number of pixels from 1 to 4096.

    Example:
        >>> import tempfile
        >>> from hmg_gpu.data.points.read import read_extents
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "points.csv"
        ...     _ = path.write_text("image,y,x,extent\na.png,3,7,12\na.png,9,9,\n")
        ...     read_extents(path)
        {'a': {(3, 7): 12}}
    """
    path = Path(path)
    result: dict[str, dict[tuple[int, int], int]] = {}
    for file in sorted(path.glob("*.csv")) if path.is_dir() else [path]:
        if not file.is_file() or find_kind(file) != "text":
            continue
        text = load(file, "text")
        if csv_file.matches(text):
            for name, y, x, extent in csv_file.extents(file, text):
                result.setdefault(image_stem(name), {})[y, x] = extent
    return result


def check_points(points: Mapping[str, np.ndarray], names: Sequence[str], sizes: Sizes) -> PointReport:
    """Look points over instead of stopping at the first that is wrong (read them with ``read_points(path)``).

    Args:
        points: int64 [n, 2], rows (y, x), by image name.
        names: N image stems.
        sizes: int [N, 2], rows (height, width).

    Raises:
        ValueError: not one size for each name.

    Example:
        >>> report = check_points({"a": np.array([[3, 7], [3, 7], [20, 0]])}, ["a", "b"], [(20, 30), (20, 30)])
        >>> report.outside, report.duplicates, report.without_points
        ([('a', 20, 0)], [('a', 3, 7)], ['b'])
    """
    size_of = _sizes_by_name(names, sizes)
    report = PointReport(unknown=[name for name in points if name not in size_of and len(points[name])])
    for name, (height, width) in size_of.items():
        seen: set[tuple[int, int]] = set()
        for y, x in np.asarray(points.get(name, np.zeros((0, 2)))).astype(np.int64).tolist():
            if not (0 <= y < height and 0 <= x < width):
                report.outside.append((name, y, x))
            if (y, x) in seen:
                report.duplicates.append((name, y, x))
            seen.add((y, x))
        if not seen:
            report.without_points.append(name)
    return report


def image_stem(name: str) -> str:
    r"""The stem of an image from any name or path in an annotation ("" where nothing usable is left); opens nothing.

    Example:
        >>> image_stem("C:\\set\\images\\a.v2.PNG"), image_stem("../..")
        ('a.v2', '')
    """
    last = name.replace("\\", "/").rsplit("/", 1)[-1]
    stem, dot, suffix = last.rpartition(".")
    if dot and f".{suffix.lower()}" in SUFFIXES:
        last = stem
    return last if last not in ("", ".", "..") and last.isprintable() else ""


def _collect(source: Path, entries: Iterable[Entry], names: Sequence[str] | None, sizes: Sizes | None) -> PointArrays:
    size_of = {} if names is None or sizes is None else _sizes_by_name(names, sizes)
    wanted = None if names is None else set(names)
    pixels: dict[str, list[tuple[int, int]]] = {name: [] for name in names or ()}
    spelling: dict[str, tuple[Path, str]] = {}
    strangers = []
    for entry in entries:
        stem = entry.own_stem
        if not stem or (wanted is not None and stem not in wanted):
            stem = image_stem(entry.name) or stem
        if not stem:
            raise InputError(f"{entry.path}: {show(entry.name)} names no image; expected a file name such as ID.png")
        if wanted is not None and stem not in wanted:
            strangers.append(stem)
            continue
        if spelling.setdefault(stem, (entry.path, entry.name)) != (entry.path, entry.name):
            raise InputError(
                f"{entry.path}: image {show(entry.name)} has the stem of {show(spelling[stem][1])} in "
                f"{spelling[stem][0]}; points are matched by stem: rename one or split the annotations"
            )
        size = size_of.get(stem)
        if size is not None and entry.size is not None and tuple(entry.size) != tuple(size):
            raise InputError(
                f"{entry.path}: {stem} was annotated at {entry.size[0]:g} x {entry.size[1]:g} (height x width) but the "
                f"image is {size[0]} x {size[1]}; points are never rescaled: annotate this image"
            )
        rows = pixels.setdefault(stem, [])
        for y, x, where in entry.points:
            row, column = math.floor(y), math.floor(x)
            if size is not None and not (0 <= row < size[0] and 0 <= column < size[1]):
                raise InputError(
                    f"{entry.path}, {where}: point (y={row}, x={column}) lies outside the image {stem} of "
                    f"{size[0]} x {size[1]} (height x width); correct or remove it"
                )
            rows.append((row, column))
    if wanted and strangers and not spelling:
        raise InputError(
            f"{source}: none of its images ({show(strangers[0])} ...) is among the {len(wanted)} images to read "
            f"({show(next(iter(pixels)))} ...); points are matched by the image's stem"
        )
    return {name: np.array(rows, np.int64).reshape(-1, 2) for name, rows in pixels.items()}


def _folder_files(folder: Path, format: str | None, names: Sequence[str] | None) -> list[Path]:
    files = sorted(path for path in folder.iterdir() if path.is_file())
    notes = [path for path in files if path.suffix.lower() in ANNOTATION_SUFFIXES]
    pictures = [path for path in files if path.suffix.lower() in SUFFIXES]
    chosen = pictures if format == "png" or (format is None and not notes) else notes
    if not chosen:
        raise InputError(f"{folder}: no point files; expected one PNG, JSON or XML file for each image, or a CSV")
    if names is None:
        return chosen
    wanted = set(names)
    named = [path for path in chosen if path.stem in wanted]
    if chosen is pictures:
        missing = wanted - {path.stem for path in named}
        if missing:
            raise InputError(
                f"{folder}: no point file {min(missing)}.png ({len(missing)} of {len(wanted)} missing); "
                "supply it: all black where the image has no target"
            )
    return named or chosen


def _sizes_by_name(names: Sequence[str], sizes: Sizes) -> dict[str, tuple[int, int]]:
    return {name: (int(size[0]), int(size[1])) for name, size in zip(names, sizes, strict=True)}
