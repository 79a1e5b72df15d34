"""The journal of a run that makes masks part by part, so that it can stop and go on.

Parts (some consecutive images) are what several processes share and what a stopped run resumes by.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hmg_gpu.common.checksums import checksum_of, read_sealed_json
from hmg_gpu.common.errors import InputError
from hmg_gpu.common.files import append_text, finite, parse_json, write_text

SUMMARY = "hmg.json"  # beside the masks: how they were made
JOURNAL = "hmg.part."  # and the number of the rank, while they are being made


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
    numbers = " ".join(map(str, (part, *counts)))
    return f"{numbers} {checksum_of(numbers.encode())}\n"


def _counts(line: str) -> tuple[int, list[int]] | None:
    """(part, counts) of a line that is whole: neither cut off by a kill nor changed since."""
    numbers, _, checksum = line.rpartition(" ")
    if checksum != checksum_of(numbers.encode()):
        return None
    part, *counts = map(int, numbers.split())
    return part, counts


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
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()[1:]
        done += filter(None, map(_counts, lines))  # a part whose line is not whole is made anew
    if journals or not summary.exists():
        return done
    _same(summary, read_sealed_json(summary).get("run"), about)
    complete = missing(folder, names) is None and (not coco or (folder / "coco.json").exists())
    return None if complete else []


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
        f"{path}: its masks were made with other {name}; resume with the same settings, points and images, "
        "or leave out --resume to make all of them anew"
    )
