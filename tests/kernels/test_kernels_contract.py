"""What the update path promises beside its results: no host synchronisation, constant launches, real targets.

No GPU is needed: ops run interpreted or on fake tensors of a device that does not exist; kernels are compiled.
"""

from __future__ import annotations

# isort: off
from kernel_tools import DEVICE, launches  # before any kernel is decorated

# isort: on
import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import hmg_gpu
from hmg_gpu.data import ImageSet
from hmg_gpu.kernels import blocks, components, pmg, update
from hmg_gpu.masks import RULES, Com, LelcmMaker, Maker, Pmg, make_rule
from hmg_gpu.masks.student.network import CropNet
from hmg_gpu.masks.student.student import StudentSettings
from hmg_gpu.masks.student.train import Course, _loss
from hmg_gpu.models import build_model
from hmg_gpu.models.predict import predict
from hmg_gpu.plain.crf import mean_field
from hmg_gpu.plain.mclc import target_probability
from hmg_gpu.plain.slic import grid_of
from hmg_gpu.updater.mask_updater import MaskUpdater
from hmg_gpu.updater.selection import Selection

ROOT = Path(__file__).resolve().parents[2]
MASK = torch.zeros(2, 6, 7, dtype=torch.bool)
MASK[0, 1:3, 2:5] = MASK[1, 4, 4] = True
POINTS = torch.tensor([[0, 2, 3], [1, 4, 4]])
SIZES = torch.tensor([[6, 7], [5, 6]])
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
        "components": (torch.ops.hmg_gpu.components.default, (MASK, SIZES, 12)),
        "detection_counts": (torch.ops.hmg_gpu.detection_counts.default, (MASK, MASK, None, 3.0)),
        "pmg": (torch.ops.hmg_gpu.pmg.default, (IMAGES, POINTS, None, SIZES, 4, 1, 0.15, True)),
        "pmg, boxes only": (torch.ops.hmg_gpu.pmg.default, (IMAGES, POINTS, None, None, 4, 1, 0.15, False)),
    }


@pytest.mark.parametrize("name", op_calls())
def test_opcheck(name: str) -> None:
    op, arguments = op_calls()[name]
    arguments = tuple(a.to(DEVICE) if isinstance(a, torch.Tensor) else a for a in arguments)
    torch.library.opcheck(op, arguments)


def test_compiles_as_one_graph_under_autocast() -> None:
    def step(logits, initial, images, points):
        filtered = update.update(logits, initial, points, radius=3)
        counts = components.detection_counts(filtered, initial)
        return pmg.point_to_mask(images, points, extent=4, half_width=1), counts

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
from hmg_gpu.kernels import blocks, components, pmg, update
assert not blocks.INTERPRETED
torch.manual_seed(0)
mask, target = torch.rand(2, 2, 30, 31) < 0.1
images = (torch.rand(2, 30, 31) * 255).round()
points = torch.tensor([[1, 4, 5], [0, 20, 9], [1, 15, 15]])
sizes = torch.tensor([[30, 20], [25, 31]])
print(update.update(mask, target, points, radius=6, sizes=sizes).sum((1, 2)).tolist())
print(components.detection_counts(mask, target, sizes=sizes).tolist())
labels, counts, table = components.components(mask, sizes=sizes, capacity=99)
print(labels.sum().item(), counts.tolist(), table.sum((1)).tolist())
print(pmg.point_to_box(images, points, extent=9).tolist(), pmg.point_to_mask(images, points, extent=9).sum().item())
"""
    plain = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    plain["CUDA_VISIBLE_DEVICES"] = ""
    outputs = []
    for environment in (plain, plain | {"TRITON_INTERPRET": "1"}):
        text = code if environment is plain else code.replace("assert not", "assert")
        done = subprocess.run(
            [sys.executable, "-c", text], env=environment, cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        outputs.append(done.stdout)
    assert outputs[0] == outputs[1] and len(outputs[0].splitlines()) == 4


# ---- no synchronisation ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def fake_backend() -> str:
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    _setup_privateuseone_for_python_backend("hmg_fake")
    return "hmg_fake"


@pytest.fixture
def fake_device(fake_backend: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """An accelerator known to Python alone: tensors on it exist only under FakeTensorMode."""
    # Or a single number on its way to the device is copied in earnest.
    monkeypatch.setattr(fake_tensor, "CONSTANT_NUMEL_LIMIT", 0)
    return fake_backend


class NoSynchronisation(TorchDispatchMode):
    """Refuse every operation whose result or shape needs the host to look at device memory.

    ``pinned``: a host tensor that is pinned on CUDA, so that a copy to it which does not block is no synchronisation.
    """

    def __init__(self, *, pinned: torch.Tensor | None = None):
        super().__init__()
        self.pinned = pinned

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.aten.index.Tensor:  # integer gathers carry the tag of boolean ones
            if any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]):
                raise AssertionError("indexing with bool synchronises")
        elif torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags:
            raise AssertionError(f"{func} synchronises")
        result = func(*args, **kwargs)
        copies = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
        if func in copies:
            source = args[0] if func is copies[0] else args[1]
            unblocked = kwargs.get("non_blocking") or (func is copies[1] and args[2:3] == (True,))
            ahead = unblocked and (source.device.type == "cpu" or result is self.pinned)  # without waiting
            if source.device != result.device and not ahead:
                raise AssertionError(f"{func} copies from {source.device} to {result.device}")
        return result


@pytest.mark.parametrize("culprit", ["nonzero", "item", "bool index", "copy"])
def test_the_check_finds_what_it_looks_for(culprit: str, fake_device: str) -> None:
    calls = {
        "nonzero": lambda t: t.nonzero(),
        "item": lambda t: t.sum().item(),
        "bool index": lambda t: t[t],
        "copy": lambda t: t.cpu(),
    }
    with FakeTensorMode(), NoSynchronisation():
        mask = torch.empty((2, 4, 4), dtype=torch.bool, device=fake_device)
        with pytest.raises(AssertionError, match=r"synchronises|copies"):
            calls[culprit](mask)


@pytest.mark.parametrize("padded", [False, True])
def test_nothing_in_the_update_path_synchronises(padded: bool, fake_device: str, monkeypatch) -> None:
    """update, point_to_mask, the metrics and a whole step in the training loop, on fake tensors of an accelerator."""
    monkeypatch.setenv("HMG_BACKEND", "triton")
    from hmg_gpu.evaluation.metrics import detection_counts

    model = build_model("acm").eval()
    state = model.state_dict()
    with FakeTensorMode():
        weights = {
            name: torch.empty(value.shape, dtype=value.dtype, device=fake_device) for name, value in state.items()
        }
        images = torch.empty((4, 64, 96), device=fake_device)
        points = torch.empty((9, 3), dtype=torch.int64, device=fake_device)
        sizes = torch.empty((4, 2), dtype=torch.int64, device=fake_device) if padded else None
        with NoSynchronisation(), torch.no_grad():
            initial = hmg_gpu.point_to_mask(images, points, sizes=sizes)
            boxes = hmg_gpu.point_to_box(images, points, sizes=sizes)
            assert hmg_gpu.box_to_mask(images, points, boxes).shape == images.shape
            logits = torch.func.functional_call(model, weights, (images[:, None],))[:, 0]
            hybrid = hmg_gpu.update(logits > 0, initial, points, sizes=sizes)
            fused = update.update(logits, initial, points, sizes=sizes)
            soft = hmg_gpu.soft_update(logits.sigmoid(), logits.sigmoid(), points, sizes=sizes)
            assert soft.dtype == torch.bool and soft.device.type == fake_device
            assert hmg_gpu.false_alarm_filter(logits > 0, points, sizes=sizes).shape == hybrid.shape == fused.shape
            assert hybrid.dtype == torch.bool and hybrid.device.type == fake_device
            assert detection_counts(hybrid, initial, sizes=sizes).shape == (4, 7)


def test_a_step_of_the_student_does_not_synchronise(fake_device: str) -> None:
    """Lessons of two sets of points, of one extent and of two, their loss and the average of the weights.

    Gradients are left out: autograd starts its threads once, and not for a device that it did not know then.
    """
    settings = StudentSettings(crop=24, shift=2, batch_size=8)
    model = CropNet()
    names = [name for name, _ in model.named_parameters()]
    side = 2 * (settings.radius + settings.shift) + 1
    with FakeTensorMode(allow_non_fake_inputs=True):

        def empty(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device=fake_device)

        weights = {name: empty(*value.shape, dtype=value.dtype) for name, value in model.state_dict().items()}
        parameters = [weights[name].requires_grad_() for name in names]
        sets = [
            ImageSet(list("abc"), empty(3, 64, 64, dtype=torch.uint8), empty(3, 2), empty(count, 3)) for count in (9, 5)
        ]
        teachers = [empty(len(one.points), side, side, dtype=torch.bool) for one in sets]
        drawn = [(empty(n), empty(n, 3), empty(n, 25, dtype=torch.float32)) for n in (5, 3)]
        average = [value.detach().clone() for value in parameters]

        def network(crops: torch.Tensor) -> torch.Tensor:
            return torch.func.functional_call(model, weights, (crops,))

        for extents in ((8, 8), (8, 5)):
            makers = [Pmg(extent=extent) for extent in extents]
            courses = [Course(*one) for one in zip(sets, makers, teachers, strict=True)]
            with NoSynchronisation():
                loss = _loss(dict.fromkeys(extents, network), courses, settings, drawn)
                torch._foreach_lerp_(average, [value.detach() for value in parameters], 0.01)
            assert loss.device.type == fake_device and loss.shape == ()
            assert loss.requires_grad


def test_prediction_holds_no_synchronisation(fake_device: str, monkeypatch) -> None:
    """Images of several sizes through a network to masks; sizes are known on the host, indices are sent ahead."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # it asks the device's own module
    sizes = torch.tensor([[32, 40], [64, 64], [50, 33], [30, 40], [20, 20]])
    model = build_model("acm").eval()

    class OnDevice(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return torch.func.functional_call(model, weights, (images,))

    with FakeTensorMode():
        state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        weights = {name: torch.empty(v.shape, dtype=v.dtype, device=fake_device) for name, v in state.items()}
        images = torch.empty((5, 64, 64), dtype=torch.uint8, device=fake_device)
        points = torch.empty((5, 3), dtype=torch.int64, device=fake_device)
        data = ImageSet(
            list("abcde"), images, torch.empty((5, 2), dtype=torch.int64, device=fake_device), points, std=2.0
        )
        data.host_sizes = sizes
        with NoSynchronisation():
            masks = predict(OnDevice(), data, batch_size=2)
            assert masks.shape == images.shape and masks.device.type == fake_device
            data.host_sizes = data.sizes
            with pytest.raises(Exception, match=r"synchronises|copies from|data-dependent"):
                predict(OnDevice(), data, batch_size=2)


@pytest.mark.parametrize("side", [21, 13])
def test_mclc_holds_no_synchronisation(side: int, fake_device: str) -> None:
    """From crops on the device to their masks: salt, SLIC, small pieces, the CRF; some of the crops are padded."""
    with FakeTensorMode():
        grey = torch.empty((2, 21 * 21), device=fake_device)
        valid = torch.empty((2, 21 * 21), dtype=torch.bool, device=fake_device)
        points = torch.empty(2, dtype=torch.int64, device=fake_device)
        names = torch.empty(2, dtype=torch.int32, device=fake_device)
        with NoSynchronisation(), torch.no_grad():
            share = target_probability(grey, valid, 21, points, grid_of(side, side), names, repeats=3)
            masks = mean_field(share, grey, valid, 21)
            assert masks.shape == grey.shape and masks.dtype == torch.bool and masks.device.type == fake_device


def test_the_mask_updater_holds_no_synchronisation(fake_device: str, monkeypatch) -> None:
    """update with a network and update_one with a prediction of one's own; each rule but lelcm, with a guard."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # it asks the device's own module
    monkeypatch.setenv("HMG_BACKEND", "triton")
    host_sizes = torch.tensor([[32, 40], [64, 64], [50, 33]])
    model = build_model("acm").eval()

    class OnDevice(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return torch.func.functional_call(model, weights, (images,))

    for rule in map(make_rule, (name for name in RULES if name != "lelcm")):
        with FakeTensorMode():

            def empty(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
                return torch.empty(shape, dtype=dtype, device=fake_device)

            state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
            weights = {name: empty(*v.shape, dtype=v.dtype) for name, v in state.items()}
            updater = object.__new__(MaskUpdater)  # what its constructor leaves, without the readings it may make
            updater.data = ImageSet(list("abc"), empty(3, 64, 64, dtype=torch.uint8), empty(3, 2), empty(5, 3), std=2.0)
            updater.data.host_sizes = host_sizes
            updater.initial, updater.masks = empty(3, 64, 64, dtype=torch.bool), empty(3, 64, 64, dtype=torch.bool)
            updater.rule, updater.guard = rule, 0.5
            updater.labels = empty(3, 64, 64, dtype=torch.uint8) if rule.evolves else None
            updater.active = empty(3, dtype=torch.bool) if rule.evolves else None
            updater._soft = empty(3, 64, 64, dtype=torch.float32) if rule.soft else None
            updater._fault = empty(1, dtype=torch.bool)
            updater._fault_seen = torch.zeros(1, dtype=torch.bool)  # pinned on CUDA, so that the copy waits for nothing
            selection = updater._selection = object.__new__(Selection)
            selection.data, selection._offsets, selection._sizes = updater.data, [0, 2, 3, 5], host_sizes.tolist()
            selection._row = {name: row for row, name in enumerate("abc")}
            updater._promised = "logits"
            updater._raise_fault = lambda: None  # reads host memory, see the next test
            with NoSynchronisation(pinned=updater._fault_seen):
                changes = updater.update(OnDevice(), "logits", batch_size=2, check=False)
                assert updater.masks.shape == (3, 64, 64) and updater.masks.device.type == fake_device
                values = empty(2, 1, 64, 64, dtype=torch.float32).sigmoid()
                one = updater.update_one(["b", "a"], values, "probabilities", check=False)
                assert one.masks.shape == (2, 1, 64, 64)
                with pytest.raises(Exception, match=r"synchronises|copies from|data-dependent"):
                    changes.pixels  # noqa: B018


@pytest.mark.parametrize("maker", [Com(), LelcmMaker()], ids=str)
def test_makers_of_other_papers_hold_no_synchronisation(maker: Maker, fake_device: str) -> None:
    with FakeTensorMode():
        images = torch.empty((3, 64, 48), dtype=torch.uint8, device=fake_device)
        points, sizes = (torch.empty(shape, dtype=torch.int64, device=fake_device) for shape in ((9, 3), (3, 2)))
        with NoSynchronisation():
            masks = maker.masks(ImageSet(list("abc"), images, sizes, points))
            assert masks.shape == images.shape and masks.dtype == torch.bool and masks.device.type == fake_device


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


# ---- launches -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 5, 5), (3, 300, 500), (200, 64, 64), (4096, 512, 512)])
@pytest.mark.parametrize("count", [1, 70])
def test_the_launch_count_is_constant(shape: tuple[int, int, int], count: int, monkeypatch) -> None:
    """On meta tensors, with kernels that only note their name."""
    empty = {"device": "meta"}
    mask, plane = torch.empty(shape, dtype=torch.bool, **empty), torch.empty(shape, **empty)
    points = torch.empty((count, 3), dtype=torch.int64, **empty)
    offsets = torch.empty(shape[0] + 1, dtype=torch.int64, **empty)

    def names(module, call):
        monkeypatch.setattr(components, "link_border_kernel", blocks.link_border_kernel)
        return launches(monkeypatch, module, call)

    for design, expected in (
        ("images", ["update_image_kernel"]),
        ("tiles", ["scan_link_kernel", "link_border_kernel", "sum_kernel", "decide_kernel"]),
    ):
        found = names(update, lambda d=design: update.launch(mask, mask, points, offsets, None, 30, 0.0, d))
        assert found == expected
        found = names(
            update, lambda d=design: update.launch(plane, plane, points, offsets, None, 30, 0.5, d, weight=0.7)
        )
        assert found == expected
    assert names(pmg, lambda: pmg.launch(plane, points, None, None, 25, 4, 0.15, True)) == ["pmg_kernel"]
    labelling = ["scan_kernel", "link_border_kernel", "first_kernel", "rank_kernel", "moments_kernel"]
    assert names(components, lambda: components.launch_components(mask, None, 100)) == labelling
    found = names(components, lambda: components.launch_counts(mask, mask, None, 3.0))
    assert found == [*labelling, *labelling, "match_kernel"]


def test_no_size_is_a_constant_of_the_compiler() -> None:
    """A new batch size, image size or number of points compiles nothing."""
    kernels = {
        name: value
        for module in (blocks, components, pmg, update)
        for name, value in vars(module).items()
        if name.endswith("_kernel")
    }
    assert len(kernels) == 11
    constants = set()
    for kernel in kernels.values():
        notes = kernel.fn.__annotations__
        constants |= {name for name in kernel.arg_names if "constexpr" in str(notes.get(name))}
        assert {"images", "height", "width", "capacity"}.isdisjoint(constants)
    # Block sizes and switches; ALONG, ACROSS and COLUMNS of pmg follow from extent and half_width.
    switches = {"HAS_INITIAL", "HAS_SIZES", "LOGITS", "SOFT", "LABELS", "SEARCH", "PAINT"}
    assert constants == switches | {"TILE_H", "TILE_W", "COLUMNS", "CHUNK", "LANES", "ALONG", "ACROSS", "ROWS"}


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
            assert row["registers"] <= 128, row
    assert done.returncode == 0


@pytest.mark.skipif(DEVICE == "cuda", reason="here is a GPU: python -m bench.gpu_check runs it")
def test_gpu_check_says_that_there_is_no_gpu() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bench.gpu_check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and done.stdout.startswith("no GPU here")
