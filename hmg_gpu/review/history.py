"""The points of every image and all that was done to them: a journal on disk, from which the state comes back.

The journal has one JSON object a line, appended and flushed to the disk before a step counts:

    {"hmg_gpu review": 1, "points": {"a": [[0, 3, 7, null]]}}                              the points at the beginning
    {"do": 1, "what": "add", "image": "a", "before": [...], "after": [...]}                a step, with its number
    {"undo": 1} {"redo": 1}                                                                steps taken back and forth
    {"saving": "sha256 of a CSV"} {"saved": "sha256 of a CSV"}                             before and after writing it

A line that a crash cut off is dropped when the journal is opened.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from hmg_gpu.common.errors import HMGError, InputError
from hmg_gpu.common.files import write_text

MARK = "hmg_gpu review"
VERSION = 1


class Click(NamedTuple):
    """A point: its number for life, its pixel, and L_ep in pixels where it has one of its own."""

    id: int
    y: int
    x: int
    extent: int | None = None


Clicks = tuple[Click, ...]


@dataclass(frozen=True)
class Step:
    """One thing that was done: the points of an image before and after."""

    number: int
    what: str
    image: str
    before: Clicks
    after: Clicks


class History:
    """Points by image name, changed step by step; made by :meth:`begin` or :meth:`resume`.

    Attributes:
        points: the clicks of each image. base: those at the beginning. steps: done, in order; taken back ones not.
        undone: what :meth:`redo` would do again, the next one last.
        saved: digests that the CSV may have: of the last one surely written, and of those tried since.
        next_id: of a new point.
    """

    def __init__(self, path: Path, base: Mapping[str, Clicks]):
        self.path, self.base, self.points = path, dict(base), dict(base)
        self.steps: list[Step] = []
        self.undone: list[Step] = []
        self.saved: list[str] = []
        self._revisions: dict[str, int] = {}
        self._next_step = 1
        self.next_id = 1 + max((click.id for clicks in base.values() for click in clicks), default=-1)

    @classmethod
    def begin(cls, path: Path, points: Mapping[str, Iterable[tuple[int, int, int | None]]]) -> History:
        """Write a new journal; ``points`` are (y, x, extent) by image name."""
        number, base = 0, {}
        for name, rows in points.items():
            rows = list(rows)
            base[name] = tuple(Click(number + row, *values) for row, values in enumerate(rows))
            number += len(rows)
        history = cls(path, base)
        write_text(path, json.dumps({MARK: VERSION, "points": base}) + "\n")
        return history

    @classmethod
    def resume(cls, path: Path) -> History:
        """Take up a journal; what a crash left of a last line is cut off.

        Raises:
            InputError: no journal of this version, or damaged; the text names the line.
        """
        try:
            content = path.read_bytes()
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror}); check the file and its rights") from error
        whole = content.rfind(b"\n") + 1
        number = 1
        try:
            lines = content[:whole].splitlines()
            head = json.loads(lines[0])
            if head[MARK] != VERSION:
                raise InputError(f"{path}: a journal of version {head[MARK]}, expected {VERSION}; update hmg_gpu")
            history = cls(path, {name: _clicks(rows) for name, rows in head["points"].items()})
            for line in lines[1:]:
                number += 1
                history._replay(json.loads(line))
        except InputError:
            raise
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise InputError(
                f"{path}, line {number}: no journal of hmg-gpu review, or damaged; move its folder away to begin anew"
            ) from error
        if whole < len(content):
            with open(path, "r+b") as handle:
                handle.truncate(whole)
        return history

    def revision(self, image: str) -> int:
        """How often the points of an image changed, undo and redo included."""
        return self._revisions.get(image, 0)

    def do(self, what: str, image: str, after: Clicks) -> None:
        """Set the points of an image as a step that can be undone."""
        step = Step(self._next_step, what, image, self.points.get(image, ()), after)
        self._append({"do": step.number, "what": what, "image": image, "before": step.before, "after": after})
        self._done(step)

    def undo(self) -> Step | None:
        """Take the last step back; None where there is none."""
        if not self.steps:
            return None
        self._append({"undo": self.steps[-1].number})
        return self._undone()

    def redo(self) -> Step | None:
        """Do again what was taken back last; None where there is nothing."""
        if not self.undone:
            return None
        self._append({"redo": self.undone[-1].number})
        return self._redone()

    def note_saving(self, digest: str) -> None:
        """To be called before the CSV is replaced by one of this SHA-256."""
        self._append({"saving": digest})
        self.saved.append(digest)

    def note_saved(self, digest: str) -> None:
        """To be called when the CSV was replaced by one of this SHA-256."""
        self._append({"saved": digest})
        self.saved = [digest]

    def changes(self) -> Iterator[dict[str, Any]]:
        """The points that are not as they were at the beginning, one row each, by image."""
        for image in sorted(self.base.keys() | self.points.keys()):
            old = {click.id: click for click in self.base.get(image, ())}
            new = {click.id: click for click in self.points.get(image, ())}
            for key in sorted(old.keys() | new.keys()):
                before, after = old.get(key), new.get(key)
                if before == after:
                    continue
                if before is None or after is None:
                    what = "removed" if after is None else "added"
                else:
                    moved = (before.y, before.x) != (after.y, after.x)
                    resized = before.extent != after.extent
                    what = " and ".join(["moved"] * moved + ["extent changed"] * resized)
                row = {"image": image, "what": what}
                for prefix, click in (("", after), ("before_", before)):
                    row |= {f"{prefix}{key}": getattr(click, key, None) for key in ("y", "x", "extent")}
                yield row

    # ---- one step, in memory

    def _done(self, step: Step) -> None:
        self._set(step.image, step.after)
        self.steps.append(step)
        self.undone.clear()
        self._next_step = step.number + 1
        self.next_id = max([self.next_id, *(click.id + 1 for click in step.after)])

    def _undone(self) -> Step:
        step = self.steps.pop()
        self.undone.append(step)
        self._set(step.image, step.before)
        return step

    def _redone(self) -> Step:
        step = self.undone.pop()
        self.steps.append(step)
        self._set(step.image, step.after)
        return step

    def _set(self, image: str, clicks: Clicks) -> None:
        self.points[image] = clicks
        self._revisions[image] = self.revision(image) + 1

    def _replay(self, line: dict[str, Any]) -> None:
        if "do" in line:
            self._done(Step(line["do"], line["what"], line["image"], _clicks(line["before"]), _clicks(line["after"])))
        elif "saving" in line:
            self.saved.append(line["saving"])
        elif "saved" in line:
            self.saved = [line["saved"]]
        elif "undo" in line and line["undo"] == self.steps[-1].number:
            self._undone()
        elif "redo" in line and line["redo"] == self.undone[-1].number:
            self._redone()
        else:
            raise ValueError(line)

    def _append(self, line: Mapping[str, Any]) -> None:
        """One write and a flush: after a crash the line is there whole, or cut off at the end; after an error not."""
        content = json.dumps(line).encode() + b"\n"
        try:
            with open(self.path, "ab", buffering=0) as handle:
                length = handle.seek(0, os.SEEK_END)
                try:
                    if handle.write(content) < len(content):  # how a disk tells that it is nearly full
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                    os.fsync(handle.fileno())
                except OSError:
                    with suppress(OSError):
                        handle.truncate(length)
                    raise
        except OSError as error:
            raise HMGError(f"{self.path}: cannot be written ({error.strerror}); free some space") from error


def _clicks(rows: Iterable[Iterable[Any]]) -> Clicks:
    clicks = tuple(Click(*row) for row in rows)
    for click in clicks:
        if not all(type(value) is int for value in click[:3]) or type(click.extent) not in (int, type(None)):
            raise TypeError(click)
    return clicks
