"""Masks, COCO and the list of changes, written while the page goes on."""

from __future__ import annotations

import csv
import io
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hmg_gpu.common.errors import HMGError
from hmg_gpu.common.files import write_text

CHANGES = ("image", "what", "y", "x", "extent", "before_y", "before_x", "before_extent")


class Export:
    """One export at a time, in a thread.

    Args:
        folder: of the masks.
        snapshot: the points as CSV and the changes as rows of ``CHANGES``, of one moment.
        write: writes the masks of a CSV into a folder; returns the command that makes the same.
    """

    def __init__(
        self,
        folder: Path,
        snapshot: Callable[[], tuple[str, list[dict[str, Any]]]],
        write: Callable[[Path, Path], str],
    ):
        self.folder, self._snapshot, self._write = folder, snapshot, write
        self._lock, self._state = threading.Lock(), {"state": "none"}

    def start(self) -> dict[str, Any]:
        """Begin one, unless one runs."""
        with self._lock:
            if self._state["state"] != "running":
                self._state = {"state": "running"}
                threading.Thread(target=self.run, daemon=True, name="export").start()
            return self._state

    def state(self) -> dict[str, Any]:
        """``state`` (none, running, done, failed), ``folder``, ``changes`` (how many), ``command``, ``error``."""
        return self._state

    def run(self) -> None:
        """The export itself."""
        self._state = {"state": "running", "folder": str(self.folder)}
        try:
            points, changes = self._snapshot()
            write_text(self.folder / "points.csv", points)
            command = self._write(self.folder / "points.csv", self.folder)
            write_text(self.folder / "changes.csv", changes_as_csv(changes))
            self._state |= {"state": "done", "changes": len(changes), "command": command}
        except Exception as error:  # whatever it was, the page has to know that nothing more will come
            text = str(error) if isinstance(error, HMGError) else f"{type(error).__name__}: {error}"
            self._state |= {"state": "failed", "error": text}


def changes_as_csv(changes: list[dict[str, Any]]) -> str:
    """One row for each point that is not as it was.

    Example:
        >>> row = {"image": "a", "what": "moved", "y": 3, "x": 7, "before_y": 3, "before_x": 6}
        >>> print(changes_as_csv([row]), end="")
        image,what,y,x,extent,before_y,before_x,before_extent
        a,moved,3,7,,3,6,
    """
    handle = io.StringIO()
    writer = csv.DictWriter(handle, CHANGES, lineterminator="\n")
    writer.writeheader()
    writer.writerows(changes)
    return handle.getvalue()
