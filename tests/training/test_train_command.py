"""train.py as people meet it: what a run leaves behind, what it refuses and in which words, and being interrupted."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tiny import small_network, write_folder

import train
from hmg_gpu.data import load_folder, read_image, read_mask
from hmg_gpu.masks import MAKERS, Pmg, Union
from hmg_gpu.masks.extent import choose_extent
from hmg_gpu.models import NETWORKS
from hmg_gpu.models.checkpoints import read_description, read_tensors, save_checkpoint
from hmg_gpu.training import estimate, recipes
from hmg_gpu.training import loop as training
from hmg_gpu.training.recipes import recipe
from hmg_gpu.training.screen import Screen
from hmg_gpu.training.settings import Settings

ROOT = Path(train.__file__).parent
FAST = ("--epochs", "1", "1", "--batch-size", "2", "--patch-size", "32", "--output-bias", "0")
MOST = ("--threads", "1", "--device", "cpu")


@dataclass
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str


Command = Callable[..., Ended]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "tiny")


@pytest.fixture
def acm_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Command]:
    """train.py's main in this process; a traceback would be an exception here."""
    monkeypatch.setenv("COLUMNS", "80")  # narrow: an error must not be wrapped
    threads = torch.get_num_threads()

    def run(*arguments: object) -> Ended:
        capsys.readouterr()
        code = train.main([*map(str, arguments), *MOST])
        return Ended(code, *capsys.readouterr())

    yield run
    torch.set_num_threads(threads)
    torch.set_flush_denormal(False)


@pytest.fixture
def command(acm_command: Command, monkeypatch: pytest.MonkeyPatch) -> Command:
    """The same around a small network."""
    monkeypatch.setattr(training, "build_model", small_network)
    return acm_command


def log_of(folder: Path) -> list[dict]:
    def no_constant(text: str) -> None:
        raise AssertionError(f"{text} is not JSON")

    return [json.loads(line, parse_constant=no_constant) for line in (folder / "log.jsonl").read_text().splitlines()]


def clockless(log: list[dict]) -> list[dict]:
    clocks = ("seconds", "images_per_second")
    return [{key: value for key, value in event.items() if key not in clocks} for event in log]


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(ended: Ended, *parts: str) -> None:
    """Exit code 2 and one line on stderr that holds every part."""
    assert ended.code == 2
    assert ended.err.startswith("error: ") and ended.err.count("\n") == 1 and ended.err.endswith("\n"), ended.err
    for part in parts:
        assert part in ended.err, ended.err


# ---- a whole run ----------------------------------------------------------------------------------------------------


def test_a_run_leaves_what_it_promises(data: Path, acm_command: Command, tmp_path: Path) -> None:
    out = tmp_path / "run"
    ended = acm_command("--data", data, *FAST, "--out", out, "--seed", 3)
    assert ended.code == 0 and ended.err == ""
    assert sorted(path.relative_to(out).as_posix() for path in out.iterdir()) == [
        ".hmg.lock",
        "last.json",
        "last.safetensors",
        "log.jsonl",
        "masks_hybrid",
        "results.json",
        "settings.json",
        "sheets",
        "stage1.json",
        "stage1.safetensors",
        "stage2.json",
        "stage2.safetensors",
    ]
    for sheet, columns in (("train_masks", 6), ("test_stage1", 3), ("test_stage2", 3)):  # the image and its masks
        with Image.open(out / "sheets" / f"{sheet}.png") as picture:
            assert picture.width > 230 * columns and picture.height > 250

    settings = json.loads((out / "settings.json").read_text())["settings"]
    given = {"data": str(data), "epochs": (1, 1), "batch_size": 2, "patch_size": 32, "output_bias": 0.0, "seed": 3}
    expected = Settings(**({"model": "unet"} | recipe("unet") | given))
    assert Settings.from_dict(settings) == expected and settings["extent"] is None
    results = json.loads((out / "results.json").read_text())
    assert results["masks"] == Pmg(extent=25).about() and results["rule"] == Union().about()
    assert results["settings"] == settings and results["stage"] == 2 and results["seconds"] > 0
    assert 0.1 < results["peak_memory_gb"] < 4
    assert {"masks", "stage 1", "stage 2"} <= results["results"].keys()
    kinds = [event["event"] for event in log_of(out) if event["event"] != "message"]
    assert kinds == ["epoch", "test", "masks", "epoch", "test"]

    train_set = load_folder(data, "train")
    hybrid = [read_mask(out / "masks_hybrid" / f"{name}.png") for name in train_set.names]
    assert [mask.shape for mask in hybrid] == [tuple(size) for size in train_set.sizes.tolist()]
    truth = [read_mask(data / "masks" / f"{name}.png") for name in train_set.names]
    union = sum(int((a | b).sum()) for a, b in zip(hybrid, truth, strict=True))
    shared = sum(int((a & b).sum()) for a, b in zip(hybrid, truth, strict=True))
    assert results["results"]["masks"]["hybrid"]["iou"] == pytest.approx(shared / union)
    for words in ("Masks of the 6 training images", "initial", "hybrid", "stage 2", "masks_hybrid/*.png"):
        assert words in ended.out
    assert f"initial masks: {Pmg().fit(train_set)}\n" in ended.out


def test_each_network_has_its_recipe(data: Path, command: Command, tmp_path: Path) -> None:
    """unet where none is named; the paper's schedule with any other; what is given counts more than either."""

    def chosen(*arguments: str) -> Settings:
        options = train.parse(["--data", str(data), *arguments])
        return train.choose_settings(options, train.Console(), train.Team())[0]

    ours = {"model": "unet"} | recipe("unet")
    assert chosen() == Settings(data=str(data), **ours)
    assert chosen("--model", "unet:widths=4-8").epochs == ours["epochs"]
    for name in ("acm", "alcnet", "dnanet"):
        assert chosen("--model", name) == Settings(data=str(data), model=name)
    assert chosen("--loss", "image") == Settings(data=str(data), **(ours | {"loss": "image"}))
    synthetic = train.choose_settings(train.parse([]), train.Console(), train.Team())[0]
    assert synthetic == Settings(**recipes.SYNTHETIC) and synthetic.model == "acm"  # two minutes are asked for there


@pytest.mark.parametrize("bf16", [False, True])
def test_the_other_precision_is_offered_where_it_is_shorter(
    bf16: bool, data: Path, command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for shorter, offered in ((60.0, True), (80.0, False)):
        seconds = {None: 100.0, not bf16: shorter}
        monkeypatch.setattr(estimate, "estimate_seconds", lambda run, bf16=None, seconds=seconds: seconds[bf16])
        ended = command("--data", data, *FAST, *["--bf16"] * bf16, "--out", tmp_path / str(offered))
        line = next(line for line in ended.out.splitlines() if line.startswith("training will take"))
        other = f"; with{'out' * bf16} --bf16 about 60 s" if offered else ""
        assert line == "training will take about 2 min" + other


def test_without_masks_and_test_split(data: Path, command: Command, tmp_path: Path) -> None:
    """Images, points and one list: all that the method asks for."""
    for path in (*(data / "masks").iterdir(), data / "img_idx" / "test_tiny.txt"):
        path.unlink()
    (data / "masks").rmdir()
    out = tmp_path / "run"
    assert command("--data", data, *FAST, "--out", out).code == 0
    assert len(list((out / "masks_hybrid").iterdir())) == 6
    assert json.loads((out / "results.json").read_text())["results"] == {}
    assert [event["event"] for event in log_of(out) if event["event"] != "message"] == ["epoch", "masks", "epoch"]


def test_full_supervision_needs_no_points(data: Path, command: Command, tmp_path: Path) -> None:
    for path in (data / "masks_centroid").iterdir():
        path.unlink()
    (data / "masks_centroid").rmdir()
    ended = command("--data", data, *FAST, "--out", tmp_path / "run", "--supervision", "full")
    assert ended.code == 0
    ended = command("--data", data, *FAST, "--out", tmp_path / "weak")
    refused(ended, str(data / "masks_centroid"))


def test_a_test_set_without_targets_still_gives_json(data: Path, command: Command, tmp_path: Path) -> None:
    """Pd is then 0 / 0."""
    for name in ("test0", "test1"):
        size = read_image(data / "images" / f"{name}.png").shape
        Image.fromarray(np.zeros(size, np.uint8)).save(data / "masks" / f"{name}.png")
    out = tmp_path / "run"
    ended = command("--data", data, *FAST, "--out", out)
    assert ended.code == 0 and "nan" in ended.out
    tests = [event for event in log_of(out) if event["event"] == "test"]
    assert len(tests) == 2 and all(event["pd"] is None for event in tests)
    for file in ("results.json", "last.json", "stage2.json"):
        assert json.loads((out / file).read_text())["results"]["stage 1"]["pd"] is None


def test_points_from_a_file(data: Path, command: Command, tmp_path: Path) -> None:
    lines = ["image,y,x"]
    for name, rows in zip(*points_by_name(data), strict=True):
        lines += [f"{name},{y},{x}" for y, x in rows]
    (data / "clicks.csv").write_text("\n".join(lines) + "\n")
    masks = []
    for kind in ("clicks.csv", "masks_centroid"):
        out = tmp_path / f"run {kind}"
        assert command("--data", data, *FAST, "--out", out, "--points", kind).code == 0
        masks.append([path.read_bytes() for path in sorted((out / "masks_hybrid").iterdir())])
    assert masks[0] == masks[1]


def test_extent_chosen_from_the_points(data: Path, command: Command, tmp_path: Path) -> None:
    """20 points and more: the extent is that of ``choose_extent``; the settings keep the word, results the number."""
    lines = (data / "img_idx" / "train_tiny.txt").read_text().split()
    for index in range(16):
        lines.append(f"more{index}")
        for folder in ("images", "masks", "masks_centroid"):
            shutil.copyfile(data / folder / f"train{index % 6}.png", data / folder / f"more{index}.png")
    (data / "img_idx" / "train_tiny.txt").write_text("\n".join(lines) + "\n")
    out = tmp_path / "run"
    ended = command("--data", data, *FAST, "--epochs", "1", "0", "--out", out, "--extent", "auto")
    chosen = choose_extent(load_folder(data, "train"))
    results = json.loads((out / "results.json").read_text())
    assert ended.code == 0 and results["settings"]["extent"] == "auto" and results["masks"]["extent"] == chosen != 25
    maker = Pmg(extent="auto").fit(load_folder(data, "train"))
    assert f"initial masks: {maker}\n" in ended.out and "chosen from 22 points in 22 images" in str(maker)
    assert command("--resume", out).code == 0


def points_by_name(data: Path) -> tuple[list[str], list[list[list[int]]]]:
    loaded = load_folder(data, "train")
    rows = [loaded.points[loaded.points[:, 0] == index, 1:].tolist() for index in range(len(loaded))]
    return loaded.names, rows


# ---- images of every kind -------------------------------------------------------------------------------------------


def as_rgb(path: Path) -> None:
    Image.open(path).convert("RGB").save(path)


def as_rgba(path: Path) -> None:
    Image.open(path).convert("RGBA").save(path)


def as_palette(path: Path) -> None:
    grey = Image.open(path)
    picture = Image.new("P", grey.size)
    picture.putpalette([value for level in range(256) for value in (level, level, level)])
    picture.putdata(np.asarray(grey).ravel().tolist())
    picture.save(path)


def as_zero_one(path: Path) -> None:
    Image.fromarray((np.asarray(Image.open(path)) > 0).astype(np.uint8)).save(path)


def as_16_bit(path: Path) -> None:
    values = np.asarray(Image.open(path)).astype(np.uint16) * 257
    Image.fromarray(values).save(path)
    assert read_image(path).dtype == np.uint16 and read_image(path).max() > 255


@pytest.mark.parametrize(
    ("folder", "change"),
    [
        ("images", as_rgb),
        ("images", as_rgba),
        ("images", as_palette),
        ("masks", as_zero_one),
        ("masks_centroid", as_zero_one),
        ("images", as_16_bit),
    ],
)
def test_the_same_pictures_in_another_coding(
    folder: str, change: Callable[[Path], None], data: Path, command: Command, tmp_path: Path
) -> None:
    """Train to the same masks; 16 bits, whose values are 257 times as large, to the same up to rounding."""
    outs = []
    for turn in ("before", "after"):
        out = tmp_path / turn
        assert command("--data", data, *FAST, "--out", out).code == 0
        outs.append(out)
        if turn == "before":
            for path in (data / folder).iterdir():
                change(path)
    first, second = (json.loads((out / "results.json").read_text()) for out in outs)
    if change is as_16_bit:
        assert second["normalisation"] == pytest.approx([257 * value for value in first["normalisation"]])
        assert second["results"]["masks"]["initial"] == first["results"]["masks"]["initial"]
    else:
        assert second["results"] == first["results"]
        for path in (outs[0] / "masks_hybrid").iterdir():
            assert path.read_bytes() == (outs[1] / "masks_hybrid" / path.name).read_bytes()


# ---- bad input ------------------------------------------------------------------------------------------------------


def wrong_size(data: Path) -> tuple[str, ...]:
    Image.fromarray(np.zeros((31, 32), np.uint8)).save(data / "masks" / "train0.png")
    return "masks/train0.png", "31 x 32", "32 x 32", "never resized"


def no_mask(data: Path) -> tuple[str, ...]:
    (data / "masks" / "train1.png").unlink()
    return "masks", "no train1.png", "supply it"


def no_list(data: Path) -> tuple[str, ...]:
    (data / "img_idx" / "train_tiny.txt").unlink()
    return "img_idx", "train_tiny.txt", "test_tiny.txt"


def no_lists(data: Path) -> tuple[str, ...]:
    for path in (data / "img_idx").iterdir():
        path.unlink()
    (data / "img_idx").rmdir()
    return "img_idx", "train_tiny.txt"


def no_images(data: Path) -> tuple[str, ...]:
    (data / "images").rename(data / "pictures")
    return "tiny/images", "no such folder"


def no_image(data: Path) -> tuple[str, ...]:
    (data / "images" / "train2.png").unlink()
    return "train_tiny.txt", "train2"


def corrupt(data: Path) -> tuple[str, ...]:
    path = data / "images" / "train3.png"
    path.write_bytes(path.read_bytes()[:-200])
    return "images/train3.png", "cannot be read", "copy it again"


def zero_bytes(data: Path) -> tuple[str, ...]:
    (data / "images" / "train4.png").write_bytes(b"")
    return "images/train4.png", "the file is empty"


def zero_byte_mask(data: Path) -> tuple[str, ...]:
    (data / "masks" / "test1.png").write_bytes(b"")
    return "masks/test1.png", "the file is empty"


def empty_list(data: Path) -> tuple[str, ...]:
    (data / "img_idx" / "train_tiny.txt").write_text("\n\n")
    return "train_tiny.txt", "the list is empty"


def empty_test_list(data: Path) -> tuple[str, ...]:
    (data / "img_idx" / "test_tiny.txt").write_text("")
    return "test_tiny.txt", "the list is empty"


def nan_pixel(data: Path) -> tuple[str, ...]:
    values = np.ones((32, 32), np.float32)
    values[7, 9] = np.nan
    (data / "images" / "train0.png").unlink()
    Image.fromarray(values).save(data / "images" / "train0.tif")
    return "images/train0.tif", "(y=7, x=9) is nan", "finite"


def no_points_folder(data: Path) -> tuple[str, ...]:
    (data / "masks_centroid").rename(data / "clicks")
    return "masks_centroid", "clicks"


def no_point_at_all(data: Path) -> tuple[str, ...]:
    for path in (data / "masks_centroid").iterdir():
        Image.fromarray(np.zeros_like(np.asarray(Image.open(path)))).save(path)
    return "tiny", "point"


@pytest.mark.parametrize(
    "damage",
    [
        wrong_size,
        no_mask,
        no_list,
        no_lists,
        no_images,
        no_image,
        corrupt,
        zero_bytes,
        zero_byte_mask,
        empty_list,
        empty_test_list,
        nan_pixel,
        no_points_folder,
        no_point_at_all,
    ],
)
def test_bad_data(damage: Callable[[Path], tuple[str, ...]], data: Path, command: Command, tmp_path: Path) -> None:
    parts = damage(data)
    before = contents(tmp_path)
    refused(command("--data", data, *FAST, "--out", tmp_path / "run"), *parts)
    assert contents(tmp_path) == before and not (tmp_path / "run").exists()


@pytest.mark.parametrize(("y", "x"), [(32, 5), (5, 32), (-1, 5)])
def test_a_point_outside_its_image(y: int, x: int, data: Path, command: Command, tmp_path: Path) -> None:
    (data / "clicks.csv").write_text(f"image,y,x\ntrain0,3,4\ntrain0,{y},{x}\n")
    ended = command("--data", data, *FAST, "--out", tmp_path / "run", "--points", "clicks.csv")
    refused(ended, "clicks.csv", "row 3", "train0", "32 x 32")
    assert not (tmp_path / "run").exists()


def test_no_such_data(command: Command, tmp_path: Path) -> None:
    ended = command("--data", tmp_path / "nowhere", *FAST, "--out", tmp_path / "run")
    refused(ended, f"{tmp_path / 'nowhere'}: no such data set; give its folder, a packed .h5 file, or synthetic")
    (tmp_path / "broken.h5").write_bytes(b"\x89HDF\r\n\x1a\nbut no more")
    refused(command("--data", tmp_path / "broken.h5", *FAST, "--out", tmp_path / "run"), "broken.h5")


def test_brackets_in_a_path_are_no_markup(command: Command, tmp_path: Path) -> None:
    data = write_folder(tmp_path / "set [red] [/] :bug:", name="odd[bold]")
    out = tmp_path / "run [link]"
    ended = command("--data", data, *FAST, "--out", out)
    assert ended.code == 0 and "odd[bold]: 6 training images" in ended.out and f"In {out}:" in unwrapped(ended.out)
    refused(command("--data", data, *FAST, "--out", out), str(out))
    corrupt(data)
    refused(command("--data", data, *FAST, "--out", tmp_path / "new"), str(data / "images" / "train3.png"))


def unwrapped(text: str) -> str:
    return text.replace("\n", "")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("--patch-size", "100"), ("patch_size = 100", "multiple of 32")),
        (("--epochs", "0", "5"), ("epochs = (0, 5)",)),
        (("--model", "resnet"), ("unknown model 'resnet'", ", ".join(NETWORKS))),
        (("--model", "nowhere.py:Net"), ("model nowhere.py:Net", "no such file nowhere.py")),
        (("--masks", "gmp"), ("masks 'gmp'", ", ".join(MAKERS))),
        (("--masks", "folder"), ("folder:PATH",)),
        (("--masks", "folder:nowhere"), ("nowhere: no such folder of masks",)),
        (("--masks", "learned:none.safetensors"), ("none.safetensors",)),
        (("--supervision", "full", "--update-every", "2"), ("update_every = 2", "no masks to correct")),
        (("--threads", "0"), ("--threads 0", "at least 1")),
        (("--device", "gpu"), ("--device gpu", "try cpu")),
    ],
)
def test_bad_settings(
    arguments: tuple[str, ...], parts: tuple[str, ...], data: Path, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    code = train.main(["--data", str(data), "--out", str(tmp_path / "run"), *arguments])
    refused(Ended(code, *capsys.readouterr()), *parts)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("option", "value", "text"),
    [
        ("--alpha", "7", "expected a number from 0 to 1, got '7'"),
        ("--extent", "0", "expected at least 1, got '0'"),
        ("--extent", "1.5", "expected a whole number or auto, got '1.5'"),
        ("--positive", "2", "expected a number from 0 to 1, got '2'"),
        ("--radius", "-1", "expected at least 0, got '-1'"),
        ("--learning-rate", "nan", "expected above 0, got 'nan'"),
        ("--seed", "x", "invalid int value: 'x'"),
        ("--rule", "mean", "invalid choice: 'mean'"),
    ],
)
def test_an_option_out_of_its_range(
    option: str, value: str, text: str, data: Path, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    """The parser names the option, before anything is read."""
    with pytest.raises(SystemExit) as caught:
        train.main(["--data", str(data), "--out", str(tmp_path / "run"), option, value])
    assert caught.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert f"error: argument {option}: {text}" in last
    assert not (tmp_path / "run").exists()


def test_an_output_that_cannot_be_written(data: Path, command: Command, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("mine")
    refused(command("--data", data, *FAST, "--out", tmp_path / "taken" / "run"), "taken/run", "cannot be written")
    assert (tmp_path / "taken").read_text() == "mine"


# ---- run folders and resuming ---------------------------------------------------------------------------------------


def test_a_run_is_never_overwritten(data: Path, command: Command, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert command("--data", data, *FAST, "--out", out).code == 0
    before = contents(out)
    ended = command("--data", data, *FAST, "--out", out)
    refused(ended, f"{out}: holds a run already; go on with --resume {out}, or choose another --out")
    (out / "last.safetensors").unlink()  # what a run killed before its first checkpoint leaves behind
    ended = command("--data", data, *FAST, "--out", out)
    refused(ended, f"{out}: holds settings.json but no checkpoint; remove the folder or choose another --out")
    del before[out / "last.safetensors"]
    assert contents(out) == before


def test_resume_takes_no_settings(data: Path, command: Command, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert command("--data", data, *FAST, "--out", out).code == 0
    before = contents(out)
    more = (("--masks", "pmg"), ("--rule", "union"), ("--extent", "25"), ("--positive", "0"))
    for arguments in (
        ("--seed", "0"),
        ("--data", data),
        ("--epochs", "9", "9"),
        ("--bf16",),
        ("--out", tmp_path),
        *more,
    ):
        ended = command("--resume", out, *arguments)
        refused(ended, "--resume takes every setting from the run; leave out the other options")
    assert contents(out) == before
    again = command("--resume", out)  # a finished run: its tables again, and the same results
    assert again.code == 0 and "Masks of the 6 training images" in again.out
    assert log_of(out) == [json.loads(line) for line in before[out / "log.jsonl"].decode().splitlines()]


def test_resume_from_a_wrong_folder(data: Path, command: Command, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert command("--data", data, *FAST, "--out", out).code == 0
    refused(command("--resume", tmp_path / "nowhere"), "nowhere/last.safetensors", "no such checkpoint")
    refused(command("--resume", data), "tiny/last.safetensors", "no such checkpoint")

    state, last = (out / "last.safetensors").read_bytes(), out / "last.safetensors"
    last.write_bytes((out / "stage1.safetensors").read_bytes())
    refused(command("--resume", out), str(last), "bare weights cannot be resumed")
    save_file({"weight": torch.ones(3)}, last)
    refused(command("--resume", out), str(out), "holds no run of train.py")
    last.write_bytes(state[:-9])
    refused(command("--resume", out), str(last), "not a readable safetensors file")
    last.write_bytes(b"")
    refused(command("--resume", out), str(last), "not a readable safetensors file")

    last.write_bytes(state)  # a run from before makers and rules
    tensors, description = read_tensors(last), read_description(last)
    settings = {"initial": "pmg", "fusion": "union"} | description["settings"]
    settings = {name: value for name, value in settings.items() if name not in ("masks", "rule", "positive")}
    save_checkpoint(last, tensors, description | {"settings": settings | {"extent": 25}})
    refused(command("--resume", out), "of an older version", "train it anew", "eval.py detector --checkpoint")

    last.write_bytes(state)
    lines = (data / "img_idx" / "train_tiny.txt").read_text().split()
    (data / "img_idx" / "train_tiny.txt").write_text("\n".join(lines[:4]) + "\n")
    refused(command("--resume", out), str(last), "the list of images is another: 2 fewer (train4 ...)")


def test_stopping_at_the_end_of_an_epoch(
    data: Path, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGINT at every kind of step of a short run; the log ends up as that of a run that was left alone."""
    alone, out = tmp_path / "alone", tmp_path / "run"
    options = ("--data", data, *FAST, "--epochs", "2", "2", "--update-every", "1", "--eval-every", "1")
    options += ("--positive", "0.5")
    assert command(*options, "--out", alone).code == 0
    stops = {(0, 0, 2), (0, 1, 3), (1, 0, 3), (1, 1, 1)}  # stage, epoch, step
    plain = Screen.on_step

    def on_step(self: Screen, event: dict) -> None:
        plain(self, event)
        if (event["stage"], event["epoch"], event["step"]) in stops:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Screen, "on_step", on_step)
    before = signal.getsignal(signal.SIGINT)
    ended = command(*options, "--out", out)
    for _ in stops:
        assert ended.code == 130 and ended.err == ""
        assert f"stopped and saved; go on with: python train.py --resume {out}\n" in ended.out
        assert signal.getsignal(signal.SIGINT) is before
        ended = command("--resume", out)
    assert ended.code == 0 and "min since the resume, peak memory" in ended.out
    assert clockless(log_of(out)) == clockless(log_of(alone))
    for path in (alone / "masks_hybrid").iterdir():
        assert path.read_bytes() == (out / "masks_hybrid" / path.name).read_bytes()


def test_a_log_cut_by_a_crash_has_no_epoch_twice(data: Path, command: Command, tmp_path: Path) -> None:
    """Lines beyond the checkpoint and a half-written last line are dropped on resuming."""
    out = tmp_path / "run"
    options = ("--data", data, *FAST, "--epochs", "3", "1", "--save-every", "2")
    assert command(*options, "--out", out).code == 0
    whole = log_of(out)
    # the state after epoch 2, as a run that died in its fourth epoch leaves it beside the log
    state = rewound(data, options, out, command, tmp_path)
    (out / "last.safetensors").write_bytes(state)
    with open(out / "log.jsonl", "a") as log:
        log.write('3\n{"stage": "2"}\n' + "[" * 9999 + '\n{"event": "epo')
    with open(out / "log.jsonl", "ab") as log:
        log.write(b"\n\xff\xfe\n")
    assert command("--resume", out).code == 0
    assert clockless(log_of(out)) == clockless(whole)
    epochs = [(event["stage"], event["epoch"]) for event in log_of(out) if event["event"] == "epoch"]
    assert epochs == [(1, 1), (1, 2), (1, 3), (2, 1)]


def rewound(data: Path, options: tuple, out: Path, command: Command, tmp_path: Path) -> bytes:
    """last.safetensors of the same run as it was after epoch 2 of stage 1."""

    class Died(Exception):
        pass

    with pytest.MonkeyPatch.context() as patch:

        def on_step(self: Screen, event: dict) -> None:
            if (event["epoch"], event["step"]) == (2, 2):
                raise Died

        patch.setattr(Screen, "on_step", on_step)
        with pytest.raises(Died):
            command(*options, "--out", tmp_path / "died")
    return (tmp_path / "died" / "last.safetensors").read_bytes()


def test_sigterm_of_a_real_process(data: Path, acm_command: Command, tmp_path: Path) -> None:
    out = tmp_path / "my run"
    arguments = ["--data", str(data), *FAST, "--epochs", "25", "1", "--out", str(out), *MOST]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env=environment,
    ) as process:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            if (out / "log.jsonl").exists() and (out / "log.jsonl").read_text().count("epoch") >= 2:
                break
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        output, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, errors
    assert errors == "" and f"go on with: python train.py --resume '{out}'\n" in output
    saved = json.loads((out / "last.json").read_text())
    assert saved["stage"] == 0 and 1 <= saved["epoch"] < 25
    assert acm_command("--resume", out).code == 0
    epochs = [(event["stage"], event["epoch"]) for event in log_of(out) if event["event"] == "epoch"]
    assert epochs == [(1, epoch) for epoch in range(1, 26)] + [(2, 1)]
