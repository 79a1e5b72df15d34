"""The table of support: every command takes every maker of masks and every rule, and its results say which.

Makers and rules come from MAKERS and RULES, so that a new one is tried by every command, or fails for want of a row.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import small_network, write_folder
from tiny_sam import save_tiny_sam

import eval as script
import train
from hmg_gpu import MaskUpdater
from hmg_gpu.commands.main import main as hmg_gpu
from hmg_gpu.data import load_folder, read_mask
from hmg_gpu.masks import MAKERS, RULES, Pmg, make_maker, make_rule
from hmg_gpu.masks.makers import learned
from hmg_gpu.masks.student import StudentSettings, train_student
from hmg_gpu.models import build_model
from hmg_gpu.models.checkpoints import save_checkpoint
from hmg_gpu.models.network import load_network
from hmg_gpu.training import loop

QUICK = StudentSettings(crop=24, shift=2, steps=2, batch_size=4, members=1)
EXTENT = 8
HAS_TRANSFORMERS = importlib.util.find_spec("transformers") is not None
NEEDS_TRANSFORMERS = pytest.mark.skipif(not HAS_TRANSFORMERS, reason="transformers is not installed")
WAYS = {  # maker -> what stands behind --masks; STUDENT, MASKS and SAM are paths of the fixture
    "pmg": ["pmg"],
    "learned": ["learned", "learned:STUDENT"],
    "folder": ["folder:MASKS"],
    "points": ["points"],
    "pal": ["pal"],
    "lelcm": ["lelcm"],
    "com": ["com"],
    "sam": ["sam:SAM"],
    "mclc": ["mclc:crop=9,repeats=2"],
    "p2b-mclc": ["p2b-mclc:repeats=2"],
}
KEPT = "learned"  # the one that trains: in each command for itself, so its masks are the command's own


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set, a student, masks of another system and a network's weights."""
    place = tmp_path_factory.mktemp("support")
    root = write_folder(place / "tiny")
    train_student(load_folder(root, "train"), Pmg(extent=EXTENT), settings=QUICK).save(place / "student.safetensors")
    torch.manual_seed(4)  # predicts something around each point
    weights = {f"model.{name}": value for name, value in build_model("acm", output_bias=0.0).state_dict().items()}
    about = {"settings": {"model": "acm"}, "normalisation": [63.0, 21.0], "dataset": "tiny", "stage": 1}
    save_checkpoint(place / "net.safetensors", weights, about)
    if HAS_TRANSFORMERS:
        save_tiny_sam(importlib.import_module("transformers"), "sam", place / "sam")
    return place


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Students of two steps, and a network of a few weights in train.py."""
    monkeypatch.setattr(learned, "StudentSettings", lambda seed: replace(QUICK, seed=seed))
    monkeypatch.setattr(loop, "build_model", small_network)


def ways() -> list[Any]:
    """Every maker with every rule."""
    texts = [text for name in MAKERS for text in WAYS.get(name, [name])]
    marks = {"sam": NEEDS_TRANSFORMERS}
    return [
        pytest.param(text, rule, id=f"{text}, {rule}", marks=marks.get(text.partition(":")[0], ()))
        for text in texts
        for rule in RULES
    ]


def of(place: Path, text: str) -> str:
    paths = {"STUDENT": "student.safetensors", "MASKS": "tiny/masks", "SAM": "sam"}
    for word, path in paths.items():
        text = text.replace(word, str(place / path))
    return text


def pictures(folder: Path, names: Iterable[str]) -> list[np.ndarray]:
    return [read_mask(folder / f"{name}.png") for name in names]


def wanted(place: Path, text: str, rule: str, split: str) -> tuple[MaskUpdater, list[np.ndarray]]:
    """The masks of MaskUpdater, to which those of the commands are compared."""
    data = replace(load_folder(place / "tiny", split), mean=63.0, std=21.0)
    updater = MaskUpdater(
        data, make_maker(of(place, text), pmg=Pmg(extent=EXTENT)), make_rule(rule, radius=9), guard=None
    )
    updater.update(load_network(place / "net.safetensors", lambda: (0, 1)).model, "logits", check=False)
    assert moved(updater)
    return updater, [mask.astype(bool) for mask in updater.as_list()]


def moved(updater: MaskUpdater) -> bool:
    """Whether the update did anything that it should. Labels that evolve become other masks after some more only, and
    in images as tiny as these a region of more than a few pixels is too large for LESPS and PAL to grow."""
    if updater.labels is None:
        return not torch.equal(updater.masks, updater.initial)
    return updater.maker.name != "points" or bool(((updater.labels > 0) & (updater.labels < 255)).any())


def same(found: list[np.ndarray], masks: list[np.ndarray]) -> bool:
    return all(np.array_equal(one, other) for one, other in zip(found, masks, strict=True))


def evaluate(place: Path, out: Path, text: str, rule: str, *more: object) -> int:
    """A command of eval.py on the set."""
    name, *rest = map(str, more)
    options = ["--data", place / "tiny", "--out", out, "--masks", of(place, text), "--rule", rule, "--radius", 9]
    return script.main([name, *rest, *map(str, options), "--extent", str(EXTENT), "--device", "cpu"])


def named(found: Any, text: str, rule: str) -> bool:
    """The results name maker and rule."""
    (maker,) = found["masks"]
    return (maker["maker"], found["rule"]) == (text.partition(":")[0], make_rule(rule, radius=9).about())


def load(path: Path) -> Any:
    return json.loads(path.read_text())


def test_every_maker_has_a_row() -> None:
    assert WAYS.keys() == MAKERS.keys()
    assert "extent" not in MAKERS["folder"].from_text("masks").settings()  # what test_eval_sweep refuses


@pytest.mark.parametrize(("text", "rule"), ways())
def test_train(text: str, rule: str, place: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    options = ["--epochs", 1, 1, "--batch-size", 2, "--patch-size", 32, "--output-bias", 0, "--extent", EXTENT]
    options += ["--data", place / "tiny", "--out", out, "--masks", of(place, text), "--rule", rule, "--radius", 9]
    options += ["--update-every", 1] * RULES[rule].evolves
    assert train.main([str(option) for option in (*options, "--device", "cpu")]) == 0
    found = load(out / "results.json")
    assert named(found | {"masks": [found["masks"]]}, text, rule)
    assert found["stage"] == 2 and list(found["results"]["masks"]) == ["initial", "prediction", "filtered", "hybrid"]
    assert len(list((out / "masks_hybrid").iterdir())) == 6
    assert (out / "student.safetensors").exists() == (text == KEPT)


@pytest.mark.parametrize(("text", "rule"), ways())
def test_eval_masks_and_show(text: str, rule: str, place: Path, tmp_path: Path) -> None:
    weights = ("--checkpoint", place / "net.safetensors")
    assert evaluate(place, tmp_path, text, rule, "masks", *weights) == 0
    found = load(tmp_path / "masks.json")
    assert named(found, text, rule) and {"prediction", "filtered", "hybrid"} < found["rows"].keys()
    if text != KEPT:
        updater, masks = wanted(place, text, rule, "train")
        assert found["masks"] == [updater.maker.about()]
        truth = [mask[:h, :w].numpy() for mask, (h, w) in zip(updater.data.masks, updater.data.sizes, strict=True)]
        shared = sum(int((one & other).sum()) for one, other in zip(masks, truth, strict=True))
        assert found["rows"]["hybrid"]["intersection"] == shared
        first = updater.initial & updater.data.masks
        assert found["rows"][updater.maker.label]["intersection"] == int(first.sum())
    assert evaluate(place, tmp_path, text, rule, "show", *weights, "--count", 2) == 0
    assert (tmp_path / "spread.png").stat().st_size > 1000


@pytest.mark.parametrize(("text", "rule"), ways())
def test_eval_detector(text: str, rule: str, place: Path, tmp_path: Path) -> None:
    weights = ("--checkpoint", place / "net.safetensors", "--point-prompt", "--no-plots")
    assert evaluate(place, tmp_path, text, rule, "detector", *weights) == 0
    found = load(tmp_path / "detector.json")
    assert named(found, text, rule) and found["output"] == "prompted"
    if text != KEPT:
        updater, masks = wanted(place, text, rule, "test")
        assert found["result"]["union"] - found["result"]["intersection"] == sum(
            int((mask ^ truth[:h, :w].numpy()).sum())
            for mask, truth, (h, w) in zip(masks, updater.data.masks, updater.data.sizes.tolist(), strict=True)
        )


@pytest.mark.parametrize(("text", "rule"), ways())
def test_eval_sweep(text: str, rule: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Over a setting of the maker, where it has one, and over one of the rule."""
    extent = ("sweep", "extent", "--values", 5, EXTENT, "--no-plots")
    capsys.readouterr()
    code = evaluate(place, tmp_path, text, rule, *extent)
    if "extent" in make_maker(of(place, text)).settings():
        found = load(tmp_path / "extent.json")
        assert code == 0 and named(found, text, rule)
        makers = [row["maker"].get("pmg", row["maker"]) for row in found["rows"]]
        assert [row["extent"] for row in found["rows"]] == [one["extent"] for one in makers] == [5, EXTENT]
        assert (tmp_path / "extent.csv").read_text().count("\n") == 3
    else:
        words = capsys.readouterr().err
        assert code == 2 and words.startswith("error: ") and words.count("\n") == 1
        assert "has no setting extent" in words and not list(tmp_path.iterdir())
    radius = ("sweep", "radius", "--values", 0, 9, "--no-plots", "--checkpoint", place / "net.safetensors")
    assert evaluate(place, tmp_path, text, rule, *radius) == 0
    found = load(tmp_path / "radius.json")
    assert named(found, text, rule) and [row["radius"] for row in found["rows"]] == [0, 9]
    if text != KEPT:
        updater, _ = wanted(place, text, rule, "train")
        assert found["rows"][1]["hybrid"]["intersection"] == int((updater.masks & updater.data.masks).sum())


@pytest.mark.parametrize(("text", "rule"), ways())
@pytest.mark.parametrize("network", [False, True], ids=["points", "both"])
def test_eval_predict(network: bool, text: str, rule: str, place: Path, tmp_path: Path) -> None:
    options = ["predict", place / "tiny" / "images", "--points", place / "tiny" / "masks_centroid", "--out", tmp_path]
    options += ["--masks", of(place, text), "--rule", rule, "--radius", 9, "--extent", EXTENT, "--device", "cpu"]
    options += ["--checkpoint", place / "net.safetensors"] * network
    assert script.main([str(option) for option in options]) == 0
    assert named(load(tmp_path / "predict.json"), text, rule)
    assert len(list((tmp_path / "masks").iterdir())) == 8
    if text != KEPT:
        compare(tmp_path / "masks", place, text, rule, network)


@pytest.mark.parametrize(("text", "rule"), ways())
@pytest.mark.parametrize("network", [False, True], ids=["initial", "hybrid"])
def test_hmg_gpu_masks(network: bool, text: str, rule: str, place: Path, tmp_path: Path) -> None:
    options = ["masks", "--images", place / "tiny" / "images", "--points", place / "tiny" / "masks_centroid"]
    options += ["--out", tmp_path, "--masks", of(place, text), "--rule", rule, "--radius", 9, "--extent", EXTENT]
    options += ["--checkpoint", place / "net.safetensors"] * network
    assert hmg_gpu([str(option) for option in (*options, "--batch", 3, "--device", "cpu")]) == 0
    settings = load(tmp_path / "hmg.json")["settings"]
    assert named({"rule": make_rule(rule, radius=9).about()} | settings | {"masks": [settings["masks"]]}, text, rule)
    assert ("rule" in settings) == network  # which has no part in initial masks
    assert len(list(tmp_path.glob("*.png"))) == 8
    assert (tmp_path / "student.safetensors").exists() == (text == KEPT)
    if text != KEPT:
        compare(tmp_path, place, text, rule, network)


def compare(folder: Path, place: Path, text: str, rule: str, network: bool) -> None:
    for split in ("train", "test"):
        updater, masks = wanted(place, text, rule, split)
        updater.masks = updater.masks if network else updater.initial
        masks = masks if network else [mask.astype(bool) for mask in updater.as_list()]
        assert same(pictures(folder, updater.data.names), masks)


@pytest.mark.parametrize(("text", "rule"), ways())
def test_mask_updater(text: str, rule: str, place: Path) -> None:
    """By name; its state names maker and rule and goes into another of its kind alone."""
    given = of(place, text) + (f":extent={EXTENT}" if text == "pmg" else "")
    settings = {"masks": given, "rule": rule, "guard": None}
    updater = MaskUpdater.from_folder(place / "tiny", device="cpu", normalisation=(63.0, 21.0), **settings)
    updater.update(load_network(place / "net.safetensors", lambda: (0, 1)).model, "logits", check=False)
    settings = updater.state_dict()["settings"]
    assert (settings["masks"]["maker"], settings["rule"]["rule"]) == (text.partition(":")[0], rule)
    assert updater.masks.any() and moved(updater)
    again = MaskUpdater(updater.data, updater.maker, updater.rule, guard=None)
    again.load_state_dict(updater.state_dict())
    assert torch.equal(again.masks, updater.masks) and torch.equal(again.targets, updater.targets)


def test_a_maker_is_fitted_once_for_all_batches(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a folder of any size: the student that is trained is trained once, kept, and taken up by the next command."""
    trained: list[int] = []
    plain: Callable[..., Any] = learned.learned_student

    def spy(data: Any, path: Path, *arguments: Any, **settings: Any) -> Path:
        trained.append(int(not path.exists()))
        return plain(data, path, *arguments, **settings)

    monkeypatch.setattr(learned, "learned_student", spy)
    options = ["masks", "--images", place / "tiny" / "images", "--points", place / "tiny" / "masks_centroid"]
    options += ["--out", tmp_path, "--masks", KEPT, "--extent", EXTENT, "--batch", 1, "--device", "cpu"]
    assert hmg_gpu([str(option) for option in options]) == 0 and sum(trained) == 1
    first = {path.name: path.read_bytes() for path in tmp_path.glob("*.png")}
    assert hmg_gpu([str(option) for option in options]) == 0 and sum(trained) == 1
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.png")} == first
    assert hmg_gpu([str(option) for option in (*options, "--resume")]) == 0 and sum(trained) == 1
    kept = [*options[:6], tmp_path / "again", "--masks", f"learned:{tmp_path / 'student.safetensors'}", *options[9:]]
    assert kept[5] == "--out" and hmg_gpu([str(option) for option in kept]) == 0
    assert {path.name: path.read_bytes() for path in (tmp_path / "again").glob("*.png")} == first
