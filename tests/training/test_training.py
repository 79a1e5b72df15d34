"""The two-stage loop: what it trains on, what it saves, and that an interrupted run ends in the same bits."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from refusal import refused
from tiny import small_network, tiny_set
from torch import Tensor, nn

from hmg_gpu import false_alarm_filter, point_to_mask, point_to_probability, soft_update
from hmg_gpu import update as correct
from hmg_gpu.common.errors import HMGError
from hmg_gpu.data import ImageSet
from hmg_gpu.evaluation.metrics import measure
from hmg_gpu.masks import MAKERS, RULES, Evidence, Pmg, Soft, Union
from hmg_gpu.masks.components import connected_components
from hmg_gpu.models import NETWORKS, build_model
from hmg_gpu.models.checkpoints import read_description, read_tensors, save_checkpoint
from hmg_gpu.models.predict import predict
from hmg_gpu.models.weights import load_model
from hmg_gpu.training import loop as training
from hmg_gpu.training.loop import StopRequest, Training
from hmg_gpu.training.settings import Settings
from hmg_gpu.training.step import centres

# Two epochs of three steps in each stage. From an even start (output_bias 0) the predictions of an untrained network
# are busy, so that correcting changes the masks.
BASE = Settings(
    data="tiny", epochs=(2, 2), batch_size=2, patch_size=32, output_bias=0.0, learning_rate=5e-3, eval_every=1
)
STEPS = 12
TEST_SIZES = ((32, 40), (40, 32))
Event = dict[str, Any]


class Recorder:
    """Takes a run's events; may ask it to stop, or break it, at the n-th step of this process."""

    def __init__(self, stop_at: int = 0, crash_at: int = 0) -> None:
        self.events: list[Event] = []
        self.stop_at, self.crash_at, self.steps = stop_at, crash_at, 0
        self.training: Training | None = None

    def __call__(self, event: Event) -> None:
        if event["event"] != "step":
            self.events.append(event)
            return
        self.steps += 1
        if self.steps == self.crash_at:
            raise MemoryError
        if self.steps == self.stop_at:
            self.training.stop = True

    def of(self, kind: str) -> list[Event]:
        return [event for event in self.events if event["event"] == kind]


def start(
    settings: Settings, folder: Path, train: ImageSet | None = None, test: ImageSet | None = None, **interrupt: int
) -> tuple[Training, Recorder]:
    recorder = Recorder(**interrupt)
    train = tiny_set() if train is None else train
    test = tiny_set(TEST_SIZES, seed=9, split="test") if test is None else test
    recorder.training = Training(settings, train, test, folder, recorder)
    return recorder.training, recorder


def weights(run: Training) -> dict[str, Tensor]:
    found = {name: value.clone() for name, value in run.model.state_dict().items()}
    return found | {f"predicts.{name}": value.clone() for name, value in run.network.state_dict().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def rows(events: list[Event]) -> list[Event]:
    """The log without clocks and pictures; notes are shown and not logged."""
    drop = ("seconds", "images_per_second", "prediction", "masks")
    logged = [event for event in events if event["event"] != "note"]
    return [{key: value for key, value in event.items() if key not in drop} for event in logged]


class Threshold(nn.Module):
    """Logits of a threshold on the normalised image: a network that is right from the start."""

    def __init__(self, bias: float) -> None:
        super().__init__()
        self.level = nn.Parameter(torch.tensor(2.0 - bias))

    def forward(self, images: Tensor) -> Tensor:
        return 20 * (images - self.level)


def threshold_network(name: str, *, output_bias: float) -> nn.Module:
    return Threshold(output_bias)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop around a network of a few weights; ACM takes twenty times as long."""
    monkeypatch.setattr(training, "build_model", small_network)


RESUMED = {
    "corrected once": BASE,
    "corrected every epoch": replace(BASE, update_every=1),
    "stage 2 from scratch": replace(BASE, stage2="scratch", save_every=1),
    "full supervision": replace(BASE, supervision="full"),
    "hard examples": replace(BASE, hard_examples=1.0, radius=2),
    "averaged": replace(BASE, average=0.8),
    "averaged, stage 2 from scratch": replace(BASE, average=0.8, stage2="scratch"),
}


@cache
def uninterrupted(name: str, network: Callable[..., nn.Module]) -> tuple[dict[str, Tensor], Tensor, Event, list[Event]]:
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "build_model", network)
        run, recorder = start(RESUMED[name], Path(folder))
        results = run.run()
        return weights(run), run.masks, results, rows(recorder.events)


# ---- resuming -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "network", "stops"),
    [
        ("corrected once", build_model, (2, 8)),  # inside an epoch of either stage
        ("corrected every epoch", build_model, (9,)),  # the end of an epoch after which the masks change
        ("corrected once", small_network, (1,)),  # before any correction
        ("corrected once", small_network, (6,)),  # the last step of stage 1: the border is still to come
        ("corrected once", small_network, (7,)),  # the first step after the border
        ("corrected once", small_network, (12,)),  # the last step of all
        ("corrected once", small_network, (1,) * 11),  # every step its own process
        ("corrected every epoch", small_network, (9,)),
        ("corrected every epoch", small_network, (11,)),
        ("stage 2 from scratch", small_network, (6,)),
        ("stage 2 from scratch", small_network, (8,)),
        ("full supervision", small_network, (5,)),
        ("hard examples", small_network, (6, 7, 5)),
        ("averaged", small_network, (2, 8)),
        ("averaged, stage 2 from scratch", small_network, (5, 7)),
    ],
)
def test_a_stopped_run_ends_in_the_same_bits(
    name: str,
    network: Callable[..., nn.Module],
    stops: tuple[int, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected_weights, expected_masks, expected_results, expected_log = uninterrupted(name, network)
    monkeypatch.setattr(training, "build_model", network)
    log: list[Event] = []
    taken = 0
    for count, stop_at in enumerate((*stops, 0)):
        run, recorder = start(RESUMED[name], tmp_path, stop_at=stop_at)  # nothing is left of the last one but its file
        if count:
            run.resume()
        if stop_at:
            with pytest.raises(StopRequest, match="stopped and saved; go on with: python train"):
                run.run()
            assert recorder.steps == stop_at  # the exact step
        else:
            results = run.run()
        taken += recorder.steps
        log += rows(recorder.events)
    assert taken == STEPS * (1.5 if name == "hard examples" else 1)  # twice the crops in stage 2
    assert same(weights(run), expected_weights)
    assert torch.equal(run.masks, expected_masks)
    assert results == expected_results
    assert log == expected_log  # each event once, epochs that were cut in two included


def test_a_crashed_run_goes_on_from_its_last_checkpoint(small: None, tmp_path: Path) -> None:
    run, _ = start(replace(RESUMED["corrected every epoch"], save_every=1), tmp_path, crash_at=11)
    with pytest.raises(MemoryError):
        run.run()
    run, recorder = start(replace(RESUMED["corrected every epoch"], save_every=1), tmp_path)
    run.resume()
    assert (run.stage, run.epoch, run.step) == (1, 1, 0)
    results = run.run()
    assert recorder.steps == 3
    expected = uninterrupted("corrected every epoch", small_network)
    assert same(weights(run), expected[0]) and torch.equal(run.masks, expected[1]) and results == expected[2]


def test_dnanet_resumes_and_trains_every_head(tmp_path: Path) -> None:
    settings = replace(BASE, model="dnanet", epochs=(1, 0))
    train = tiny_set().subset([0, 1, 2])  # two steps
    run, _ = start(settings, tmp_path / "whole", train)
    before = weights(run)
    run.run()
    for head in ("final1", "final2", "final3", "final4"):
        assert not torch.equal(before[f"{head}.weight"], weights(run)[f"{head}.weight"])
    expected = weights(run)
    run, _ = start(settings, tmp_path / "parts", train, stop_at=1)
    with pytest.raises(StopRequest):
        run.run()
    run, _ = start(settings, tmp_path / "parts", train)
    run.resume()
    run.run()
    assert same(weights(run), expected)


def test_a_run_goes_on_with_changed_points_where_it_is_asked_to(small: None, tmp_path: Path) -> None:
    run, _ = start(BASE, tmp_path, stop_at=2)
    with pytest.raises(StopRequest):
        run.run()
    moved = tiny_set()
    moved.points[2, 1] += 1
    again, _ = start(BASE, tmp_path, moved)
    again.resume(changed_data=True)
    assert torch.equal(again.masks, again.updater.initial)  # those of the points that it goes on with
    again.run()
    said = again.describe()["data_changed"]
    assert said[0] == "1 points of 6 differ, first in train2" and len(said) == 2
    finished, _ = start(BASE, tmp_path, moved)
    finished.resume()  # of the data that it ended with
    assert finished.data_changed == said


@pytest.mark.parametrize("stage2", ["continue", "scratch"])
def test_the_average_of_the_weights(stage2: str, small: None, tmp_path: Path) -> None:
    """Moved at every step; it predicts, and is what other programs load."""
    settings = replace(BASE, average=0.5, stage2=stage2)
    run, _ = start(settings, tmp_path)
    wanted = {name: value.clone() for name, value in run.model.state_dict().items()}
    step = run.training_step

    def stepped(masks: Tensor, plan: Tensor) -> None:
        step(masks, plan)
        for name, value in run.model.state_dict().items():
            floating = value.is_floating_point()
            wanted[name] = 0.5 * wanted[name] + 0.5 * value if floating else value.clone()

    run.training_step = stepped
    stepped.totals, stepped.set_rate = step.totals, step.set_rate
    run.train_stage(1)
    for name, value in run.network.state_dict().items():
        assert torch.allclose(value, wanted[name], atol=1e-6), name
    assert any(not torch.equal(a, b) for a, b in zip(run.model.parameters(), run.network.parameters(), strict=True))
    run.correct()
    saved = read_tensors(tmp_path / "stage1.safetensors")
    assert all(torch.allclose(saved[f"model.{name}"], value, atol=1e-6) for name, value in wanted.items())
    assert not any(name.startswith("trained.") for name in saved)


def test_a_finished_run_resumes_to_its_results(small: None, tmp_path: Path) -> None:
    run, _ = start(replace(BASE, epochs=(1, 1)), tmp_path)
    results = run.run()
    again, recorder = start(replace(BASE, epochs=(1, 1)), tmp_path)
    again.resume()
    assert again.run() == results and recorder.steps == 0
    assert same(weights(again), weights(run)) and torch.equal(again.masks, run.masks)


def test_resume_refuses(tmp_path: Path) -> None:
    run, _ = start(BASE, tmp_path, stop_at=1)
    refused(run.resume, str(tmp_path / "last.safetensors"), "no such checkpoint")
    with pytest.raises(StopRequest):
        run.run()

    other, _ = start(replace(BASE, radius=5), tmp_path)
    refused(other.resume, "last.safetensors", "its run had radius = 30, this one has 5")
    other, _ = start(replace(BASE, model="dnanet"), tmp_path)
    refused(other.resume, "last.safetensors", "its run had model = 'acm', this one has 'dnanet'")
    other, _ = start(replace(BASE, rule="soft"), tmp_path)
    refused(other.resume, "last.safetensors", "its run had rule = 'union', this one has 'soft'")
    other, _ = start(replace(BASE, extent=25), tmp_path)  # what its run came to by itself; still another setting
    refused(other.resume, "last.safetensors", "its run had extent = None, this one has 25")
    elsewhere = replace(tiny_set(), dataset="NUAA-SIRST")
    other, _ = start(BASE, tmp_path, elsewhere)
    refused(other.resume, "last.safetensors", "its run had dataset = 'tiny', this one has 'NUAA-SIRST'")
    other, _ = start(BASE, tmp_path, tiny_set().subset([0, 1, 2]))
    refused(other.resume, "last.safetensors", "data changed", "list of images is another: 3 fewer (train3 ...)")
    refused(lambda: other.resume(changed_data=True), "list of images is another")  # masks belong to images
    moved = tiny_set()
    moved.points[:, 1:] = (moved.points[:, 1:] + 9) % 20
    other, _ = start(BASE, tmp_path, moved)
    refused(other.resume, "6 points of 6 differ, first in train0; 6 initial masks of 6 differ", "--changed-data")
    brighter = tiny_set()
    brighter.images[4, 3, 3] ^= 1
    other, _ = start(BASE, tmp_path, brighter)
    refused(other.resume, "1 images of 6 differ, first train4", "--changed-data")

    path = tmp_path / "last.safetensors"
    tensors, description = read_tensors(path), read_description(path)
    changed = description["masks"] | {
        "extent": 10
    }  # as a set whose extent is chosen by its points gives, had they moved
    save_checkpoint(path, tensors, description | {"masks": changed})
    refused(run.resume, "last.safetensors", "its run had extent = 10, this one has 25")
    old = {name: value for name, value in description["settings"].items() if name not in ("masks", "rule", "positive")}
    save_checkpoint(path, tensors, description | {"settings": old | {"initial": "pmg", "fusion": "union"}})
    refused(run.resume, "of an older version", "train it anew", "eval.py detector --checkpoint")
    bare = {name: value for name, value in tensors.items() if name.startswith("model.")}
    for content, words in ((bare, description), (tensors, {"epoch": 3}), (tensors, {})):
        save_checkpoint(path, content, words)
        refused(run.resume, "last.safetensors", "not the state of a run of train.py")
    missing = {name: value for name, value in tensors.items() if name != "model.stem.1.weight"}
    save_checkpoint(path, missing, description)
    refused(run.resume, "last.safetensors", "1 tensors missing (first stem.1.weight)")


# ---- masks ----------------------------------------------------------------------------------------------------------


def initial_masks(data: ImageSet) -> Tensor:
    return point_to_mask(data.images, data.points, sizes=data.sizes)


def test_hybrid_masks_come_from_stage_one_and_hold_the_initial_ones(tmp_path: Path) -> None:
    train = tiny_set()
    run, recorder = start(BASE, tmp_path, train)
    run.run()
    initial = initial_masks(train)
    assert (run.masks & initial).sum() == initial.sum() > 0  # never smaller
    assert (run.masks & ~initial).any()  # the case means something
    model, description = load_model(tmp_path / "stage1.safetensors")
    assert description["normalisation"] == [train.mean, train.std] and description["stage"] == 1
    prediction = predict(model, train)
    assert torch.equal(run.masks, correct(prediction, initial, train.points, radius=30, sizes=train.sizes))

    (event,) = recorder.of("masks")
    assert (event["stage"], event["epoch"]) == (1, 2)
    assert list(event["masks"]) == list(event["metrics"]) == ["initial", "prediction", "filtered", "hybrid"]
    assert torch.equal(event["masks"]["hybrid"], run.masks) and torch.equal(event["masks"]["prediction"], prediction)
    for name, masks in event["masks"].items():
        assert event["metrics"][name] == measure(masks, train) == run.results["masks"][name]


def test_pmg_and_update_settings_reach_the_masks(small: None, tmp_path: Path) -> None:
    train = tiny_set()
    settings = replace(BASE, extent=5, half_width=1, alpha=0.6, radius=2, epochs=(1, 1))
    run, recorder = start(settings, tmp_path, train)
    expected = point_to_mask(train.images, train.points, extent=5, half_width=1, alpha=0.6, sizes=train.sizes)
    assert torch.equal(run.updater.initial, expected) and not torch.equal(expected, initial_masks(train))
    assert torch.equal(run.masks, expected)
    run.run()
    (event,) = recorder.of("masks")
    hybrid = correct(event["masks"]["prediction"], expected, train.points, radius=2, sizes=train.sizes)
    assert torch.equal(run.masks, hybrid)


@pytest.mark.parametrize(("every", "corrections"), [(0, 0), (1, 3), (2, 1), (3, 1), (4, 0)])
def test_update_every(
    every: int, corrections: int, small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the N-th, 2 N-th ... epoch of stage 2, but not after its last: nothing would be trained on those."""
    seen: list[tuple[tuple[int, int], Tensor]] = []
    plain = Union.correct

    def spy(rule: Union, evidence: Evidence) -> Tensor:
        seen.append(((run.stage, run.epoch), evidence.initial))  # some images of one size at a time
        return plain(rule, evidence)

    monkeypatch.setattr(Union, "correct", spy)
    train = tiny_set()
    run, recorder = start(replace(BASE, epochs=(1, 4), update_every=every), tmp_path, train)
    run.run()
    border = recorder.of("masks")[0]["masks"]["hybrid"]
    places = list(dict.fromkeys(place for place, _ in seen))
    assert places == [(0, 1), *((1, epoch) for epoch in range(1, 4) if every and epoch % every == 0)]
    assert len(places) == 1 + corrections
    for place in places:  # always from the initial masks
        parts = [initial for where, initial in seen if where == place]
        assert sum(map(len, parts)) == len(train)
        assert sum(int(part.sum()) for part in parts) == int(initial_masks(train).sum())
    assert torch.equal(run.updater.initial, initial_masks(train))
    assert torch.equal(run.masks, border) is (corrections == 0)
    assert (run.masks | run.updater.initial == run.masks).all()


def test_full_supervision_trains_on_the_ground_truth(small: None, tmp_path: Path) -> None:
    train = replace(tiny_set(), points=torch.zeros(0, 3, dtype=torch.int64))
    run, recorder = start(replace(BASE, supervision="full", epochs=(1, 1)), tmp_path, train)
    results = run.run()
    assert run.masks is train.masks and run.updater is None
    assert read_description(tmp_path / "last.safetensors")["masks"] is None
    assert not recorder.of("masks") and results.keys() == {"stage 1", "stage 2"}
    points, _ = start(replace(BASE, epochs=(1, 1)), tmp_path / "points")
    points.run()
    assert not same(weights(run), weights(points))


def test_works_without_masks(small: None, tmp_path: Path) -> None:
    """Images and points alone: the same weights as where the ground truth is only looked at."""
    train = replace(tiny_set(), masks=None)
    run, recorder = start(replace(BASE, epochs=(1, 1)), tmp_path / "without", train)
    results = run.run()
    (event,) = recorder.of("masks")
    assert event["metrics"] is None and results.keys() == {"stage 1", "stage 2"}
    whole, _ = start(replace(BASE, epochs=(1, 1)), tmp_path / "with")
    whole.run()
    assert same(weights(run), weights(whole)) and torch.equal(run.masks, whole.masks)

    test = replace(tiny_set(TEST_SIZES), masks=None)  # nothing to measure
    run, recorder = start(replace(BASE, epochs=(1, 1)), tmp_path / "neither", train, test)
    assert run.run() == {} and not recorder.of("test")


# ---- stages ---------------------------------------------------------------------------------------------------------


def model_tensors(path: Path) -> dict[str, Tensor]:
    return {name: value for name, value in read_tensors(path).items() if name.startswith("model.")}


def test_stage_two_continues_or_starts_from_scratch(small: None, tmp_path: Path) -> None:
    """On fixed masks (full supervision) a stage 2 from scratch knows nothing of stage 1; one that continues does."""
    ends: dict[tuple[str, int], dict[str, Tensor]] = {}
    for stage2 in ("continue", "scratch"):
        for epochs in (1, 2):
            folder = tmp_path / f"{stage2}{epochs}"
            start(replace(BASE, supervision="full", stage2=stage2, epochs=(epochs, 1)), folder)[0].run()
            ends[stage2, epochs] = model_tensors(folder / "stage2.safetensors")
    first = [model_tensors(tmp_path / f"{stage2}1" / "stage1.safetensors") for stage2 in ("continue", "scratch")]
    assert same(*first)
    assert same(ends["scratch", 1], ends["scratch", 2])
    assert not same(ends["continue", 1], ends["continue", 2])
    assert not same(ends["continue", 1], ends["scratch", 1])
    assert not same(ends["scratch", 1], first[0])  # a new start, not stage 1's again


def test_stage_two_may_be_left_out(small: None, tmp_path: Path) -> None:
    for stage2 in ("continue", "scratch"):
        run, recorder = start(replace(BASE, epochs=(1, 0), stage2=stage2), tmp_path / stage2)
        results = run.run()
        assert results.keys() == {"masks", "stage 1"} and run.stage == 2
        assert not (tmp_path / stage2 / "stage2.safetensors").exists()
        assert [event["stage"] for event in recorder.of("test")] == [1]
        last, first = (model_tensors(tmp_path / stage2 / f"{name}.safetensors") for name in ("last", "stage1"))
        assert same(last, first)


def test_events_of_a_run(small: None, tmp_path: Path) -> None:
    run, recorder = start(replace(BASE, epochs=(3, 2), eval_every=2), tmp_path)
    results = run.run()
    epochs = recorder.of("epoch")
    assert [(row["stage"], row["epoch"]) for row in epochs] == [(1, 1), (1, 2), (1, 3), (2, 1), (2, 2)]
    for row in epochs:
        at = 0.5 * 5e-3 * (1 + math.cos(math.pi * (row["epoch"] - 1) / (3, 2)[row["stage"] - 1]))
        assert row["learning_rate"] == pytest.approx(at) and 0 < row["loss"] < 1
        assert 0 <= row["iou"] <= 1 and 0 <= row["foreground"] <= 1 and row["images_per_second"] > 0
    tests = recorder.of("test")
    assert [(row["stage"], row["epoch"], row["final"]) for row in tests] == [(1, 2, False), (1, 3, True), (2, 2, True)]
    for row in tests:
        assert ("prediction" in row) is row["final"]
    for stage, row in (("stage 1", tests[1]), ("stage 2", tests[2])):
        assert results[stage] == {key: row[key] for key in results[stage]}
        assert results[stage] == measure(row["prediction"], tiny_set(TEST_SIZES, seed=9))


def test_seed_decides_everything(small: None, tmp_path: Path) -> None:
    settings = replace(BASE, epochs=(1, 0))
    ends = []
    for number, seed in enumerate((0, 0, 1)):
        torch.manual_seed(number)  # what was drawn before does not matter
        run, _ = start(replace(settings, seed=seed), tmp_path / str(number))
        run.run()
        ends.append(weights(run))
    assert same(ends[0], ends[1]) and not same(ends[0], ends[2])


def test_bf16(tmp_path: Path) -> None:
    run, _ = start(replace(BASE, epochs=(1, 0), bf16=True), tmp_path)
    run.run()
    plain, _ = start(replace(BASE, epochs=(1, 0)), tmp_path / "plain")
    plain.run()
    assert all(value.dtype != torch.bfloat16 for value in weights(run).values())
    assert not same(weights(run), weights(plain))


def test_the_test_set_is_normalised_as_the_training_set(tmp_path: Path) -> None:
    settings = replace(BASE, epochs=(1, 0))
    results = []
    for name, (mean, std) in {"own": (63.0, 21.0), "odd": (5.0, 900.0)}.items():
        test = replace(tiny_set(TEST_SIZES, seed=9), mean=mean, std=std)
        results.append(start(settings, tmp_path / name, test=test)[0].run())
    assert results[0] == results[1]
    train = replace(tiny_set(), mean=5.0, std=900.0)
    assert start(settings, tmp_path / "train", train)[0].run() != results[0]


# ---- collapse -------------------------------------------------------------------------------------------------------


FROZEN = replace(BASE, learning_rate=1e-9)
CURE = (
    "If it stays so: train longer, or try --output-bias -4, --loss image, a lower --learning-rate; look at the sheets."
)


EMPTY, FULL = "the network predicts background everywhere", "the network predicts foreground nearly everywhere"


@pytest.mark.parametrize(
    ("bias", "network", "expected"),
    [
        (-9.0, small_network, [(1, EMPTY), (2, EMPTY)]),
        # the filter keeps one huge component near the points, so stage 2 learns "everything" with a small loss
        (9.0, small_network, [(1, "the loss is still 0.98"), (1, FULL), (2, FULL)]),
        (0.0, threshold_network, []),  # right from the start: nothing to say
    ],
)
def test_a_collapse_is_reported_once_a_stage(
    bias: float,
    network: Callable[..., nn.Module],
    expected: list[tuple[int, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(training, "build_model", network)
    run, recorder = start(replace(FROZEN, output_bias=bias, epochs=(12, 11)), tmp_path)
    run.run()
    messages = [message for message in recorder.of("message") if "grew past" not in message["text"]]  # of an update
    assert len(messages) == len(expected)
    for message, (stage, finding) in zip(messages, expected, strict=True):
        assert message["text"].startswith(f"stage {stage}: {finding}") and message["text"].endswith(CURE)
        assert (message["stage"], message["epoch"]) == (stage, 1)  # the first tenth of 12 and of 11 epochs is one


def test_warnings_wait_for_the_first_tenth(small: None, tmp_path: Path) -> None:
    run, recorder = start(replace(FROZEN, output_bias=-9.0, epochs=(30, 0)), tmp_path)
    run.run()
    assert [message["epoch"] for message in recorder.of("message")] == [3]


def test_warnings_are_not_repeated_after_a_resume(small: None, tmp_path: Path) -> None:
    settings = replace(FROZEN, output_bias=-9.0, epochs=(4, 0))
    run, recorder = start(settings, tmp_path, stop_at=5)
    with pytest.raises(StopRequest):
        run.run()
    assert len(recorder.of("message")) == 1
    run, recorder = start(settings, tmp_path)
    run.resume()
    run.run()
    assert not recorder.of("message")


@pytest.mark.parametrize("stop", [False, True])  # a stop request must not save what is broken
def test_a_loss_that_is_not_finite_stops_the_run(stop: bool, small: None, tmp_path: Path) -> None:
    settings = replace(BASE, epochs=(4, 0), save_every=1)

    class Breaker(Recorder):
        def __call__(self, event: Event) -> None:
            super().__call__(event)
            if event["event"] == "step" and self.steps == 4:  # the first step of the second epoch
                with torch.no_grad():
                    next(self.training.model.parameters()).fill_(math.nan)
                self.training.stop = stop

    breaker = Breaker()
    train, test = tiny_set(), tiny_set(TEST_SIZES, seed=9)
    breaker.training = Training(settings, train, test, tmp_path, breaker)
    with pytest.raises(HMGError) as caught:
        breaker.training.run()
    assert not isinstance(caught.value, StopRequest)
    last = tmp_path / "last.safetensors"
    if stop:
        assert str(caught.value) == f"the weights are no longer finite; {last} keeps the last good ones"
    else:
        assert str(caught.value) == (
            f"the loss is no longer finite in stage 1, epoch 2; {last} keeps the last good state; "
            "try a lower --learning-rate or leave out --bf16"
        )
    description = read_description(last)
    assert (description["stage"], description["epoch"], description["step"]) == (0, 1, 0)
    assert all(value.isfinite().all() for value in read_tensors(last).values())
    run, recorder = start(settings, tmp_path)
    run.resume()
    run.run()  # nothing of the breakdown is in the file
    assert [row["epoch"] for row in recorder.of("epoch")] == [2, 3, 4]


def test_a_rate_far_too_high_is_reported(tmp_path: Path) -> None:
    run, _ = start(replace(BASE, learning_rate=1e30), tmp_path)
    with pytest.raises(HMGError) as caught:
        run.run()
    assert str(caught.value).startswith("the loss is no longer finite in stage 1, epoch 1; no checkpoint had been")
    assert not list(tmp_path.iterdir())


# ---- settings and inputs --------------------------------------------------------------------------------------------


def test_settings_survive_json() -> None:
    settings = replace(BASE, epochs=(3, 4), learning_rate=1)
    again = Settings.from_dict(json.loads(json.dumps(asdict(settings))))
    assert again == settings and again.epochs == (3, 4) and type(again.learning_rate) is float


def test_rule_follows_the_masks_where_nobody_names_one() -> None:
    assert Settings().rule == "union" and Settings(masks="learned").rule == "soft"
    assert Settings(masks="learned", rule="union").rule == "union" and Settings(rule="soft").rule == "soft"
    assert isinstance(Settings(masks="learned:student.safetensors", radius=7).correction(), Soft)


def test_settings_refuse_unknown_and_missing_names() -> None:
    values = asdict(BASE)
    refused(lambda: Settings.from_dict(values | {"momentum": 0.9}), "momentum", "another version")
    refused(lambda: Settings.from_dict({k: v for k, v in values.items() if k != "radius"}), "radius", "missing")
    for content in (None, 3, ["seed"]):
        refused(lambda content=content: Settings.from_dict(content), "settings: expected an object")
    with pytest.raises(TypeError, match="momentum"):
        Settings(momentum=0.9)


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("supervision", "weak", "supervision = 'weak': expected one of points, full"),
        ("model", "resnet", f"unknown model 'resnet'; choose one of: {', '.join(NETWORKS)}, or FILE.py:Class"),
        ("model", "nowhere.py:Net", "model nowhere.py:Net: no such file nowhere.py"),
        ("masks", "gmp", f"masks 'gmp': expected one of {', '.join(MAKERS)}"),
        ("masks", "folder", "folder: expected folder:PATH"),
        ("masks", "pmg:width=3", "masks 'pmg:width=3': expected NAME=VALUE of extent"),
        ("rule", "mean", f"rule = 'mean': expected one of {', '.join(('auto', *RULES))}"),
        ("positive", 1.5, "positive = 1.5: expected a number from 0 to 1"),
        ("positive", -0.1, "positive = -0.1: expected a number from 0 to 1"),
        ("positive", (0.5, 2), "positive = 2.0: expected a number from 0 to 1"),
        ("positive", (0.5, 0, 1), "positive = (0.5, 0, 1): expected one number, or one for each of 2"),
        ("positive", "half", "positive = 'half': expected one number, or one for each of 2"),
        ("positive", (True, 0.5), "positive = (True, 0.5): expected one number, or one for each of 2"),
        ("hard_examples", 1.5, "hard_examples = 1.5: expected a number from 0 to 1"),
        ("margin", -1, "margin = -1: expected at least 0"),
        ("jitter", 2.5, "jitter = 2.5: expected a number from 0 to 2"),
        ("extent", "long", "extent = 'long': expected int, auto, got str"),
        ("extent", 2.5, "extent = 2.5: expected int, auto, got float"),
        ("loss", "bce", "loss = 'bce': expected one of image, batch"),
        ("stage2", "skip", "stage2 = 'skip': expected one of continue, scratch"),
        ("batch_size", 1, "batch_size = 1: expected at least 2"),
        ("batch_size", "8", "batch_size = '8': expected int, got str"),
        ("batch_size", 8.0, "batch_size = 8.0: expected int, got float"),
        ("seed", True, "seed = True: expected int, got bool"),
        ("patch_size", 0, "patch_size = 0: expected at least 32"),
        ("patch_size", 100, "patch_size = 100: expected a multiple of 32"),
        ("extent", 0, "extent = 0: expected at least 1"),
        ("half_width", -1, "half_width = -1: expected at least 0"),
        ("radius", -1, "radius = -1: expected at least 0"),
        ("alpha", 1.5, "alpha = 1.5: expected a number from 0 to 1"),
        ("alpha", math.nan, "alpha = nan: expected a number from 0 to 1"),
        ("epochs", (0, 5), "epochs = (0, 5): expected two whole numbers, at least 1 for stage 1 and 0 for stage 2"),
        ("epochs", (5, -1), "epochs = (5, -1): expected two whole numbers"),
        ("epochs", (5,), "epochs = (5,): expected two whole numbers"),
        ("epochs", (5, 2.5), "epochs = (5, 2.5): expected two whole numbers"),
        ("epochs", 5, "epochs = 5: expected tuple, got int"),
        ("learning_rate", 0.0, "learning_rate = 0.0: expected above 0"),
        ("learning_rate", math.nan, "learning_rate = nan: expected above 0"),
        ("learning_rate", math.inf, "learning_rate = inf: expected above 0"),
        ("output_bias", math.nan, "output_bias = nan: expected a finite number"),
        ("eval_every", 0, "eval_every = 0: expected at least 1"),
        ("save_every", 0, "save_every = 0: expected at least 1"),
        ("update_every", -1, "update_every = -1: expected at least 0"),
    ],
)
def test_settings_refuse_values(name: str, value: Any, text: str) -> None:
    refused(lambda: Settings(**{name: value}), text)


def test_full_supervision_has_nothing_to_correct() -> None:
    refused(lambda: Settings(supervision="full", update_every=5), "update_every = 5", "no masks to correct")


def test_data_that_cannot_be_trained_on(tmp_path: Path) -> None:
    train = tiny_set()
    empty = train.subset([])
    refused(lambda: start(BASE, tmp_path, empty), "tiny train: no image to train on")
    pointless = replace(train, points=train.points[:0])
    refused(lambda: start(BASE, tmp_path, pointless), "tiny train: no point label in the whole set; check --points")
    bare = replace(train, masks=None)
    full = replace(BASE, supervision="full")
    refused(lambda: start(full, tmp_path, bare), "tiny: full supervision needs ground-truth masks")
    assert not list(tmp_path.iterdir())


def test_the_soft_rule_at_the_stage_border(tmp_path: Path) -> None:
    data = tiny_set()
    events: list[Event] = []
    run = Training(replace(BASE, rule="soft", epochs=(1, 1)), data, None, tmp_path, events.append)
    run.train_stage(1)
    normalisation = {"mean": data.mean, "std": data.std}
    probability = predict(run.model, data, soft=True, **normalisation)
    assert probability.dtype == torch.float32 and torch.equal(probability > 0.5, predict(run.model, data))
    run.correct()
    initial = point_to_probability(
        data.images, data.points, extent=25, half_width=BASE.half_width, alpha=BASE.alpha, sizes=data.sizes
    )
    wanted = soft_update(probability, initial, data.points, radius=BASE.radius, sizes=data.sizes)
    assert torch.equal(run.masks, wanted)
    (event,) = (event for event in events if event["event"] == "masks")
    assert torch.equal(event["masks"]["hybrid"], wanted) and run.results["masks"]["hybrid"] == measure(wanted, data)
    assert not torch.equal(wanted, correct(probability > 0.5, initial_masks(data), data.points, sizes=data.sizes))
    assert read_description(tmp_path / "last.safetensors")["rule"] == Soft(radius=BASE.radius).about()


# ---- stage by stage, makers, crops ----------------------------------------------------------------------------------


def test_stage_by_stage_is_run(small: None, tmp_path: Path) -> None:
    """``run`` is the three steps of the method in turn; each does nothing where it lies behind."""
    run, recorder = start(BASE, tmp_path)
    run.train_stage(2)  # not yet
    assert recorder.steps == 0 and run.stage == 0
    run.train_stage(1)
    assert (recorder.steps, run.stage, run.epoch) == (6, 0, 2) and torch.equal(run.masks, initial_masks(run.train))
    assert not (tmp_path / "stage1.safetensors").exists()
    run.train_stage(2)
    assert recorder.steps == 6
    run.correct()
    assert (run.stage, run.epoch) == (1, 0) and (tmp_path / "stage1.safetensors").exists()
    corrected = run.masks
    run.correct()
    run.train_stage(1)
    assert run.masks is corrected and recorder.steps == 6
    run.train_stage(2)
    assert recorder.steps == STEPS and run.stage == 2
    run.train_stage(2)
    run.correct()
    assert recorder.steps == STEPS and len(recorder.of("masks")) == 1
    expected = uninterrupted("corrected once", small_network)
    assert same(weights(run), expected[0]) and torch.equal(run.masks, expected[1])
    assert run.results == expected[2] and rows(recorder.events) == expected[3]


def test_a_note_says_how_the_initial_masks_are_made(small: None, tmp_path: Path) -> None:
    for number, (settings, words) in enumerate(
        (
            ({}, "the paper's for most data sets"),
            ({"extent": 7}, "as given"),
            ({"extent": "auto"}, "too few to choose by"),
        )
    ):
        run, recorder = start(replace(BASE, **settings), tmp_path / str(number))
        (note,) = recorder.of("note")
        maker = Pmg(**settings).fit(run.train)
        assert note["text"] == f"initial masks: {maker}" and words in note["text"]
        assert run.describe()["masks"] == Pmg(extent=settings.get("extent", 25)).fit(run.train).about()
        assert run.settings.extent == settings.get("extent") == run.describe()["settings"]["extent"]


def test_the_papers_extent_for_the_set(small: None, tmp_path: Path) -> None:
    train = replace(tiny_set(), dataset="NUDT-SIRST")
    run, _ = start(BASE, tmp_path, train)
    assert run.updater.maker == Pmg(extent=10) and run.describe()["masks"]["extent"] == 10
    expected = point_to_mask(train.images, train.points, extent=10, sizes=train.sizes)
    assert torch.equal(run.masks, expected) and not torch.equal(expected, initial_masks(train))


@pytest.mark.parametrize(("name", "most"), [("positive", 1.0), ("jitter", 1.0), ("margin", 8)])
def test_settings_of_crops_reach_the_plan(
    small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, most: float
) -> None:
    """And the points; a run that was stopped goes on with them."""
    seen: list[tuple[float, Tensor]] = []
    plain = training.draw_epoch

    def spy(*arguments: Any, **settings: Any) -> Tensor:
        seen.append((settings[name], settings["points"]))
        return plain(*arguments, **settings)

    monkeypatch.setattr(training, "draw_epoch", spy)
    ends = []
    for value in (type(most)(0), most):
        run, _ = start(replace(BASE, epochs=(2, 0), **{name: value}), tmp_path / str(value))
        run.run()
        ends.append(weights(run))
    assert [value for value, _ in seen] == [0, 0, most, most]
    assert all(torch.equal(points, tiny_set().points) for _, points in seen)
    assert not same(*ends)
    settings = replace(BASE, epochs=(2, 0), **{name: most})
    stopped, _ = start(settings, tmp_path / "stopped", stop_at=4)
    with pytest.raises(StopRequest):
        stopped.run()
    again, _ = start(settings, tmp_path / "stopped")
    again.resume()
    again.run()
    assert same(weights(again), ends[1])


def test_each_stage_has_its_share_of_crops_around_points(
    small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[float] = []
    plain = training.draw_epoch
    monkeypatch.setattr(
        training, "draw_epoch", lambda *a, **named: seen.append(named["positive"]) or plain(*a, **named)
    )
    ends = {}
    for shares in ((1.0, 0.0), (1.0, 1.0), (0.0, 0.0)):
        seen.clear()
        folder = tmp_path / " ".join(map(str, shares))
        start(replace(BASE, positive=shares), folder)[0].run()
        assert seen == [shares[0]] * 2 + [shares[1]] * 2
        ends[shares] = [read_tensors(folder / f"stage{number}.safetensors") for number in (1, 2)]
    assert same(ends[1.0, 0.0][0], ends[1.0, 1.0][0]) and not same(ends[1.0, 0.0][0], ends[0.0, 0.0][0])
    assert not same(ends[1.0, 0.0][1], ends[1.0, 1.0][1])


@pytest.mark.parametrize("supervision", ["points", "full"])
def test_stage_two_sees_what_was_corrected_again(
    supervision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What FAF erases and MDR brings back at the border; masks and stage 1 are as without."""
    monkeypatch.setattr(training, "build_model", threshold_network)
    settings = replace(BASE, supervision=supervision, learning_rate=1e-9, radius=2)
    train = tiny_set()
    train.images[1, 2:4, 25:28] = train.images[1, 20, 20] = train.images[4, 27:, 2:5] = train.images.max()  # clutter
    train.images[3] = train.images[3] // 2  # a target below the threshold
    plain, _ = start(settings, tmp_path / "plain", train)
    plain.run()
    run, recorder = start(replace(settings, hard_examples=0.5), tmp_path / "hard", train)
    run.train_stage(1)
    assert len(run.corrected) == 0
    prediction = run._predict(run.train)
    points = run.train.points if supervision == "points" else centres(run.train)
    run.correct()
    kept = false_alarm_filter(prediction, points, radius=2, sizes=run.train.sizes)
    targets = connected_components(run.train.masks if supervision == "full" else run.updater.initial)
    hit = torch.stack([kept.view(-1)[targets.pixels[targets.component == one]].any() for one in range(len(targets))])
    wanted = [connected_components(masks) for masks in (prediction & ~kept, targets.mask(~hit))]
    assert len(wanted[0]) == 3 and len(wanted[1]) == 1 + (supervision == "points")  # a speck of an initial mask
    assert torch.equal(run.corrected[:, 0], torch.cat([found.image for found in wanted]))
    assert torch.equal(run.corrected[:, 1:], torch.cat([found.centroids for found in wanted]).round().long())
    said = [event["text"] for event in recorder.events if "false alarms" in event.get("text", "")]
    words = f"3 false alarms and {len(wanted[1])} missed targets in 3 training images are shown again"
    assert said == [f"stage 1: {words}"]
    assert torch.equal(run.masks, plain.masks)
    assert same(*(read_tensors(tmp_path / name / "stage1.safetensors") for name in ("plain", "hard")))
    before = recorder.steps
    run.train_stage(2)
    assert recorder.steps - before == 2 * 5  # 6 images and 3 crops, two a step
    state = read_tensors(tmp_path / "hard" / "last.safetensors")
    assert torch.equal(state["corrected.current"], run.corrected)


def test_damaged_hard_examples_are_refused(small: None, tmp_path: Path) -> None:
    settings = replace(BASE, hard_examples=1.0, radius=2)
    run, _ = start(settings, tmp_path, stop_at=8)
    with pytest.raises(StopRequest):
        run.run()
    path = tmp_path / "last.safetensors"
    tensors, description = read_tensors(path), read_description(path)
    good = tensors["corrected.current"]
    far = torch.tensor([[0, 10**6, 0]])
    for value in (None, good.int(), good[:, :2], far, far.flip(1), far.roll(-1, 1), -far - 1):
        others = {name: tensor for name, tensor in tensors.items() if name != "corrected.current"}
        save_checkpoint(path, others if value is None else others | {"corrected.current": value}, description)
        again, _ = start(settings, tmp_path)
        refused(again.resume, "last.safetensors: corrected.current is not what a run of train.py writes")
        assert (again.stage, again.epoch, again.step) == (0, 0, 0)


def test_one_share_stands_for_both_stages() -> None:
    for given in (0.5, (0.5,), [0.5], [0.5, 0.5], (0.5, 0.5)):
        settings = Settings(positive=given)
        assert settings.positive == (0.5, 0.5) and all(type(share) is float for share in settings.positive)
    settings = Settings(positive=(1, 0))
    assert settings.positive == (1.0, 0.0) and Settings.from_dict(json.loads(json.dumps(asdict(settings)))) == settings
