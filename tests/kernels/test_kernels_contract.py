"""What the update path promises beside its results: no host synchronisation, constant launches, real targets.

No GPU is needed: ops run interpreted or on fake tensors of a device that does not exist; kernels are compiled.
"""

from __future__ import annotations

# isort: off
from kernel_tools import DEVICE, launches  # before any kernel is decorated

# isort: on
import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode

from bench.compile_report import KERNELS
from hmg_gpu import InputError
from hmg_gpu.kernels import blocks, components, counts, pmg, stream, tiles, update
from hmg_gpu.updater.mask_updater import MaskUpdater

ROOT = Path(__file__).resolve().parents[2]
MASK = torch.zeros(2, 6, 7, dtype=torch.bool)
MASK[0, 1:3, 2:5] = MASK[1, 4, 4] = True
POINTS = torch.tensor([[0, 2, 3], [1, 4, 4]])
SIZES = torch.tensor([[6, 7], [5, 6]])
MODULES = (blocks, components, counts, pmg, stream, tiles, update)
IMAGES = MASK.float() * 90 + torch.arange(84).view(2, 6, 7) % 5


# ---- torch.library --------------------------------------------------------------------------------------------------


def op_calls():
    points, offsets = update.group_points(POINTS, 2)
    return {
        "update": (torch.ops.hmg_gpu.update.default, (MASK, MASK, points, offsets, None, 3, 0.0)),
        "update, logits": (torch.ops.hmg_gpu.update.default, (IMAGES, None, points, offsets, SIZES, 3, 50.0)),
        "soft update": (
            torch.ops.hmg_gpu.soft_update.default,
            (IMAGES, MASK.float(), points, offsets, SIZES, 3, 0.5, 0.7),
        ),
        "correct": (
            torch.ops.hmg_gpu.correct.default,
            (IMAGES, MASK, MASK, points, offsets, SIZES, 3, 50.0, 0.0, 1.0, 0.3),
        ),
        "components": (torch.ops.hmg_gpu.components.default, (MASK, SIZES, 12)),
        "detection_counts": (torch.ops.hmg_gpu.detection_counts.default, (MASK, MASK, None, 3.0)),
        "pmg": (torch.ops.hmg_gpu.pmg.default, (IMAGES, POINTS, None, SIZES, 4, 1, 0.15, True, False)),
        "pmg, probabilities": (torch.ops.hmg_gpu.pmg.default, (IMAGES, POINTS, None, SIZES, 4, 1, 0.15, True, True)),
        "pmg, boxes only": (torch.ops.hmg_gpu.pmg.default, (IMAGES, POINTS, None, None, 4, 1, 0.15, False, False)),
    }


@pytest.mark.parametrize("name", op_calls())
def test_opcheck(name: str) -> None:
    op, arguments = op_calls()[name]
    arguments = tuple(a.to(DEVICE) if isinstance(a, torch.Tensor) else a for a in arguments)
    torch.library.opcheck(op, arguments)


def test_compiles_as_one_graph_under_autocast() -> None:
    def step(logits, initial, images, points):
        filtered = update.update(logits, initial, points, radius=3)
        found = counts.detection_counts(filtered, initial)
        return pmg.point_to_mask(images, points, extent=4, half_width=1), found

    logits = torch.where(MASK, 2.0, -2.0).bfloat16().to(DEVICE).requires_grad_()
    arguments = (logits, MASK.to(DEVICE), IMAGES.to(DEVICE), POINTS.to(DEVICE))
    expected = step(*arguments)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        found = torch.compile(step, backend="aot_eager", fullgraph=True)(*arguments)
    for first, second in zip(found, expected, strict=True):
        assert first.equal(second) and not first.requires_grad


@pytest.mark.slow
def test_cpu_without_the_interpreter_takes_the_plain_path() -> None:
    """The same ops in a process where kernels are not interpreted: results of the CPU path."""
    code = """
import torch
from hmg_gpu.kernels import blocks, components, counts, pmg, stream, tiles, update
assert not blocks.INTERPRETED
torch.manual_seed(0)
mask, target = torch.rand(2, 2, 30, 31) < 0.1
images = (torch.rand(2, 30, 31) * 255).round()
points = torch.tensor([[1, 4, 5], [0, 20, 9], [1, 15, 15]])
sizes = torch.tensor([[30, 20], [25, 31]])
print(update.update(mask, target, points, radius=6, sizes=sizes).sum((1, 2)).tolist())
print(counts.detection_counts(mask, target, sizes=sizes).tolist())
labels, number, table = components.components(mask, sizes=sizes, capacity=99)
print(labels.sum().item(), number.tolist(), table.sum((1)).tolist())
print(pmg.point_to_box(images, points, extent=9).tolist(), pmg.point_to_mask(images, points, extent=9).sum().item())
"""
    plain = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    plain["CUDA_VISIBLE_DEVICES"] = ""
    outputs = []
    # Triton 3.6 takes int() of an array of one number, which NumPy 2.4 refuses: only one half then.
    interprets = triton.__version__ >= "3.7" or np.lib.NumpyVersion(np.__version__) < "2.4.0"
    for environment in (plain, plain | {"TRITON_INTERPRET": "1"})[: 1 + interprets]:
        text = code if environment is plain else code.replace("assert not", "assert")
        done = subprocess.run(
            [sys.executable, "-c", text], env=environment, cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        outputs.append(done.stdout)
    assert len(set(outputs)) == 1 and len(outputs[0].splitlines()) == 4


# ---- no synchronisation ---------------------------------------------------------------------------------------------


def test_nothing_synchronises() -> None:
    """See fake_device.py, which needs a process of its own."""
    options = ["-q", "-n", "0", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", *options, str(Path(__file__).with_name("fake_device.py"))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-4000:] + done.stderr[-2000:]


def test_only_host_memory_is_read_before_an_update() -> None:
    """``_fault`` is on the device: here it has nothing that could be read."""
    own = SimpleNamespace(
        _fault=object(), _fault_seen=torch.zeros(1, dtype=torch.bool), _refuse=pytest.fail, _promised="logits"
    )
    MaskUpdater._raise_fault(own)
    refused: list[str] = []
    own._fault_seen[0], own._refuse = True, refused.append
    MaskUpdater._raise_fault(own)
    assert refused


def test_a_copy_on_its_way_does_not_tell_a_fault_twice() -> None:
    class Seen:
        """Pinned memory: a copy that does not block lands some time later."""

        def __init__(self):
            self.value, self.coming = False, []

        def copy_(self, source: torch.Tensor, non_blocking: bool = False) -> None:
            self.coming.append(bool(source))
            if not non_blocking:
                self.land()

        def zero_(self) -> None:
            self.value = False

        def land(self) -> None:
            while self.coming:
                self.value = self.coming.pop(0)

    own = SimpleNamespace(_fault=torch.ones(1, dtype=torch.bool), _fault_seen=Seen())
    own._fault_seen.copy_(own._fault, non_blocking=True)
    with pytest.raises(InputError, match="logits were promised"):
        MaskUpdater._refuse(own, "logits")
    own._fault_seen.land()
    assert not own._fault_seen.value and not own._fault.any()


# ---- launches -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 5, 5), (3, 300, 500), (200, 64, 64), (4096, 512, 512)])
@pytest.mark.parametrize("count", [1, 70])
def test_the_launch_count_is_constant(shape: tuple[int, int, int], count: int, monkeypatch) -> None:
    """On meta tensors, with kernels that only note their name."""
    empty = {"device": "meta"}
    mask, plane = torch.empty(shape, dtype=torch.bool, **empty), torch.empty(shape, **empty)
    points = torch.empty((count, 3), dtype=torch.int64, **empty)
    offsets = torch.empty(shape[0] + 1, dtype=torch.int64, **empty)
    sizes = torch.empty((shape[0], 2), dtype=torch.int64, **empty)

    def names(call):
        return launches(monkeypatch, MODULES, call)

    labelling = ["link_kernel", "border_kernel", "sum_kernel"]
    groups = -(-shape[0] // tiles.group_size(*shape))
    update_names = ["stream_kernel", *labelling, "decide_kernel"] * groups
    assert names(lambda: update.launch(mask, mask, points, offsets, None, 30, 0.0)) == update_names
    assert names(lambda: update.launch(plane, mask, points, offsets, sizes, 30, 0.0)) == update_names
    assert names(lambda: update.launch(plane, plane, points, offsets, None, 30, 0.5, weight=0.7)) == update_names
    for guard, last in ((None, []), (0.05, ["restore_kernel"])):
        found = names(
            lambda g=guard: update.launch_correct(plane, mask, mask, points, offsets, sizes, 30, 0.0, 0.0, 1.0, g)
        )
        assert found == update_names + last
    assert names(lambda: pmg.launch(plane, points, None, None, 25, 4, 0.15, True)) == ["pmg_kernel"]
    groups = -(-shape[0] // tiles.group_size(*shape, extra=2))
    expected = ["stream_kernel", *labelling, "rank_kernel", "moments_kernel"] * groups
    assert names(lambda: components.launch(mask, None, 100)) == expected
    groups = -(-shape[0] // tiles.group_size(*shape, planes=2, extra=2))
    expected = ["pair_kernel", *labelling, "match_kernel"] * groups
    assert names(lambda: counts.launch(mask, mask, None, 3.0)) == expected
    assert groups == (1 if shape[0] < 4096 else 13)


def test_a_small_update_costs_the_host_no_custom_op(monkeypatch) -> None:
    """Eager calls on plain tensors go to the launcher; tracing and modes find the op."""
    ran: list[str] = []
    monkeypatch.setattr(update, "launch", lambda *_: ran.append("launcher"))
    monkeypatch.setattr(update, "_update", lambda *_: ran.append("op"))
    monkeypatch.setattr(blocks, "INTERPRETED", True)
    points, offsets = update.group_points(POINTS, 2)

    def call() -> None:
        update.update(MASK, MASK, points, offsets=offsets)

    call()
    with TorchDispatchMode():
        call()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    call()
    assert ran == ["launcher", "op", "op"]


def test_no_size_is_a_constant_of_the_compiler() -> None:
    """A new batch size, image size or number of points compiles nothing."""
    kernels = {name: value for module in MODULES for name, value in vars(module).items() if name.endswith("_kernel")}
    assert len(kernels) == 11
    constants = set()
    for kernel in kernels.values():
        notes = kernel.fn.__annotations__
        constants |= {name for name in kernel.arg_names if "constexpr" in str(notes.get(name))}
        assert {"images", "start", "height", "width", "capacity"}.isdisjoint(constants)
    # Block sizes and switches; ALONG, ACROSS and COLUMNS of pmg follow from extent and half_width.
    switches = {"HAS_INITIAL", "HAS_SIZES", "LOGITS", "SOFT", "JUDGE", "PACKED", "PAIR", "FIRST", "ROOTS"}
    switches |= {"SEARCH", "PAINT", "BITS", "KEPT", "WIDE"}
    blocks_of = {"TILE_H", "TILE_W", "CHUNK_H", "CHUNK_W", "COLUMNS", "CHUNK", "LANES", "ALONG", "ACROSS", "ROWS"}
    assert constants == switches | blocks_of


def test_no_kernel_is_specialised_in_a_size() -> None:
    """A size of 1 would be a constant of the compiler, which fails where a tensor is wanted; no interpreter sees it."""
    for module in MODULES:
        for name, kernel in vars(module).items():
            if name.endswith("_kernel"):
                sizes = {"images", "start", "height", "width", "capacity", "radius", "extent", "half_width"}
                free = kernel.kwargs["do_not_specialize"] if blocks.INTERPRETED else kernel.do_not_specialize
                assert sizes & set(kernel.arg_names) <= set(free), name
                assert name in {row[2] for row in KERNELS}  # is compiled for every target


def test_tiles_have_a_block_for_every_lane(monkeypatch) -> None:
    """Or several warps share a block, and part in a loop that holds barriers; no interpreter sees that."""
    assert blocks.tile_options("cuda")["num_warps"] == blocks.tile_options("hip")["num_warps"] == 8
    mask = torch.zeros(1, 9, 9, dtype=torch.bool)
    monkeypatch.setattr(blocks, "TILE_H", 8)
    monkeypatch.setattr(blocks, "TILE_W", 16)
    points, offsets = update.group_points(POINTS[:1], 1)
    for call in (
        lambda: update.launch(mask, mask, points, offsets, None, 3, 0.0),
        lambda: components.launch(mask, None, 9),
    ):
        with pytest.raises(ValueError, match=r"8 x 16 pixels: fewer blocks than (256|512) lanes; take fewer warps"):
            call()
    monkeypatch.setattr(blocks, "NUM_WARPS", 1)
    assert blocks.tile_options("cuda")["num_warps"] == 1
    with pytest.raises(ValueError, match="64 lanes"):
        blocks.tile_options("hip")


def test_an_image_that_int32_cannot_address_is_refused() -> None:
    """No tensor of that size is made; up to the limit, a last step of any loop over pixels still fits."""
    steps = (components.CHUNK, stream.CHUNK_PIXELS, blocks.TILE_H * blocks.TILE_W)
    assert max(steps) <= 2**31 - blocks.MAX_PIXELS
    plane = torch.zeros(1, 1, 1, dtype=torch.bool)
    blocks.check_plane("mask", plane.expand(1, 1, blocks.MAX_PIXELS), (torch.bool,))
    for shape in ((1, 1, blocks.MAX_PIXELS + 1), (1, 46341, 46340), (2, 2**15, 2**16)):
        large = plane.expand(shape)
        for call in (
            lambda large=large: components.components(large),
            lambda large=large: counts.detection_counts(large, large),
            lambda large=large: update.update(large, large, POINTS[:0]),
        ):
            with pytest.raises(ValueError, match=r"more than 2147418112 pixels.*cut it into parts"):
                call()


def test_sums_of_other_programs_are_read_past_the_first_cache() -> None:
    """AMD promises no more; no interpreter has caches, so the source is read."""
    loads = [
        node
        for node in ast.walk(ast.parse(Path(update.__file__).read_text()))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) == "tl.load"
        and ast.unparse(node.args[0]).startswith(("areas", "own_sums"))
    ]
    assert len(loads) == 3
    for node in loads:
        assert any(word.arg == "cache_modifier" and word.value.value == ".cg" for word in node.keywords)


# ---- compiled for real targets --------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_86", "sm_90", "sm_100", "gfx942"])
def test_every_kernel_compiles_without_spills(target: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "bench.compile_report", "--json", "--target", target],
        env=environment, cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout, done.stderr
    rows = json.loads(done.stdout)
    assert {row["target"] for row in rows} == {target} and len({row["kernel"] for row in rows}) == 11
    for row in rows:
        assert row["spills"] == 0, row
        assert row["binary"] > 0
        if target != "gfx942":
            assert row["registers"] <= row["limit"] <= 144, row
    assert done.returncode == 0


@pytest.mark.cpu_only
def test_gpu_check_says_that_there_is_no_gpu() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bench.gpu_check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and done.stdout.startswith("no GPU here")
