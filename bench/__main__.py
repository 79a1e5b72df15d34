"""Time the library against what it replaces, side by side: python -m bench [CASE ...] [--json FILE] [--plots FOLDER]

Every row's result is checked against the reference before any row is timed; a row whose result differs shows no time.
Rows of a case run in turn within one process, so the figure to quote is the ratio. "x roof" is the time in terms of the
least possible: the bytes that must move at the bandwidth of a copy on the same device. Real images and predictions are
used where HMG_DATA and HMG_CHECKPOINTS name their folders, synthetic ones otherwise.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from bench.cases import CASES
from bench.measure import exponents, faults, run_case
from bench.show import case_table, goal_table, write_plots
from bench.timer import copy_bandwidth
from hmg_gpu.common.console import tell_error
from hmg_gpu.common.errors import HMGError
from hmg_gpu.common.files import write_json
from hmg_gpu.common.provenance import provenance
from hmg_gpu.evaluation.plots import require_matplotlib

BY_NAME = {case.name: case for case in CASES}


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.set_flush_denormal(True)
    console = Console(width=None if sys.stdout.isatty() else 150)
    try:
        if options.plots:
            require_matplotlib()
        chosen = [BY_NAME[name] for name in options.cases] or [case for case in CASES if not case.long]
        report = measure(chosen, options, console)
        if options.json:
            write_json(options.json, report)
        written = write_plots(options.plots, chosen, report) if options.plots else []
    except HMGError as error:
        return tell_error(error)
    for path in [*([options.json] if options.json else []), *written]:
        console.print(f"written: {path}")
    wrong = faults(report["figures"])
    for line in wrong:
        console.print(f"[red]{line}[/red]")
    return 1 if wrong else 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    listed = "\n".join(f"  {case.name:13} {case.what}{' (only by name)' if case.long else ''}" for case in CASES)
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description=__doc__,
        epilog=f"cases:\n{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("cases", nargs="*", metavar="CASE", help="which (default: all that are not long)")
    parser.add_argument(
        "--seconds", type=float, default=4.0, help="to time each case, and each size of a sweep (default: %(default)s)"
    )
    parser.add_argument("--threads", type=int, help=f"of PyTorch (default: {torch.get_num_threads()})")
    parser.add_argument("--cpu", action="store_true", help="leave out the rows of a GPU")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to this file")
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="draw throughput-CASE.png of every sweep here")
    options = parser.parse_args(arguments)
    unknown = sorted(set(options.cases) - set(BY_NAME))
    if unknown:
        parser.error(f"unknown case {', '.join(unknown)}; choose from {', '.join(BY_NAME)}")
    if options.seconds <= 0 or (options.threads is not None and options.threads < 1):
        parser.error("--seconds and --threads: expected a positive number")
    return options


def measure(chosen: list, options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Run the cases, print each when it is done, and give everything that is worth keeping."""
    gpu = "cuda" if torch.cuda.is_available() and not options.cpu else None
    about = machine(gpu)
    bandwidths = ", ".join(f"{name} {value / 1e9:.0f} GB/s" for name, value in about["copy_bandwidth"].items())
    console.print(f"{about['processor']}, {about['threads']} threads; copy: {bandwidths}; GPU: {about['gpu']}")
    figures: list[dict[str, Any]] = []
    started = time.perf_counter()
    for case in chosen:
        case_figures = run_case(case, seconds=options.seconds, gpu=gpu)
        figures += case_figures
        console.print(case_table(case, case_figures, exponents(case_figures)))
    if any("goal" in figure for figure in figures):
        console.print(goal_table(figures))
    about |= {"load_at_end": _load(), "seconds": time.perf_counter() - started}
    return {"machine": about, "versions": provenance(), "exponents": exponents(figures), "figures": figures}


def machine(gpu: str | None) -> dict[str, Any]:
    """What every figure depends on."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_at_start": _load(),
        "gpu": torch.cuda.get_device_name() if gpu else "none",
        "copy_bandwidth": {device: copy_bandwidth(device) for device in ("cpu", *([gpu] if gpu else []))},
        "inputs": {name: "set" if os.environ.get(name) else "not set" for name in ("HMG_DATA", "HMG_CHECKPOINTS")},
    }


def _load() -> float | None:
    """Processes that wanted to run in the last minute: above the number of cores the machine was not quiet."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


if __name__ == "__main__":
    sys.exit(main())
