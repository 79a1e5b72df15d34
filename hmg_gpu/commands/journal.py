"""The journal of a run that makes masks part by part, so that it can stop and go on.

Parts (some consecutive images) are what several processes share and what a stopped run resumes by.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hmg_gpu.common.checksums import checksum_of, read_sealed_json
from hmg_gpu.common.errors import InputError
from hmg_gpu.common.files import append_text, finite, parse_json, write_text

SUMMARY = "hmg.json"  # beside the masks: how they were made
JOURNAL = "hmg.part."  # and the number of the rank, while they are being made
ANEW = "leave out --resume to make all of them anew"
COUNTS = ("images", "components", "foreground", "pixels")  # what is counted in a part
PIXELS = "pixels"  # in the summary: a checksum of all images' checksums


class Done(NamedTuple):
    """Of a part whose masks are all there: what was counted in them, and a CRC-32 of each image."""

    counts: list[int]
    pixels: list[int]


class Journal:
    """What one process of a run has done, in a file that a kill leaves readable: settings, then a line for each part.

    Args:
        folder: of the masks.
        about: all that decides the masks, as JSON values.
        rank: of the process; each writes a file of its own. What a run of other settings left is removed.
        done: the parts that this process has done already, by number.
    """

    def __init__(self, folder: Path, about: Mapping[str, Any], rank: int, done: Mapping[int, Done]):
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

    def add(self, part: int, done: Done) -> None:
        """Note that a part's masks are all there."""
        append_text(self.path, _line(part, done))


def _line(part: int, done: Done) -> str:
    text = json.dumps([part, *done])
    return f"{text} {checksum_of(text.encode())}\n"


def _read_line(line: str) -> tuple[int, Done] | None:
    """A line that is whole: neither cut off by a kill nor changed since."""
    text, _, checksum = line.rpartition(" ")
    if checksum != checksum_of(text.encode()):
        return None
    try:
        part, counts, pixels = parse_json(text)
        whole = {type(number) for number in (part, *counts, *pixels)} == {int} and len(counts) == len(COUNTS)
    except (TypeError, ValueError):
        return None  # another version's
    return (part, Done(counts, pixels)) if whole and part >= 0 else None


def unfinished(folder: Path) -> list[Path]:
    """The journals that a stopped run left."""
    return sorted(folder.glob(JOURNAL + "*"))


def missing(folder: Path, names: Sequence[str]) -> str | None:
    """The first image that has no mask."""
    return next((name for name in names if not (folder / f"{name}.png").exists()), None)


def noted(folder: Path) -> dict[int, Done]:
    """What the journals there hold, the newest last word; a line that is not whole is left out, its part made anew."""
    paths = sorted(unfinished(folder), key=lambda path: path.stat().st_mtime_ns)  # an older run may have left some
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in paths]
    return dict(filter(None, (_read_line(line) for text in texts for line in text.splitlines()[1:])))


def all_pixels(parts: Sequence[Sequence[int]]) -> str:
    """One checksum of the images of all parts, for the summary."""
    return checksum_of(json.dumps([checksum for part in parts for checksum in part]).encode())


def take_up(
    folder: Path,
    about: Mapping[str, Any],
    names: Sequence[Sequence[str]],
    pixels: Callable[[int], Sequence[int]],
    coco: str | None = None,
) -> dict[int, Done] | None:
    """The parts that a run which resumes has done already, by number; None where all is done.

    Args:
        folder: of the masks.
        about: as :class:`Journal`.
        names: of the images of each part.
        pixels: a CRC-32 of each image of a part; asked for the parts that are done alone.
        coco: whether coco.json is wanted, too.

    Raises:
        InputError: the masks there are, or some of them, were made in another way, or from other pixels.
    """
    about = plain(about)
    journals, summary = unfinished(folder), folder / SUMMARY
    for path in journals:
        _same(path, _header(path), about)
    if journals:
        done = {part: found for part, found in noted(folder).items() if _fits(folder, found, names[part : part + 1])}
        for part, found in done.items():
            for name, then, now in zip(names[part], found.pixels, pixels(part), strict=True):
                if then != now:
                    raise InputError(f"{folder}: {name} has changed since its mask was made; {ANEW}")
        return done
    if not summary.exists():
        return {}
    run = read_sealed_json(summary).get("run")
    _same(summary, run, about | {PIXELS: run.get(PIXELS)} if isinstance(run, dict) else about)
    _same(summary, run, about | {PIXELS: all_pixels([pixels(part) for part in range(len(names))])})
    complete = all(missing(folder, part) is None for part in names) and (not coco or (folder / "coco.json").exists())
    return None if complete else {}


def _fits(folder: Path, found: Done, names: Sequence[Sequence[str]]) -> bool:
    """Whether a part is one of this run's and still has its masks."""
    return len(names) == 1 and len(names[0]) == len(found.pixels) and missing(folder, names[0]) is None


def check_data(folder: Path, digest: Mapping[str, Any]) -> None:
    """Refuse to go on with masks of other images or points, before anything is trained.

    Args:
        digest: of the images and points, a part of what :class:`Journal` is given.

    Raises:
        InputError: the folder holds masks of others.
    """
    for path in unfinished(folder):
        if header := _header(path):
            _same(path, {name: header.get(name) for name in digest}, digest)


def _header(path: Path) -> dict[str, Any] | None:
    """The JSON object on a file's first line; None where there is none."""
    try:
        header = parse_json(path.read_text(encoding="utf-8", errors="replace").partition("\n")[0])
    except (OSError, ValueError):
        return None
    return header if isinstance(header, dict) else None


def plain(about: Mapping[str, Any]) -> dict[str, Any]:
    """A description as it comes back from a file."""
    return json.loads(json.dumps(finite(about)))


def _same(path: Path, theirs: Any, mine: Mapping[str, Any]) -> None:
    if theirs == mine:
        return
    theirs = theirs if isinstance(theirs, dict) else {}
    name = next(name for name in (*mine, *theirs) if theirs.get(name) != mine.get(name))
    raise InputError(
        f"{path}: its masks were made with other {name}; resume with the same settings, points and images, or {ANEW}"
    )
