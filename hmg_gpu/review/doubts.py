"""How doubtful each image is, found out by a thread of its own while nobody clicks."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable

QUIET = 0.4  # seconds without a request before the thread goes on


class Doubts:
    """The doubt of images by number, the last asked for first.

    Args:
        measure: the doubt of an image, 0 to 1, or None where it has no point.
    """

    def __init__(self, measure: Callable[[int], float | None]):
        self._measure = measure
        self._waiting: dict[int, None] = {}
        self._found: list[tuple[int, float | None]] = []
        self._used = 0.0
        self._change = threading.Condition()
        self._stop = False
        self._thread = threading.Thread(target=self._run, daemon=True, name="doubts")
        self._thread.start()

    def ask(self, rows: Iterable[int]) -> None:
        """Measure these images (again), before all that wait."""
        with self._change:
            for row in rows:
                self._waiting.pop(row, None)
                self._waiting[row] = None
            self._change.notify()

    def since(self, count: int) -> dict[str, object]:
        """What was found after the first ``count`` results: (image, doubt) each, and how many still wait."""
        with self._change:
            return {"found": self._found[count:], "count": len(self._found), "waiting": len(self._waiting)}

    def used(self) -> None:
        """Somebody works: wait a little."""
        self._used = time.monotonic()

    def close(self) -> None:
        with self._change:
            self._stop = True
            self._change.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._change:
                while not self._waiting and not self._stop:
                    self._change.wait()
                if not self._stop and (left := self._used + QUIET - time.monotonic()) > 0:
                    self._change.wait(left)
                    continue
                if self._stop:
                    return
                row, _ = self._waiting.popitem()
            try:
                value = self._measure(row)
            except Exception:  # told where the image is opened; the others are measured all the same
                value = None
            with self._change:
                self._found.append((row, value))
