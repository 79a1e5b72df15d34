"""Everything that needs a GPU, in one command: python -m bench.gpu_check [--json FILE] [--quick]

Runs the kernel tests compiled for this device, the update path under the sync debug mode "error", CUDA graph capture
with 100 replays on changed inputs, 100 repeats, compute-sanitizer where it is installed, and the kernel timings.
Writes one JSON file with device, driver and versions. Without a GPU it says so and ends with exit code 0.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import shutil
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
SIDE = 512
RADIUS = 30

# What `python -m bench.gpu_check` runs under compute-sanitizer: every kernel once, on odd sizes.
SANITIZED = """
import torch
from hmg_gpu.kernels import components, pmg, update
torch.manual_seed(0)
mask, target = (torch.rand(2, 3, 133, 271, device="cuda") < 0.2)
points = torch.tensor([[0, 5, 5], [1, 132, 270], [2, 60, 9]], device="cuda")
grouped = update.group_points(points, 3)
for design in ("images", "tiles"):
    update.launch(mask, target, *grouped, None, 30, 0.0, design)
components.components(mask)
components.detection_counts(mask, target)
pmg.point_to_mask(torch.rand(3, 133, 271, device="cuda"), points)
torch.cuda.synchronize()
"""


# ---- inputs and timing ----------------------------------------------------------------------------------------------


def sparse_scene(images: int, side: int = SIDE, targets: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    """Predictions and initial masks with a few blobs an image (under 1 % foreground), and one point a blob."""
    generator = torch.Generator().manual_seed(0)
    y, x = torch.randint(0, side - 12, (2, images * targets), generator=generator)
    image = torch.arange(images).repeat_interleave(targets)
    prediction = torch.zeros((images, side, side), dtype=torch.bool)
    initial = torch.zeros_like(prediction)
    for dy in range(9):
        for dx in range(9):
            prediction[image, y + dy, x + dx] = True
            if 1 < dy < 7 and 1 < dx < 7:
                initial[image, y + dy, x + dx] = True
    points = torch.stack((image, y + 4, x + 4), 1)
    return prediction.cuda(), initial.cuda(), points.cuda()


def milliseconds(call: Callable[[], object], runs: int = 30) -> dict[str, float]:
    """Median and quartiles of the device time of one call, measured with events."""
    for _ in range(3):
        call()
    spent = []
    for _ in range(runs):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        spent.append(start.elapsed_time(end))
    low, median, high = statistics.quantiles(spent, n=4)
    return {"median_ms": median, "low_ms": low, "high_ms": high, "runs": runs}


def captured(call: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """A CUDA graph of one call, and the tensor that its replays write."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    return graph, result


# ---- checks ---------------------------------------------------------------------------------------------------------


def check_tests(quick: bool) -> dict:
    """The kernel tests on this device, and every other test marked gpu."""
    commands = [["-m", "gpu", "tests"]]
    if not quick:
        files = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests" / "kernels").glob("test_*.py"))
        commands.append(["-m", "not gpu", *files])
    outputs = []
    for arguments in commands:
        command = [sys.executable, "-m", "pytest", "-q", *arguments]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        outputs.append(done.stdout.strip().splitlines()[-1])
        if done.returncode:
            raise RuntimeError(done.stdout[-3000:])
    return {"pytest": outputs}


def check_synchronisation(_quick: bool) -> dict:
    """The update path under torch.cuda.set_sync_debug_mode("error")."""
    import hmg_gpu
    from hmg_gpu.evaluation.metrics import detection_counts

    prediction, initial, points = sparse_scene(16)
    images = torch.rand(prediction.shape, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        hmg_gpu.update(prediction, initial, points)
        hmg_gpu.point_to_mask(images, points)
        detection_counts(prediction, initial)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    return {"sync_debug_mode": "no synchronisation"}


def check_graphs(_quick: bool) -> dict:
    """Both designs and PMG captured once, replayed 100 times on changed inputs: bit-equal to eager."""
    from hmg_gpu.kernels import pmg, update

    prediction, initial, points = sparse_scene(8)
    image = torch.rand(prediction.shape, device="cuda") * 255
    grouped, offsets = update.group_points(points, len(prediction))
    calls = {
        design: lambda d=design: update.launch(prediction, initial, grouped, offsets, None, RADIUS, 0.0, d)
        for design in ("images", "tiles")
    }
    calls["pmg"] = lambda: pmg.point_to_mask(image, points)
    for name, call in calls.items():
        graph, result = captured(call)
        for _ in range(100):
            prediction.copy_(torch.rand(prediction.shape, device="cuda") < torch.rand(1, device="cuda") * 0.3)
            image.copy_(torch.rand(image.shape, device="cuda") * 255)
            graph.replay()
            if not result.equal(call()):
                raise RuntimeError(f"{name}: a replay differs from eager")
    return {"replays": 100, "captured": list(calls)}


def check_repeats(_quick: bool) -> dict:
    """100 runs on the same input give the same bits, at densities from sparse to full."""
    from hmg_gpu.kernels import update

    _, initial, points = sparse_scene(64)
    grouped, offsets = update.group_points(points, 64)
    for density in (0.01, 0.3, 0.6, 1.0):
        prediction = torch.rand(initial.shape, device="cuda") < density
        runs = [
            update.launch(prediction, initial, grouped, offsets, None, RADIUS, 0.0, design)
            for design in ("images", "tiles")
            for _ in range(50)
        ]
        if not all(run.equal(runs[0]) for run in runs):
            raise RuntimeError(f"density {density}: runs differ")
    return {"repeats": 100}


def check_sanitizer(_quick: bool) -> dict:
    """compute-sanitizer memcheck over one launch of every kernel."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return {"memcheck": "compute-sanitizer is not installed"}
    command = [tool, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, "-c", SANITIZED]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stdout[-3000:] + done.stderr[-1000:])
    return {"memcheck": done.stdout.strip().splitlines()[-1]}


# ---- timings --------------------------------------------------------------------------------------------------------


def time_update(quick: bool) -> dict:
    """FAF + MDR by design and batch, against the floor, kornia, CuPy and SciPy."""
    from hmg_gpu.kernels import update

    rows = {}
    for images in (1, 8, 64, 256) if quick else (1, 8, 32, 64, 128, 256, 1024):
        prediction, initial, points = sparse_scene(images)
        grouped, offsets = update.group_points(points, images)
        out = torch.empty_like(prediction)
        row = {"floor": milliseconds(lambda p=prediction, i=initial, o=out: torch.bitwise_or(p, i, out=o))}
        for design in ("images", "tiles"):
            if design == "tiles" and images * update.image_bytes(SIDE, SIDE) > update.WORKSPACE_BYTES:
                continue

            def call(d=design, p=prediction, i=initial, g=grouped, o=offsets):
                return update.launch(p, i, g, o, None, RADIUS, 0.0, d)

            row[design] = milliseconds(call)
            graph, _ = captured(call)
            row[f"{design}, graph"] = milliseconds(graph.replay)
        chosen = update.choose_design(images, SIDE, SIDE)
        row["chosen"] = chosen
        row["times_floor"] = row[chosen]["median_ms"] / row["floor"]["median_ms"]
        row |= peers(prediction)
        for name in ("kornia", "cupy", "scipy"):
            if name in row:
                row[f"{name}_over_ours"] = row[name]["median_ms"] / row[chosen]["median_ms"]
        rows[f"{images} x {SIDE} x {SIDE}"] = row
    return rows


def peers(prediction: Tensor) -> dict:
    """Labelling alone, as others do it; CuPy and SciPy take the images one by one."""
    from kornia.contrib import connected_components_union_find
    from scipy import ndimage

    timings = {}
    if len(prediction) <= 256:
        planes = prediction[:, None]
        timings["kornia"] = milliseconds(lambda: connected_components_union_find(planes), runs=5)
    if importlib.util.find_spec("cupy") and importlib.util.find_spec("cupyx"):
        import cupy
        from cupyx.scipy.ndimage import label

        planes = [cupy.from_dlpack(plane.byte()) for plane in prediction]
        eight = cupy.ones((3, 3))
        timings["cupy"] = milliseconds(lambda: [label(plane, eight) for plane in planes], runs=5)
    if len(prediction) <= 64:
        planes = prediction.cpu().numpy()
        start = time.perf_counter()
        for plane in planes:
            ndimage.label(plane, [[1, 1, 1]] * 3)
        timings["scipy"] = {"median_ms": 1e3 * (time.perf_counter() - start), "runs": 1}
    return timings


def time_densities(_quick: bool) -> dict:
    """Adversarial predictions against the sparse one, both designs."""
    from hmg_gpu.kernels import update

    sparse, initial, points = sparse_scene(64)
    grouped, offsets = update.group_points(points, 64)
    grid = torch.arange(SIDE, device="cuda")
    scenes = {
        "sparse": sparse,
        "full": torch.ones_like(sparse),
        "checkerboard": ((grid[:, None] + grid) % 2 == 0).expand(sparse.shape).contiguous(),
        "random 60 %": torch.rand(sparse.shape, device="cuda") < 0.6,
        "random 20 %": torch.rand(sparse.shape, device="cuda") < 0.2,
    }
    rows = {}
    for design in ("images", "tiles"):
        for name, scene in scenes.items():
            rows[f"{design}, {name}"] = milliseconds(
                lambda d=design, s=scene: update.launch(s, initial, grouped, offsets, None, RADIUS, 0.0, d), runs=10
            )
            sparse_ms = rows[f"{design}, sparse"]["median_ms"]
            rows[f"{design}, {name}"]["times_sparse"] = rows[f"{design}, {name}"]["median_ms"] / sparse_ms
    return rows


def time_pmg(_quick: bool) -> dict:
    """Points a second at extent 25, uint8 and float32."""
    from hmg_gpu.kernels import pmg

    images = torch.randint(0, 256, (256, SIDE, SIDE), dtype=torch.uint8, device="cuda")
    count = 1 << 17
    limits = torch.tensor([256, SIDE, SIDE], device="cuda")
    points = (torch.rand((count, 3), device="cuda") * limits).long()
    rows = {}
    for name, batch in (("uint8", images), ("float32", images.float())):
        row = milliseconds(lambda b=batch: pmg.point_to_mask(b, points))
        rows[name] = row | {"million_points_a_second": count / row["median_ms"] / 1e3}
    return rows


def time_step(_quick: bool) -> dict:
    """The in-loop update beside a training step of ACM: batch 8, 256 x 256."""
    from hmg_gpu.kernels import update
    from hmg_gpu.models import build_model

    prediction, initial, points = sparse_scene(8, 256)
    grouped, offsets = update.group_points(points, 8)
    model = build_model("acm").cuda().train()
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)
    images, wanted = torch.rand((8, 1, 256, 256), device="cuda"), initial[:, None].float()

    def step() -> None:
        optimiser.zero_grad(set_to_none=True)
        torch.nn.functional.binary_cross_entropy_with_logits(model(images), wanted).backward()
        optimiser.step()

    training = milliseconds(step)
    ours = milliseconds(lambda: update.update(prediction, initial, grouped, offsets=offsets, radius=RADIUS))
    return {"training step": training, "update": ours, "share": ours["median_ms"] / training["median_ms"]}


def time_cases(quick: bool) -> dict:
    """The cases of ``python -m bench`` with their rows on this device, each checked before it is timed."""
    from bench.cases import CASES
    from bench.measure import exponents, faults, run_case

    chosen = [case for case in CASES if not (quick and (case.axis or case.long))]
    figures = [figure for case in chosen for figure in run_case(case, seconds=1 if quick else 3, gpu="cuda")]
    wrong = faults(figures)
    if wrong:
        raise RuntimeError("\n".join(wrong))
    return {"exponents": exponents(figures), "figures": figures}


CHECKS = (
    check_tests, check_synchronisation, check_graphs, check_repeats, check_sanitizer,
    time_update, time_densities, time_pmg, time_step, time_cases,
)  # fmt: skip


def machine() -> dict:
    """Device, driver and versions that every figure depends on."""
    import triton

    device = torch.cuda.get_device_properties(0)
    driver = "unknown"
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "device": device.name,
        "multiprocessors": device.multi_processor_count,
        "memory_GiB": round(device.total_memory / 2**30, 1),
        "driver": driver,
        "cuda": torch.version.cuda or torch.version.hip,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": sys.version.split()[0],
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_check", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--json", type=Path, help="where to write the results (default: bench/results/DEVICE_DATE.json)"
    )
    parser.add_argument("--quick", action="store_true", help="fewer sizes, and only the tests marked gpu")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("no GPU here: nothing was run. On a machine with a CUDA or ROCm device this command checks and times it.")
        return 0

    from hmg_gpu.common.files import write_json

    results: dict = {"machine": machine(), "passed": {}, "results": {}}
    for check in CHECKS:
        print(f"{check.__name__} ...", flush=True)
        try:
            results["results"][check.__name__] = check(options.quick)
            results["passed"][check.__name__] = True
        except Exception:  # one failure must not hide the others; it is printed, stored and decides the exit code
            print(traceback.format_exc(), file=sys.stderr)
            results["results"][check.__name__] = traceback.format_exc()
            results["passed"][check.__name__] = False
    name = re.sub(r"\W+", "-", results["machine"]["device"]).strip("-").lower()
    path = options.json or ROOT / "bench" / "results" / f"{name}_{time.strftime('%Y-%m-%d_%H%M%S')}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, results)
    for check, passed in results["passed"].items():
        print(f"{'passed' if passed else 'FAILED'}  {check}")
    print(f"written to {path}")
    return 0 if all(results["passed"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
