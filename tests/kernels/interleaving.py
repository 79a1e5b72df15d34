"""Interpreted programs of a launch that run interleaved: at each memory operation another one may go on.

Triton's interpreter runs the programs of a launch one after another. Here each is a thread of Python and one runs at
a time; before every memory operation, and between the two halves into which an operation's lanes are cut at random,
the turn may pass to any other. A seed gives a schedule. Seeds differ in how often the turn passes and in how fast each
program is, so that some programs are overtaken whole and others meet at every step.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import triton.runtime.interpreter as interpreter
from watching import Operation, Watcher


class Interleaved(Watcher):
    """Run every launch in one random order of its programs' memory operations.

    Attributes:
        switches: how often the turn passed from one program to another.

    Example:
        with watched(Interleaved(seed=3)):
            update(prediction, initial, points)
    """

    def __init__(self, seed: int) -> None:
        self.switches = 0
        self._random = np.random.default_rng(seed)
        self._often = self._random.choice([1.0, 0.3, 0.03])
        self._spread = self._random.choice([0.0, 1.0, 2.0])

    def programs(self, executor: interpreter.GridExecutor) -> None:
        builder = interpreter.interpreter_builder
        total = int(np.prod(builder.grid_dim))
        plain, collected = executor.fn, []

        def collect(**arguments: Any) -> None:
            """Called for each program in turn; the last call runs them all."""
            collected.append(builder.grid_idx)
            if len(collected) == total:
                executor.fn = plain
                self._run(lambda: plain(**arguments), collected)

        executor.fn = collect

    def _run(self, program: Any, indices: list[tuple[int, int, int]]) -> None:
        self._indices = indices
        self._speed = (self._random.exponential(size=len(indices)) + 1e-3) ** self._spread
        self._turns = [threading.Semaphore(0) for _ in indices]
        self._alive = list(range(len(indices)))
        self._done = threading.Semaphore(0)
        self._failure: BaseException | None = None
        self._running = -1

        def body(number: int) -> None:
            self._turns[number].acquire()
            try:
                if self._failure is None:
                    program()
            except BaseException as error:
                self._failure = self._failure or error
            self._alive.remove(number)
            if self._alive:
                self._give(self._choose())
            else:
                self._done.release()

        threads = [threading.Thread(target=body, args=(n,), daemon=True) for n in self._alive]
        for thread in threads:
            thread.start()
        self._give(self._choose())
        self._done.acquire()
        for thread in threads:
            thread.join()
        self._running = -1
        if self._failure is not None:
            raise self._failure

    def _choose(self) -> int:
        speed = self._speed[self._alive]
        return int(self._random.choice(self._alive, p=speed / speed.sum()))

    def _give(self, number: int) -> None:
        self._running = number
        interpreter.interpreter_builder.grid_idx = self._indices[number]
        self._turns[number].release()

    def _pass(self) -> None:
        """Perhaps let another program go on."""
        if self._running < 0 or self._random.random() > self._often:
            return
        here, there = self._running, self._choose()
        if there != here:
            self.switches += 1
            self._give(there)
            self._turns[here].acquire()
        if self._failure is not None:
            raise _Stopped

    def memory(self, operation: Operation) -> Any:
        self._pass()
        some = operation.mask & (self._random.random(operation.mask.shape) < 0.5)
        rest = operation.mask & ~some
        if not some.any() or not rest.any():
            return operation.run(operation.mask)
        first = operation.run(some)
        self._pass()
        second = operation.run(rest)
        if first is None:
            return None
        # Where no lane is chosen both hold the value of ``other``.
        return interpreter.TensorHandle(np.where(some, first.data, second.data), second.dtype)


class _Stopped(Exception):
    """Another program has failed."""
