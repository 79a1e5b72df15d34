"""A race detector for interpreted Triton kernels: which lanes of which programs meet in memory without an order.

The interpreter runs programs and lanes one after another, so it computes what a GPU computes only where no result
hangs on their order. This module notes every access of a launch and reports two accesses to one byte when

    one of them is a plain store, or one is atomic and the other is a plain load, and
    they belong to two programs of the launch, or to two threads of one program with no barrier between them.

Nothing depends on the order in which the accesses came, so one run of a launch stands for all orders of the same
accesses. Two stores of one operation to one byte are reported where they store different values.

What stands for a thread. No interpreter knows how the compiler lays lanes over threads. Two operations are taken to
share their threads, lane by lane, when their tensors have one shape and their elements one size. Any other two lanes
are taken for different threads. A tensor with fewer elements than the launch has threads (a scalar, too) is held by
several threads: all of them load, one of them stores.

What is not seen: accesses outside ``tl.load``, ``tl.store`` and the atomics, and paths that the data did not take.
Barriers inside a reduction are not counted: Triton promises none.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import triton.runtime.interpreter as interpreter
from watching import Operation, Site, Watcher, site

EVERY = -1  # thread number of a load that all threads of a program do
FAR = 2**62


class Conflict(NamedTuple):
    """Two places in the source that meet in memory without an order.

    Between threads ``first`` is the one that the program comes to first; either way round is a conflict of its own.
    """

    kernel: str
    first: Site
    second: Site
    where: str  # "programs", "threads" or "lanes"

    def __str__(self) -> str:
        between = {"programs": "two programs", "threads": "two threads, no barrier between", "lanes": "one store"}
        return f"{self.kernel}, {between[self.where]}:\n    {self.first}\n    {self.second}"


class Races(Watcher):
    """Notes accesses; ``conflicts`` counts the bytes of each conflict, ``kernels`` names what has run.

    Example:
        with watched(races := Races()):
            update(prediction, initial, points)
        assert not races.conflicts
    """

    def __init__(self) -> None:
        self.conflicts: Counter[Conflict] = Counter()
        self.kernels: set[str] = set()
        self._sites: dict[Site, int] = {}
        self._groups: dict[tuple[tuple[int, ...], int], int] = {}

    def launch(self, executor: interpreter.GridExecutor, num_warps: int) -> None:
        self._kernel = executor.fn.__name__
        self._threads = 32 * num_warps
        self._barriers: Counter[tuple[int, int, int]] = Counter()
        self._log: list[np.ndarray] = []
        self.kernels.add(self._kernel)

    def barrier(self) -> None:
        self._barriers[interpreter.interpreter_builder.grid_idx] += 1

    def memory(self, operation: Operation) -> object:
        shape = operation.pointers.shape
        group = self._groups.setdefault((shape, operation.size), len(self._groups))
        where = site(operation.kind)
        number = self._sites.setdefault(where, len(self._sites))
        lanes = np.flatnonzero(operation.mask)
        addresses = operation.pointers.reshape(-1)[lanes].astype(np.int64)
        if operation.kind == "store" and len(lanes) > 1:
            values = np.broadcast_to(operation.values, shape).reshape(-1)[lanes]
            order = np.argsort(addresses, kind="stable")
            same = addresses[order][1:] == addresses[order][:-1]
            differ = same & (values[order][1:].view(np.uint8 if values.dtype == bool else values.dtype)
                             != values[order][:-1])  # fmt: skip
            if differ.any():
                self.conflicts[Conflict(self._kernel, where, where, "lanes")] += int(differ.sum()) * operation.size
            first = np.unique(addresses, return_index=True)[1]  # lanes that store the same need no order
            lanes, addresses = lanes[first], addresses[first]
        if operation.kind == "load" and operation.pointers.size < self._threads:
            low, high = np.full_like(addresses, EVERY), np.full_like(addresses, FAR)
        else:
            low = high = lanes.astype(np.int64) + (group << 40)
        x, y, z = index = interpreter.interpreter_builder.grid_idx
        program = x + (y << 24) + (z << 40)
        rows = np.empty((len(addresses) * operation.size, 7), dtype=np.int64)
        rows[:, 0] = (addresses[:, None] + np.arange(operation.size)).reshape(-1)
        rows[:, 1], rows[:, 2], rows[:, 3] = program, self._barriers[index], number
        rows[:, 4], rows[:, 5] = (np.repeat(bound, operation.size) for bound in (low, high))
        rows[:, 6] = len(self._log)
        self._log.append(rows)
        return operation.run(operation.mask)

    def finish(self) -> None:
        if not self._log:
            return
        address, program, barriers, place, low, high, time = np.concatenate(self._log).T
        self._log = []
        # Byte by byte and place by place: the lowest and the highest program; then of each program the threads.
        (of_byte, of_place), bounds = _reduce((address, place), program, program, time)
        self._report(of_byte[:, None], of_place, bounds, "programs")
        (byte, owner, passed, of_place), bounds = _reduce((address, program, barriers, place), low, high, time)
        self._report(np.stack((byte, owner, passed), 1), of_place, bounds, "threads")

    def _report(self, keys: np.ndarray, places: np.ndarray, bounds: np.ndarray, where: str) -> None:
        """Conflicts among rows of one key: (key, place) with lowest and highest actor, first and last time."""
        names = {number: one for one, number in self._sites.items()}
        writes = np.isin(places, [number for number, one in names.items() if one.kind != "load"])
        begins = np.flatnonzero(np.r_[True, (keys[1:] != keys[:-1]).any(1)])
        key = np.cumsum(np.isin(np.arange(len(keys)), begins)) - 1
        # Only keys that somebody writes and two actors share can conflict.
        doubtful = np.logical_or.reduceat(writes, begins) & (
            np.minimum.reduceat(bounds[0], begins) < np.maximum.reduceat(bounds[1], begins)
        )
        kept = doubtful[key]
        key, places, bounds = np.cumsum(doubtful)[key][kept] - 1, places[kept], bounds[:, kept]
        table = {}
        for place in np.unique(places):
            table[place] = np.repeat([[FAR + 1], [EVERY - 1], [FAR + 1], [EVERY - 1]], int(doubtful.sum()), axis=1)
            table[place][:, key[places == place]] = bounds[:, places == place]
        for a, (least_a, most_a, first_a, _) in table.items():
            for b, (least_b, most_b, _, last_b) in table.items():
                kinds = {names[a].kind, names[b].kind}
                if "store" not in kinds and kinds != {"load", "atomic"}:
                    continue
                both = (most_a >= EVERY) & (most_b >= EVERY)
                apart = both & (np.minimum(least_a, least_b) < np.maximum(most_a, most_b)) & (first_a < last_b)
                if apart.any():
                    ends = (names[a], names[b])
                    ends = tuple(sorted(ends, key=str)) if where == "programs" else ends
                    self.conflicts[Conflict(self._kernel, *ends, where)] += int(apart.sum())


def _reduce(
    columns: tuple[np.ndarray, ...], low: np.ndarray, high: np.ndarray, time: np.ndarray
) -> tuple[list[np.ndarray], np.ndarray]:
    """One row for each combination of the columns, sorted: least ``low``, most ``high``, first and last ``time``."""
    order = np.lexsort(columns[::-1])
    columns = [column[order] for column in columns]
    changes = np.logical_or.reduce([column[1:] != column[:-1] for column in columns])
    begins = np.flatnonzero(np.r_[True, changes])
    least = [np.minimum.reduceat(values[order], begins) for values in (low, time)]
    most = [np.maximum.reduceat(values[order], begins) for values in (high, time)]
    return [column[begins] for column in columns], np.stack((least[0], most[0], least[1], most[1]))


class Harmless(NamedTuple):
    """Two places that may meet, and why no order of theirs changes a result.

    ``in_turn``: of threads only where the program comes to the first one first.
    """

    functions: str  # of the first and the second place, where they differ
    first: str
    second: str
    why: str
    in_turn: bool = False

    def covers(self, conflict: Conflict) -> bool:
        one, _, other = self.functions.partition(", ")
        own = [(one, self.first), (other or one, self.second)]
        ends = [(place.function, place.code) for place in (conflict.first, conflict.second)]
        return conflict.where != "lanes" and (ends == own or (ends == own[::-1] and not self.in_turn))


def unlisted(conflicts: Iterable[Conflict], harmless: Iterable[Harmless]) -> list[Conflict]:
    """What no entry of the list covers."""
    listed = list(harmless)
    return [conflict for conflict in conflicts if not any(entry.covers(conflict) for entry in listed)]
