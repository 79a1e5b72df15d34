"""The checks of ``bench.gpu_check`` but the timings, one a process: python -m bench.gpu_checks NAME --device cuda

On the CPU (``--device cpu``) they run in toy sizes and the ops take the library's CPU path. What only a GPU has
(graphs, the sync debug mode, compute-sanitizer) is left out there. Everything around it runs.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
RADIUS = 30
REPLAYS = 100


# ---- inputs ---------------------------------------------------------------------------------------------------------


def scene(images: int, side: int, device: str, targets: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    """Predictions and initial masks with a few blobs an image (under 1 % of 512 x 512), and one point a blob."""
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
    return prediction.to(device), initial.to(device), torch.stack((image, y + 4, x + 4), 1).to(device)


def calls(height: int, width: int, density: float, device: str) -> dict[str, tuple[Callable, Callable]]:
    """Each public op on one random batch, on the device and by the CPU's own path: what both give must be equal."""
    import hmg_gpu
    from hmg_gpu.evaluation.metrics import detection_counts
    from hmg_gpu.kernels import components, counts, pmg, update
    from hmg_gpu.plain.components import connected_components

    generator = torch.Generator().manual_seed(height * width)
    shape = (2, height, width)
    prediction, initial = (torch.rand(shape, generator=generator) < density for _ in range(2))
    logits = torch.randn(shape, generator=generator)
    soft = torch.where(initial, torch.rand(shape, generator=generator), 0.0)
    images = torch.randint(0, 256, shape, generator=generator).float()
    points = (torch.rand((6, 3), generator=generator) * torch.tensor(shape)).long()
    sizes = torch.tensor([[height, width], [max(1, height - 1), max(1, width - 1)]])
    inside = points[(points[:, 1:] < sizes[points[:, 0]]).all(1)]

    def moved(*tensors: Tensor) -> list[Tensor]:
        return [tensor.to(device) for tensor in tensors]

    def labels_of(mask: Tensor) -> Tensor:
        found = connected_components(mask).labels()
        last = found.flatten(1).amax(1).cummax(0).values  # the CPU numbers through the batch, the kernels by image
        before = torch.cat((last.new_zeros(1), last[:-1]))[:, None, None]
        return torch.where(found > 0, found - before, 0).int()

    p, i, s, q, g, n = moved(prediction, initial, soft, inside, images, sizes)
    found = {
        "update": (lambda: update.update(p, i, q), lambda: hmg_gpu.update(prediction, initial, inside)),
        "update, sizes": (
            lambda: update.update(p, i, q, sizes=n),
            lambda: hmg_gpu.update(prediction, initial, inside, sizes=sizes),
        ),
        "soft_update": (
            lambda: update.soft_update(logits.sigmoid().to(device), s, q),
            lambda: hmg_gpu.soft_update(logits.sigmoid(), soft, inside),
        ),
        "components": (lambda: components.components(p)[0], lambda: labels_of(prediction)),
        "detection_counts": (
            lambda: counts.detection_counts(p, i, sizes=n),
            lambda: detection_counts(prediction, initial, sizes=sizes),
        ),
        "point_to_mask": (lambda: pmg.point_to_mask(g, q), lambda: hmg_gpu.point_to_mask(images, inside)),
        "point_to_probability": (
            lambda: pmg.point_to_probability(g, q),
            lambda: hmg_gpu.point_to_probability(images, inside),
        ),
        "point_to_mask, uint8": (
            lambda: pmg.point_to_mask(g.byte(), q),
            lambda: hmg_gpu.point_to_mask(images.byte(), inside),
        ),
        "box_to_mask": (
            lambda: pmg.box_to_mask(g, q, pmg.point_to_box(g, q)),
            lambda: hmg_gpu.box_to_mask(images, inside, hmg_gpu.point_to_box(images, inside)),
        ),
    }

    def judged(values: Tensor, run: Callable) -> Tensor:
        """Planes, totals and refusals of ``correct`` as one row of numbers."""
        return torch.cat([part.flatten().long() for part in run(values)])

    odd = logits.clone()
    odd[0, 0, 0], odd[1, -1, -1] = torch.nan, torch.inf
    grouped, offsets = update.group_points(inside, 2)
    h, o = moved(grouped, offsets)
    for guard in (None, 0.4):
        found[f"correct, guard {guard}"] = (
            lambda g=guard: judged(
                odd.to(device),
                lambda v: update.correct(v, i, p, h, sizes=n, offsets=o, radius=RADIUS, guard=g),
            ),
            lambda g=guard: judged(
                odd,
                lambda v: update.correct_without_triton(
                    v, initial, prediction, grouped, offsets, sizes, RADIUS, 0.0, 0.0, 1.0, g
                ),
            ),
        )
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        values = logits.to(dtype)
        found[f"update, {dtype} logits"] = (
            lambda v=values: update.update(v.to(device), i, q, threshold=0.3),
            lambda v=values: hmg_gpu.update(v > 0.3, initial, inside),
        )
    return found


@contextmanager
def cpu_path() -> Iterator[None]:
    """The library's own CPU path, whatever HMG_BACKEND says."""
    before = os.environ.pop("HMG_BACKEND", None)
    try:
        yield
    finally:
        if before is not None:
            os.environ["HMG_BACKEND"] = before


def captured(call: Callable[[], Tensor], device: str) -> tuple[Any, Tensor]:
    """A CUDA graph of one call, and the tensor that its replays write; on the CPU something that stands for both."""
    if device == "cpu":
        result = call()
        return SimpleNamespace(replay=lambda: result.copy_(call())), result
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


def finish(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


# ---- checks ---------------------------------------------------------------------------------------------------------


def machine(device: str) -> dict:
    """Device, driver and versions that every figure depends on; device None where there is no GPU."""
    import numpy
    import triton

    about = {
        "device": None,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "numpy": numpy.__version__,
        "python": sys.version.split()[0],
    }
    if device == "cpu":
        return about | {"device": "cpu, a rehearsal"}
    if not torch.cuda.is_available():
        return about
    found = torch.cuda.get_device_properties(0)
    driver = "unknown"
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
    return about | {
        "device": found.name,
        "multiprocessors": found.multi_processor_count,
        "memory_GiB": round(found.total_memory / 2**30, 1),
        "driver": driver,
        "cuda": torch.version.cuda or torch.version.hip,
    }


def smoke(device: str) -> dict:
    """Every op against the CPU at production tiles: width 1, an odd width, a dense plane; seconds of first calls.

    A first call compiles. All are tried; the failures of all are told together.
    """
    shapes = ((23, 1, 0.5), (1, 1, 0.5), (37, 131, 0.3), (512, 512, 0.6), (512, 512, 1.0))
    if device == "cpu":
        shapes = ((5, 1, 0.5), (18, 131, 0.1))
    first, wrong = {}, []
    for height, width, density in shapes:
        for name, (ours, theirs) in calls(height, width, density, device).items():
            label = f"{name}, {height} x {width}, density {density}"
            start = time.perf_counter()
            try:
                found = ours()
                finish(device)
                first[label] = round(time.perf_counter() - start, 3)
                with cpu_path():
                    same = torch.equal(found.cpu(), theirs())
                if not same:
                    wrong.append(f"{label}: differs from the CPU")
            except Exception as error:  # the next op may still work; all are told below
                wrong.append(f"{label}: {type(error).__name__}: {str(error)[:300]}")
    if wrong:
        raise RuntimeError("\n".join(wrong))
    return {"seconds of first calls": first}


def update_path(device: str) -> dict[str, Callable[[], object]]:
    """The calls of a training loop with masks in it."""
    import hmg_gpu
    from hmg_gpu.evaluation.metrics import DetectionMetrics
    from hmg_gpu.models import build_model

    prediction, initial, points = scene(2 if device == "cpu" else 16, 64 if device == "cpu" else 512, device)
    images = torch.rand(prediction.shape, device=device)
    metrics = DetectionMetrics()
    model = build_model("acm").to(device).eval()

    @torch.no_grad()
    def predict_and_update() -> Tensor:
        return hmg_gpu.update(model(images[:2, None])[:, 0] > 0, initial[:2], points[points[:, 0].argsort()][:0])

    return {
        "update": lambda: hmg_gpu.update(prediction, initial, points),
        "soft_update": lambda: hmg_gpu.soft_update(images, initial.float(), points),
        "point_to_mask": lambda: hmg_gpu.point_to_mask(images, points),
        "metrics": lambda: metrics.update(prediction, initial),
        "network and update": predict_and_update,
    }


def synchronisation(device: str) -> dict:
    """The update path under ``torch.cuda.set_sync_debug_mode("error")``."""
    found = update_path(device)
    for call in found.values():
        call()  # compiles
    if device == "cpu":
        return {"not looked at on a CPU": list(found)}
    waiting = {}
    for name, call in found.items():
        torch.cuda.set_sync_debug_mode("error")
        try:
            call()
        except RuntimeError as error:
            waiting[name] = str(error)[:300]
        finally:
            torch.cuda.set_sync_debug_mode("default")
    finish(device)
    if waiting:
        raise RuntimeError(f"these synchronise: {waiting}")
    return {"no synchronisation": list(found)}


def graphs(device: str) -> dict:
    """Each op captured once, replayed on changed inputs: bit-equal to eager."""
    from hmg_gpu.kernels import counts, pmg, update

    prediction, initial, points = scene(2 if device == "cpu" else 8, 40 if device == "cpu" else 512, device)
    image = torch.rand(prediction.shape, device=device) * 255
    grouped, offsets = update.group_points(points, len(prediction))
    sizes = torch.tensor(prediction.shape[1:], device=device).repeat(len(prediction), 1)
    found = {
        "update": lambda: update.update(prediction, initial, grouped, offsets=offsets, radius=RADIUS),
        "soft_update": lambda: update.soft_update(image / 255, initial.float(), grouped, offsets=offsets),
        "detection_counts": lambda: counts.detection_counts(prediction, initial),
        "pmg": lambda: pmg.point_to_mask(image, points),
        "correct": lambda: update.correct(
            image, initial, initial, grouped, sizes=sizes, offsets=offsets, threshold=200.0, high=255.0, guard=0.4
        )[0],
    }
    replays = 2 if device == "cpu" else REPLAYS
    for name, call in found.items():
        graph, result = captured(call, device)
        for number in range(replays):
            density = 0.05 if device == "cpu" else 0.3 * number / replays
            prediction.copy_(torch.rand(prediction.shape, device=device) < density)
            image.copy_(torch.rand(image.shape, device=device) * 255)
            graph.replay()
            if not result.equal(call()):
                raise RuntimeError(f"{name}: replay {number} differs from eager")
    return {"replays": replays, "captured": list(found)}


def repeats(device: str) -> dict:
    """Runs on the same input give the same bits, at densities from sparse to full."""
    from hmg_gpu.kernels import components, counts, pmg, update

    images, side, runs = (1, 40, 2) if device == "cpu" else (64, 512, 100)
    _, initial, points = scene(images, side, device)
    grouped, offsets = update.group_points(points, images)
    pixels = torch.rand(initial.shape, device=device)
    for density in (0.01, 0.3) if device == "cpu" else (0.01, 0.3, 0.6, 1.0):
        prediction = torch.rand(initial.shape, device=device) < density
        found = {
            "update": lambda p=prediction: update.update(p, initial, grouped, offsets=offsets, radius=RADIUS),
            "components": lambda p=prediction: components.components(p)[0],
            "detection_counts": lambda p=prediction: counts.detection_counts(p[:8], initial[:8]),
            "pmg": lambda: pmg.point_to_mask(pixels, points),
        }
        for name, call in found.items():
            first = call()
            if not all(call().equal(first) for _ in range(runs)):
                raise RuntimeError(f"{name}, density {density}: runs differ")
    return {"repeats": runs}


def sanitized(device: str) -> dict:
    """What runs under compute-sanitizer: every op on odd sizes, sparse and dense."""
    for height, width, density in ((37, 271, 0.02), (23, 1, 0.5), (66, 140, 0.9))[: 1 if device == "cpu" else 3]:
        for ours, _ in calls(height, width, density, device).values():
            ours()
    finish(device)
    return {"ran": "every op"}


def _sanitize(tool: str, device: str) -> dict:
    command = [sys.executable, "-m", "bench.gpu_checks", "sanitized", "--device", device, "--result", os.devnull]
    if device != "cpu":
        program = shutil.which("compute-sanitizer")
        if program is None:
            return {tool: "compute-sanitizer is not installed"}
        command = [program, "--tool", tool, "--error-exitcode", "9", *command]
    # Behind PyTorch's allocator every access lies in some block of it: without it each tensor is one allocation.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{tool}: exit code {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-1000:]}")
    return {tool: done.stdout[-300:]}


def memcheck(device: str) -> dict:
    return _sanitize("memcheck", device)


def initcheck(device: str) -> dict:
    return _sanitize("initcheck", device)


def racecheck(device: str) -> dict:
    return _sanitize("racecheck", device)


def synccheck(device: str) -> dict:
    return _sanitize("synccheck", device)


def _pytest(*arguments: str) -> dict:
    # In one process: workers would share the GPU and its memory. Skips do not fail the run here (see conftest.py).
    environment = {name: value for name, value in os.environ.items() if name != "HMG_CHECKPOINTS"}
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 5):  # 5: nothing was selected
        raise RuntimeError(f"exit code {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-1000:]}")
    return {"pytest": done.stdout[-300:]}


def tests(device: str) -> dict:
    """Every test that is marked gpu."""
    return _pytest("-m", "gpu", "tests/kernels/test_kernels_pmg.py" if device == "cpu" else "tests")


def kernel_tests(device: str) -> dict:
    """The kernel tests on this device; they stop at the first failure."""
    files = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests" / "kernels").glob("test_kernels_*.py"))
    if device == "cpu":
        return _pytest("-x", "-m", "not slow", "-k", "errors_name or no_points", *files)
    return _pytest("-x", "-m", "not gpu and not slow", *files)


def main(functions: dict[str, Any], arguments: list[str] | None = None) -> int:
    """Run one function of a module and write what it gives as JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("name")
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    parser.add_argument("--result", type=Path, required=True)
    options = parser.parse_args(arguments)
    result = functions[options.name](options.device)
    options.result.write_text(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main(globals()))
