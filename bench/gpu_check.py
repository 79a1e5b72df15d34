"""Everything that needs a GPU, in one command: python -m bench.gpu_check [--json FILE] [--budget SECONDS]

Each check is a process of its own with a time limit. One that hangs, crashes or says nothing costs its own result
alone, and the report says what happened. The results are written after every check. This process imports neither torch
nor triton, so no fault of a GPU reaches it. Without a GPU it says so and ends with exit code 0.

    python -m bench.gpu_check --rehearse     every check on the CPU, in toy sizes and without the kernels

The rehearsal finds what is misspelt in the checks. It says nothing about a kernel.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
TAIL = 4000  # characters kept of what a check prints
LEAST = 5  # seconds that must be left for a check to begin
GRACE = 3  # seconds that a check has to say where it hangs


class Check(NamedTuple):
    """A function of ``module``; ``seconds`` that it may take at most."""

    name: str
    seconds: float
    module: str = "bench.gpu_checks"


# What is cheap and decides whether the rest means anything comes first; what is long and may hang comes last.
CHECKS = (
    Check("smoke", 120),
    Check("synchronisation", 60),
    Check("graphs", 60),
    Check("update", 90, "bench.gpu_timings"),
    Check("counts", 60, "bench.gpu_timings"),
    Check("pmg", 60, "bench.gpu_timings"),
    Check("densities", 60, "bench.gpu_timings"),
    Check("step", 60, "bench.gpu_timings"),
    Check("dram_bytes", 60, "bench.gpu_timings"),
    Check("repeats", 60),
    Check("memcheck", 60),
    Check("initcheck", 60),
    Check("racecheck", 60),
    Check("synccheck", 60),
    Check("tests", 120),
    Check("kernel_tests", 120),
    Check("cases", 120, "bench.gpu_timings"),
)


def run_check(check: Check, device: str, seconds: float) -> dict[str, Any]:
    """Run one check in a process group of its own, ended whole when its time is over.

    Returns:
        ``state`` ("passed", or what happened in words), ``seconds``, ``returncode``, ``stdout`` and ``stderr`` (their
        ends), and ``result`` where there is one.
    """
    with tempfile.TemporaryDirectory() as folder:
        result, out, err = (Path(folder) / name for name in ("result.json", "out", "err"))
        command = [sys.executable, "-X", "faulthandler", "-m", check.module, check.name]
        command += ["--device", device, "--result", str(result)]
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        start = time.monotonic()
        # Files, not pipes: nothing waits for a grandchild that holds one open.
        with out.open("wb") as stdout, err.open("wb") as stderr:
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr,
                start_new_session=True,
            )  # fmt: skip
            try:
                late = not _wait(process, seconds)
                if late:
                    _signal_group(process, signal.SIGABRT)  # faulthandler tells where it hangs
                    _wait(process, GRACE)
            finally:
                _signal_group(process, signal.SIGKILL)
                process.wait()
        report = {
            "state": "",
            "seconds": round(time.monotonic() - start, 2),
            "returncode": process.returncode,
            "stdout": _tail(out),
            "stderr": _tail(err),
        }
        if late:
            report["state"] = f"hung: ended after {seconds:.0f} s"
        elif process.returncode < 0:
            report["state"] = f"crashed: {signal.Signals(-process.returncode).name}"
        elif process.returncode:
            report["state"] = f"failed: exit code {process.returncode}"
        else:
            try:
                report["result"] = json.loads(result.read_text())
                report["state"] = "passed"
            except FileNotFoundError:
                report["state"] = "no result: it ended with exit code 0 and wrote nothing"
            except ValueError as error:
                report["state"] = f"no result: what it wrote is no JSON ({error})"
    return report


def _tail(path: Path) -> str:
    lines = path.read_bytes().decode(errors="replace").splitlines()
    return "\n".join(line for line in lines if not line.startswith("Extension modules:"))[-TAIL:]


def _wait(process: subprocess.Popen, seconds: float) -> bool:
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


def _signal_group(process: subprocess.Popen, number: signal.Signals) -> None:
    with suppress(ProcessLookupError, PermissionError):  # all have ended
        os.killpg(process.pid, number)


def run_all(checks: tuple[Check, ...], report: dict, path: Path, device: str, budget: float) -> None:
    """Run the checks in order while the budget lasts; the file holds all results so far at any moment."""
    end = time.monotonic() + budget
    for check in checks:
        left = end - time.monotonic()
        if left < LEAST:
            report["checks"][check.name] = {"state": f"not run: the budget of {budget:.0f} s is spent"}
        else:
            print(f"{check.name} ...", end=" ", flush=True)
            report["checks"][check.name] = run_check(check, device, min(check.seconds, left))
            one = report["checks"][check.name]
            print(f"{one['state']} ({one['seconds']:.1f} s)", flush=True)
            if one["state"] != "passed":
                print(one["stderr"][-1000:], file=sys.stderr, flush=True)
        write(path, report)


def write(path: Path, report: dict) -> None:
    """Replace the file whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(report, indent=1) + "\n")
    part.replace(path)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_check", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--json", type=Path, help="where to write the results (default: bench/results/DEVICE_DATE.json)"
    )
    parser.add_argument("--budget", type=float, default=450, help="seconds for all checks (default: %(default)s)")
    names = [check.name for check in CHECKS]
    parser.add_argument("--only", nargs="+", choices=names, metavar="CHECK", help=f"of: {', '.join(names)}")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, in toy sizes, without the kernels")
    options = parser.parse_args(arguments)
    device = "cpu" if options.rehearse else "cuda"
    machine = run_check(Check("machine", 60), device, min(60, options.budget))
    about = machine.get("result") or {"device": "unknown device"}
    if machine["state"] == "passed" and about["device"] is None:
        print("no GPU here: nothing was run. On a machine with a CUDA or ROCm device this command checks and times it.")
        return 0
    stamp = f"{re.sub(r'[^a-z0-9]+', '-', about['device'].lower()).strip('-')}_{time.strftime('%Y-%m-%d_%H%M%S')}"
    path = options.json or ROOT / "bench" / "results" / f"{stamp}.json"
    report = {"machine": about, "checks": {"machine": machine}}
    print(f"{about}\nresults: {path}", flush=True)
    chosen = tuple(check for check in CHECKS if not options.only or check.name in options.only)
    if machine["state"] == "passed":
        run_all(chosen, report, path, device, options.budget - machine["seconds"])
    else:
        print(f"machine: {machine['state']}\n{machine['stderr']}", file=sys.stderr)
        write(path, report)
    states = {name: one["state"] for name, one in report["checks"].items()}
    for name, state in states.items():
        print(f"{name:16} {state}")
    print(f"written to {path}")
    return 0 if all(state == "passed" for state in states.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
