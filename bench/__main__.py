"""Time the library against what it replaces: python -m bench [CASE ...] [--json FILE].

Every case checks first that its rows give the same result. Rows run in turn within one process; the figure to quote is
the ratio. Real data is used where HMG_DATA names its folder, synthetic scenes otherwise.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
from dataclasses import asdict

import torch
from rich.console import Console
from rich.table import Table

from bench.cases import CASES
from bench.timer import time_together
from hmg_gpu.files import write_json
from hmg_gpu.provenance import provenance


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help="; ".join(f"{c.name}: {c.what}" for c in CASES))
    parser.add_argument("--seconds", type=float, default=6.0, help="time for each case (default: %(default)s)")
    parser.add_argument("--json", help="write the figures to this file")
    options = parser.parse_args()
    unknown = set(options.cases) - {case.name for case in CASES}
    if unknown:
        parser.error(f"unknown case {', '.join(sorted(unknown))}; choose from {', '.join(c.name for c in CASES)}")

    table = Table(title=f"{torch.get_num_threads()} CPU threads, {platform.processor() or platform.machine()}")
    for heading in ("case", "row", "median ms", "quartiles ms", "ratio", "asked for"):
        table.add_column(heading, justify="left" if heading in ("case", "row") else "right")
    figures = []
    for case in CASES:
        if options.cases and case.name not in options.cases:
            continue
        timings = time_together(case.build(), seconds=options.seconds)
        base = next(iter(timings.values())).median
        for number, (row, timing) in enumerate(timings.items()):
            ratio = timing.median / base if case.share else base / timing.median
            goal = ""
            if number and case.goal is not None:
                goal = f"<= {100 * case.goal:.0f} %" if case.share else f">= {case.goal:g} x"
            table.add_row(
                case.name if number == 0 else "",
                row,
                f"{1e3 * timing.median:.2f}",
                f"{1e3 * timing.low:.2f} to {1e3 * timing.high:.2f}",
                "" if number == 0 else (f"{100 * ratio:.1f} %" if case.share else f"{ratio:.1f} x"),
                goal,
            )
            figures.append({"case": case.name, "what": case.what, "row": row, "ratio": ratio} | asdict(timing))
    Console().print(table)
    if options.json:
        machine = {"threads": torch.get_num_threads(), "cores": os.cpu_count(), "processor": platform.processor()}
        write_json(options.json, {"machine": machine, "versions": provenance(), "figures": figures})
    return 0


if __name__ == "__main__":
    sys.exit(main())
