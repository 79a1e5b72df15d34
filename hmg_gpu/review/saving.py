"""Points to and from the CSV that everything else reads; it is replaced in one step by a thread of its own."""

from __future__ import annotations

import csv
import hashlib
import io
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from hmg_gpu.common.errors import HMGError, InputError
from hmg_gpu.common.files import write_bytes
from hmg_gpu.data import read_extents, read_points
from hmg_gpu.review.history import Click, Clicks

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


def check_names(files: Mapping[str, str]) -> None:
    """Refuse images whose names a CSV does not give back, such as those with a tab or in another coding than UTF-8.

    Args:
        files: the file of each image by its name, as for :func:`as_csv`.

    Raises:
        InputError: names the first such file.
    """
    with TemporaryDirectory() as folder:
        path = Path(folder, "names.csv")
        if _survive(files, path):
            return
        for name, file in files.items():
            if not _survive({name: file}, path):
                shown = file.encode("utf-8", "backslashreplace").decode()
                raise InputError(f"{shown!r}: a name that a CSV does not keep; rename it to letters, digits and _")


def _survive(files: Mapping[str, str], path: Path) -> bool:
    points = {name: (Click(0, 0, 0),) for name in files}
    try:
        write_bytes(path, as_csv(points, files).encode())
        return read_rows(path) == {name: [(0, 0, None)] for name in files}
    except (UnicodeEncodeError, InputError):
        return False


def digest(content: bytes) -> str:
    """SHA-256 in hexadecimal, by which a CSV is known again."""
    return hashlib.sha256(content).hexdigest()


def read_content(path: Path) -> bytes:
    """The bytes of a file.

    Raises:
        InputError: it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check the file and its rights") from error


class Saver:
    """Writes the CSV after every change; changes that come while it writes are written together.

    Args:
        path: of the CSV.
        render: gives its text.
        before: called with the text's digest before the file is replaced.
        after: called with it when the file was replaced.
        folder: keeps what somebody else wrote to ``path`` since the first writing.

    Attributes:
        error: why the file was not written, or what was found in its place; for the page.
    """

    def __init__(
        self,
        path: Path,
        render: Callable[[], str],
        before: Callable[[str], None],
        after: Callable[[str], None],
        folder: Path,
    ):
        self.path, self.error = path, ""
        self._render, self._before, self._after, self._folder = render, before, after, folder
        self._ours: set[str] = set()  # digests that the file may have
        self._found = ""
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
            try:
                content = self._render().encode()
                self._keep_foreign()
                mark = digest(content)
                self._before(mark)
                self._ours.add(mark)
                write_bytes(self.path, content)
                self._ours = {mark}
                self._after(mark)
            except Exception as error:  # whatever it was, the page has to know that the points are not saved
                self.error = str(error) if isinstance(error, HMGError) else f"{type(error).__name__}: {error}"
                raise
            self.error = self._found

    def close(self) -> None:
        """Write what is left."""
        self._stop = True
        self._wanted.set()
        self._thread.join()

    def _keep_foreign(self) -> None:
        """Copy what somebody else wrote before it is replaced."""
        if not self._ours or not self.path.exists():
            return
        content = read_content(self.path)
        if digest(content) not in self._ours:
            kept = self._folder / f"edited_{digest(content)[:12]}.csv"
            write_bytes(kept, content)
            self._found = f"{self.path} was edited elsewhere while the page was open; that file is kept as {kept}"

    def _run(self) -> None:
        while not self._stop or self._wanted.is_set():
            self._wanted.wait()
            with suppress(Exception):  # kept in ``error`` for the page, tried again with the next change
                self.write()
