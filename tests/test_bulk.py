"""hmg-gpu masks in parts: stopped and resumed, from a store, and what keeps stale masks out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from test_cli import make, refused, run
from tiny import write_folder

from hmg_gpu import cli
from hmg_gpu.bulk import JOURNAL, open_source, unfinished
from hmg_gpu.checkpoints import save_checkpoint
from hmg_gpu.data import load_folder, load_images
from hmg_gpu.models import build_model

FIXED = ("--extent", 8, "--batch", 2, "--device", "cpu")  # eight images: four parts


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "tiny")


def pictures(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.png")}


def summary(folder: Path) -> dict[str, object]:
    found = json.loads((folder / "hmg.json").read_text())
    clocks = ("seconds", "peak_memory_gb", "images_per_second", "megapixels_per_second", "ranks", "points_from")
    return {key: value for key, value in found.items() if key not in clocks}


def stopped(root: Path, out: Path, after: int, *more: object) -> None:
    """A run that Ctrl-C ends while it writes part ``after``: one mask of it is there."""
    with pytest.MonkeyPatch.context() as patch:
        write, calls = cli._write_masks, []

        def interrupted(folder: Path, data, found) -> None:
            calls.append(data)
            if len(calls) > after:
                write(folder, data.subset([0]), found[:1])
                raise KeyboardInterrupt
            write(folder, data, found)

        patch.setattr(cli, "_write_masks", interrupted)
        assert make(root, out, *FIXED, *more) == 130


def count_parts(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The names of every part that is written from now on."""
    written: list[list[str]] = []
    write = cli._write_masks

    def spy(folder: Path, data, found) -> None:
        written.append(data.names)
        write(folder, data, found)

    monkeypatch.setattr(cli, "_write_masks", spy)
    return written


def test_a_stopped_run_resumes(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert make(root, whole, *FIXED, "--coco", "rle") == 0
    stopped(root, out, 2)
    assert len(pictures(out)) == 5 and not (out / "hmg.json").exists() and len(unfinished(out)) == 1
    with open(out / f"{JOURNAL}0", "a") as journal:
        journal.write("3 2 2")  # as a kill in the middle of a line leaves it

    capsys.readouterr()
    refused(capsys, make(root, out, "--resume", "--extent", 9, "--batch", 2), "hmg.part.0", "other settings")
    refused(capsys, make(root, out, "--resume", "--extent", 8, "--batch", 3), "hmg.part.0", "other batch")
    written = count_parts(monkeypatch)
    assert make(root, out, *FIXED, "--resume", "--coco", "rle") == 0
    assert written == [["train2", "train3"], ["train4", "train5"]]
    assert pictures(out) == pictures(whole) and not unfinished(out)
    assert (out / "coco.json").read_bytes() == (whole / "coco.json").read_bytes()
    assert summary(out) == summary(whole)

    capsys.readouterr()
    assert make(root, out, *FIXED, "--resume") == 0
    assert "complete already" in capsys.readouterr().out and len(written) == 2
    refused(capsys, make(root, out, "--resume", "--extent", 9, "--batch", 2), "hmg.json", "other settings")


def test_a_mask_that_was_removed_is_made_again(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    stopped(root, out, 2)
    (out / "test1.png").unlink()  # of the first part
    written = count_parts(monkeypatch)
    assert make(root, out, *FIXED, "--resume") == 0
    assert len(written) == 3 and (out / "test1.png").exists()
    (out / "test1.png").unlink()  # of a finished run, whose journal is gone: all are made again
    assert make(root, out, *FIXED, "--resume") == 0
    assert len(written) == 3 + 4 and (out / "test1.png").exists()


def test_moved_points_are_not_taken_for_the_old_ones(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = load_images(root / "images", points=root / "masks_centroid")
    clicks = [f"{data.names[i]},{y},{x}" for i, y, x in data.points.tolist()]
    table, out = tmp_path / "clicks.csv", tmp_path / "out"
    command = ("masks", "--images", root / "images", "--points", table, "--out", out, *FIXED, "--resume")
    table.write_text("\n".join(["image,y,x", *clicks]) + "\n")
    assert run(*command) == 0  # nothing to go on with: a new run
    table.write_text("\n".join(["image,y,x", *clicks[:-1]]) + "\n")
    refused(capsys, run(*command), "hmg.json", "other points")


def test_without_resume_all_is_made_anew(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also over what a stopped run of other settings left, whose journals are not believed later."""
    out = tmp_path / "out"
    stopped(root, out, 2)
    shutil.copyfile(out / f"{JOURNAL}0", out / f"{JOURNAL}1")  # as another rank's
    other = ("--extent", 5, "--batch", 2)
    written = count_parts(monkeypatch)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli.Journal, "add", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert make(root, out, *other) == 130
    assert [path.name for path in unfinished(out)] == [f"{JOURNAL}0"]
    assert make(root, out, *other, "--resume") == 0
    assert len(written) == 1 + 4
    assert make(root, tmp_path / "whole", *other) == 0
    assert pictures(out) == pictures(tmp_path / "whole")


def test_masks_of_a_store(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The masks of the folder, with and without a network; batches differ, so float sums may, the masks do not."""
    torch.manual_seed(1)
    net = build_model("acm", output_bias=0.0)
    weights = {f"model.{name}": value for name, value in net.state_dict().items()}
    save_checkpoint(tmp_path / "net.safetensors", weights, {"settings": {"model": "acm"}})
    assert run("pack", root, tmp_path / "tiny.h5") == 0
    for number, more in enumerate(((), ("--checkpoint", tmp_path / "net.safetensors", "--normalisation", "63,21"))):
        assert make(root, tmp_path / f"folder{number}", "--extent", 8, *more) == 0
        wanted = pictures(tmp_path / f"folder{number}")
        for split, points in (("train", "masks_centroid"), ("test", root / "masks_centroid")):
            out = tmp_path / f"{split}{number}"
            store = ("--images", tmp_path / "tiny.h5", "--split", split, "--points", points)
            assert run("masks", *store, "--out", out, *FIXED, *more, "--coco", "rle") == 0
            assert pictures(out) == {name: data for name, data in wanted.items() if name.startswith(split)}
            names = [one["file_name"] for one in json.loads((out / "coco.json").read_text())["images"]]
            assert names == load_folder(root, split).names
    out = ("--points", "masks_centroid", "--out", tmp_path / "no")
    capsys.readouterr()
    refused(capsys, run("masks", "--images", tmp_path / "tiny.h5", "--split", "val", *out), "no split 'val'")
    refused(capsys, make(root, tmp_path / "no", "--split", "train"), "--split train", "leave it out")


def test_any_rows_of_a_store(root: Path, tmp_path: Path) -> None:
    assert run("pack", root, tmp_path / "tiny.h5") == 0
    data = load_folder(root, "train")
    with open_source(tmp_path / "tiny.h5", Path("masks_centroid"), None, None) as source:
        assert source.normalisation() == (data.mean, data.std)
        for rows in ([3], [1, 2], [0, 2, 3, 5]):
            part, wanted = source.read(rows), data.subset(rows)
            assert part.names == wanted.names and torch.equal(part.images, wanted.images)
            assert torch.equal(part.points, wanted.points) and torch.equal(part.sizes, wanted.sizes)
        assert all(np.array_equal(source.points[name], part[:, 1:]) for name, part in zip(
            data.names, (data.points[data.points[:, 0] == row] for row in range(len(data))), strict=True
        ))  # fmt: skip
