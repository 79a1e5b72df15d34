"""What one small update costs the host, with idle kernels: python -m bench.host_time

Counts what Python and PyTorch do around the launches: checks, allocations, arguments. A launch itself costs more; that
is measured on a GPU (``host_us`` of bench.gpu_check). Two versions are compared by running this file in both checkouts
in turns:

    python -m bench.host_time --beside OTHER_CHECKOUT
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"  # kernels take tensors of the CPU

CALLS, ROUNDS = 1000, 7


class Idle:
    """In place of a kernel: takes a launch and does nothing."""

    def __getitem__(self, grid: Any) -> Idle:
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        pass


def silence(module: ModuleType) -> int:
    """Replace the kernels that a module launches; how many."""
    from triton.runtime import KernelInterface

    kernels = [name for name, value in vars(module).items() if isinstance(value, KernelInterface)]
    for name in kernels:
        setattr(module, name, Idle())
    return len(kernels)


def measure(images: int, side: int) -> float:
    """Median host time of an update of so many images, in microseconds."""
    import torch

    from hmg_gpu.kernels import update as kernels

    torch.set_num_threads(1)
    modules = [module for name, module in sys.modules.items() if name.startswith("hmg_gpu.kernels.")]
    if not sum(map(silence, modules)):
        raise SystemExit("found no kernel to replace")
    planes = torch.zeros(images, side, side, dtype=torch.bool)
    points = torch.tensor([[image, side // 2, side // 2] for image in range(images)])
    spent = []
    for call in range(CALLS + 20):
        start = time.perf_counter()
        kernels.update(planes, planes, points)
        if call >= 20:
            spent.append(1e6 * (time.perf_counter() - start))
    return statistics.median(spent)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument(
        "--side", type=int, default=64, help="pixels; little memory, as a GPU keeps its own (default: %(default)s)"
    )
    parser.add_argument("--beside", type=Path, metavar="CHECKOUT", help="another version, measured in turns with this")
    parser.add_argument("--once", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.once:
        print(measure(options.images, options.side))
        return 0
    checkouts = [Path.cwd(), *([options.beside] if options.beside else [])]
    for checkout in checkouts:
        if not (checkout / "hmg_gpu" / "__init__.py").is_file():
            raise SystemExit(f"{checkout}: no checkout of hmg_gpu")
    found: dict[Path, list[float]] = {checkout: [] for checkout in checkouts}
    for _ in range(ROUNDS):
        for checkout in checkouts:
            command = [sys.executable, __file__, "--once", "--images", str(options.images), "--side", str(options.side)]
            environment = os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
            run = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
            if run.returncode:
                raise SystemExit(f"{checkout}: {run.stderr.strip().splitlines()[-1]}")
            found[checkout].append(float(run.stdout))
    for checkout, times in found.items():
        print(f"{checkout}: {min(times):.0f} us (each of {ROUNDS} medians: {' '.join(f'{one:.0f}' for one in times)})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
