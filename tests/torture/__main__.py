"""Bad luck on purpose: python -m tests.torture [PART ...] [--minutes N].

Each part says what it counted and ends the command with exit code 1 where something did not hold. Linux only; `disk`
mounts a tmpfs and a read-only folder, which wants root or a system that allows user namespaces.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

from hmg_gpu.common.files import write_json
from hmg_gpu.common.provenance import provenance

from . import disk, flip, fuzz, kill, own, pairs, steady

PARTS = {  # what it does, and how often where --count does not say
    "kill": (kill.run, 100),
    "disk": (disk.run, 20),
    "flip": (flip.run, 1000),
    "pairs": (pairs.run, 20),
    "fuzz": (fuzz.run, 3000),
    "own": (own.run, 10_000),
    "memory": (steady.run_memory, 1000),
    "determinism": (steady.run_determinism, 5),
}


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    kill.one_thread()
    parts = options.parts or list(PARTS)
    report: dict[str, dict] = {}
    for place, part in enumerate(parts):
        function, count = PARTS[part]
        started = time.monotonic()
        seconds = 60 * options.minutes / len(parts) if options.minutes else float("inf")
        with tempfile.TemporaryDirectory(prefix=f"torture-{part}-", dir=options.folder) as folder:
            found = function(Path(folder).resolve(), options.count or count, started + seconds, options.seed)
        report[part] = found | {"seed": options.seed, "seconds": time.monotonic() - started}
        print(f"[{place + 1}/{len(parts)}] {part}: {json.dumps(report[part], indent=2)}", flush=True)
        if options.json:
            write_json(options.json, report | {"versions": provenance()})
    failed = [part for part, found in report.items() if found["failures"]]
    print(f"failed: {', '.join(failed)}" if failed else "all held")
    return int(bool(failed))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS], help=f"any of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--minutes", type=float, help="stop after about so many, shared evenly (default: the counts)")
    parser.add_argument("--count", type=int, help="how often, instead of each part's own count")
    parser.add_argument("--seed", type=int, default=0, help="of moments and mutations (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the counts there")
    parser.add_argument("--folder", type=Path, help="for scratch files (default: the system's)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
