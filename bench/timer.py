"""Timing two or more callables against each other in one run, so that a noisy machine slows all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Timing:
    """Seconds of one callable: median and the quartiles around it."""

    median: float
    low: float
    high: float
    runs: int


def time_together(
    calls: Mapping[str, Callable[[], object]], *, seconds: float = 6.0, least: int = 5
) -> dict[str, Timing]:
    """Run the callables in turn, A B A B ..., after one warm-up each, for ``seconds`` or ``least`` rounds."""
    for call in calls.values():
        call()
    spent: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    rounds = 0
    while rounds < least or (time.perf_counter() < end and rounds < 200):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            spent[name].append(time.perf_counter() - start)
        rounds += 1
    return {name: _summary(values) for name, values in spent.items()}


def _summary(values: list[float]) -> Timing:
    low, median, high = statistics.quantiles(values, n=4) if len(values) > 1 else (values[0],) * 3
    return Timing(median, low, high, len(values))
