"""Images for the commands that make masks: files, folders or a packed store, read in any selection."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hmg_gpu.common.checks import at_least
from hmg_gpu.common.errors import InputError
from hmg_gpu.data import (
    NORMALISATION,
    ImageSet,
    find_images,
    load_images,
    load_points,
    read_extents,
    read_image,
    read_points,
    store_splits,
)
from hmg_gpu.data.folder import find_list
from hmg_gpu.data.images import map_files, read_header
from hmg_gpu.data.points import image_stem
from hmg_gpu.data.record import PIXELS, record_of
from hmg_gpu.data.sets import padded_shape
from hmg_gpu.data.source import SYNTHETIC
from hmg_gpu.data.store import open_split
from hmg_gpu.evaluation.masks import load_set


@dataclass
class Images:
    """Images in files, or the embedded scenes, read in batches: memory does not grow with their number."""

    paths: list[Path]  # empty for the embedded scenes
    points: Mapping[str, Any] | None
    batch: int
    scenes: ImageSet | None = None

    @property
    def names(self) -> list[str]:
        return self.scenes.names if self.scenes else [path.stem for path in self.paths]

    @property
    def dataset(self) -> str:
        """The name of the folder that holds the first image (of ``NAME/images``: NAME)."""
        if self.scenes:
            return self.scenes.dataset
        folder = self.paths[0].absolute().parent
        return (folder.parent if folder.name == "images" else folder).name

    def normalisation(self) -> tuple[float, float]:
        """The constants of a known data set, by its folder's name, else the mean of per-image means and stds."""
        if self.scenes:
            return self.scenes.mean, self.scenes.std
        if self.dataset in NORMALISATION:
            return NORMALISATION[self.dataset]
        mean = std = 0.0
        for pixels in map(read_image, self.paths):
            mean, std = mean + float(pixels.mean(dtype="float64")), std + float(pixels.std(dtype="float64"))
        return mean / len(self.paths), std / len(self.paths) or 1.0

    def sample(self, points: int, pixels: int) -> ImageSet:
        """As :class:`hmg_gpu.masks.makers.maker.Sampled`."""
        if self.scenes:
            return self.scenes
        sizes = [read_header(path)[:2] for path in self.paths]
        rows = spread_rows([len(self.points.get(path.stem, ())) for path in self.paths], sizes, points, pixels)
        rows = rows or [0]  # no image has a point
        return load_images([self.paths[row] for row in rows], points=self.points, normalisation=(0.0, 1.0))

    def batches(self, normalisation: tuple[float, float] | None) -> Iterator[ImageSet]:
        """Sets of up to ``batch`` images; without a normalisation their images are for PMG alone."""
        for first in range(0, len(self.names), self.batch):
            rows = slice(first, first + self.batch)
            if self.scenes:
                yield self.scenes.subset(range(len(self.names))[rows])
            else:
                yield load_images(self.paths[rows], points=self.points, normalisation=normalisation or (0.0, 1.0))


def open_images(sources: Sequence[str], points: str | None, batch: int, seed: int = 0) -> Images:
    """Images from files and folders (of a data set its ``images``), or without any the embedded test scenes.

    Args:
        sources: files and folders.
        points: a file or folder for ``read_points`` (of the scenes: masks_centroid or masks_coarse), or None.
        batch: images held at a time.
        seed: of the scenes.

    Raises:
        InputError: no image, two of one stem, or points that cannot be read.
    """
    at_least(1, batch=batch)
    if not sources:
        return Images([], None, batch, load_set(SYNTHETIC, "test", points=points, seed=seed))
    paths: list[Path] = []
    for path in map(Path, sources):
        paths += find_images(path / "images" if (path / "images").is_dir() else path) if path.is_dir() else [path]
    seen: dict[str, Path] = {}
    for path in paths:
        if seen.setdefault(path.stem, path) is not path:
            raise InputError(f"{path} and {seen[path.stem]} have one stem, so one mask would replace the other; rename")
    return Images(paths, None if points is None else read_points(points, names=list(seen)), batch)


@dataclass
class Source:
    """Images with points that can be read in any selection; made by :func:`open_source`.

    Attributes:
        names: N stems. files: their files' names. sizes: their (height, width).
        points: int64 [n, 2], rows (y, x), by name.
        dataset: the data set's name.
        extents: L_ep of single points by pixel (y, x), by name, where a CSV gives them.
    """

    names: list[str]
    files: list[str]
    sizes: list[tuple[int, int]]
    points: Mapping[str, np.ndarray]
    dataset: str
    extents: Mapping[str, Mapping[tuple[int, int], int]]
    _images: Any  # Images of a folder, or a split of a store

    def read(self, rows: Sequence[int], normalisation: tuple[float, float] | None = None) -> ImageSet:
        """Some images, in that order, in one padded batch; without a normalisation they are for PMG alone."""
        mean, std = normalisation or (0.0, 1.0)
        if isinstance(self._images, Images):
            paths = [self._images.paths[row] for row in rows]
            return load_images(paths, points=self.points, normalisation=(mean, std))
        runs = [self._images.read(first, last) for first, last in _runs(rows)]
        part = runs[0] if len(runs) == 1 else _join(runs)
        points = load_points(self.points, part.names, part.sizes)
        return replace(part, points=points, masks=None, mean=mean, std=std)

    def pixels(self, rows: Sequence[int]) -> list[int]:
        """A CRC-32 of each image: of its file, or in a store of its pixels."""
        if isinstance(self._images, Images):
            paths = [self._images.paths[row] for row in rows]
            return list(map_files(lambda path: zlib.crc32(path.read_bytes()), paths))
        return record_of(self.read(rows))[PIXELS].tolist()

    def sample(self, points: int, pixels: int) -> ImageSet:
        """As :class:`hmg_gpu.masks.makers.maker.Sampled`."""
        counts = [len(self.points[name]) for name in self.names]
        return self.read(spread_rows(counts, self.sizes, points, pixels) or [0])  # [0]: no image has a point

    def normalisation(self) -> tuple[float, float]:
        """(mean, std) that the images ask for: the store's, a known data set's, or their own."""
        if isinstance(self._images, Images):
            return self._images.normalisation()
        return self._images.mean, self._images.std

    def digest(self) -> dict[str, str]:
        """SHA-256 of names and sizes, and of the points."""
        images = json.dumps([self.names, [list(map(int, size)) for size in self.sizes]])
        points = json.dumps([np.asarray(self.points[name]).tolist() for name in self.names])
        return {
            name: hashlib.sha256(text.encode()).hexdigest() for name, text in (("images", images), ("points", points))
        }


def spread_rows(counts: Sequence[int], sizes: Sequence[tuple[int, int]], points: int, pixels: int) -> list[int]:
    """Images with points, evenly spread, of about so many points and no more pixels in one padded batch.

    Args:
        counts: points of each image. sizes: its (height, width).
    """
    marked = [row for row, count in enumerate(counts) if count]
    if not marked:
        return []
    tallest, widest = (max(sizes[row][axis] for row in marked) for axis in (0, 1))
    count = min(len(marked), pixels // (tallest * widest), points * len(marked) // sum(counts))
    return list(dict.fromkeys(marked[round(step)] for step in np.linspace(0, len(marked) - 1, max(1, count))))


@contextmanager
def open_source(
    images: Path, points: Path, form: str | None, split: str | None, names: Path | None = None
) -> Iterator[Source]:
    """Open a folder of images, or one split of a packed store, with its points.

    Args:
        images: a folder, or a .h5 file, which stays open and is read in parts.
        points: a file or folder for :func:`hmg_gpu.data.read_points`; of a store also the name of its own points.
        form: of the points; None: by their content.
        split: of a store (None: "train", or the only one), or of the data set whose ``images`` the folder is.
        names: a text file of image stems, one a line: those of the folder alone.

    Raises:
        InputError: as the readers; or there is no such split.
    """
    if images.suffix != ".h5" or images.is_dir():
        paths = listed_images(images, split, names)
        names = [path.stem for path in paths]
        sizes = [header[:2] for header in map_files(read_header, paths)]
        coordinates = read_points(points, form, names, sizes)
        folder = Images(paths, coordinates, 1)
        extents = _extents(points, form)
        yield Source(names, [path.name for path in paths], sizes, coordinates, folder.dataset, extents, folder)
        return
    if names is not None:
        raise InputError(f"--list {names}: {images} is a packed .h5, which has splits; use --split, or leave it out")
    splits = store_splits(images)
    if split is None:
        split = "train" if "train" in splits or len(splits) != 1 else next(iter(splits))
    packed = not points.exists() or (str(points) in splits.get(split, ()))
    with open_split(images, split, points=str(points) if packed else None) as reader:
        sizes = [tuple(size) for size in reader.sizes.tolist()]
        if packed:
            ends = np.searchsorted(reader.points[:, 0], np.arange(len(reader.names) + 1))
            coordinates = {name: reader.points[ends[row] : ends[row + 1], 1:] for row, name in enumerate(reader.names)}
        else:
            coordinates = read_points(points, form, reader.names, sizes)
        extents = {} if packed else _extents(points, form)
        names = list(reader.names)
        yield Source(names, names, sizes, coordinates, reader.dataset, extents, reader)


def _extents(points: Path, form: str | None) -> dict[str, dict[tuple[int, int], int]]:
    return read_extents(points) if form in (None, "csv") else {}


def listed_images(images: Path, split: str | None, names: Path | None) -> list[Path]:
    """The images of a folder, or those of a split of its data set, or those that a text file lists.

    Raises:
        InputError: no such folder, split or list, or an image that is listed but missing.
    """
    paths = find_images(images)
    if split is None and names is None:
        return paths
    if split is not None and names is not None:
        raise InputError(f"--split {split} and --list {names}: give one of them")
    if names is None:
        root = images.resolve().parent
        names = find_list(root, split) if (root / "img_idx").is_dir() else None
        if names is None:
            text = f"{root / 'img_idx'} does not exist, so {images} has no splits"
            raise InputError(f"--split {split}: {text}; use --list FILE, or leave it out")
    by_stem = {path.stem: path for path in paths}
    try:
        wanted = names.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{names}: cannot be read as UTF-8 text ({error}); write one image stem a line") from error
    wanted = [image_stem(line.strip()) for line in wanted if line.strip()]
    missing = [stem for stem in wanted if stem not in by_stem]
    if missing or not wanted:
        text = (
            f"no image {missing[0]} in {images} ({len(missing)} of {len(wanted)} are missing)" if missing else "no name"
        )
        raise InputError(f"{names}: {text}; expected stems of images, one a line")
    return [by_stem[stem] for stem in dict.fromkeys(wanted)]


def _runs(rows: Sequence[int]) -> list[tuple[int, int]]:
    """Consecutive rows as half-open ranges."""
    runs: list[tuple[int, int]] = []
    for row in rows:
        if runs and runs[-1][1] == row:
            runs[-1] = (runs[-1][0], row + 1)
        else:
            runs.append((row, row + 1))
    return runs


def _join(parts: Sequence[ImageSet]) -> ImageSet:
    """Images of several sets in one padded batch, without points and masks."""
    sizes = torch.cat([part.sizes for part in parts])
    height, width = padded_shape(sizes)
    dtype = parts[0].images.dtype
    images = torch.zeros(len(sizes), height, width, dtype=dtype)
    first = 0
    for part in parts:
        images[first : first + len(part), : part.images.shape[1], : part.images.shape[2]] = part.images
        first += len(part)
    names = [name for part in parts for name in part.names]
    return replace(parts[0], names=names, images=images, sizes=sizes, points=torch.zeros(0, 3, dtype=torch.int64))
