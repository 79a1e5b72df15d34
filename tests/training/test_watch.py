"""What a run says of its labels, and whether it comes out the same again."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import small_network, tiny_set, write_folder

import train
from hmg_gpu.models.checkpoints import read_description
from hmg_gpu.training import Settings, Training, loop
from hmg_gpu.training.watch import verdict, watch_labels

FAST = ("--epochs", "1", "1", "--batch-size", "2", "--patch-size", "32", "--threads", "1", "--device", "cpu")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "build_model", small_network)


@pytest.fixture(autouse=True)
def machine() -> None:
    yield
    torch.set_flush_denormal(False)  # which train.py sets


def test_labels_are_watched() -> None:
    data = tiny_set()
    after = data.masks.clone()
    assert watch_labels(data, data.masks, after)[1] is None
    after[1] = False
    line, warning = watch_labels(data, data.masks, after)
    changed = int(data.masks[1].sum())
    assert line.startswith(f"{changed} pixels of the masks changed, 1 points lost their mask, ")
    assert warning.startswith("1 of 6 points lost their mask in one update. ") and "more epochs" in warning
    after = data.masks.clone()
    height, width = data.sizes[4].tolist()
    after[4, :height, :width] = True
    before = data.masks & False
    line, warning = watch_labels(data, before, after & (torch.arange(6) == 4)[:, None, None])
    assert "1 images are covered by more than 5 %" in line and "masks of 1 images grew past 5 %" in warning
    assert "first train4" in warning


def test_an_update_is_told_when_it_happens(small: None, tmp_path: Path) -> None:
    events: list[dict] = []
    settings = Settings(epochs=(1, 4), batch_size=2, patch_size=32, extent=8, update_every=2)
    Training(settings, tiny_set(), None, tmp_path, events.append).run()
    said = [
        event["text"] for event in events if event["event"] == "note" and "pixels of the masks changed" in event["text"]
    ]
    assert [text.split(":")[0] for text in said] == ["stage 1, epoch 1", "stage 2, epoch 2"]


def test_a_network_that_fills_images_is_told_at_the_update(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "build_model", lambda name, output_bias: small_network(name, output_bias=9.0))
    events: list[dict] = []
    settings = Settings(epochs=(1, 0), batch_size=2, patch_size=32, extent=8, learning_rate=1e-9)
    Training(settings, tiny_set(), None, tmp_path, events.append).run()
    said = [event["text"] for event in events if event["event"] == "message"]
    assert any("grew past 5 % of the image" in text and "give it more epochs" in text for text in said)


def test_a_run_that_ends_worse_says_so() -> None:
    masks = {"initial": {"iou": 0.75}, "hybrid": {"iou": 0.74}}
    words = verdict({"masks": masks}, Settings())
    assert "IoU 74.00 % after 75.00 %" in words and words.endswith("try --rule soft or --model unet or more epochs")
    assert verdict({"masks": masks}, Settings(rule="soft", model="unet")).endswith("try more epochs")
    assert verdict({"masks": masks | {"hybrid": {"iou": 0.75}}}, Settings()) is None and verdict({}, Settings()) is None
    even = verdict({"masks": masks | {"hybrid": {"iou": 0.7499}}}, Settings())
    assert even == "the correction gained nothing here: IoU 74.99 % after 75.00 %"


def test_check_repeats_the_first_epoch(tmp_path: Path, capsys: pytest.CaptureFixture, small: None) -> None:
    data, out = write_folder(tmp_path / "tiny"), tmp_path / "run"
    assert train.main(["--data", str(data), *FAST, "--extent", "8", "--out", str(out)]) == 0
    before = sorted((path.name, path.stat().st_mtime_ns) for path in out.iterdir())
    capsys.readouterr()
    assert train.main(["--check", str(out), "--threads", "1", "--device", "cpu"]) == 0
    assert "the first epoch comes out the same, bit for bit" in capsys.readouterr().out
    assert sorted((path.name, path.stat().st_mtime_ns) for path in out.iterdir()) == before
    about = read_description(out / "last.safetensors")
    assert about["machine"] == {"device": "cpu", "threads": 1, "ranks": 1}
    assert set(about["data"]) == {"names", "points", "pixels", "masks"}

    lines = (out / "log.jsonl").read_text().splitlines()
    row = json.loads(lines[0])
    (out / "log.jsonl").write_text("\n".join([json.dumps(row | {"loss": row["loss"] + 1e-12}), *lines[1:]]))
    assert train.main(["--check", str(out), "--threads", "1", "--device", "cpu"]) == 1
    text = capsys.readouterr().out
    assert "first epoch: loss" in text and "the first epoch differs" in text
    image = np.array(Image.open(data / "images" / "train2.png"))
    image[0, 0] ^= 1
    Image.fromarray(image).save(data / "images" / "train2.png")
    assert train.main(["--check", str(out), "--threads", "1", "--device", "cpu"]) == 1
    assert "data: 1 images of 6 differ, first train2" in capsys.readouterr().out


def test_check_of_what_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for arguments, words in (
        (["--check", str(tmp_path)], "no such checkpoint"),
        (["--check", str(tmp_path), "--epochs", "1", "1"], "--check takes every setting from the run"),
        (["--check", str(tmp_path), "--resume", str(tmp_path)], "takes every setting"),
    ):
        assert train.main(arguments) == 2
        assert words in capsys.readouterr().err
