"""One thread against several on the CPU, quiet and beside busy processes: python -m bench.threads [--json FILE]

Several threads should never be slower than one, also where other processes want the cores. Each work runs with one
thread and with several in turn, within one process; the figure to quote is the ratio of the pairs, several threads by
one: below 1 they help, above 1 they harm. The busy processes are started and ended here.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import hmg_gpu
from bench.scenes import blob_scene, points_scene
from hmg_gpu.common.files import write_json
from hmg_gpu.common.provenance import provenance
from hmg_gpu.evaluation.metrics import detection_counts
from hmg_gpu.masks.student.network import CropNet
from hmg_gpu.masks.student.student import Student, StudentSettings

Work = Callable[[], object]
FRACTION = 1.1  # several threads may take so many times what one takes


def works(size: int | None = None) -> dict[str, Work]:
    """What is timed; ``size``: side of synthetic images, small ones for tests."""
    found: dict[str, Work] = {}
    for points, extent in ((1000, 10), (1000, 25), (1000, 40), (100, 25), (10, 25)):
        scene, _ = points_scene(points if size is None else points // 100 + 1, "NUAA-SIRST", size)
        found[f"PMG, {points:,} points, extent {extent}"] = lambda s=scene, e=extent: hmg_gpu.point_to_mask(
            s.images, s.points, extent=e, sizes=s.sizes
        )
    for images in (8, 64):
        prediction, initial, points = blob_scene(images if size is None else 2, size or 256, 20 if size is None else 3)
        found[f"update, {images} images"] = lambda p=prediction, i=initial, q=points: hmg_gpu.update(p, i, q)
        target = prediction.roll((1, 1), (1, 2))
        found[f"metrics, {images} images"] = lambda p=prediction, t=target: detection_counts(p, t)
    scene, _ = points_scene(16 if size is None else 2, "NUAA-SIRST", size)
    torch.manual_seed(0)
    student = Student({25: [CropNet() for _ in range(4)]}, StudentSettings())
    found["learned masks, 16 points, four networks"] = lambda: student.probabilities(
        scene.images, scene.points, sizes=scene.sizes
    )
    return found


@contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """So many processes that each want a core."""
    running = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def compare(work: Work, threads: int, seconds: float, least: int = 5) -> dict:
    """Quartiles of the milliseconds with one thread and with several, and of the ratio of each pair."""
    spent: dict[int, list[float]] = {1: [], threads: []}
    for count in spent:
        torch.set_num_threads(count)
        work()
    end = time.perf_counter() + seconds
    while len(spent[1]) < least or time.perf_counter() < end:
        order = list(spent) if len(spent[1]) % 2 else list(spent)[::-1]
        for count in order:
            torch.set_num_threads(count)
            start = time.perf_counter()
            work()
            spent[count].append(1e3 * (time.perf_counter() - start))
    ratios = [several / one for one, several in zip(spent[1], spent[threads], strict=True)]
    return {
        "one": statistics.quantiles(spent[1], n=4),
        "several": statistics.quantiles(spent[threads], n=4),
        "ratio": statistics.quantiles(ratios, n=4),
        "pairs": len(ratios),
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.threads", description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch, against one (default: %(default)s)")
    parser.add_argument("--busy", type=int, default=2, help="other processes that want a core (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=6, help="for each work, quiet and busy (default: %(default)s)")
    parser.add_argument("--only", default="", metavar="WORD", help="works whose name holds this")
    parser.add_argument("--size", type=int, help="side of synthetic images in place of the real ones, in pixels")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to this file")
    options = parser.parse_args(arguments)
    before = torch.get_num_threads()
    rows = []
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    try:
        for name, work in works(options.size).items():
            if options.only in name:
                for busy in (0, options.busy):
                    with busy_processes(busy):
                        rows.append({"work": name, "busy": busy} | compare(work, options.threads, options.seconds))
                    print(f"{name}, {busy} busy: {rows[-1]['ratio'][1]:.2f}", flush=True)
    finally:
        torch.set_num_threads(before)
    table = Table("work", "busy processes", title=f"1 thread and {options.threads}: median (quartiles)")
    for column in ("1 thread, ms", f"{options.threads} threads, ms", "ratio"):
        table.add_column(column, justify="right")
    for row in rows:
        cells = (
            f"{middle:.3g} ({low:.3g} - {high:.3g})" for low, middle, high in map(row.get, ("one", "several", "ratio"))
        )
        table.add_row(row["work"], str(row["busy"]), *cells)
    Console(width=130).print(table)
    if load is not None:
        print(f"load of the machine when it began: {load:.1f} on {os.cpu_count()} cores")
    if options.json:
        write_json(options.json, {"versions": provenance(), "load_at_start": load, "rows": rows})
        print(f"written: {options.json}")
    slow = [row["work"] for row in rows if row["ratio"][1] > FRACTION]
    for name in slow:
        print(f"{options.threads} threads are slower than one: {name}")
    return 1 if slow else 0


if __name__ == "__main__":
    sys.exit(main())
