"""Hooks into Triton's interpreter: every launch, every memory operation and every barrier passes a watcher."""

from __future__ import annotations

import linecache
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType
from typing import Any, NamedTuple

# isort: off
import kernel_tools  # noqa: F401 (before any kernel is decorated)

# isort: on
import numpy as np
import triton
import triton.runtime.interpreter as interpreter

# Frames that lie between a kernel and its memory: Triton's own and the watchers'.
WATCHERS = [Path(__file__).with_name(f"{name}.py") for name in ("watching", "races", "interleaving")]
OWN = tuple(map(str, (Path(triton.__file__).parent, *WATCHERS)))


class Site(NamedTuple):
    """Where a memory operation stands in a kernel's source."""

    kind: str  # "load", "store" or "atomic"
    function: str
    code: str

    def __str__(self) -> str:
        return f"{self.function}: {self.code}"


class Operation(NamedTuple):
    """One memory operation: a pointer and a mask for each lane; ``run`` does it for the lanes of a mask."""

    kind: str
    pointers: np.ndarray  # uint64 addresses
    mask: np.ndarray
    size: int  # bytes an element
    values: np.ndarray | None  # what a store writes
    run: Callable[[np.ndarray], Any]


class Watcher:
    """What may be overridden; by default nothing changes."""

    def launch(self, executor: interpreter.GridExecutor, num_warps: int) -> None:
        """A kernel is about to run."""

    def programs(self, executor: interpreter.GridExecutor) -> None:
        """Its arguments are bound and its grid is known."""

    def finish(self) -> None:
        """It has run."""

    def memory(self, operation: Operation) -> Any:
        return operation.run(operation.mask)

    def barrier(self) -> None:
        """``tl.debug_barrier()``."""


@contextmanager
def watched(watcher: Watcher) -> Iterator[None]:
    """Let every launch of an interpreted kernel pass the watcher; contexts may be nested."""
    builder, executor = interpreter.interpreter_builder, interpreter.GridExecutor
    names = ("create_masked_load", "create_masked_store", "create_atomic_rmw", "create_atomic_cas", "create_barrier")
    plain = {name: getattr(builder, name) for name in (*names, "set_grid_dim")}
    before = {name: builder.__dict__.get(name) for name in plain}
    plain_call = executor.__call__
    running: list[interpreter.GridExecutor] = []

    def operation(kind: str, pointers: Any, mask: Any, values: Any, run: Callable[[Any], Any]) -> Any:
        flags = np.ones_like(pointers.data, dtype=bool) if mask is None else mask.data
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)

        def chosen_lanes(chosen: np.ndarray) -> Any:
            return run(mask if chosen is flags else interpreter.TensorHandle(chosen, interpreter.tl.int1))

        return watcher.memory(Operation(kind, pointers.data, flags, size, values, chosen_lanes))

    def load(pointers, mask, other, *rest):
        return operation("load", pointers, mask, None, lambda m: plain["create_masked_load"](pointers, m, other, *rest))

    def store(pointers, value, mask, *rest):
        return operation(
            "store", pointers, mask, value.data, lambda m: plain["create_masked_store"](pointers, value, m, *rest)
        )

    def rmw(op, pointers, value, mask, *rest):
        return operation(
            "atomic", pointers, mask, None, lambda m: plain["create_atomic_rmw"](op, pointers, value, m, *rest)
        )

    def cas(pointers, *rest):  # has no mask
        return operation("atomic", pointers, None, None, lambda _mask: plain["create_atomic_cas"](pointers, *rest))

    def barrier():
        watcher.barrier()
        return plain["create_barrier"]()

    def set_grid_dim(*sizes: int) -> None:
        plain["set_grid_dim"](*sizes)
        watcher.programs(running[-1])

    def call(self, *arguments, **options):
        running.append(self)
        watcher.launch(self, options.get("num_warps", 4))
        try:
            return plain_call(self, *arguments, **options)
        finally:
            watcher.finish()
            running.pop()

    replaced = dict(zip(names, (load, store, rmw, cas, barrier), strict=True)) | {"set_grid_dim": set_grid_dim}
    for name, function in replaced.items():
        setattr(builder, name, function)
    executor.__call__ = call
    try:
        yield
    finally:
        executor.__call__ = plain_call
        for name, function in before.items():
            if function is None:
                delattr(builder, name)
            else:
                setattr(builder, name, function)


_sites: dict[tuple[CodeType, int, str], Site] = {}


def site(kind: str) -> Site:
    """The call in a kernel's source that the interpreter is at."""
    frame = sys._getframe(1)
    while frame.f_code.co_filename.startswith(OWN):
        frame = frame.f_back
    key = (frame.f_code, frame.f_lasti, kind)
    if key not in _sites:
        first, last, start, end = list(frame.f_code.co_positions())[frame.f_lasti // 2]
        lines = [linecache.getline(frame.f_code.co_filename, number) for number in range(first, last + 1)]
        lines[-1] = lines[-1].encode()[:end].decode()
        lines[0] = lines[0].encode()[start:].decode()
        _sites[key] = Site(kind, frame.f_code.co_name, " ".join("".join(lines).split()))
    return _sites[key]
