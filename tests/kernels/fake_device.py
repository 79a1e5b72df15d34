"""What runs on an accelerator holds no host synchronisation: on fake tensors of a device that does not exist.

Not collected by itself: once a device is registered in Python nothing can be pinned any more in that process, so
test_kernels_contract.py runs this file in a process of its own.
"""

from __future__ import annotations

# isort: off
import kernel_tools  # noqa: F401 (before any kernel is decorated)

# isort: on
from contextlib import nullcontext

import pytest
import torch
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import hmg_gpu
from hmg_gpu.data import ImageSet
from hmg_gpu.kernels import update
from hmg_gpu.masks import RULES, Com, LelcmMaker, Maker, Pmg, make_rule
from hmg_gpu.masks.student.network import CropNet
from hmg_gpu.masks.student.student import Student, StudentSettings
from hmg_gpu.masks.student.train import Course, _loss
from hmg_gpu.models import build_model
from hmg_gpu.models.predict import predict
from hmg_gpu.plain.crf import mean_field
from hmg_gpu.plain.mclc import target_probability
from hmg_gpu.plain.slic import grid_of
from hmg_gpu.updater.mask_updater import MaskUpdater
from hmg_gpu.updater.selection import Selection


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
    from hmg_gpu.evaluation.metrics import DetectionMetrics, detection_counts

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
            metrics = DetectionMetrics()
            for _ in range(2):
                metrics.update(hybrid, initial, sizes)
            metrics.reset()
            offsets = torch.empty(5, dtype=torch.int64, device=fake_device)
            assert hmg_gpu.update(logits, initial, points, sizes=sizes, offsets=offsets).shape == hybrid.shape


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
        drawn = [
            (empty(n), empty(n, 3), empty(n, 25, dtype=torch.float32), empty(n, 4, dtype=torch.float32)) for n in (5, 3)
        ]
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


@pytest.mark.parametrize("flips", [False, True])
def test_learned_masks_hold_no_synchronisation(flips: bool, fake_device: str, monkeypatch) -> None:
    """Crops, normalisation, the network, each point's threshold and own pixels, and pasting; hard and soft."""
    monkeypatch.setenv("HMG_BACKEND", "triton")
    model = CropNet()
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    student = object.__new__(Student)
    student.settings, student.threshold = StudentSettings(crop=24, flips=flips), 0.4
    with FakeTensorMode(allow_non_fake_inputs=True):

        def empty(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device=fake_device)

        weights = {name: empty(*value.shape, dtype=value.dtype) for name, value in state.items()}
        student.placements, student.centrings = {8: ()}, {8: (0.5, 0.5, 0.2) if flips else None}
        student.networks = {8: [lambda crops: torch.func.functional_call(model, weights, (crops,))]}
        data = ImageSet(list("abc"), empty(3, 64, 48, dtype=torch.uint8), empty(3, 2), empty(9, 3))
        with NoSynchronisation():
            masks = student.masks(data, Pmg(extent=8))
            assert masks.shape == data.images.shape and masks.dtype == torch.bool and masks.device.type == fake_device
            soft = student.soft_masks(data, Pmg(extent=8))
            assert soft.shape == data.images.shape and soft.device.type == fake_device
            probability = hmg_gpu.point_to_probability(data.images, data.points, sizes=data.sizes)
            assert probability.dtype == torch.float32


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
