"""The ways of taking a training step: each gives what plain eager mode gives, and says where it cannot work."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
from refusal import refused
from tiny import tiny_set
from torch import Tensor, nn

from hmg_gpu.common.parallel import ALONE, Team
from hmg_gpu.data.batches import cut_crops, draw_epoch
from hmg_gpu.models import build_model
from hmg_gpu.models.losses import soft_iou_loss
from hmg_gpu.training import step
from hmg_gpu.training.step import TrainingStep, check_step, in_channels_last, synchronised

STEPS = 3
PATCH = 32
RATE = 1e-3


def acm() -> nn.Module:
    return build_model("acm", output_bias=0.0)


def small() -> nn.Module:
    """No bias in front of the batch norm: its gradient is rounding alone, of which Adam makes whole steps."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.1), nn.Conv2d(8, 1, 1)
    )


def without_dropout(network: nn.Module) -> nn.Module:
    """Where random numbers are not drawn in the same order: another memory layout, compiled code."""
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return network


def trained(
    network: nn.Module, steps: int = STEPS, device: str = "cpu", seed: int = 5, **settings: object
) -> tuple[TrainingStep, dict[str, Tensor]]:
    """A few steps on the tiny set; weights before the masks change and after."""
    data = tiny_set().to(device)
    model = copy.deepcopy(network).to(device)
    if in_channels_last(torch.device(device), bool(settings.get("bf16"))):
        model = model.to(memory_format=torch.channels_last)
    take = TrainingStep(model.train(), data, patch_size=PATCH, learning_rate=RATE, **settings)
    plan = draw_epoch(data.host_sizes, 2, PATCH, seed=0, epoch=0).to(device)
    masks = data.masks
    for number in range(steps):
        take.set_rate(RATE / (1 + number))
        torch.manual_seed(seed + number)
        if number == steps // 2:
            masks = ~masks  # a correction of the masks in the middle of a run
        take(masks, plan[number % len(plan)])
    return take, {name: value.cpu() for name, value in model.state_dict().items()}


def difference(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """The mean over all weights and statistics, in units of one step of Adam."""
    assert found.keys() == wanted.keys()
    parts = [(found[name].double() - value.double()).abs().reshape(-1) for name, value in wanted.items()]
    return float(torch.cat(parts).mean()) / RATE


# ---- eager ----------------------------------------------------------------------------------------------------------


def test_a_step_is_what_one_would_write_by_hand() -> None:
    network = small()
    take, found = trained(network)
    data, model = tiny_set(), copy.deepcopy(network).train().to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters())
    totals = torch.zeros(5, dtype=torch.float64)
    for number, rows in enumerate(draw_epoch(data.sizes, 2, PATCH, seed=0, epoch=0)):
        images, target = cut_crops(data, data.masks ^ (number > 0), rows, PATCH)
        torch.manual_seed(5 + number)
        optimizer.param_groups[0]["lr"] = RATE / (1 + number)
        logits = model(images.contiguous(memory_format=torch.channels_last))
        loss = soft_iou_loss(logits, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found_mask = logits > 0
        totals += torch.tensor(
            [loss.item(), (found_mask & target).sum(), (found_mask | target).sum(), found_mask.sum(), target.numel()]
        )
    assert difference(found, model.state_dict()) < 1e-3
    torch.testing.assert_close(take.totals, totals, rtol=1e-5, atol=1e-5)
    assert take.totals[4] == STEPS * 2 * PATCH * PATCH


def test_the_layout_changes_only_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    network = without_dropout(small())
    _, last = trained(network)
    monkeypatch.setattr(step, "in_channels_last", lambda *_: False)
    monkeypatch.setitem(trained.__globals__, "in_channels_last", lambda *_: False)
    _, plain = trained(network)
    assert 0 < difference(last, plain) < 1e-3


def test_bfloat16_stays_close() -> None:
    """Eight bits of mantissa: a loss within a hundredth, weights in float32."""
    network = acm()
    full, _ = trained(network)
    half, weights = trained(network, bf16=True)
    assert all(value.dtype != torch.bfloat16 for value in weights.values())
    assert half.totals[0] != full.totals[0]
    torch.testing.assert_close(half.totals[0] / STEPS, full.totals[0] / STEPS, rtol=0, atol=1e-2)


def test_adam_is_fused() -> None:
    take, _ = trained(small(), 1)
    assert take.optimizer.defaults["fused"]


def test_layouts() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert in_channels_last(cpu, False) and in_channels_last(cuda, True) and not in_channels_last(cuda, False)


def test_batch_norm_of_a_team() -> None:
    pair = Team(0, 2)
    kinds = {type(module) for module in synchronised(small(), torch.device("cuda"), pair).modules()}
    assert nn.SyncBatchNorm in kinds and nn.BatchNorm2d not in kinds
    for device, team in (("cpu", pair), ("cuda", ALONE)):
        model = small()
        assert synchronised(model, torch.device(device), team) is model


# ---- compile --------------------------------------------------------------------------------------------------------


def test_compiled_is_eager_within_rounding() -> None:
    network = without_dropout(small())
    _, wanted = trained(network)
    take, found = trained(network, way="compile")
    assert take.network is not take.model
    assert difference(found, wanted) < 1e-3


def test_a_compiler_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("No working C++ compiler found\nin 3 lines\nor more")

    monkeypatch.setattr(torch, "compile", broken)
    step.try_compiling.cache_clear()
    refused(
        lambda: check_step("compile", torch.device("cpu")),
        "step = compile: torch.compile does not work here (No working C++ compiler found in 3 lines or more)",
        "install a C++ compiler (g++ or clang++), or use eager",
    )


# ---- graph ----------------------------------------------------------------------------------------------------------


def test_where_a_way_cannot_work() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    refused(lambda: check_step("graph", cpu), "step = graph", "CUDA device", "on cpu", "use eager")
    refused(lambda: check_step("graph", cuda, Team(0, 2)), "step = graph", "one process")
    refused(lambda: check_step("fast", cpu), "'fast'", "eager, compile, graph")
    refused(lambda: trained(small(), way="graph"), "step = graph")


def test_a_capture_that_failed_is_not_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    """With stand-ins for CUDA's graph: the second call captures again, and one stream serves all of the warm-up."""
    replays: list[str] = []

    class Graph:
        def replay(self) -> None:
            replays.append("replayed")

    class Stream:
        made = 0

        def __init__(self, *_: object):
            Stream.made += 1

        def wait_stream(self, _: object) -> None: ...

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "graph", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    here = Stream()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: here)
    monkeypatch.setattr(step, "check_step", lambda *_: None)
    data = tiny_set()
    monkeypatch.setattr(torch.optim, "Adam", lambda parameters, **_: torch.optim.SGD(parameters, lr=RATE))
    take = TrainingStep(small(), data, patch_size=PATCH, learning_rate=RATE, way="graph")
    ran = iter([*range(step.WARM_UP), RuntimeError("out of memory"), "captured"])

    def run(*_: object) -> None:
        done = next(ran)
        if isinstance(done, Exception):
            raise done

    monkeypatch.setattr(take, "_run", run)
    plan = torch.zeros(2, 6, dtype=torch.int64)
    for _ in range(step.WARM_UP):
        take(data.masks, plan)
    with pytest.raises(RuntimeError, match="out of memory"):
        take(data.masks, plan)
    assert not replays
    take(data.masks, plan)
    assert replays == ["replayed"] and next(ran, None) is None and Stream.made == 2


@pytest.mark.gpu
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("name", ["small", "acm", "dnanet"])
def test_a_graph_is_eager_within_rounding(name: str, bf16: bool) -> None:
    """Warm-up, capture, replays, new masks and so a new graph; dropout and learning rate change at every step."""
    network = small() if name == "small" else build_model(name, output_bias=0.0)
    eager, wanted = trained(network, 12, "cuda", bf16=bf16)
    graph, found = trained(network, 12, "cuda", bf16=bf16, way="graph")
    # Atomics of the backward pass add in any order, and batch norm over two small images enlarges what they leave.
    assert difference(found, wanted) < (0.05 if name == "small" else 3.0)
    torch.testing.assert_close(graph.totals[0], eager.totals[0], rtol=1e-4 if name == "small" else 2e-2, atol=0)
    if name == "small":
        _, other = trained(network, 12, "cuda", seed=77, bf16=bf16, way="graph")  # other dropout
        assert difference(found, other) > 0.1


@pytest.mark.gpu
@pytest.mark.parametrize("way", ["eager", "graph"])
def test_a_step_waits_for_nothing(way: str) -> None:
    data = tiny_set().to("cuda")
    take = TrainingStep(acm().cuda().train(), data, patch_size=PATCH, learning_rate=RATE, way=way)
    plan = draw_epoch(data.host_sizes, 2, PATCH, seed=0, epoch=0).to("cuda")
    for rows in plan.repeat(2, 1, 1):  # past warm-up and capture
        take(data.masks, rows)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for number, rows in enumerate(plan):
            take.set_rate(RATE / (1 + number))
            torch.manual_seed(number)
            take(data.masks, rows)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert take.totals.isfinite().all()
