"""Images of a folder or a store by rows, and the journal of a run that makes masks for them part by part.

Parts (some consecutive images) are what several processes share and what a stopped run resumes by. Where a part comes
from is the business of ``read`` alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .data import ImageSet, find_images, load_images, load_points, read_points, store_splits
from .data.images import map_files, read_header
from .data.store import open_split
from .errors import InputError
from .files import append_text, finite, write_text
from .prediction import Images

SUMMARY = "hmg.json"  # beside the masks: how they were made
JOURNAL = "hmg.part."  # and the number of the rank, while they are being made
COUNTS = 4  # of a part: images, components, foreground, pixels


@dataclass
class Source:
    """Images with points that can be read in any selection; made by :func:`open_source`.

    Attributes:
        names: N stems. files: their files' names. sizes: their (height, width).
        points: int64 [n, 2], rows (y, x), by name.
        dataset: the data set's name.
    """

    names: list[str]
    files: list[str]
    sizes: list[tuple[int, int]]
    points: Mapping[str, np.ndarray]
    dataset: str
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


@contextmanager
def open_source(images: Path, points: Path, form: str | None, split: str | None) -> Iterator[Source]:
    """Open a folder of images, or one split of a packed store, with its points.

    Args:
        images: a folder, or a .h5 file, which stays open and is read in parts.
        points: a file or folder for :func:`hmg_gpu.data.read_points`; of a store also the name of its own points.
        form: of the points; None: by their content.
        split: of a store; None: "train", or the only one.

    Raises:
        InputError: as the readers; or there is no such split.
    """
    if images.suffix != ".h5" or images.is_dir():
        if split is not None:
            raise InputError(f"--split {split}: {images} is a folder, of which every image is taken; leave it out")
        paths = find_images(images)
        names = [path.stem for path in paths]
        sizes = [header[:2] for header in map_files(read_header, paths)]
        found = read_points(points, form, names, sizes)
        folder = Images(paths, found, 1)
        yield Source(names, [path.name for path in paths], sizes, found, folder.dataset, folder)
        return
    there = store_splits(images)
    if split is None:
        split = "train" if "train" in there or len(there) != 1 else next(iter(there))
    own = not points.exists() or (str(points) in there.get(split, ()))
    with open_split(images, split, points=str(points) if own else None) as reader:
        sizes = [tuple(size) for size in reader.sizes.tolist()]
        if own:
            ends = np.searchsorted(reader.points[:, 0], np.arange(len(reader.names) + 1))
            found = {name: reader.points[ends[row] : ends[row + 1], 1:] for row, name in enumerate(reader.names)}
        else:
            found = read_points(points, form, reader.names, sizes)
        yield Source(list(reader.names), list(reader.names), sizes, found, reader.dataset, reader)


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
    height, width = sizes.amax(0).tolist()
    dtype = parts[0].images.dtype
    images = torch.zeros(len(sizes), height, width, dtype=dtype)
    first = 0
    for part in parts:
        images[first : first + len(part), : part.images.shape[1], : part.images.shape[2]] = part.images
        first += len(part)
    names = [name for part in parts for name in part.names]
    return replace(parts[0], names=names, images=images, sizes=sizes, points=torch.zeros(0, 3, dtype=torch.int64))


# ---- journal --------------------------------------------------------------------------------------------------------


class Journal:
    """What one process of a run has done, in a file that a kill leaves readable: settings, then a line for each part.

    Args:
        folder: of the masks.
        about: all that decides the masks, as JSON values.
        rank: of the process; each writes a file of its own. What a run of other settings left is removed.
        done: counts of the parts that this process has done already, by part.
    """

    def __init__(self, folder: Path, about: Mapping[str, Any], rank: int, done: Mapping[int, Sequence[int]]):
        self.path, self.about, self.lines = folder / f"{JOURNAL}{rank}", plain(about), dict(done)
        self._begun = False

    def begin(self) -> None:
        """To be called before a part's masks are written: from now on the folder holds this unfinished run alone."""
        if not self._begun:
            for path in unfinished(self.path.parent):
                if _header(path) not in (None, self.about):
                    path.unlink(missing_ok=True)
            write_text(self.path, json.dumps(self.about) + "\n" + "".join(map(_line, self.lines, self.lines.values())))
            (self.path.parent / SUMMARY).unlink(missing_ok=True)  # it describes other masks
            self._begun = True

    def add(self, part: int, counts: Sequence[int]) -> None:
        """Note that a part's masks are all there, with what was counted in them."""
        append_text(self.path, _line(part, counts))


def _line(part: int, counts: Sequence[int]) -> str:
    return " ".join(map(str, (part, *counts, "done"))) + "\n"


def unfinished(folder: Path) -> list[Path]:
    """The journals that a stopped run left."""
    return sorted(folder.glob(JOURNAL + "*"))


def missing(folder: Path, names: Sequence[str]) -> str | None:
    """The first image that has no mask."""
    return next((name for name in names if not (folder / f"{name}.png").exists()), None)


def take_up(
    folder: Path, about: Mapping[str, Any], names: Sequence[str], coco: str | None = None
) -> list[tuple[int, list[int]]] | None:
    """What is done already of a run that resumes: (part, counts); None where all of it is.

    Args:
        folder: of the masks.
        about: as :class:`Journal`.
        names: of all images.
        coco: whether coco.json is wanted, too.

    Raises:
        InputError: the masks there are, or some of them, were made in another way.
    """
    about = plain(about)
    done: list[tuple[int, list[int]]] = []
    journals, summary = unfinished(folder), folder / SUMMARY
    for path in journals:
        _same(path, _header(path), about)
        for fields in map(str.split, path.read_text(encoding="utf-8").splitlines()[1:]):
            numbers = [int(field) for field in fields[:-1] if field.isdecimal()]
            if len(numbers) == 1 + COUNTS and fields[-1] == "done":  # else cut off
                done.append((numbers[0], numbers[1:]))
    if journals or not summary.exists():
        return done
    _same(summary, (_header(summary, whole=True) or {}).get("run"), about)
    whole = missing(folder, names) is None and (not coco or (folder / "coco.json").exists())
    return None if whole else []


def _header(path: Path, whole: bool = False) -> dict[str, Any] | None:
    """The JSON object on a file's first line, or in all of it; None where there is none."""
    try:
        text = path.read_text(encoding="utf-8")
        found = json.loads(text if whole else text.partition("\n")[0])
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def plain(about: Mapping[str, Any]) -> dict[str, Any]:
    """A description as it comes back from a file."""
    return json.loads(json.dumps(finite(about)))


def _same(path: Path, theirs: Any, mine: Mapping[str, Any]) -> None:
    if theirs == mine:
        return
    theirs = theirs or {}
    name = next(name for name in (*mine, *theirs) if theirs.get(name) != mine.get(name))
    raise InputError(
        f"{path}: its masks were made with other {name}; resume with the same settings, points and images, "
        "or leave out --resume to make all of them anew"
    )
