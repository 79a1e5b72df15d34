"""From a case to figures: every row is checked against the reference first, and only then timed."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.timer import copy_bandwidth, peak_bytes, time_together

Figure = dict[str, Any]
PATIENCE = 3  # a row may take so many times the seconds of its case for one call


def as_tensor(result: Any) -> Tensor:
    return result.cpu()


@dataclass(frozen=True)
class Row:
    """One way to do the work.

    Attributes:
        name: in tables.
        call: does the work; None where it cannot run here, then ``why`` says why.
        units: how much of the case's unit one call does; loops may take a part of what the batched rows take.
        read: turns what ``call`` gives into what is compared, a tensor whose first axis may be shorter than the
            reference's where ``units`` is less; not timed.
        expected: makes what this row must equal where it does other work than the reference.
        device: "cpu", or "cuda" for CUDA events and GPU memory.
        ours: a wrong result of ours fails the run; a peer's is only shown.
        tolerance: see :func:`difference`; 0 but where the order of float sums on a GPU is not fixed.
    """

    name: str
    call: Callable[[], Any] | None
    units: int = 1
    read: Callable[[Any], Tensor] = as_tensor
    expected: Callable[[], Tensor] | None = None
    device: str = "cpu"
    ours: bool = False
    tolerance: float = 0.0
    why: str = ""


@dataclass(frozen=True)
class Problem:
    """A case at one size: its rows, the reference first.

    Attributes:
        rows: the ways to do it.
        base: the row that ratios are against; None: the reference.
        bytes_per_unit: what must move between memory and processor at least, for the roofline; None: not bound by it.
        inputs: what it ran on, in words.
    """

    rows: Sequence[Row]
    base: str | None = None
    bytes_per_unit: float | None = None
    inputs: str = ""


@dataclass(frozen=True)
class Case:
    """What is timed, as plain data.

    Attributes:
        name: to ask for it.
        what: what is timed, and in how far it is like real work.
        unit: what throughput counts.
        build: makes the problem from ``sizes`` (by name) and the GPU to use ("cuda" or None).
        sizes: its arguments; ``toy`` replaces some of them where only the agreement of the rows matters.
        goals: by row, the least ratio asked for; with ``share`` the largest share of the base row.
        axis, values: the name in ``sizes`` that a sweep varies; ``work`` is what its cost should be linear in.
        axis_label: of the plot, with its unit.
        long: only runs where it is named.
    """

    name: str
    what: str
    unit: str
    build: Callable[..., Problem]
    sizes: Mapping[str, Any]
    toy: Mapping[str, Any] = field(default_factory=dict)
    goals: Mapping[str, float] = field(default_factory=dict)
    share: bool = False
    axis: str = ""
    values: tuple[Any, ...] = ()
    work: Callable[[Any], float] = float
    axis_label: str = ""
    long: bool = False


def run_case(case: Case, *, seconds: float, gpu: str | None = None, toy: bool = False) -> list[Figure]:
    """Measure a case, or every size of a sweep: one figure for each row and size.

    A row whose call takes more than ``PATIENCE * seconds`` is left out, and not tried at the sizes beyond; only the
    reference, the row that ratios are against and the rows of a ``long`` case take what they take.

    Args:
        case: what to measure.
        seconds: to spend on the timing of each size.
        gpu: "cuda", or None to leave those rows unmeasured.
        toy: at toy size, the first two sizes of a sweep: that the rows agree, not how fast they are.
    """
    sizes = dict(case.sizes) | (dict(case.toy) if toy else {})
    if not case.axis:
        return _run_problem(case, case.build(**sizes, gpu=gpu), None, seconds, set())
    figures: list[Figure] = []
    slow: set[str] = set()
    for value in case.values[:2] if toy else case.values:
        measured = _run_problem(case, case.build(**(sizes | {case.axis: value}), gpu=gpu), value, seconds, slow)
        slow |= {figure["row"] for figure in measured if figure["state"].startswith("left out")}
        figures += measured
    return figures


def _run_problem(case: Case, problem: Problem, value: Any, seconds: float, slow: set[str]) -> list[Figure]:
    figures = [_blank(case, problem, row, value) for row in problem.rows]
    running: dict[str, Row] = {}
    reference: Tensor | None = None
    needed = {problem.rows[0].name, problem.base}
    total = 0.0
    for row, figure in zip(problem.rows, figures, strict=True):
        if row.call is None:
            figure["state"] = row.why
        elif row.name in slow:
            figure["state"] = "left out: too slow at the size before"
        else:
            start = time.perf_counter()
            output = row.read(row.call())
            took = time.perf_counter() - start
            if reference is None:
                reference = output
            wrong = difference(reference if row.expected is None else row.expected(), output, row.tolerance)
            if wrong:
                figure["state"] = f"wrong: {wrong}"
            elif took > PATIENCE * seconds > 0 and row.name not in needed and not case.long:
                figure["state"] = f"left out: a call takes {took:.0f} s"
            else:
                figure["state"] = "timed"
                running[row.name] = row
                total += took

    least = max(1, min(5, int(2 * seconds / total))) if total else 5
    on_gpu = {name for name, row in running.items() if row.device != "cpu"}
    timings = time_together({n: r.call for n, r in running.items()}, seconds=seconds, least=least, on_gpu=on_gpu)
    base = timings.get(problem.base or problem.rows[0].name)
    base_units = next((row.units for row in problem.rows if row.name == (problem.base or problem.rows[0].name)), 1)
    for figure in figures:
        if figure["state"] != "timed":
            continue
        row, timing = running[figure["row"]], timings[figure["row"]]
        figure.update(asdict(timing), per_second=row.units / timing.median)
        figure["peak_bytes"] = None if timing.median > seconds > 0 else peak_bytes(row.call, row.device != "cpu")
        if base is not None:
            ratio = (base.median / base_units) / (timing.median / row.units)
            figure["ratio"] = 1 / ratio if case.share else ratio
        if problem.bytes_per_unit is not None and row.expected is None:
            floor = problem.bytes_per_unit * row.units / copy_bandwidth(row.device)
            figure.update(floor=floor, times_floor=timing.median / floor)
        goal = case.goals.get(row.name)
        if goal is not None and "ratio" in figure:
            figure["goal"] = goal
            figure["met"] = figure["ratio"] <= goal if case.share else figure["ratio"] >= goal
    return figures


def _blank(case: Case, problem: Problem, row: Row, value: Any) -> Figure:
    return {
        "case": case.name,
        "what": case.what,
        "inputs": problem.inputs,
        "row": row.name,
        "ours": row.ours,
        "device": row.device,
        "unit": case.unit,
        "units": row.units,
        "share": case.share,
        **({"axis": case.axis, "value": value, "work": case.work(value)} if case.axis else {}),
    }


def difference(expected: Tensor, actual: Tensor, tolerance: float = 0.0) -> str:
    """What tells two results apart, in words, or nothing; the longer one is cut to the other's length.

    ``tolerance``: of floats the largest difference, as a share of the largest value; of masks the pixels that may
    differ, as a share of the foreground.
    """
    length = min(len(expected), len(actual))
    if length == 0 and (len(expected) or len(actual)):
        return f"{len(actual)} results instead of {len(expected)}"
    expected, actual = expected[:length], actual[:length]
    if expected.shape != actual.shape or expected.dtype != actual.dtype:
        return f"{actual.dtype} {list(actual.shape)} instead of {expected.dtype} {list(expected.shape)}"
    if torch.equal(expected, actual):
        return ""
    differ = int((expected != actual).sum())
    if expected.dtype == torch.bool and differ <= tolerance * int(expected.sum()):
        return ""
    if expected.is_floating_point() and (expected - actual).abs().max() <= tolerance * expected.abs().max():
        return ""
    return f"{differ} of {expected.numel()} values differ"


def exponents(figures: Sequence[Figure]) -> list[Figure]:
    """How cost grows along each sweep: cost ~ work ** exponent, fitted to the medians on logarithmic axes.

    ``overall`` takes all sizes; fixed costs make it small where the first sizes are tiny. ``tail`` takes the last
    three, where the cost itself shows.
    """
    fits = []
    timed = [figure for figure in figures if figure["state"] == "timed" and "axis" in figure]
    for case, row in dict.fromkeys((figure["case"], figure["row"]) for figure in timed):
        sweep = [figure for figure in timed if (figure["case"], figure["row"]) == (case, row)]
        most_units = {
            figure["value"]: max(other["units"] for other in figures if _same_size(other, figure)) for figure in sweep
        }
        work = np.log([figure["work"] for figure in sweep])
        cost = np.log([figure["median"] / figure["units"] * most_units[figure["value"]] for figure in sweep])
        if len(sweep) >= 3:
            overall, tail = (float(np.polyfit(work[-n:], cost[-n:], 1)[0]) for n in (len(sweep), 3))
            fits.append({"case": case, "row": row, "axis": sweep[0]["axis"], "overall": overall, "tail": tail})
    return fits


def _same_size(figure: Figure, other: Figure) -> bool:
    return (figure["case"], figure.get("value")) == (other["case"], other.get("value"))


def forced(backend: str, call: Callable[[], Any]) -> Callable[[], Any]:
    """The call with HMG_BACKEND set, and as it was afterwards."""

    def run() -> Any:
        before = os.environ.get("HMG_BACKEND")
        os.environ["HMG_BACKEND"] = backend
        try:
            return call()
        finally:
            if before is None:
                del os.environ["HMG_BACKEND"]
            else:
                os.environ["HMG_BACKEND"] = before

    return run


def faults(figures: Sequence[Figure]) -> list[str]:
    """Rows of ours with a wrong result, in words."""
    return [f"{f['case']}, {f['row']}: {f['state']}" for f in figures if f["ours"] and f["state"].startswith("wrong")]
