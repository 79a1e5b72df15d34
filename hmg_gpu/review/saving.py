"""Points to and from the CSV that everything else reads; it is replaced in one step by a thread of its own."""

from __future__ import annotations

import csv
import hashlib
import io
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

from hmg_gpu.common.errors import HMGError
from hmg_gpu.common.files import write_text
from hmg_gpu.data import read_extents, read_points
from hmg_gpu.review.history import Clicks

Rows = dict[str, list[tuple[int, int, int | None]]]


def read_rows(path: Path) -> Rows:
    """(y, x, extent or None) by image stem, each pixel once, of any file or folder of points.

    Raises:
        InputError: as :func:`hmg_gpu.data.read_points`.
    """
    extents = read_extents(path)
    return {
        name: [(y, x, extents.get(name, {}).get((y, x))) for y, x in dict.fromkeys(map(tuple, rows.tolist()))]
        for name, rows in read_points(path).items()
    }


def as_csv(points: Mapping[str, Clicks], files: Mapping[str, str]) -> str:
    """The points as CSV: image,y,x,extent, by image; ``files`` gives the name of each image's file.

    Example:
        >>> from hmg_gpu.review.history import Click
        >>> print(as_csv({"b": (Click(0, 3, 7, 12),), "a": (Click(1, 5, 6),)}, {"a": "a.png"}), end="")
        image,y,x,extent
        a.png,5,6,
        b,3,7,12
    """
    handle = io.StringIO()
    writer = csv.writer(handle, lineterminator="\n")
    writer.writerow(("image", "y", "x", "extent"))
    for name in sorted(points):
        writer.writerows((files.get(name, name), click.y, click.x, click.extent) for click in points[name])
    return handle.getvalue()


def digest(text: str) -> str:
    """SHA-256 in hexadecimal, by which a CSV is known again."""
    return hashlib.sha256(text.encode()).hexdigest()


class Saver:
    """Writes the CSV after every change; changes that come while it writes are written together.

    Args:
        path: of the CSV.
        render: gives its text.
        before: called with the text's digest before the file is replaced.
    """

    def __init__(self, path: Path, render: Callable[[], str], before: Callable[[str], None]):
        self.path, self.error = path, ""
        self._render, self._before = render, before
        self._wanted, self._stop = threading.Event(), False
        self._writing = threading.Lock()
        self._thread = threading.Thread(target=self._run, daemon=True, name="saver")
        self._thread.start()

    def wake(self) -> None:
        """Something changed."""
        self._wanted.set()

    def write(self) -> None:
        """Write now; returns when the file is there.

        Raises:
            HMGError: it cannot be written; the old file stays whole.
        """
        with self._writing:
            self._wanted.clear()
            text = self._render()
            try:
                self._before(digest(text))
                write_text(self.path, text)
            except HMGError as error:
                self.error = str(error)
                raise
            self.error = ""

    def close(self) -> None:
        """Write what is left."""
        self._stop = True
        self._wanted.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop or self._wanted.is_set():
            self._wanted.wait()
            try:
                self.write()
            except HMGError:
                pass  # kept in ``error`` for the page, tried again with the next change
            except Exception as error:  # the thread must live on: nothing would be saved any more
                self.error = f"{self.path}: cannot be written ({type(error).__name__}: {error})"
