"""What went wrong when people put MaskUpdater into their trainers: a test for each fault that was reported."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_tools import make as make_masks
from command_tools import refused as refused_command
from command_tools import run
from refusal import refused
from tiny import SIZES, tiny_set, write_folder
from torch import Tensor, distributed, nn
from torch.utils.data import default_collate

from hmg_gpu import HMGError, MaskUpdater
from hmg_gpu.common import parallel
from hmg_gpu.data import load_folder
from hmg_gpu.masks import Pmg
from hmg_gpu.models.predict import padded_side, predict_logits
from hmg_gpu.models.weights import load_model

EXTENT = 8
HEADS = "2 heads; say which by head=: -1 is the last (DNANet), 0 the first (UIUNet, ISNet)"


def make(**settings: Any) -> MaskUpdater:
    return MaskUpdater(tiny_set(), **{"masks": Pmg(EXTENT), **settings})


class Net(nn.Module):
    """Bright pixels are foreground, a few more than in the initial masks; ``finish`` makes the output of the logits."""

    def __init__(self, finish: Callable[[Tensor], Any] = lambda logits: logits, channels: int = 1):
        super().__init__()
        self.scale, self.norm, self.finish = nn.Conv2d(channels, 1, 1), nn.BatchNorm2d(1), finish
        nn.init.constant_(self.scale.weight, 2.0 / channels)
        nn.init.constant_(self.scale.bias, -2.0)
        nn.init.constant_(self.norm.running_mean, 0.25)

    def forward(self, images: Tensor) -> Any:
        return self.finish(self.norm(self.scale(images)))


def corrected(net: nn.Module, output: Any, **settings: Any) -> Tensor:
    """The masks of a fresh updater after one update, which changed some of them."""
    updater = make()
    updater.update(net, output, **settings)
    assert not torch.equal(updater.masks, updater.initial)
    return updater.masks


def nothing_changes(call: Callable[[MaskUpdater], object], *parts: str) -> None:
    """The call is refused at once, and the updater is as before and goes on."""
    updater = make()
    updater.update(Net(), "logits", threshold=0.9)
    before = updater.masks.clone()
    refused(lambda: call(updater), *parts)
    assert torch.equal(updater.masks, before)
    updater.update(Net(), "logits")
    assert torch.equal(updater.masks, corrected(Net(), "logits"))


def prediction_of(index: int, *, side: int = 64) -> Tensor:
    """Logits [1, 1, side, side] of one image of the tiny set, larger than it at the bottom and the right."""
    data, (height, width) = tiny_set(), SIZES[index]
    image = torch.zeros(1, 1, side, side)
    image[0, 0, :height, :width] = (data.images[index, :height, :width].float() - data.mean) / data.std
    with torch.no_grad():
        return Net().eval()(image)


# ---- 1: LESPS -------------------------------------------------------------------------------------------------------


def test_lesps_joins_the_path_as_strings(tmp_path: Path) -> None:
    """dataset_dir + dataset_name is the set; dataset_dir alone holds several sets, and is refused by its path."""
    write_folder(tmp_path / "datasets" / "SIRST3", name="SIRST3")
    dataset_dir, dataset_name = f"{tmp_path}/datasets/", "SIRST3"
    updater = MaskUpdater.from_folder(dataset_dir + dataset_name, "train", points="masks_centroid", device="cpu")
    assert len(updater) == 6 and updater.data.dataset == "SIRST3"
    refused(
        lambda: MaskUpdater.from_folder(dataset_dir, "train", device="cpu"), f"{tmp_path}/datasets", "no such folder"
    )


def test_lesps_list_cache() -> None:
    """A list that the data set's loader holds too is filled in place; the key is then an index in a tensor."""
    updater, whole = make(), make()
    whole.update(Net(), "logits")
    held = cache = [np.ones((3, 3), np.float32)] * 6
    updater.export(cache)
    for index, (height, width) in enumerate(SIZES):
        assert held[index].dtype == np.float32
        assert np.array_equal(held[index] > 0, updater.initial[index, :height, :width].numpy())
        key = default_collate([index])
        assert key.shape == (1,)
        pred = prediction_of(index)[:, :, :height, :width]
        cache[key] = updater.update_one(key, pred, "logits").masks[0, 0].numpy()
        assert np.array_equal(held[index] > 0, whole.masks[index, :height, :width].numpy())
    updater.export(empty := [])
    assert all(np.array_equal(a, b) for a, b in zip(empty, held, strict=True))
    refused(lambda: updater.export(cache[:5]), "5 masks", "6 images")
    refused(lambda: updater.export(3), "export", "folder or a list", "int")


@pytest.mark.parametrize("kind", [list, tuple])
def test_lesps_file_cache(kind: type) -> None:
    """A path of one image comes out of a DataLoader as a list or tuple of one path."""
    updater, other = make(), make()
    path = f"datasets/NUAA-SIRST_DNANet_LESPS_centroid_Tue_Jul_18_00:33:14_2023/{updater.data.names[3]}.png"
    changes = updater.update_one(kind(default_collate([path])), prediction_of(3), "logits")
    other.update_one(3, prediction_of(3), "logits")
    assert torch.equal(updater.masks, other.masks) and changes.pixels > 0


# ---- 2 and 9: what the network returns ------------------------------------------------------------------------------


def test_sigmoid_sold_as_logits_is_refused_at_once() -> None:
    """Every pixel of a sigmoid is a logit above 0: the whole image would become foreground."""
    words = ("all values lie within 0 and 1", 'pass output="probabilities"', "no mask was changed")
    for guard in (0.05, None):
        updater = make(guard=guard)
        refused(lambda updater=updater: updater.update(Net(torch.sigmoid), "logits"), *words)
        assert torch.equal(updater.masks, updater.initial)
    nothing_changes(lambda updater: updater.update(Net(torch.sigmoid), "logits"), *words)
    nothing_changes(lambda updater: updater.update_one(2, prediction_of(2).sigmoid(), "logits"), *words)
    nothing_changes(lambda updater: updater.update_one(2, prediction_of(2).sigmoid().numpy(), "logits"), *words)
    nothing_changes(lambda updater: updater.update(Net(lambda x: [x, x.sigmoid()]), "logits", head=1), *words)


def test_what_the_network_returns_must_be_said() -> None:
    """No default that is wrong for half of the networks."""
    with pytest.raises(TypeError, match="output"):
        make().update(Net())
    with pytest.raises(TypeError, match="output"):
        make().update_one(0, prediction_of(0))


@pytest.mark.parametrize("rule", ["union", "soft"])
def test_logits_promised_as_probabilities_are_refused_in_the_same_update(rule: str) -> None:
    """Also where it is the last one, after which nobody calls anything."""
    words = ("probabilities were promised", "outside 0 to 1", "no mask was changed", 'pass output="logits"')
    updater = make(rule=rule)
    for call in (
        lambda: updater.update(Net(), "probabilities"),
        lambda: updater.update(Net(), lambda logits: logits),
        lambda: updater.update_one([0, 3], torch.cat((prediction_of(0), prediction_of(3))), "probabilities"),
    ):
        refused(call, *words)
        assert torch.equal(updater.masks, updater.initial)
    updater.update(Net(torch.sigmoid), "probabilities")
    assert not torch.equal(updater.masks, updater.initial)


def test_unchecked_faults_are_told_by_the_next_call() -> None:
    """check=False waits for nothing; either kind of fault is told by the next call, whatever it is, once."""
    updater = make()
    updater.update(Net(), "probabilities", check=False)
    assert torch.equal(updater.masks, updater.initial)
    refused(lambda: updater.update(Net(), "logits", check=False), "probabilities were promised")
    updater.update(Net(torch.sigmoid), "logits", check=False)
    assert torch.equal(updater.masks, updater.initial)
    refused(lambda: updater.update_one(0, prediction_of(0), "logits"), "logits were promised")
    changes = updater.update_one(0, prediction_of(0).sigmoid(), "logits", check=False)
    refused(lambda: changes.ignored, "logits were promised")
    updater.update(Net(), "logits", check=False)
    assert torch.equal(updater.masks, corrected(Net(), "logits"))


def test_rounding_is_no_fault() -> None:
    """A resize of probabilities may leave 0 to 1 by a rounding error."""
    masks = corrected(Net(torch.sigmoid), "probabilities")
    assert torch.equal(corrected(Net(lambda x: x.sigmoid() * 1.006 - 0.003), "probabilities"), masks)
    updater = make()
    nothing = torch.zeros(64, 64)
    assert updater.update_one(0, nothing - 0.004, "probabilities").non_finite == 0
    refused(lambda: updater.update_one(0, nothing - 0.02, "probabilities"), "outside 0 to 1")


# ---- 3: several heads -----------------------------------------------------------------------------------------------


def test_which_of_several_heads() -> None:
    """UIUNet has the fused map first, DNANet last, ISNet returns (mask, edge); nobody guesses."""
    masks = corrected(Net(torch.sigmoid), "probabilities")
    side = 0.3  # of a head that sees less
    uiunet = Net(lambda x: tuple((x - shift).sigmoid() for shift in (0.0, side, 2 * side)))
    dnanet = Net(lambda x: [(x - shift).sigmoid() for shift in (2 * side, side, 0.0)])
    isnet = Net(lambda x: (x.sigmoid(), x * 5))
    for net, head in ((uiunet, 0), (dnanet, -1), (dnanet, 2), (isnet, 0), (Net(torch.sigmoid), -1)):
        assert torch.equal(corrected(net, "probabilities", head=head), masks)
    assert torch.equal(corrected(dnanet, lambda heads: heads[-1]), masks)
    assert not torch.equal(corrected(uiunet, "probabilities", head=-1), masks)
    nothing_changes(lambda updater: updater.update(isnet, "probabilities"), HEADS)
    nothing_changes(lambda updater: updater.update(dnanet, "probabilities"), "3 heads", "head=")
    nothing_changes(lambda updater: updater.update(dnanet, "probabilities", head=3), "no head 3", "returned 3")
    nothing_changes(lambda updater: updater.update(isnet, "probabilities", head=1), "outside 0 to 1")
    two = [prediction_of(1), -prediction_of(1)]
    nothing_changes(lambda updater: updater.update_one(1, two, "logits"), HEADS)
    first, second = make(), make()
    first.update_one(1, two, "logits", head=0)
    second.update_one(1, two[0], "logits")
    assert torch.equal(first.masks, second.masks) and not torch.equal(first.masks, first.initial)


# ---- 4: masks of one split ------------------------------------------------------------------------------------------


def pictures(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.png")}


def test_masks_of_one_split_leave_the_ground_truth_of_the_other(tmp_path: Path) -> None:
    """BasicIRSTD reads masks/ for training and for testing: in a copy of the set only the former may be ours."""
    root = write_folder(tmp_path / "datasets" / "tiny")
    out, lists = tmp_path / "masks_hmg", tmp_path / "some.txt"
    assert make_masks(root, out, "--split", "train", "--extent", EXTENT, "--device", "cpu") == 0
    assert sorted(pictures(out)) == [f"train{row}.png" for row in range(6)]
    copy = tmp_path / "datasets_hmg" / "tiny"
    shutil.copytree(root, copy)
    for path in out.glob("*.png"):
        shutil.copy(path, copy / "masks")
    before, after = (pictures(folder / "masks") for folder in (root, copy))
    assert all(after[name] == before[name] for name in before if name.startswith("test"))
    updater = MaskUpdater.from_folder(root, masks=Pmg(EXTENT), device="cpu")
    assert torch.equal(load_folder(copy, "train").masks, updater.initial)
    assert torch.equal(load_folder(copy, "test").masks, load_folder(root, "test").masks)

    lists.write_text("train4.png\n\ntrain0\n")
    assert make_masks(root, tmp_path / "some", "--list", lists, "--extent", EXTENT, "--device", "cpu") == 0
    assert pictures(tmp_path / "some") == {name: pictures(out)[name] for name in ("train0.png", "train4.png")}


def test_a_bad_split_or_list_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Before any mask is written, with exit code 2."""
    root, out = write_folder(tmp_path / "tiny"), tmp_path / "out"
    stranger, empty = tmp_path / "stranger.txt", tmp_path / "empty.txt"
    stranger.write_text("train0\nnobody\n")
    empty.write_text("\n")
    shutil.copytree(root / "images", tmp_path / "frames")
    for options, parts in (
        (("--split", "val"), ("val", "train_tiny.txt")),
        (("--list", stranger), ("stranger.txt", "nobody", "1 of 2 are missing")),
        (("--list", empty), ("empty.txt", "no name")),
        (("--list", tmp_path / "none.txt"), ("none.txt", "cannot be read")),
        (("--split", "train", "--list", stranger), ("--split train", "--list", "one of them")),
    ):
        refused_command(capsys, make_masks(root, out, *options, "--extent", EXTENT), *parts)
    alone = ("masks", "--images", tmp_path / "frames", "--points", root / "masks_centroid", "--out", out)
    refused_command(capsys, run(*alone, "--split", "train"), "--split train", "img_idx", "--list FILE")
    assert not out.exists()


# ---- 5: a function in the module's place ----------------------------------------------------------------------------


def test_a_function_in_the_place_of_a_module_is_refused() -> None:
    """Eval mode would not reach the module behind it: batch norm would learn from the update's batches."""
    net = Net()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    for function in (lambda images: net(images).sigmoid(), net.forward, net.__call__):
        nothing_changes(
            lambda updater, function=function: updater.update(function, "logits"), "torch.nn.Module", "training mode"
        )
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items()) and net.training
    masks = corrected(net, lambda logits: logits.sigmoid())
    assert torch.equal(masks, corrected(Net(), "logits"))
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items()) and net.training


# ---- 6 and 7: what the network is fed -------------------------------------------------------------------------------


def test_the_networks_own_normalisation(tmp_path: Path) -> None:
    """A set that our table has, trained with other numbers: the network goes on seeing its own."""
    root = write_folder(tmp_path / "NUAA-SIRST", name="NUAA-SIRST")
    img_norm_cfg = dict(mean=87.5, std=40.0)
    updater = MaskUpdater.from_folder(root, normalisation=tuple(img_norm_cfg.values()), device="cpu")
    seen: list[Tensor] = []

    def remember(module: nn.Module, inputs: tuple[Tensor]) -> None:
        seen.extend(inputs[0])

    net = Net()
    net.register_forward_pre_hook(remember)
    updater.update(net, "logits", batch_size=1)
    assert len(seen) == 6
    for image in seen:
        pixels = image * 40 + 87.5
        here = [row for row in range(6) if torch.equal(inside(updater, row), crop(pixels, row))]
        assert len(here) == 1
    batch, _ = next(iter(updater.loader(6, 48)))
    assert {*(batch * 40 + 87.5).round().unique().tolist()} <= {*updater.data.images.unique().tolist(), 88.0}


def inside(updater: MaskUpdater, row: int) -> Tensor:
    height, width = updater.data.host_sizes[row].tolist()
    return updater.data.images[row, :height, :width].float()


def crop(pixels: Tensor, row: int) -> Tensor:
    height, width = SIZES[row]
    return pixels[0, :height, :width].round()


def test_share_of_crops_with_a_target() -> None:
    """BasicIRSTD places half of its crops around a target; a loader that cannot trains on empty crops."""
    count, side, patch, epochs = 48, 64, 16, 12
    points = torch.stack((torch.arange(count), *torch.randint(0, side, (2, count))), dim=1)
    updater = MaskUpdater.from_tensors(torch.rand(count, side, side), points, masks=Pmg(EXTENT))
    updater.masks = torch.zeros_like(updater.masks)
    updater.masks[tuple(points.T)] = True
    reach = [[min(int(at), side - patch) - max(0, int(at) - patch + 1) + 1 for at in axis] for axis in points[:, 1:].T]
    chance = np.prod(np.array(reach) / (side - patch + 1), axis=0).mean()  # that a crop anywhere holds its point
    assert chance < 0.2

    def share(positive: float) -> float:
        loader = updater.loader(8, patch, positive=positive)
        found = [bool(mask.any()) for _ in range(epochs) for _, masks in loader for mask in masks]
        assert len(found) == epochs * count
        return float(np.mean(found))

    within = 4 * 0.5 / np.sqrt(epochs * count)
    assert abs(share(0.0) - chance) < within
    assert abs(share(0.5) - (0.5 + 0.5 * chance)) < within
    assert share(1.0) == 1.0
    for plain, none in zip(updater.loader(8, patch, seed=3), updater.loader(8, patch, seed=3, positive=0), strict=True):
        assert torch.equal(plain[0], none[0]) and torch.equal(plain[1], none[1])
    refused(lambda: updater.loader(8, patch, positive=1.5), "positive = 1.5", "0 to 1")
    refused(lambda: updater.loader(8, patch, jitter=-0.1), "jitter = -0.1", "0 to 2")
    refused(lambda: updater.loader(8, patch, hard_examples=2), "hard_examples = 2", "0 to 1")
    refused(lambda: updater.loader(8, patch, margin=-1), "margin -1: expected at least 0")
    beyond = [image for image, _ in updater.loader(8, patch, margin=patch)]
    assert any((image == 0).all(-1).any() for image in beyond)  # rows of padding
    for plain, bright in zip(updater.loader(8, patch), updater.loader(8, patch, jitter=0.5), strict=True):
        assert torch.equal(plain[1], bright[1]) and not torch.isclose(plain[0], bright[0]).all(dim=(1, 2, 3)).any()


# ---- 8: an update that comes too early ------------------------------------------------------------------------------


def test_an_early_prediction_of_everything_is_held_back() -> None:
    """An untrained network calls whole images foreground; the union would keep nothing of the points' masks."""
    everything = Net(lambda logits: logits.abs() + 3)
    updater = make()
    updater.update(Net(), "logits")
    before = updater.masks.clone()
    with pytest.warns(UserWarning) as caught:
        changes = updater.update(everything, "logits")
    (warning,) = caught
    assert "6 of 6 images cover more than 5 % of the image and were not applied" in str(warning.message)
    assert "guard=None" in str(warning.message) and warning.filename == __file__
    assert torch.equal(updater.masks, before) and (changes.ignored, changes.pixels) == (6, 0)
    with pytest.warns(UserWarning, match="1 of 1 images"):
        masks = updater.update_one(4, torch.full((64, 64), 3.0), "logits").masks
    assert torch.equal(masks[: SIZES[4][0], : SIZES[4][1]] > 0, before[4, : SIZES[4][0], : SIZES[4][1]])
    free = make(guard=None)
    assert free.update(everything, "logits").ignored == 0
    assert free.masks.sum() > 2 * free.initial.sum()


def test_the_guard_leaves_a_trained_network_alone(recwarn: pytest.WarningsRecorder) -> None:
    """Where targets are targets it changes no mask and says nothing."""
    guarded, free = make(), make(guard=None)
    for updater in (guarded, free):
        updater.update(Net(), "logits")
    assert torch.equal(guarded.masks, free.masks) and not torch.equal(free.masks, free.initial)
    assert not list(recwarn)


# ---- 11: networks of another kind -----------------------------------------------------------------------------------


def test_three_channels() -> None:
    """Backbones of ImageNet take three; torch's words about weights of size [4, 3, 3, 3] help nobody."""

    def statistics_in_place(module: nn.Module, inputs: tuple[Tensor]) -> None:
        (images,) = inputs
        assert images.shape[1] == 3 and torch.equal(images[:, 0], images[:, 2])
        images.view(len(images), -1)
        images.sub_(0.0)  # normalises its input itself; a view of one channel could not be written to

    net = Net(channels=3)
    net.scale.register_forward_pre_hook(statistics_in_place)
    assert torch.equal(corrected(net, "logits", channels=3), corrected(Net(), "logits"))
    words = ("takes 3 channels, got 1", "channels=3")
    nothing_changes(lambda updater: updater.update(Net(channels=3), "logits"), *words)
    nothing_changes(lambda updater: updater.update(Net(), "logits", channels=3), "takes 1 channels, got 3")
    nothing_changes(lambda updater: updater.update(Net(), "logits", channels=0), "channels 0", "at least 1")
    refused(lambda: next(predict_logits(Net(channels=3), tiny_set())), *words)


def test_an_error_of_the_networks_own_stays_as_it_is() -> None:
    """Only what we can explain is told in our words."""

    def fail(logits: Tensor) -> Tensor:
        raise RuntimeError("only like those")

    class Coloured(Net):  # makes its three channels itself
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images.expand(-1, 3, -1, -1))

    for net in (Net(fail), Coloured(fail, channels=3), nn.Sequential(Net(), nn.Conv2d(3, 1, 1))):
        with pytest.raises(RuntimeError, match=r"to have 3 channels|only like those"):
            make().update(net, "logits")


def test_a_network_on_another_device_is_named() -> None:
    """The updater is on the GPU by default, a network where its trainer put it."""
    refused(lambda: make().update(Net().to("meta"), "logits"), "meta", "cpu", "net.to(")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_networks_of_any_dtype(dtype: torch.dtype) -> None:
    """Weights in bfloat16, as large networks are trained: images come in their dtype, masks differ where it rounds."""
    data, net = tiny_set(), Net()
    logits = torch.full(data.images.shape, -torch.inf)
    for chunk, values in predict_logits(net, data):
        logits[chunk] = values
    doubtful = logits.abs() < 0.05  # bfloat16 has 8 bits; logits near 0 are sums of numbers near 3
    updater, other = make(), make()
    updater.update(net, "logits")
    changes = other.update(net.to(dtype), "logits")
    assert changes.ignored == 0 and next(net.parameters()).dtype == dtype
    assert not ((updater.masks ^ other.masks) & ~doubtful).any() and doubtful.sum() < 10
    assert not torch.equal(other.masks, other.initial)
    one, two = make(), make()
    one.update_one(1, prediction_of(1).to(dtype), "logits")
    two.update_one(1, prediction_of(1).to(dtype).float(), "logits")
    assert torch.equal(one.masks, two.masks)


# ---- 12: predictions of another size --------------------------------------------------------------------------------


def test_a_resized_prediction_is_refused_and_padding_is_not() -> None:
    """512 x 512 of a whole image of 197 x 296 is another scale, not padding: its top left corner would be taken."""
    image = torch.full((1, 197, 296), 10.0)
    image[0, 90:93, 90:93] = 200
    updater = MaskUpdater.from_tensors(image, torch.tensor([[0, 91, 91]]), names=["Misc_1"], masks=Pmg(6))
    words = ("512 x 512", "Misc_1", "197 x 296", "never resized")
    refused(lambda: updater.update_one("Misc_1", torch.full((1, 1, 512, 512), -1.0), "logits"), *words)
    assert torch.equal(updater.masks, updater.initial)
    sides = [(side // 32 + 1) * 32 for side in (197, 296)]
    assert sides == [padded_side(side, "lesps") for side in (197, 296)] == [224, 320]
    prediction = torch.full((1, 1, *sides), -1.0)
    prediction[0, 0, 90:95, 90:93] = 1
    prediction[0, 0, 200:] = 1  # padding
    changes = updater.update_one("Misc_1", prediction, "logits")
    assert changes.pixels == 6 and changes.masks.shape == prediction.shape and not changes.masks[0, 0, 200:].any()
    surplus = torch.full((197 + 65, 296), -1.0)
    updater.update_one("Misc_1", surplus[:-1], "logits")
    refused(lambda: updater.update_one("Misc_1", surplus, "logits"), "262 x 296", "up to 64")
    refused(lambda: updater.update_one("Misc_1", surplus[:196], "logits"), "196 x 296", "smaller", "never resized")


# ---- 13: weights of others ------------------------------------------------------------------------------------------


def test_weights_of_an_unknown_network_say_what_was_tried(tmp_path: Path) -> None:
    """Which class was tried, which are known, and how to name one's own."""
    torch.save({"state_dict": Net().state_dict()}, tmp_path / "theirs.pth.tar")
    words = ("theirs.pth.tar", "as ACM", "scale.weight", "acm", "dnanet", "--model FILE.py:Class")
    refused(lambda: load_model(tmp_path / "theirs.pth.tar"), *words)


# ---- 14: several processes ------------------------------------------------------------------------------------------


class Meeting:
    """Rank 0 of two processes that share a store in this one."""

    def __init__(self, patch: pytest.MonkeyPatch):
        self.store = distributed.HashStore()
        patch.setattr(parallel, "position", lambda: (0, 2))
        patch.setattr(parallel, "WAIT", 0.2)
        patch.setattr(parallel, "_met", 0)
        patch.setattr(distributed.distributed_c10d, "_get_default_store", lambda: self.store)

    def other(self, call: str, number: int) -> None:
        self.store.set(f"hmg_gpu {number} {call} 1", "here")


def test_a_rank_that_does_not_come_ends_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """`if rank == 0: updater.update(net)` would wait for ever; each call waits for its own meeting, of any updater."""
    meeting = Meeting(monkeypatch)
    started = time.perf_counter()
    with pytest.raises(HMGError, match=r"update: rank 1 has not made this call within 0\.2 s.*if rank == 0"):
        make().update(Net(), "logits")
    assert time.perf_counter() - started < 5
    assert not meeting.store.check(["hmg_gpu 0 update 0"])  # rank 1, too late, does not go on alone
    meeting.other("update", 0)
    assert parallel.meet("update") == (0, 2)
    with pytest.raises(HMGError, match="update: rank 1"):  # the second call has a meeting of its own
        parallel.meet("update")
    meeting.other("export", 1)
    with pytest.raises(HMGError, match="update: rank 1"):  # another call is not this one
        parallel.meet("update")
    assert parallel.meet("export") == (0, 2)


def only_rank_0(rank: int, folder: Path) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    torch.set_num_threads(1)
    parallel.WAIT = 1.0
    updater, net = make(), Net()
    started = time.perf_counter()
    if rank == 0:
        try:
            updater.update(net, "logits")
        except HMGError as error:
            (folder / "told.txt").write_text(f"{time.perf_counter() - started:.1f} {error}")
            assert torch.equal(updater.masks, updater.initial)
    distributed.barrier()
    updater.update(net, "logits")  # both, and all is well
    torch.save(updater.masks, folder / f"rank{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.slow
def test_update_on_rank_0_alone_ends_in_words(tmp_path: Path) -> None:
    """The same with two processes; after the error they can still work together."""
    torch.multiprocessing.spawn(only_rank_0, (tmp_path,), nprocs=2)
    seconds, _, text = (tmp_path / "told.txt").read_text().partition(" ")
    assert float(seconds) < 10 and "rank 1 has not made this call within 1 s" in text and "\n" not in text
    for rank in (0, 1):
        assert torch.equal(torch.load(tmp_path / f"rank{rank}.pt", weights_only=True), corrected(Net(), "logits"))


# ---- and more -------------------------------------------------------------------------------------------------------


def test_masks_given_as_points_are_refused(tmp_path: Path) -> None:
    """Every pixel of a mask would be a target of its own; the message names the folder and the one that is meant."""
    root = write_folder(tmp_path / "tiny")
    words = (str(root / "masks"), "looks like a mask, not points", "masks_centroid")
    refused(lambda: MaskUpdater.from_folder(root, points="masks", device="cpu"), *words)


def test_keys_of_bytes_are_refused() -> None:
    """h5py gives names as bytes; as a sequence of numbers they would be indices."""
    for key in (b"train0", [b"train0"], np.array([b"train0"])):
        nothing_changes(lambda updater, key=key: updater.update_one(key, prediction_of(0), "logits"), "bytes", "decode")


def test_predictions_and_keys_of_numpy() -> None:
    """As they come out of other libraries: float64, read-only, flipped, with an array of indices or names."""
    updater, wanted = make(), make()
    wanted.update(Net(), "logits")
    predictions = torch.cat([prediction_of(index) for index in range(6)]).numpy()
    updater.update_one(np.arange(3), predictions[:3].astype(np.float64), "logits")
    frozen = predictions[3].copy()
    frozen.setflags(write=False)
    updater.update_one(np.array("train3"), frozen, "logits")
    flipped = predictions[4:, :, ::-1, ::-1].copy()[:, :, ::-1, ::-1]
    assert flipped.strides[-1] < 0
    updater.update_one(np.array(["train4", "train5"]), flipped, "logits")
    assert torch.equal(updater.masks, wanted.masks) and not torch.equal(updater.masks, updater.initial)
    before = updater.masks.clone()
    assert updater.update_one([], np.zeros((0, 1, 512, 512)), "logits").pixels == 0  # a batch of which none was left
    assert torch.equal(updater.masks, before)
    hard = make()
    hard.update_one(range(6), predictions > 0, "logits")
    assert torch.equal(hard.masks, wanted.masks)
    nothing_changes(lambda one: one.update_one(0, (predictions[0] > 0).astype(np.uint8), "logits"), "uint8")


def test_an_iterator_nobody_uses_is_no_epoch() -> None:
    """Lightning asks for iterators twice an epoch; half of the epochs would be left out."""
    loader = make().loader(2, 32, seed=1)
    iter(loader)
    first = list(loader)
    assert loader.epoch == 1 and len(first) == 3
    for (images, _), (wanted, _) in zip(first, loader.steps(0), strict=True):
        assert torch.equal(images, wanted)
    iter(loader), iter(loader)
    second = next(iter(loader))
    assert loader.epoch == 2 and torch.equal(second[0], next(loader.steps(1))[0])


def test_a_network_that_acts_on_its_mode_is_left_in_it() -> None:
    """Adapters merge their weights in eval mode and take them out again: who came in eval mode stays merged."""

    class Adapter(Net):
        merged = False

        def train(self, mode: bool = True) -> nn.Module:
            self.merged = not mode
            return super().train(mode)

    for mode in (True, False):
        net = Adapter().train(mode)
        make().update(net, "logits")
        assert net.training == mode and net.merged == (not mode)


def test_reading_what_the_guard_held_back_labels_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checked update looks at four numbers an image; components are searched only when somebody asks."""
    from hmg_gpu.updater import report

    calls: list[Tensor] = []
    find = report.corrections
    monkeypatch.setattr(report, "corrections", lambda mask, *a, **named: calls.append(mask) or find(mask, *a, **named))
    changes = make().update(Net(), "logits")
    assert (changes.ignored, changes.non_finite) == (0, 0) and not calls
    assert re.match(r"\d+ pixels changed", str(changes)) and len(calls) == 1
