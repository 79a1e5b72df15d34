"""Time, memory and copy bandwidth of a device; callables take turns so that a noisy machine slows all of them alike."""

from __future__ import annotations

import ctypes
import statistics
import sys
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

Call = Callable[[], object]
MOST_ROUNDS = 200
ROUND = 0.02  # seconds: a callable faster than this runs several times in its turn, up to 20 times
COPY_BYTES = 1 << 28


@dataclass(frozen=True)
class Timing:
    """Seconds of one callable: median and the quartiles around it."""

    median: float
    low: float
    high: float
    runs: int


def time_together(
    calls: Mapping[str, Call], *, seconds: float = 6.0, least: int = 5, on_gpu: Collection[str] = ()
) -> dict[str, Timing]:
    """Run the callables in turn, A B A B ..., for ``seconds`` or ``least`` rounds.

    Args:
        calls: warm already: each has run at least once.
        seconds: for all of them together.
        least: rounds, however long they take.
        on_gpu: names of the callables that a GPU runs; these are timed with CUDA events.
    """
    spent: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    rounds = 0
    while rounds < least or (time.perf_counter() < end and rounds < MOST_ROUNDS):
        for name, call in calls.items():
            clock = _gpu_seconds if name in on_gpu else _cpu_seconds
            first = clock(call)
            spent[name].append(first)
            for _ in range(min(19, int(ROUND / max(first, 1e-6)))):
                spent[name].append(clock(call))
        rounds += 1
    return {name: _summary(values) for name, values in spent.items()}


def peak_bytes(call: Call, on_gpu: bool) -> int | None:
    """What a call takes beyond what was held before it: GPU memory, or resident memory of this process on Linux."""
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    if sys.platform != "linux":
        return None
    try:
        _give_memory_back()
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from the present
        before = _status("VmRSS")
        call()
        return max(0, _status("VmHWM") - before)
    except OSError:  # a system that hides these files
        return None


@cache
def copy_bandwidth(device: str) -> float:
    """Bytes read and written in a second by a copy of 256 MiB, the best of 7: the roof of anything bound by memory."""
    source = torch.ones(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    clock = _cpu_seconds if device == "cpu" else _gpu_seconds
    target.copy_(source)
    return 2 * COPY_BYTES / min(clock(lambda: target.copy_(source)) for _ in range(7))


def _cpu_seconds(call: Call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _gpu_seconds(call: Call) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def _summary(values: list[float]) -> Timing:
    low, median, high = statistics.quantiles(values, n=4) if len(values) > 1 else (values[0],) * 3
    return Timing(median, low, high, len(values))


def _give_memory_back() -> None:
    """Freed memory that the allocator keeps would hide what the next call takes."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:  # glibc
        trim(0)


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {name}")
