"""MaskUpdater with rules whose labels evolve: what it carries from update to update, and what is trained on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import reference_rules
import torch
from refusal import refused
from tiny import SIZES, tiny_set
from torch import Tensor, distributed, nn

from hmg_gpu import MaskUpdater
from hmg_gpu.common.errors import InputError
from hmg_gpu.data import read_mask
from hmg_gpu.data.batches import cut_crops, draw_epoch
from hmg_gpu.masks import RULES, Evidence, Lesps, Points, make_rule, to_masks
from hmg_gpu.updater import mask_updater

EVOLVING = sorted(name for name, rule in RULES.items() if rule.evolves)


class Net(nn.Module):
    """Logits that rise with the image: blobs are targets, and some of the noise."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, images: Tensor) -> Tensor:
        return self.scale * (images - 0.8)


def make(rule: str = "lesps", masks: str = "points", **settings: object) -> MaskUpdater:
    return MaskUpdater(tiny_set(), masks, make_rule(rule), **{"guard": None} | settings)


def probability(updater: MaskUpdater) -> Tensor:
    data = updater.data
    return Net()((data.images.float() - data.mean) / data.std).detach().sigmoid()


def test_updates_go_on_from_the_one_before() -> None:
    updater = make()
    values = probability(updater)
    wanted = [np.where(updater.initial[i, :h, :w], 255, 0).astype(np.uint8) for i, (h, w) in enumerate(SIZES)]
    assert updater.labels.dtype == torch.uint8 and torch.equal(updater.labels, updater.initial * 255)
    seen = []
    for _ in range(4):
        changes = updater.update(Net(), "logits")
        for index, (height, width) in enumerate(SIZES):
            wanted[index] = reference_rules.lesps(wanted[index], values[index, :height, :width].numpy())
            assert np.array_equal(updater.labels[index, :height, :width].numpy(), wanted[index])
        assert torch.equal(updater.masks, to_masks(updater.labels)) and changes.entered == 0
        seen.append((changes.pixels, int(updater.masks.sum())))
    assert seen[0] == (0, 6)  # a pixel that was 0 has at most a half after one update
    assert any(pixels for pixels, _ in seen) and seen[-1][1] > 6
    updater.restart()
    assert torch.equal(updater.labels, updater.initial * 255) and torch.equal(updater.masks, updater.initial)


@pytest.mark.parametrize("rule", EVOLVING)
def test_update_one_is_update(rule: str) -> None:
    """By logits, probabilities and hard masks; of a batch in another order."""
    updater, other = make(rule), make(rule)
    values = probability(updater)
    for at in ((0, 4), (1, 4)):
        updater.update(Net(), "logits", at=at)
        for index in ([4, 1], [0, 5, 3], 2):
            other.update_one(index, values[index], "probabilities", at=at)
        assert torch.equal(updater.labels, other.labels) and torch.equal(updater.masks, other.masks)
    hard, soft = make(rule), make(rule)
    hard.update_one(range(6), values > 0.5, "logits")
    soft.update_one(range(6), (values > 0.5).float(), "probabilities")
    assert torch.equal(hard.labels, soft.labels) and not torch.equal(hard.labels, updater.labels)


@pytest.mark.parametrize("rule", EVOLVING)
def test_an_update_that_is_refused_or_ignored_changes_nothing(rule: str) -> None:
    updater = make(rule)
    updater.update(Net(), "logits")
    before, active = updater.labels.clone(), updater.active.clone()
    for call in (
        lambda: updater.update(Net(), "probabilities"),
        lambda: updater.update_one(0, probability(updater)[0], "logits"),
    ):
        with pytest.raises(InputError, match="so no mask was changed"):
            call()
        assert torch.equal(updater.labels, before) and torch.equal(updater.active, active)
        assert torch.equal(updater.masks, to_masks(before))
    guarded = make(rule, guard=0.05)
    values = probability(guarded)
    values[2] = 1
    with pytest.warns(UserWarning, match="cover more than 5 %"):
        changes = guarded.update_one(range(6), values, "probabilities")
    free = make(rule)
    free.update_one(range(6), values, "probabilities")
    ignored = ((values > 0.5).float() * 1).sum((1, 2)) > 0  # every image holds a prediction
    assert bool(ignored.all()) and 1 <= changes.ignored < 6
    assert torch.equal(guarded.labels[2], guarded.initial[2] * 255)
    assert not torch.equal(free.labels, guarded.labels)


@pytest.mark.parametrize("rule", EVOLVING)
def test_state_holds_labels_and_pool(rule: str, tmp_path: Path) -> None:
    updater = make(rule)
    updater.update(Net(), "logits")
    torch.save(updater.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    record = {"data.names", "data.points", "data.pixels", "data_changed"}
    assert state.keys() == record | {"settings", "initial", "masks", "labels", "active", "checksum"}
    other = make(rule)
    other.load_state_dict(state)
    assert torch.equal(other.labels, updater.labels) and other.labels is not state["labels"]
    for one in (updater, other):
        one.update(Net(), "logits")
    assert torch.equal(other.labels, updater.labels) and not torch.equal(other.labels, state["labels"])
    plain = make("union")
    refused(lambda: plain.load_state_dict(state), "its rule is")
    refused(lambda: other.load_state_dict(state | {"labels": state["masks"]}), "labels is torch.bool")
    refused(lambda: other.load_state_dict({k: v for k, v in state.items() if k != "active"}), "state_dict()")


@pytest.mark.parametrize("rule", EVOLVING)
def test_what_is_trained_on(rule: str, tmp_path: Path) -> None:
    updater = make(rule)
    for _ in range(2):
        updater.update(Net(), "logits")
    soft = RULES[rule].soft_targets
    assert updater.targets is (updater.labels if soft else updater.masks)
    plan = draw_epoch(updater.data.host_sizes, 3, 32, seed=5, epoch=0)
    steps = list(updater.loader(3, 32, seed=5))
    assert len(steps) == len(plan) == len(updater.loader(3, 32))
    for (images, targets), rows in zip(steps, plan, strict=True):
        wanted_images, wanted = cut_crops(updater.data, updater.targets, rows, 32)
        assert torch.equal(images, wanted_images) and targets.dtype == torch.float32
        assert torch.equal(targets, wanted.float() / 255 if soft else wanted.float())
    updater.export(tmp_path)
    for index, (size, array) in enumerate(zip(SIZES, updater.as_list(), strict=True)):
        mask = read_mask(tmp_path / f"train{index}.png", size)
        assert np.array_equal(mask, array > 0) and np.array_equal(mask, updater.masks[index, : size[0], : size[1]])


def test_the_position_reaches_the_rule() -> None:
    seen: list[Evidence] = []

    class Spy(Lesps):
        def evolve(self, evidence: Evidence):
            seen.append(evidence)
            return super().evolve(evidence)

    updater = MaskUpdater(tiny_set(), Points(), Spy(), guard=None)
    updater.update(Net(), "logits", at=(5, 20))
    updater.update_one(0, torch.zeros(32, 32), "probabilities")
    assert {evidence.at for evidence in seen[:-1]} == {(5, 20)} and seen[-1].at == (0, 1)
    assert all(evidence.probability is not None and evidence.initial_probability is None for evidence in seen)


def test_labels_are_a_rules_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other rules keep none, and are asked for none."""
    updater = make("union", "pmg:extent=8")
    assert updater.labels is updater.active is updater.pool is None and updater.targets is updater.masks
    monkeypatch.setattr(mask_updater, "to_masks", None)
    updater.update(Net(), "logits")


def run_rank(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    for rule in EVOLVING:
        updater = make(rule)
        for step in range(3):
            changes = updater.update(Net(), "logits", batch_size=2, at=(step, 4))
        torch.save([updater.labels, updater.active, updater.masks, str(changes)], folder / f"{rule}{rank}.pt")
    distributed.destroy_process_group()


def test_ranks_end_with_the_bits_of_one_process(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(run_rank, (tmp_path,), nprocs=2)
    for rule in EVOLVING:
        alone = make(rule)
        for step in range(3):
            changes = alone.update(Net(), "logits", batch_size=2, at=(step, 4))
        assert not torch.equal(alone.labels, alone.initial * 255)
        for rank in range(2):
            labels, active, masks, text = torch.load(tmp_path / f"{rule}{rank}.pt", weights_only=True)
            assert torch.equal(labels, alone.labels) and torch.equal(active, alone.active)
            assert torch.equal(masks, alone.masks) and text == str(changes)
