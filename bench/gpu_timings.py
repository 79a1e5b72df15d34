"""The timings of ``bench.gpu_check``, one a process: python -m bench.gpu_timings NAME --device cuda

Every time is of device events around a graph's replay, with the L2 cache overwritten before each: up to 64 images would
lie in it. The floor is one bitwise OR of the same planes, which reads two and writes one. On the CPU (a rehearsal) the
sizes are toys and the times mean nothing.
"""

from __future__ import annotations

import importlib.util
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from bench.gpu_checks import RADIUS, ROOT, captured, finish, main, scene

L2_BYTES = 1 << 28  # more than any cache


def side(device: str) -> int:
    return 40 if device == "cpu" else 512


def milliseconds(call: Callable[[], object], device: str, runs: int = 20) -> dict[str, float]:
    """Median and quartiles of the device time of one call."""
    if device == "cpu":
        start = time.perf_counter()
        call()
        spent = 1e3 * (time.perf_counter() - start)
        return {"median_ms": spent, "low_ms": spent, "high_ms": spent, "runs": 1}
    cache = torch.empty(L2_BYTES, dtype=torch.uint8, device=device)
    for _ in range(3):
        call()
    events = []
    for _ in range(runs):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        cache.zero_()
        start.record()
        call()
        end.record()
        events.append((start, end))
    finish(device)
    low, median, high = statistics.quantiles([start.elapsed_time(end) for start, end in events], n=4)
    return {"median_ms": median, "low_ms": low, "high_ms": high, "runs": runs}


def replayed(call: Callable[[], Tensor], device: str, runs: int = 20) -> dict[str, float]:
    graph, _ = captured(call, device)
    return milliseconds(graph.replay, device, runs)


def update(device: str) -> dict:
    """FAF + MDR by batch, eager and from a graph, against the floor and peers."""
    from hmg_gpu.kernels import update as kernels

    rows = {}
    for images in (2,) if device == "cpu" else (1, 8, 16, 32, 64, 128, 256, 1024):
        prediction, initial, points = scene(images, side(device), device)
        grouped, offsets = kernels.group_points(points, images)
        out = torch.empty_like(prediction)

        def ours(p=prediction, i=initial, g=grouped, o=offsets):
            return kernels.update(p, i, g, offsets=o, radius=RADIUS)

        row = {
            "floor": replayed(lambda p=prediction, i=initial, o=out: torch.bitwise_or(p, i, out=o), device),
            "eager": milliseconds(ours, device),
            "graph": replayed(ours, device),
            "host_us": host_microseconds(ours, device),
        }
        row["graph_over_floor"] = row["graph"]["median_ms"] / row["floor"]["median_ms"]
        rows[f"{images} x {side(device)}^2"] = row | peers(prediction, device)
    return rows


def host_microseconds(call: Callable[[], object], device: str) -> float:
    """Median host time of one call: what the CPU pays to launch it."""
    spent = []
    for _ in range(2 if device == "cpu" else 50):
        finish(device)
        start = time.perf_counter()
        call()
        spent.append(1e6 * (time.perf_counter() - start))
    finish(device)
    return statistics.median(spent)


def peers(prediction: Tensor, device: str) -> dict:
    """Labelling alone, as others do it, where they are installed; CuPy and SciPy take the images one by one."""
    timings = {}
    if len(prediction) <= 256 and importlib.util.find_spec("kornia"):
        from kornia.contrib import connected_components_union_find

        timings["kornia"] = milliseconds(lambda: connected_components_union_find(prediction[:, None]), device, runs=3)
    if device != "cpu" and importlib.util.find_spec("cupy") and importlib.util.find_spec("cupyx"):
        import cupy
        from cupyx.scipy.ndimage import label

        planes = [cupy.from_dlpack(plane.byte()) for plane in prediction]
        timings["cupy"] = milliseconds(lambda: [label(plane, cupy.ones((3, 3))) for plane in planes], device, runs=3)
    if len(prediction) <= 64:
        from scipy import ndimage

        start = time.perf_counter()
        for plane in prediction.cpu().numpy():
            ndimage.label(plane, [[1, 1, 1]] * 3)
        timings["scipy"] = {"median_ms": 1e3 * (time.perf_counter() - start), "runs": 1}
    return timings


def counts(device: str) -> dict:
    """IoU, Pd and Fa by batch; the floor reads two planes."""
    from hmg_gpu.kernels import components
    from hmg_gpu.kernels import counts as kernels

    rows = {}
    for images in (2,) if device == "cpu" else (8, 64, 256):
        prediction, target, _ = scene(images, side(device), device)
        row = {
            "floor": replayed(lambda p=prediction, t=target: torch.logical_and(p, t), device),
            "graph": replayed(lambda p=prediction, t=target: kernels.detection_counts(p, t), device),
            "components": replayed(lambda p=prediction: components.components(p)[0], device),
        }
        rows[f"{images} x {side(device)}^2"] = row | {
            "graph_over_floor": row["graph"]["median_ms"] / row["floor"]["median_ms"]
        }
    return rows


def pmg(device: str) -> dict:
    """Points a second, uint8 and float32, at the extents of the paper."""
    from hmg_gpu.kernels import pmg as kernels

    images, count = (2, 8) if device == "cpu" else (256, 1 << 17)
    batch = torch.randint(0, 256, (images, side(device), side(device)), dtype=torch.uint8, device=device)
    limits = torch.tensor(batch.shape, device=device)
    points = (torch.rand((count, 3), device=device) * limits).long()
    rows = {}
    for extent in (10, 25):
        for name, pixels in (("uint8", batch), ("float32", batch.float())):
            row = milliseconds(lambda p=pixels, e=extent: kernels.point_to_mask(p, points, extent=e), device)
            row["million_points_a_second"] = count / row["median_ms"] / 1e3
            rows[f"{name}, extent {extent}"] = row
    return rows


def densities(device: str) -> dict:
    """Adversarial predictions against the sparse one."""
    from hmg_gpu.kernels import update as kernels

    images = 1 if device == "cpu" else 64
    sparse, initial, points = scene(images, side(device), device)
    grouped, offsets = kernels.group_points(points, images)
    grid = torch.arange(side(device), device=device)
    scenes = {
        "sparse": sparse,
        "full": torch.ones_like(sparse),
        "checkerboard": ((grid[:, None] + grid) % 2 == 0).expand(sparse.shape).contiguous(),
        "random 60 %": torch.rand(sparse.shape, device=device) < 0.6,
        "random 20 %": torch.rand(sparse.shape, device=device) < 0.2,
    }
    rows = {}
    for name, plane in scenes.items():
        rows[name] = replayed(
            lambda s=plane: kernels.update(s, initial, grouped, offsets=offsets, radius=RADIUS), device, runs=10
        )
        rows[name]["times_sparse"] = rows[name]["median_ms"] / rows["sparse"]["median_ms"]
    return rows


def step(device: str) -> dict:
    """The in-loop update beside a training step of ACM: batch 8, 256 x 256."""
    from hmg_gpu.kernels import update as kernels
    from hmg_gpu.models import build_model

    images, size = (2, 32) if device == "cpu" else (8, 256)
    prediction, initial, points = scene(images, size, device)
    grouped, offsets = kernels.group_points(points, images)
    model = build_model("acm").to(device).train()
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)
    pixels, wanted = torch.rand((images, 1, size, size), device=device), initial[:, None].float()

    def train() -> None:
        optimiser.zero_grad(set_to_none=True)
        torch.nn.functional.binary_cross_entropy_with_logits(model(pixels), wanted).backward()
        optimiser.step()

    training = milliseconds(train, device)
    ours = milliseconds(lambda: kernels.update(prediction, initial, grouped, offsets=offsets, radius=RADIUS), device)
    return {"training step": training, "update": ours, "share": ours["median_ms"] / training["median_ms"]}


def one_update(device: str) -> dict:
    """What ncu looks at: one update of 64 images."""
    from hmg_gpu.kernels import update as kernels

    images = 1 if device == "cpu" else 64
    prediction, initial, points = scene(images, side(device), device)
    grouped, offsets = kernels.group_points(points, images)
    for _ in range(2):
        kernels.update(prediction, initial, grouped, offsets=offsets, radius=RADIUS)
    finish(device)
    return {"pixels": prediction.numel()}


def dram_bytes(device: str) -> dict:
    """Bytes that each kernel of one update moves between memory and chip, where Nsight Compute is installed."""
    program = shutil.which("ncu")
    command = [sys.executable, "-m", "bench.gpu_timings", "one_update", "--device", device, "--result", "/dev/null"]
    if device != "cpu":
        if program is None:
            return {"ncu": "not installed"}
        metrics = "dram__bytes_read.sum,dram__bytes_write.sum,gpu__time_duration.sum"
        command = [program, "--csv", "--metrics", metrics, "--kernel-name", "regex:kernel", *command]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:  # a machine may not allow its counters to be read
        return {"ncu": f"exit code {done.returncode}", "output": (done.stdout + done.stderr)[-1000:]}
    return {"pixels": 64 * side(device) ** 2, "output": done.stdout[-4000:]}


def cases(device: str) -> dict:
    """The short cases of ``python -m bench`` with their rows on this device, each checked before it is timed."""
    from bench.cases import CASES
    from bench.measure import exponents, faults, run_case

    chosen = [case for case in CASES if not case.axis and not case.long]
    if device == "cpu":
        figures = [figure for case in chosen[:2] for figure in run_case(case, seconds=0, toy=True)]
    else:
        figures = [figure for case in chosen for figure in run_case(case, seconds=1, gpu=device)]
    wrong = faults(figures)
    if wrong:
        raise RuntimeError("\n".join(wrong))
    return {"exponents": exponents(figures), "figures": figures}


if __name__ == "__main__":
    sys.exit(main(globals()))
