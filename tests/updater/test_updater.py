"""MaskUpdater: its masks are those of the free functions, and the caller's program does not notice it."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from refusal import refused
from scipy import ndimage
from tiny import SIZES, tiny_set, write_folder
from torch import Tensor, distributed, nn

from hmg_gpu import InputError, MaskUpdater, false_alarm_filter, point_to_mask, soft_update, update
from hmg_gpu.data import load_folder, pack_folder, read_mask
from hmg_gpu.data.batches import batches, cut_crops, draw_epoch
from hmg_gpu.masks import Evidence, Learned, Pmg, Rule, Soft, Union
from hmg_gpu.masks.extent import choose_extent
from hmg_gpu.masks.student import Student, StudentSettings
from hmg_gpu.masks.student.network import CropNet
from hmg_gpu.models import build_model
from hmg_gpu.models.predict import predict, predict_logits

EXTENT = 8
RECORD = {"data.names", "data.points", "data.pixels"}


def make(**settings: Any) -> MaskUpdater:
    """Without the guard, as the paper has it; test_drop_in.py has the guard."""
    return MaskUpdater(tiny_set(), **{"masks": Pmg(EXTENT), "guard": None, **settings})


class Net(nn.Module):
    """Bright pixels are foreground; with everything in it that an update could disturb."""

    def __init__(self, finish: Callable[[Tensor], Any] = lambda logits: logits):
        super().__init__()
        self.norm, self.drop, self.frozen = nn.BatchNorm2d(1), nn.Dropout(0.5), nn.BatchNorm2d(1)
        self.scale = nn.Conv2d(1, 1, 1)
        nn.init.constant_(self.scale.weight, 2.0)
        nn.init.constant_(self.scale.bias, -3.0)
        self.finish = finish

    def forward(self, images: Tensor) -> Any:
        return self.finish(self.frozen(self.drop(self.norm(self.scale(images)))))


def expected(updater: MaskUpdater, net: nn.Module) -> Tensor:
    """The library's own way from a network to hybrid masks."""
    data = updater.data
    return update(predict(net, data), updater.initial, data.points, radius=updater.rule.radius, sizes=data.sizes)


# ---- making one -----------------------------------------------------------------------------------------------------


def test_from_folder_store_and_tensors_agree(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "tiny")
    pack_folder(root, tmp_path / "tiny.h5")
    data = load_folder(root, "train")
    wanted = point_to_mask(data.images, data.points, sizes=data.sizes, extent=25)
    folder = MaskUpdater.from_folder(root, "train", device="cpu")
    assert torch.equal(folder.initial, wanted) and torch.equal(folder.masks, wanted) and wanted.any()
    assert folder.data.masks is None and len(folder) == 6
    assert torch.equal(MaskUpdater.from_store(tmp_path / "tiny.h5", device="cpu").initial, wanted)
    tensors = MaskUpdater.from_tensors(
        data.images[:, None], data.points.flip(0), sizes=data.sizes, names=data.names, mean=data.mean, std=data.std
    )
    assert torch.equal(tensors.initial, wanted)
    net = Net()
    for one in (folder, tensors):
        one.update(net, "logits")
    assert torch.equal(folder.masks, tensors.masks) and not torch.equal(folder.masks, wanted)


def test_ground_truth_is_not_needed(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "tiny")
    with_truth = MaskUpdater.from_folder(root, device="cpu").initial
    for mask in (root / "masks").iterdir():  # damaged: it must not even be opened
        mask.write_bytes(b"no image")
    assert torch.equal(MaskUpdater.from_folder(root, device="cpu").initial, with_truth)
    for mask in (root / "masks").iterdir():
        mask.unlink()
    assert torch.equal(MaskUpdater.from_folder(root, device="cpu").initial, with_truth)


def test_extent_of_the_paper_by_data_set() -> None:
    data = tiny_set()
    assert MaskUpdater(data).maker.extent == 25
    data.dataset = "NUDT-SIRST"
    assert MaskUpdater(data).maker.extent == 10
    for masks in (Pmg(extent=7), "pmg:extent=7"):
        assert MaskUpdater(data, masks).maker.extent == 7


def test_extent_chosen_from_the_set() -> None:
    data = tiny_set(SIZES * 4)
    chosen = choose_extent(data, half_width=2, alpha=0.1)
    for masks in (Pmg("auto", half_width=2, alpha=0.1), "pmg:extent=auto,half_width=2,alpha=0.1"):
        assert MaskUpdater(data, masks).maker.extent == chosen != 25


def test_one_image_by_eye() -> None:
    """A 3 x 3 target; the prediction adds a row to it and sees a false alarm 40 pixels away."""
    image = torch.full((1, 64, 64), 10.0)
    image[0, 9:12, 9:12] = 200
    updater = MaskUpdater.from_tensors(image, torch.tensor([[0, 10, 10]]), masks="pmg:extent=6")
    assert updater.masks.nonzero()[:, 1:].tolist() == [[y, x] for y in (9, 10, 11) for x in (9, 10, 11)]
    prediction = torch.full((1, 1, 64, 64), -5.0)
    prediction[0, 0, 9:13, 9:12] = 5
    prediction[0, 0, 50:52, 50:52] = 5
    changes = updater.update_one(0, prediction, "logits")
    assert updater.masks.nonzero()[:, 1:].tolist() == [[y, x] for y in (9, 10, 11, 12) for x in (9, 10, 11)]
    assert (changes.pixels, changes.erased, changes.retrieved, changes.non_finite) == (3, 1, 0, 0)
    assert str(changes) == "3 pixels changed, 1 components erased, 0 targets brought back"
    nothing = updater.update_one(0, torch.full((64, 64), -5.0), "logits")
    assert torch.equal(updater.masks, updater.initial)  # always from the initial masks
    assert (nothing.pixels, nothing.erased, nothing.retrieved) == (3, 0, 1)


# ---- updating -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("network", ["acm", "dnanet"])
def test_update_equals_the_free_functions(network: str) -> None:
    """Both networks in training mode, where DNANet returns four heads."""
    updater = make()
    net = build_model(network, output_bias=0.0)
    logits = torch.cat([values.flatten() for _, values in predict_logits(net, updater.data)])
    for convolution in net.output_convolutions():  # a tenth of everything is foreground
        nn.init.constant_(convolution.bias, -float(logits[logits.isfinite()].quantile(0.9)))
    wanted = expected(updater, net)
    changes = updater.update(net, "logits")
    assert torch.equal(updater.masks, wanted) and not torch.equal(wanted, updater.initial)
    assert changes.pixels == int((wanted ^ updater.initial).sum()) and changes.masks is None
    assert torch.equal(make().initial, updater.initial)


@pytest.mark.parametrize(
    ("finish", "output"),
    [
        (torch.sigmoid, "probabilities"),
        (lambda logits: [-logits, logits], ("logits", -1)),
        (lambda logits: (logits.new_zeros(3), logits.sigmoid()), ("probabilities", 1)),
        (lambda logits: [logits], "logits"),
        (lambda logits: {"head": logits}, lambda result: result["head"].sigmoid()),
        (lambda logits: logits, lambda logits: logits > 0),
        (lambda logits: logits[:, 0], "logits"),
        (lambda logits: nn.functional.pad(logits, (0, 32, 0, 32), value=9.0), "logits"),
        (lambda logits: logits.bfloat16().float(), "logits"),
    ],
    ids=["sigmoid", "heads", "sigmoid heads", "one head", "function", "bool", "no channel", "padded", "plain"],
)
def test_kinds_of_output(finish: Callable[[Tensor], Any], output: Any) -> None:
    updater = make()
    plain = Net()
    wanted = expected(updater, plain)
    output, head = output if isinstance(output, tuple) else (output, None)
    updater.update(Net(finish), output, head=head)
    assert torch.equal(updater.masks, wanted) and not torch.equal(wanted, updater.initial)


def test_threshold_is_a_probability() -> None:
    updater = make()
    counts = []
    for threshold in (0.3, 0.9):
        updater.update(Net(), "logits", threshold=threshold)
        logits = updater.masks.clone()
        updater.update(Net(torch.sigmoid), "probabilities", threshold=threshold)
        assert torch.equal(updater.masks, logits)
        counts.append(int(logits.sum()))
    assert counts[0] > counts[1]


def test_update_one_equals_update() -> None:
    """Names, paths, indices, tensors and batches, with predictions cut to the image, padded, and in several shapes."""
    whole, single = make(), make()
    net = Net().eval()
    whole.update(net, "logits")
    data = whole.data
    keys = ["train0", "some/folder/train1.png", 2, torch.tensor([3]), np.int64(4), torch.tensor(5)]
    for index, ((height, width), key) in enumerate(zip(SIZES, keys, strict=True)):
        image = torch.zeros(1, 1, 64, 64)
        image[0, 0, :height, :width] = (data.images[index, :height, :width].float() - data.mean) / data.std
        with torch.no_grad():
            prediction = net(image)
        prediction = (prediction, prediction[..., :height, :width], prediction[0, 0, :height, :width])[index % 3]
        changes = single.update_one(key, prediction.requires_grad_(), "logits")
        assert changes.masks.shape == prediction.shape and changes.masks.dtype == torch.float32
        assert torch.equal(
            changes.masks.view(prediction.shape[-2:])[:height, :width] > 0, whole.masks[index, :height, :width]
        )
        assert changes.masks.sum() == whole.masks[index].sum()
    assert torch.equal(single.masks, whole.masks)

    again = make()
    values = torch.full((3, 1, 64, 64), torch.nan)
    for place, index in enumerate((4, 0, 2)):
        values[place, 0, : data.images.shape[1], : data.images.shape[2]] = whole.masks[index].float()
    again.update_one(["train4", "train0", 2], values, "probabilities")
    assert torch.equal(again.masks[[4, 0, 2]], whole.masks[[4, 0, 2]])
    assert torch.equal(again.masks[[1, 3, 5]], whole.initial[[1, 3, 5]])


def test_bool_prediction_and_heads_for_update_one() -> None:
    first, second = make(), make()
    prediction = torch.rand(1, 1, 48, 48) > 0.8
    first.update_one(1, prediction, "logits")
    second.update_one(1, [torch.zeros(3), torch.where(prediction, 2.0, -2.0)], "logits", head=-1)
    assert torch.equal(first.masks, second.masks) and not torch.equal(first.masks, first.initial)


def test_counts_against_a_slow_count() -> None:
    from scipy import ndimage

    updater = make(rule=Union(radius=6))
    net = Net()
    nn.init.constant_(net.scale.bias, -0.2)  # noise enough for components far from the points
    prediction = predict(net, updater.data)
    before = updater.masks
    changes = updater.update(net, "logits")
    erased = retrieved = 0
    for index, (height, width) in enumerate(SIZES):
        points = updater.data.points[updater.data.points[:, 0] == index, 1:].numpy()
        kept = np.zeros((height, width), bool)
        labels, count = ndimage.label(prediction[index, :height, :width].numpy(), np.ones((3, 3)))
        for label in range(1, count + 1):
            centre = np.argwhere(labels == label).mean(0)
            near = (np.abs(points - centre).sum(1) <= 6).any()
            erased += not near
            kept |= (labels == label) & near
        labels, count = ndimage.label(updater.initial[index, :height, :width].numpy(), np.ones((3, 3)))
        retrieved += sum(not kept[labels == label].any() for label in range(1, count + 1))
    assert erased > 5
    assert (changes.erased, changes.retrieved) == (erased, retrieved)
    assert changes.pixels == int((before ^ updater.masks).sum())


# ---- what must not go wrong -----------------------------------------------------------------------------------------


def test_logits_sold_as_probabilities_change_nothing() -> None:
    updater = make()
    changes = updater.update(Net(), "probabilities", check=False)
    assert torch.equal(updater.masks, updater.initial)
    refused(lambda: changes.pixels, "outside 0 to 1", 'output="logits"')
    updater.update(Net(torch.sigmoid), "probabilities")  # told once
    assert not torch.equal(updater.masks, updater.initial)


@pytest.mark.parametrize("call", ["update", "update_one", "as_list", "export", "state_dict"])
def test_an_unread_fault_is_told_later(call: str, tmp_path: Path) -> None:
    updater = make()
    changes = updater.update_one(0, torch.full((64, 64), 1.5), "probabilities", check=False)
    assert torch.equal(updater.masks, updater.initial) and changes.masks is not None
    calls = {
        "update": lambda: updater.update(Net(), "logits"),
        "update_one": lambda: updater.update_one(1, torch.zeros(64, 64), "logits"),
        "as_list": updater.as_list,
        "export": lambda: updater.export(tmp_path / "masks"),
        "state_dict": updater.state_dict,
    }
    refused(calls[call], "outside 0 to 1")
    calls[call]()


def test_only_the_image_decides_about_probabilities() -> None:
    """Values in the padding may be anything: networks write what they like there."""
    updater = make()
    height, width = SIZES[0]
    prediction = torch.full((1, 1, 64, 64), 7.0)
    prediction[..., :height, :width] = 0.1
    assert updater.update_one(0, prediction, "probabilities").non_finite == 0


def test_non_finite_predictions_are_counted() -> None:
    updater = make()
    height, _ = SIZES[1]
    prediction = torch.full((1, 1, 64, 64), -1.0)
    prediction[0, 0, 2, 3:8] = torch.nan
    prediction[0, 0, 3, 3] = -torch.inf
    prediction[0, 0, height:, :] = torch.nan  # beyond the image
    changes = updater.update_one(1, prediction, "logits")
    assert changes.non_finite == 6 and "6 predicted pixels not finite" in str(changes)
    assert torch.equal(updater.masks, updater.initial)  # NaN is background
    assert updater.update(Net(lambda logits: logits * torch.nan), "logits").non_finite == sum(h * w for h, w in SIZES)


@pytest.mark.parametrize("threshold", [0.5, 0.8])
def test_soft_fusion_in_place_of_the_union(threshold: float) -> None:
    """Logits and probabilities give what the free function gives; a bool prediction counts as 0 and 1."""
    net = Net()
    updater = make(rule="soft")
    data = updater.data
    assert torch.equal(updater._soft >= 0.5, updater.initial)
    logits = torch.full(data.images.shape, -torch.inf)
    for chunk, values in predict_logits(net, data):
        logits[chunk] = values
    settings = {"radius": updater.rule.radius, "sizes": data.sizes}
    wanted = soft_update(logits.sigmoid(), updater._soft, data.points, threshold=threshold, **settings)
    updater.update(net, "logits", threshold=threshold)
    assert torch.equal(updater.masks, wanted) and not torch.equal(wanted, expected(make(), net))
    other = make(rule="soft")
    other.update(net, lambda output: output.sigmoid(), threshold=threshold)
    assert torch.equal(other.masks, wanted)
    hard = make(rule="soft")
    hard.update_one(range(len(data)), logits > 0, "logits")
    plain = soft_update((logits > 0).float(), updater._soft, data.points, **settings)
    assert torch.equal(hard.masks, plain)
    heavy = make(rule=Soft(weight=0.9))
    heavy.update(net, "logits", threshold=threshold)
    weighed = soft_update(logits.sigmoid(), updater._soft, data.points, weight=0.9, threshold=threshold, **settings)
    assert torch.equal(heavy.masks, weighed) and not torch.equal(weighed, wanted)
    state = updater.state_dict()
    with pytest.raises(InputError, match="its rule is"):
        make().load_state_dict(state)
    with pytest.raises(InputError, match="expected one of auto, union, soft"):
        make(rule="hard")


def test_guard_ignores_a_prediction_of_everything() -> None:
    """Without it an untrained network fills an image whose target lies in the middle; with it the mask stays."""
    image = torch.full((2, 40, 40), 10.0)
    image[:, 19:22, 19:22] = 200
    points = torch.tensor([[0, 20, 20], [1, 20, 20]])
    everything = torch.ones(2, 1, 40, 40)
    everything[1, 0, 23:] = -1.0  # 57.5 %
    free = MaskUpdater.from_tensors(image, points, masks=Pmg(6), guard=None)
    assert free.update_one([0, 1], everything, "logits").ignored == 0 and free.masks[0].all()
    guarded = MaskUpdater.from_tensors(image, points, masks=Pmg(6), guard=0.6)
    guarded.update_one([0, 1], torch.where(torch.arange(40) < 22, everything, -1.0), "logits")
    before = guarded.masks.clone()
    with pytest.warns(UserWarning, match="1 of 2 images cover more than 60 %"):
        changes = guarded.update_one([0, 1], everything, "logits")
    assert (changes.ignored, changes.retrieved) == (1, 0) and "1 predictions ignored" in str(changes)
    assert torch.equal(guarded.masks[0], before[0]) and guarded.masks[1, :23].all()
    assert not changes.prediction[0].any() and torch.equal(changes.prediction[1], everything[1, 0] > 0)


def test_what_was_predicted_and_what_was_kept_of_it() -> None:
    """Of a whole set and of a batch in another order, whose points are renumbered."""
    updater, net = make(rule=Union(radius=6)), Net()
    nn.init.constant_(net.scale.bias, -0.2)  # noise enough for components far from the points
    data = updater.data
    wanted = predict(net, data)
    kept = false_alarm_filter(wanted, data.points, radius=6, sizes=data.sizes)
    changes = updater.update(net, "logits")
    assert torch.equal(changes.prediction, wanted) and torch.equal(changes.filtered, kept)
    assert kept.any() and not torch.equal(kept, wanted)
    index = [4, 0, 2]
    part = updater.update_one(index, wanted[index], "logits")
    assert torch.equal(part.prediction, wanted[index]) and torch.equal(part.filtered, kept[index])


class Steady(Rule):
    """Takes what two predictions in a row agree on, and shows what a rule is given."""

    name = "steady"

    def correct(self, evidence: Evidence) -> Tensor:
        self.seen.append(evidence)
        return evidence.initial | (evidence.prediction & evidence.current)


def test_a_rule_of_ones_own() -> None:
    Steady.seen = seen = []
    updater = make(rule=Steady(radius=3))
    updater.masks |= True
    everything = torch.ones(1, 64, 64, dtype=torch.bool)
    changes = updater.update_one(2, everything, "logits")
    height, width = SIZES[2]
    inside = torch.zeros(updater.masks.shape[1:], dtype=torch.bool)
    inside[:height, :width] = True
    assert torch.equal(updater.masks[2], inside) and updater.masks[0].all()
    assert torch.equal(changes.filtered[0], false_alarm_filter(inside[None], changes._points, radius=3)[0])
    (evidence,) = seen
    assert torch.equal(evidence.points[:, 1:], updater.data.points[2:3, 1:]) and not evidence.points[:, 0].any()
    assert torch.equal(evidence.initial[0], updater.initial[2]) and evidence.current.all()
    assert evidence.probability is evidence.initial_probability is None
    assert evidence.sizes.tolist() == [[height, width]]
    assert updater.state_dict()["settings"]["rule"] == {"rule": "steady", "radius": 3}


def test_a_failing_network_changes_nothing() -> None:
    updater, net = make(), Net(lambda logits: 1 / 0)
    net.frozen.eval()
    with pytest.raises(ZeroDivisionError):
        updater.update(net, "logits")
    assert torch.equal(updater.masks, updater.initial) and net.training and not net.frozen.training


# ---- the caller's program -------------------------------------------------------------------------------------------


def global_state() -> tuple:
    return (
        torch.get_rng_state().tolist(),
        random.getstate(),
        np.random.get_state()[1].tolist(),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_autocast_dtype("cpu"),
        torch.is_autocast_cache_enabled(),
        torch.get_num_threads(),
        torch.get_default_dtype(),
    )


def test_nothing_of_the_caller_is_touched() -> None:
    """Dropout that draws in eval mode, a frozen layer, gradients in flight, buffers, and every global switch."""
    net = Net(lambda logits: nn.functional.dropout(logits, 0.1, training=True))
    net.train()
    net.frozen.eval()
    net(torch.rand(2, 1, 32, 32)).sum().backward()
    gradients = [parameter.grad.clone() for parameter in net.parameters()]
    weights = {name: value.clone() for name, value in net.state_dict().items()}
    prediction = torch.rand(64, 64)
    before = global_state()

    updater = make()
    updater.update(net, "logits", autocast=True)
    updater.update_one(0, prediction, "probabilities").pixels  # noqa: B018
    loader = updater.loader(2, 32)
    next(iter(loader))
    updater.as_list()

    assert global_state() == before
    assert [module.training for module in net.modules()] == [True, True, True, False, True]
    assert all(torch.equal(p.grad, g) for p, g in zip(net.parameters(), gradients, strict=True))
    assert all(torch.equal(net.state_dict()[name], value) for name, value in weights.items())
    assert not any(module._forward_hooks for module in net.modules())


def test_inside_autocast_the_gradients_survive() -> None:
    """Weights cast without gradient must not stay in autocast's cache for the training step that follows."""
    updater, net = make(), Net()
    with torch.autocast("cpu", torch.bfloat16):
        updater.update(net, "logits", autocast=True)
        loss = net(torch.rand(2, 1, 32, 32)).float().square().mean()
    loss.backward()
    assert net.scale.weight.grad is not None
    with torch.autocast("cpu", torch.bfloat16):
        updater.update(net, "logits")
    inside = updater.masks
    updater.update(net, "logits")
    assert torch.equal(updater.masks, inside)  # the caller's autocast does not decide about the masks


def test_inside_inference_mode_the_masks_can_be_trained_on() -> None:
    net = Net()
    with torch.inference_mode():
        updater = make()
        updater.update(net, "logits")
        updater.update_one(0, torch.rand(64, 64), "probabilities")
    images, masks = next(iter(updater.loader(2, 32)))
    (net(images).sigmoid() * masks).sum().backward()
    assert net.scale.weight.grad is not None


def test_compiled_network() -> None:
    updater, net = make(), Net()
    wanted = expected(updater, net)
    compiled = torch.compile(net, backend="eager")
    compiled.train()
    updater.update(compiled, "logits")
    assert torch.equal(updater.masks, wanted) and net.training and compiled.training


# ---- loader, export, state ------------------------------------------------------------------------------------------


def test_loader_gives_the_trainers_batches() -> None:
    updater = make()
    updater.update(Net(), "logits")
    loader = updater.loader(2, 32, seed=5)
    assert len(loader) == 3
    for epoch in (0, 1):
        wanted = list(batches(updater.data, updater.masks, batch_size=2, patch_size=32, seed=5, epoch=epoch))
        found = list(loader)
        assert len(found) == 3
        for (image, mask), (own_image, own_mask) in zip(wanted, found, strict=True):
            assert torch.equal(image, own_image) and torch.equal(mask.float(), own_mask)
            assert own_mask.dtype == torch.float32 and own_mask.shape == (2, 1, 32, 32)
    resumed = updater.loader(2, 32, seed=5)
    resumed.epoch = 1
    assert all(torch.equal(a[0], b[0]) for a, b in zip(resumed, found, strict=True))
    assert torch.equal(next(resumed.steps(1, start=2))[0], found[2][0])


def test_loader_shows_what_was_corrected_again() -> None:
    """Hard examples, as train.py has them: false alarms and missed targets, seen in a share of crops more."""
    updater = make(rule=Union(radius=2))
    changes = updater.update(Net(), lambda out: (torch.sin(1000 * out) > 0.98).float())  # specks everywhere
    found = changes.corrected
    prediction, points = changes.prediction.numpy(), updater.data.points.numpy()
    wanted = []
    for image, plane in enumerate(prediction):
        components, count = ndimage.label(plane, np.ones((3, 3)))
        for y, x in ndimage.center_of_mass(plane, components, range(1, count + 1)):
            own = points[points[:, 0] == image, 1:]
            if not (np.abs(own - (y, x)).sum(1) <= 2).any():
                wanted.append((image, round(y), round(x)))
    assert len(wanted) == changes.erased > 3
    for image, plane in enumerate(updater.initial.numpy()):
        components, count = ndimage.label(plane, np.ones((3, 3)))
        hit = components[changes.filtered[image].numpy()]
        centres = ndimage.center_of_mass(plane, components, [k for k in range(1, count + 1) if k not in hit])
        wanted += [(image, round(y), round(x)) for y, x in centres]
    assert len(wanted) == changes.erased + changes.retrieved > changes.erased
    assert sorted(map(tuple, found.tolist())) == sorted(wanted)

    loader, plain = updater.loader(2, 16, seed=5, hard_examples=0.5), updater.loader(2, 16, seed=5)
    assert len(loader) == len(plain) == 3  # nothing is known yet
    assert all(torch.equal(a[0], b[0]) for a, b in zip(loader.steps(0), plain.steps(0), strict=True))
    loader.corrected = found
    assert len(loader) == 5  # three crops more, and a last batch that is filled up
    sizes = updater.data.host_sizes
    plan = draw_epoch(sizes, 2, 16, seed=5, epoch=0, places=found, hard_examples=0.5).to(updater.device)
    steps = [cut_crops(updater.data, updater.masks, rows, 16) for rows in plan]
    assert all(torch.equal(a[0], b[0]) for a, b in zip(loader, steps, strict=True))
    loader.corrected = found[:0]
    assert len(loader) == 3


@pytest.mark.parametrize(
    "corrected", [[[0, 1, 1]], torch.zeros(2, 3), torch.tensor([[6, 0, 0]]), torch.tensor([[0, 99, 0]])]
)
def test_loader_refuses_what_are_no_places(corrected: Any) -> None:
    loader = make().loader(2, 16, hard_examples=0.5)
    loader.corrected = corrected
    refused(lambda: len(loader), "loader: corrected are not int64 [A, 3]", "an update of the whole set")
    refused(lambda: next(iter(loader)), "loader: corrected are not int64 [A, 3]")


def test_loader_shows_images_of_the_pool_alone() -> None:
    updater = make(rule="pal")
    loader = updater.loader(1, 16, hard_examples=1)
    loader.corrected = torch.tensor([[0, 3, 3], [4, 3, 3]])
    updater.active = torch.tensor([False, True, True, False, True, False])
    assert len(loader) == 6
    seen = draw_epoch(
        updater.data.host_sizes, 1, 16, seed=0, epoch=0, images=updater.pool, places=loader.corrected, hard_examples=1.0
    )
    assert sorted(seen[:, 0, 0].tolist()) == [1, 2, 4, 4, 4, 4]
    loader.corrected = loader.corrected[:1]
    assert len(loader) == 3


def test_loader_follows_an_update_within_an_epoch() -> None:
    updater = make()
    steps = iter(updater.loader(6, 48))
    updater.masks = torch.ones_like(updater.masks)
    _, masks = next(steps)
    assert masks.sum() == sum(h * w for h, w in SIZES)


def test_export_is_what_a_folder_reader_gets(tmp_path: Path) -> None:
    updater = make()
    updater.update(Net(), "logits")
    folder = tmp_path / "masks_hmg"
    updater.export(folder)
    arrays = updater.as_list()
    assert sorted(path.name for path in folder.iterdir()) == [f"train{index}.png" for index in range(6)]
    for index, (size, array) in enumerate(zip(SIZES, arrays, strict=True)):
        height, width = size
        mask = updater.masks[index, :height, :width].numpy()
        assert np.array_equal(read_mask(folder / f"train{index}.png", size), mask)
        assert array.dtype == np.float32 and np.array_equal(array, mask.astype(np.float32)) and array.any()


def test_state_survives_a_file(tmp_path: Path) -> None:
    updater, net = make(), Net()
    updater.update(net, "logits")
    torch.save(updater.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    other = make()
    other.load_state_dict(state)
    assert torch.equal(other.masks, updater.masks) and torch.equal(other.initial, updater.initial)
    for one in (updater, other):
        nn.init.constant_(net.scale.bias, -1.0)
        one.update(net, "logits")
    assert torch.equal(other.masks, updater.masks)
    assert not torch.equal(other.masks, state["masks"])  # the state that was loaded is not written to


def test_state_of_another_set_is_refused() -> None:
    updater = make()
    state = updater.state_dict()
    other = tiny_set(seed=1)
    shorter, stranger = (MaskUpdater(data, Pmg(EXTENT), guard=None) for data in (tiny_set(SIZES[:5]), other))
    refused(lambda: make(rule=Union(31)).load_state_dict(state), "'radius': 30", "'radius': 31")
    refused(lambda: shorter.load_state_dict(state), "the list of images is another: 1 fewer (train5 ...)")
    words = ("6 points of 6 differ, first in train0; 6 images of 6 differ, first train0", "changed_data=True")
    refused(lambda: stranger.load_state_dict(state), *words)
    refused(lambda: updater.load_state_dict({"masks": updater.masks}), "state_dict()")
    refused(lambda: updater.load_state_dict(state | {"masks": updater.masks.float()}), "masks is torch.float32")
    for name in ("initial", "masks"):  # one pixel, as a flipped bit makes it
        damaged = state[name].clone()
        damaged[2, 3, 4] ^= True
        refused(lambda changed=state | {name: damaged}: updater.load_state_dict(changed), "checksum")
    updater.update_one(0, torch.ones(*updater.data.images.shape[1:]), "probabilities")  # in place
    updater.load_state_dict(state)


@pytest.fixture(scope="module")
def student() -> Student:
    """Not trained: its probabilities are anything, and its masks PMG's where they do not fit."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = CropNet()
    return Student({EXTENT: [network]}, StudentSettings(crop=16, members=1, flips=False))


def test_state_of_another_maker_or_rule_is_refused(student: Student) -> None:
    """One line names what differs, and nothing of the updater changes."""
    learned = {"masks": Learned(student=student, pmg=Pmg(EXTENT))}
    kinds = {
        "masks 'maker': 'pmg'": {},
        "masks 'extent': 9": {"masks": Pmg(9)},
        "masks 'alpha': 0.3": {"masks": Pmg(EXTENT, alpha=0.3)},
        "masks 'directional': False": {"masks": Pmg(EXTENT, directional=False)},
        "masks 'maker': 'learned'": learned,
        "rule {'rule': 'union', 'radius': 5}": {"rule": Union(5)},
        "rule {'rule': 'soft', 'radius': 30, 'weight': 0.7}": {"rule": "soft"},
        "rule {'rule': 'soft', 'radius': 30, 'weight': 0.6}": {"rule": Soft(weight=0.6)},
        "guard 0.5": {"guard": 0.5},
    }
    updaters = {name: make(**settings) for name, settings in kinds.items()}
    first, *others = kinds
    for name in others:
        what, _, value = name.partition(" ")
        for theirs, mine in ((name, first), (first, name)):
            updater = updaters[mine]
            before = {key: value.clone() for key, value in updater._tensors().items()}
            state = updaters[theirs].state_dict()
            state["masks"] = ~state["masks"]
            load = partial(updater.load_state_dict, state)
            refused(load, f"state: its {what} is ", value, "use the same")
            assert all(torch.equal(value, updater._tensors()[key]) for key, value in before.items())
    other = Student(student.networks, student.settings, 0.35)
    stranger = make(masks=Learned(student=other, pmg=Pmg(EXTENT)))
    state = updaters["masks 'maker': 'learned'"].state_dict()
    refused(lambda: stranger.load_state_dict(state), "its masks is", student.digest(), other.digest())
    again = make(**learned)
    again.load_state_dict(state)
    assert torch.equal(again.masks, state["masks"])


def test_state_of_an_older_layout_is_refused() -> None:
    updater = make()
    state = updater.state_dict()
    older = {"names": updater.data.names, "points": updater.data.points}
    older |= {name: value for name, value in state.items() if name not in RECORD}
    refused(lambda: updater.load_state_dict(older), "older layout", "anew")
    settings = {"extent": 8, "half_width": 4, "alpha": 0.15, "radius": 30, "fusion": "union"}
    refused(lambda: updater.load_state_dict(updater.state_dict() | {"settings": settings}), "older layout", "anew")


@pytest.mark.parametrize("masks", ["pmg", "learned"])
def test_state_restores_the_probabilities(masks: str, student: Student, tmp_path: Path) -> None:
    """They come from the state: images that have changed since are told, and do not change them."""
    maker = {"pmg": Pmg(EXTENT), "learned": Learned(student=student, pmg=Pmg(EXTENT))}[masks]
    updater, net = make(masks=maker, rule=Soft(weight=0.6)), Net()
    updater.update(net, "logits")
    torch.save(updater.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert state.keys() == {*RECORD, "settings", "data_changed", "initial", "masks", "soft", "checksum"}
    assert state["settings"] == {
        "masks": maker.about(),
        "rule": {"rule": "soft", "radius": 30, "weight": 0.6},
        "guard": None,
    }
    data = tiny_set()
    data.images = 255 - data.images
    other = MaskUpdater(data, maker, Soft(weight=0.6), guard=None)
    assert not torch.equal(other._soft, updater._soft) and not torch.equal(other.initial, updater.initial)
    changed = "6 images of 6 differ, first train0"
    refused(lambda: other.load_state_dict(state), f"the data changed since it was made: {changed}; load the same")
    assert other.data_changed == []
    other.load_state_dict(state, changed_data=True)
    assert other.data_changed == [changed] == other.state_dict()["data_changed"]
    assert torch.equal(other._soft, updater._soft) and other._soft is not state["soft"]
    assert torch.equal(other.initial, updater.initial) and torch.equal(other.masks, updater.masks)
    prediction = predict(net, updater.data)
    for one in (updater, other):
        one.update_one(range(6), prediction, "logits")
    assert torch.equal(other.masks, updater.masks)
    without = {name: value for name, value in state.items() if name != "soft"}
    refused(lambda: other.load_state_dict(without), "state_dict()")
    refused(lambda: other.load_state_dict(state | {"soft": state["soft"] > 0}), "soft is torch.bool")
    plain = make(masks=maker, rule="union")
    refused(lambda: plain.load_state_dict(plain.state_dict() | {"soft": state["soft"]}), "state_dict()")


# ---- refusals -------------------------------------------------------------------------------------------------------


def test_refusals() -> None:
    updater, plane = make(), torch.zeros(64, 64)
    no_points = tiny_set()
    no_points.points = no_points.points[:0]
    refused(lambda: MaskUpdater(no_points), "no point label")
    refused(lambda: make(guard=0.0), "guard = 0.0")
    refused(lambda: updater.update(Net(), "sigmoid"), "'sigmoid'", "logits, probabilities or a function")
    refused(lambda: updater.update(Net(), "logits", threshold=1.0), "threshold 1.0")
    refused(lambda: updater.update_one("train9", plane, "logits"), "'train9'", "train0")
    refused(lambda: updater.update_one(6, plane, "logits"), "image 6", "0 to 5")
    refused(lambda: updater.update_one(-1, plane, "logits"), "image -1")
    refused(lambda: updater.update_one(1.5, plane, "logits"), "1.5")
    refused(lambda: updater.update_one([0, 0], torch.zeros(2, 64, 64), "logits"), "train0 comes twice")
    refused(lambda: updater.update_one([0, 1], plane, "logits"), "[2, 1, h, w]", "[1, 64, 64]")
    refused(lambda: updater.update_one(0, plane[:30], "logits"), "30 x 64", "train0", "never resized")
    refused(lambda: updater.update_one(0, plane.long(), "logits"), "int64")
    refused(lambda: updater.update_one(0, {"head": plane}, "logits"), "dict", "output=FUNCTION")
    refused(lambda: updater.update(Net(lambda logits: {"head": logits}), "logits"), "dict", "output=FUNCTION")
    half, double = Net(lambda logits: logits[..., ::2, ::2]), Net(lambda logits: logits.expand(-1, 2, -1, -1))
    refused(lambda: updater.update(half, "logits"), "[2, 1, 32, 32], got [2, 1, 16, 16]", "output=FUNCTION")
    refused(lambda: updater.update(double, "logits"), "got [2, 2, 32, 32]", "output=FUNCTION")
    refused(lambda: updater.loader(0, 32), "batch_size 0")
    refused(lambda: MaskUpdater.from_tensors(plane[None], torch.tensor([[0, 1, 1]]), names=["a", "b"]), "1 different")
    with pytest.raises(ValueError, match="row 0"):
        MaskUpdater.from_tensors(plane[None], torch.tensor([[0, 64, 1]]))


# ---- on a GPU -------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_update_one_does_not_synchronise() -> None:
    """The same masks as on the CPU, and nothing is read from the device before somebody asks."""
    data, prediction = tiny_set(), torch.rand(2, 1, 64, 64)
    there = MaskUpdater(data.to("cuda"), Pmg(EXTENT), guard=None)
    on_device = prediction.cuda()
    there.update_one([0, 3], on_device, "probabilities", check=False)  # builds the kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        changes = there.update_one([0, 3], on_device, "probabilities", check=False)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    here = make()
    here.update_one([0, 3], prediction, "probabilities")
    assert torch.equal(there.masks.cpu(), here.masks) and changes.pixels == 0
    here.update(Net(), "logits")
    there.update(Net().cuda(), "logits")
    assert (there.masks.cpu() ^ here.masks).sum() <= 2  # a logit within rounding of 0
    there.update_one(0, on_device[:1] * 2, "probabilities", check=False)
    torch.cuda.synchronize()
    refused(there.as_list, "outside 0 to 1")


# ---- several processes ----------------------------------------------------------------------------------------------


def run_rank(rank: int, ranks: int, folder: Path) -> None:
    """One rank: update, read the result, take the loader's first epoch, export."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=ranks)
    net = build_model("acm", output_bias=0.0)
    net.load_state_dict(torch.load(folder / "net.pt", weights_only=True))
    if rank == 1:  # batch norm statistics drift apart between DDP's forward passes; rank 0's count
        net.load_state_dict({k: v + 1 if "running_mean" in k else v for k, v in net.state_dict().items()})
    own = {name: value.clone() for name, value in net.named_buffers()}
    wrapped = nn.parallel.DistributedDataParallel(net)
    for name, value in net.named_buffers():  # wrapping broadcasts them
        value.copy_(own[name])
    updater = make()
    changes = updater.update(wrapped, "logits", batch_size=2)
    assert all(torch.equal(value, own[name]) for name, value in net.named_buffers())
    loader = updater.loader(1, 32)
    result = {
        "masks": updater.masks,
        "text": str(changes),
        "images": torch.cat([images for images, _ in loader]),
        "length": len(loader),
    }
    updater.export(folder / "masks")
    torch.save(result, folder / f"rank{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.parametrize("ranks", [2])
def test_ranks_end_with_the_bits_of_one_process(ranks: int, tmp_path: Path) -> None:
    net = build_model("acm", output_bias=0.0)
    torch.save(net.state_dict(), tmp_path / "net.pt")
    alone = make()
    changes = alone.update(net, "logits", batch_size=2)
    torch.multiprocessing.spawn(run_rank, (ranks, tmp_path), nprocs=ranks)
    results = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(ranks)]
    for result in results:
        assert torch.equal(result["masks"], alone.masks) and result["text"] == str(changes)
        assert result["length"] == 3
    assert not torch.equal(alone.masks, alone.initial)
    # Together the ranks see every image of the epoch once, as one process with their joint batch does.
    joint = [images for images, _ in alone.loader(ranks, 32)]
    for step, images in enumerate(joint):
        assert torch.equal(torch.stack([result["images"][step] for result in results]), images)
    assert all(
        np.array_equal(read_mask(tmp_path / "masks" / f"train{i}.png"), alone.as_list()[i] > 0) for i in range(6)
    )
