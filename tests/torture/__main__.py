"""Bad luck on purpose: python -m tests.torture [PART ...] [--minutes N].

Each part says what it counted and ends the command with exit code 1 where something did not hold. Linux only; `disk`
mounts a tmpfs and a read-only folder, which wants root or a system that allows user namespaces.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from hmg_gpu.common.files import write_json
from hmg_gpu.common.provenance import provenance

from . import disk, flip, fuzz, kill, own, pairs, steady

PARTS = {  # what it does, and how often where --count does not say; the longest first
    "own": (own.run, 10_000),
    "kill": (kill.run, 100),
    "pairs": (pairs.run, 20),
    "fuzz": (fuzz.run, 3000),
    "flip": (flip.run, 1000),
    "disk": (disk.run, 20),
    "memory": (steady.run_memory, 1000),
    "determinism": (steady.run_determinism, 5),
}


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    kill.one_thread()
    waiting = list(options.parts or PARTS)
    count, started = len(waiting), time.monotonic()
    seconds = 60 * options.minutes * options.jobs / count if options.minutes else float("inf")
    report: dict[str, dict] = {}
    with tempfile.TemporaryDirectory(prefix="torture-", dir=options.folder) as folder:
        running: dict[int, str] = {}
        while waiting or running:
            while waiting and len(running) < options.jobs:
                part, place = waiting.pop(0), Path(folder).resolve()
                running[kill.start(partial(run, part, place, options, seconds), place / f"{part}.said")] = part
            process, status = os.wait()
            part = running.pop(process)
            said = (place / f"{part}.said").read_text()
            failed = {"failures": [f"ended with {os.waitstatus_to_exitcode(status)}: {said[-2000:]}"]}
            report[part] = failed if status else json.loads((place / f"{part}.json").read_text())
            print(f"[{len(report)}/{count}] {part}: {json.dumps(report[part], indent=2)}", flush=True)
            if options.json:
                write_json(options.json, report | {"versions": provenance()})
    failed = [part for part, found in report.items() if found["failures"]]
    verdict = f"failed: {', '.join(failed)}" if failed else "all held"
    print(f"{verdict}: {count} parts in {(time.monotonic() - started) / 60:.0f} minutes")
    return int(bool(failed))


def run(part: str, place: Path, options: argparse.Namespace, seconds: float) -> None:
    """One part in this process; what it counted goes to a file."""
    function, count = PARTS[part]
    started = time.monotonic()
    folder = place / part
    folder.mkdir()
    found = function(folder, options.count or count, started + seconds, options.seed)
    used = sum(os.times()[:4])  # of this process and its children
    found |= {"seed": options.seed, "seconds": time.monotonic() - started, "cpu_seconds": used}
    write_json(place / f"{part}.json", found)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS], help=f"any of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--minutes", type=float, help="stop after about so many, shared evenly (default: the counts)")
    parser.add_argument("--count", type=int, help="how often, instead of each part's own count")
    parser.add_argument("--seed", type=int, default=0, help="of moments and mutations (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="parts at a time (default: one a core)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the counts there")
    parser.add_argument("--folder", type=Path, help="for scratch files (default: the system's)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
