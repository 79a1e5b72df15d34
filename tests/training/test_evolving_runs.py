"""Training with rules whose labels evolve: what is trained on, when stage 1 ends, and runs that were interrupted."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from refusal import refused
from tiny import small_network, tiny_set
from torch import Tensor, nn

from hmg_gpu import MaskUpdater
from hmg_gpu.data import ImageSet
from hmg_gpu.data.batches import ONE, cut_crops, to_targets
from hmg_gpu.masks import RULES, to_masks
from hmg_gpu.models.checkpoints import read_description, read_tensors, save_checkpoint
from hmg_gpu.models.losses import soft_iou_loss
from hmg_gpu.training import Settings, StopRequest, Training
from hmg_gpu.training import loop as training
from hmg_gpu.training.step import TrainingStep

EVOLVING = sorted(name for name, rule in RULES.items() if rule.evolves)
BASE = Settings(
    data="tiny", masks="points", epochs=(2, 3), batch_size=2, patch_size=32, output_bias=0.0, learning_rate=5e-3,
    eval_every=1, update_every=1, rule="lesps",
)  # fmt: skip


class Recorder:
    """Takes a run's events; asks it to stop at the n-th step of this process."""

    def __init__(self, stop_at: int = 0) -> None:
        self.events: list[dict[str, Any]] = []
        self.notes: list[str] = []
        self.stop_at, self.steps = stop_at, 0
        self.training: Training | None = None

    def __call__(self, event: dict[str, Any]) -> None:
        if event["event"] == "step":
            self.steps += 1
            self.training.stop = self.steps == self.stop_at
        elif event["event"] == "note":
            self.notes.append(event["text"])
        else:
            drop = ("seconds", "images_per_second", "prediction", "masks")
            self.events.append({key: value for key, value in event.items() if key not in drop})


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "build_model", small_network)


def start(
    settings: Settings, folder: Path, stop_at: int = 0, train: ImageSet | None = None
) -> tuple[Training, Recorder]:
    recorder = Recorder(stop_at)
    train = tiny_set() if train is None else train
    recorder.training = Training(settings, train, tiny_set(((32, 40),), seed=9), folder, recorder)
    return recorder.training, recorder


def ends(run: Training) -> dict[str, Tensor]:
    """All that a run leaves."""
    own = {"masks": run.masks, "labels": run.updater.labels, "active": run.updater.active}
    return {name: value.clone() for name, value in (own | run.model.state_dict()).items()}


@cache
def uninterrupted(settings: str) -> tuple[dict[str, Tensor], dict[str, Any], list[dict[str, Any]], int]:
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "build_model", small_network)
        run, recorder = start(CASES[settings], Path(folder))
        results = run.run()
        return ends(run), results, recorder.events, recorder.steps


CASES = {name: replace(BASE, rule=name) for name in EVOLVING}
CASES["start by loss"] = replace(BASE, start="loss", loss_below=0.999, epochs=(4, 2))


@pytest.mark.parametrize("stops", [(2,), (6,), (7,), (9,), (11, 1, 1), (1,) * 8], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_a_stopped_run_ends_in_the_same_bits(name: str, stops: tuple[int, ...], tmp_path: Path) -> None:
    """Stopped inside epochs, at the border, and at the end of an epoch that updates follow."""
    expected, expected_results, expected_log, steps = uninterrupted(name)
    if sum(stops) >= steps:
        stops = (3, 3)  # the last step of stage 1 and one that an update follows
    log, taken = [], 0
    for count, stop_at in enumerate((*stops, 0)):
        run, recorder = start(CASES[name], tmp_path, stop_at)
        if count:
            run.resume()
        if stop_at:
            with pytest.raises(StopRequest):
                run.run()
        else:
            results = run.run()
        taken += recorder.steps
        log += recorder.events
    assert taken == steps and results == expected_results and log == expected_log
    found = ends(run)
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)


def test_the_cases_mean_something() -> None:
    for name in EVOLVING:
        labels = uninterrupted(name)[0]["labels"]
        assert ((labels > 0) & (labels < 255)).any(), name
    epochs = [(row["stage"], row["epoch"]) for row in uninterrupted("start by loss")[2] if row["event"] == "epoch"]
    assert epochs == [(1, 1), (2, 1), (2, 2)]  # four epochs were meant at most


def test_updates_go_on_from_one_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After stage 1 and each but the last epoch of stage 2; the position is that in stage 2."""
    seen: list[tuple[int, int]] = []
    plain = RULES["lesps"].evolve

    def spy(rule: Any, evidence: Any) -> Any:
        seen.append(evidence.at)
        return plain(rule, evidence)

    monkeypatch.setattr(RULES["lesps"], "evolve", spy)
    run, _ = start(BASE, tmp_path)
    assert torch.equal(run.updater.labels, run.updater.initial * 255)
    run.run()
    assert list(dict.fromkeys(seen)) == [(0, 3), (1, 3), (2, 3)]
    assert int(run.updater.labels.count_nonzero()) > 6 and torch.equal(run.masks, to_masks(run.updater.labels))


@pytest.mark.parametrize("rule", EVOLVING)
def test_targets(rule: str, tmp_path: Path) -> None:
    run, _ = start(replace(BASE, rule=rule), tmp_path)
    run.train_stage(1)
    run.correct()
    assert run.targets is (run.updater.labels if RULES[rule].soft_targets else run.masks)


def test_a_step_on_soft_labels() -> None:
    """The loss sees the labels as they are, the counts the masks."""
    data = tiny_set()
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 256, data.images.shape, dtype=torch.uint8, generator=generator)
    plan = torch.tensor([[0, 0, 0, 0, 1, 0, ONE, 0], [3, 0, 7, 1, 0, 1, ONE, 0]])
    model = small_network("", output_bias=0.0)
    step = TrainingStep(model, data, patch_size=32, learning_rate=0.0)
    model.eval()
    images, cut = cut_crops(data, labels, plan, 32)
    assert cut.dtype == torch.uint8
    logits = model(images).detach()
    step(labels, plan)
    loss = soft_iou_loss(logits, to_targets(cut)).detach()
    prediction, masks = logits > 0, cut > 127
    wanted = [float(loss), int((prediction & masks).sum()), int((prediction | masks).sum()), int(prediction.sum())]
    assert step.totals[:4].tolist() == pytest.approx(wanted) and loss.detach() != soft_iou_loss(logits, masks)
    assert to_targets(cut).max() == 1 and not torch.equal(to_targets(cut), masks.float())


def test_settings_that_cannot_be() -> None:
    for rule in EVOLVING:
        refused(lambda rule=rule: replace(BASE, rule=rule, update_every=0), f"rule = {rule}", "--update-every")
        assert replace(BASE, rule=rule, supervision="full", update_every=0).supervision == "full"
    refused(lambda: replace(BASE, start="later"), "start = 'later': expected one of epoch, loss")
    for loss in (0.0, 1.5):
        refused(lambda loss=loss: replace(BASE, loss_below=loss), f"loss_below = {loss}: expected")


def test_labels_that_do_not_belong_to_the_run_are_refused(tmp_path: Path) -> None:
    run, _ = start(BASE, tmp_path, stop_at=7)
    with pytest.raises(StopRequest):
        run.run()
    path = tmp_path / "last.safetensors"
    tensors, description = read_tensors(path), read_description(path)
    changed = tensors["labels.current"].clone()
    changed[0, 0, 0] ^= 255
    for name, value in (
        ("labels.current", None),
        ("labels.current", tensors["masks.current"].clone()),
        ("labels.current", tensors["labels.current"][:, :-1].contiguous()),
        ("labels.current", changed),
        ("pool.current", None),
        ("pool.current", tensors["pool.current"][1:].contiguous()),
        ("pool.current", tensors["pool.current"].to(torch.uint8)),
    ):
        kept = {key: tensor for key, tensor in (tensors | {name: value}).items() if tensor is not None}
        save_checkpoint(path, kept, description)
        refused(run.resume, "last.safetensors", f"{name} is not what a run of train.py writes")
    save_checkpoint(path, tensors, description | {"over": 1})
    refused(run.resume, "over is not what")
    other, _ = start(replace(BASE, rule="union"), tmp_path)
    save_checkpoint(path, tensors, description)
    refused(other.resume, "its run had rule = 'lesps', this one has 'union'")


# ---- images that wait -----------------------------------------------------------------------------------------------


class Threshold(nn.Module):
    """Logits of a threshold on the normalised image: a network that sees the blobs from the start."""

    def __init__(self) -> None:
        super().__init__()
        self.level = nn.Parameter(torch.tensor(2.0))

    def forward(self, images: Tensor) -> Tensor:
        return 20 * (images - self.level)


def half_sure() -> ImageSet:
    """Each second image has another point where nothing is: PAL finds one of two there, and lets it wait."""
    data = tiny_set()
    more = [(1, 1, 30), (3, 30, 1), (5, 1, 1)]
    points = sorted([*map(tuple, data.points.tolist()), *more])
    return replace(data, points=torch.tensor(points))


POOL = replace(BASE, rule="pal", masks="pal", epochs=(1, 12), learning_rate=1e-9)


@pytest.fixture
def right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "build_model", lambda name, *, output_bias: Threshold())


def test_images_enter_as_rho_rises(right: None, tmp_path: Path) -> None:
    """In 9 of 12 epochs images may enter; rho = 0.2 + 0.8 (j + 2) / 9 reaches a half, one point of two, at j = 2."""
    run, recorder = start(POOL, tmp_path, train=half_sure())
    assert run.updater.active.tolist() == [True, False] * 3
    assert "3 of 6 images whose masks the maker trusts start in the pool" in recorder.notes
    run.run()
    assert run.updater.active.all() and recorder.notes.count("6 of 6 images are trained on from now on") == 10
    pools = [row["pool"] for row in recorder.events if row["event"] == "epoch"]
    assert pools == [3] * 3 + [6] * 10 and recorder.steps == 3 * 2 + 10 * 3  # an epoch is as long as the pool
    assert read_description(tmp_path / "last.safetensors")["rule"]["rule"] == "pal"


@pytest.mark.parametrize("stops", [(3,), (4,), (5,), (2, 1, 1, 1)], ids=str)
def test_a_pool_that_grows_resumes_to_the_same_bits(stops: tuple[int, ...], right: None, tmp_path: Path) -> None:
    """Stopped inside and after the epochs before the images enter, and in the first epoch that draws from them."""
    settings = replace(POOL, epochs=(1, 8), learning_rate=1e-3)
    whole, expected = start(settings, tmp_path / "whole", train=half_sure())
    results = whole.run()
    assert [row["pool"] for row in expected.events if row["event"] == "epoch"] == [3, 3] + [6] * 7
    log = []
    for count, stop_at in enumerate((*stops, 0)):
        run, recorder = start(settings, tmp_path / "parts", stop_at, half_sure())
        if count:
            run.resume()
        if stop_at:
            with pytest.raises(StopRequest):
                run.run()
        else:
            assert run.run() == results
        log += recorder.events
    assert log == expected.events
    found, wanted = ends(run), ends(whole)
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_only_the_pool_is_drawn(right: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[set[int]] = []
    plain = TrainingStep.__call__

    def spy(step: TrainingStep, masks: Tensor, plan: Tensor) -> None:
        seen.append(set(plan[:, 0].tolist()))
        plain(step, masks, plan)

    monkeypatch.setattr(TrainingStep, "__call__", spy)
    run, _ = start(replace(POOL, epochs=(1, 1)), tmp_path, train=half_sure())
    run.train_stage(1)
    assert set.union(*seen) == {0, 2, 4} and len(seen) == 2
    updater = MaskUpdater(half_sure(), "pal", "pal", guard=None)
    assert updater.pool.tolist() == [0, 2, 4] and len(updater.loader(2, 32)) == len(list(updater.loader(2, 32))) == 2
    updater.active |= True
    assert updater.pool is None and len(updater.loader(2, 32)) == 3


def test_a_pool_of_nothing_is_refused(tmp_path: Path) -> None:
    data = half_sure()
    blank = replace(data, images=torch.full_like(data.images, 9))
    refused(lambda: start(POOL, tmp_path, train=blank), "rule pal: masks pal trust no image", "use others")
    refused(lambda: MaskUpdater(blank, "pal", "pal").loader(2, 32), "trust no image")


def test_labels_are_those_of_the_points_that_a_run_goes_on_with(tmp_path: Path) -> None:
    settings = Settings(rule="lesps", epochs=(2, 2), update_every=1, batch_size=2, patch_size=32, extent=8)
    data = tiny_set()

    def stopping(event: dict) -> None:
        if event["event"] == "step" and event["step"] == 2:
            run.stop = True

    run = Training(settings, data, None, tmp_path, stopping)
    with pytest.raises(StopRequest):
        run.run()
    moved = tiny_set()
    moved.points[:, 1] += 1
    again = Training(settings, moved, None, tmp_path, lambda event: None)
    again.resume(changed_data=True)
    assert torch.equal(again.masks, again.updater.initial) and torch.equal(again.updater.labels > 127, again.masks)
    again.save()
    Training(settings, moved, None, tmp_path, lambda event: None).resume()
