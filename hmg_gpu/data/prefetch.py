"""Reading the next part of a set while the device works on the present one."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator
from typing import TypeVar

Part = TypeVar("Part")


def prefetch(parts: Iterable[Part], ahead: int = 1) -> Iterator[Part]:
    """Give the parts in their order, each read by a thread up to ``ahead`` parts before it is asked for.

    At most ``ahead`` + 2 parts exist at a time: the caller's, those that wait, and the one being read. An error of the
    reader is raised where its part would have come. Closing the generator ends the thread.
    """
    waiting: queue.Queue[tuple[bool, Part | BaseException | None]] = queue.Queue(ahead)
    over = threading.Event()

    def hand(item: tuple[bool, Part | BaseException | None]) -> bool:
        while not over.is_set():
            try:
                waiting.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def read() -> None:
        try:
            for part in parts:
                if not hand((True, part)):
                    return
            hand((False, None))
        except BaseException as error:
            hand((False, error))

    reader = threading.Thread(target=read, daemon=True, name="prefetch")
    reader.start()
    try:
        while True:
            is_part, item = waiting.get()
            if is_part:
                yield item
            elif item is None:
                return
            else:
                raise item
    finally:
        over.set()
        reader.join()
