"""hmg-gpu masks in parts: stopped and resumed, from a store, and what keeps stale masks out."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from command_tools import FIXED, ctrl_c_after, make, refused, run, stopped, summary
from PIL import Image
from tiny import write_folder

from hmg_gpu.commands import masks as command
from hmg_gpu.commands.inputs import open_source
from hmg_gpu.commands.journal import JOURNAL, Done, Journal, take_up, unfinished
from hmg_gpu.common.checksums import checksum_of, write_sealed_json
from hmg_gpu.common.errors import InputError
from hmg_gpu.common.files import append_text
from hmg_gpu.data import load_folder, load_images, read_image, write_store
from hmg_gpu.models import build_model
from hmg_gpu.models.checkpoints import save_checkpoint


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "tiny")


def pictures(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.png")}


def count_parts(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The names of every part that is written from now on."""
    written: list[list[str]] = []
    write = command._write_masks

    def spy(folder: Path, data, found) -> None:
        written.append(data.names)
        write(folder, data, found)

    monkeypatch.setattr(command, "_write_masks", spy)
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
    theirs = ("--masks", f"folder:{root / 'masks'}")
    refused(capsys, make(root, out, "--resume", *FIXED, *theirs), "hmg.part.0", "other settings")
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


@pytest.mark.parametrize("kind", ["folder", "store"])
def test_changed_pixels_are_not_taken_for_the_old_ones(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    """Whether the run was stopped or has ended; an image that has no mask yet may change."""
    images, out = root / "images", tmp_path / "out"

    def change(name: str) -> None:
        pixels = read_image(images / f"{name}.png").copy()
        pixels[0, 0] ^= 1
        Image.fromarray(pixels).save(images / f"{name}.png")

    def masks(*more: object) -> int:
        if kind == "folder":
            return make(root, out, *FIXED, *more)
        write_store(tmp_path / "set.h5", [replace(load_folder(root, "train"), masks=None)])
        return run("masks", "--images", tmp_path / "set.h5", "--points", "masks_centroid", "--out", out, *FIXED, *more)

    with ctrl_c_after(2):
        assert masks() == 130
    change("train5")
    assert masks("--resume") == 0
    capsys.readouterr()
    assert masks("--resume") == 0 and "complete already" in capsys.readouterr().out
    change("train4")
    refused(capsys, masks("--resume"), "hmg.json", "other pixels")
    with ctrl_c_after(2):
        assert masks() == 130
    change("train1")
    capsys.readouterr()
    refused(capsys, masks("--resume"), "train1 has changed since its mask was made", "leave out --resume")
    assert masks() == 0 and masks("--resume") == 0


def test_without_resume_all_is_made_anew(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also over what a stopped run of other settings left, whose journals are not believed later."""
    out = tmp_path / "out"
    stopped(root, out, 2)
    shutil.copyfile(out / f"{JOURNAL}0", out / f"{JOURNAL}1")  # as another rank's
    other = ("--extent", 5, "--batch", 2)
    written = count_parts(monkeypatch)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command.Journal, "add", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
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
    (tmp_path / "list.txt").write_text("train0\n")
    listed = ("masks", "--images", tmp_path / "tiny.h5", "--list", tmp_path / "list.txt", *out)
    refused(capsys, run(*listed), "--list", "packed .h5", "--split")


def test_some_images_of_a_folder(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A split by its list in img_idx, or any list of stems (with suffix, twice, with empty lines): the same masks."""
    assert make(root, tmp_path / "all", *FIXED) == 0
    wanted = pictures(tmp_path / "all")
    assert make(root, tmp_path / "train", *FIXED, "--split", "train") == 0
    assert pictures(tmp_path / "train") == {name: data for name, data in wanted.items() if name.startswith("train")}
    (tmp_path / "list.txt").write_text("test1.png\n\ntrain3\ntest1\n")
    assert make(root, tmp_path / "list", *FIXED, "--list", tmp_path / "list.txt", "--coco", "rle") == 0
    assert pictures(tmp_path / "list") == {name: wanted[name] for name in ("test1.png", "train3.png")}
    coco = json.loads((tmp_path / "list" / "coco.json").read_text())
    assert [one["file_name"] for one in coco["images"]] == ["test1.png", "train3.png"]

    capsys.readouterr()
    no = tmp_path / "no"
    refused(capsys, make(root, no, "--split", "val"), "img_idx", "'val'")
    both = ("--split", "train", "--list", tmp_path / "list.txt")
    refused(capsys, make(root, no, *both), "--split train and --list", "one of them")
    refused(capsys, make(root, no, "--list", tmp_path / "nowhere.txt"), "nowhere.txt", "cannot be read")
    (tmp_path / "list.txt").write_text("train0\nnobody\n")
    refused(
        capsys, make(root, no, "--list", tmp_path / "list.txt"), "list.txt: no image nobody", "(1 of 2 are missing)"
    )
    (tmp_path / "list.txt").write_text("\n")
    refused(capsys, make(root, no, "--list", tmp_path / "list.txt"), "list.txt: no name")
    shutil.rmtree(root / "img_idx")
    refused(capsys, make(root, no, "--split", "train"), "img_idx does not exist", "--list FILE", "leave it out")
    assert not no.exists()


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


def test_a_line_of_a_journal_that_changed_is_made_anew(tmp_path: Path) -> None:
    writer = Journal(tmp_path, {"extent": 8}, 0, {})
    writer.begin()
    done = Done([2, 4, 57, 1000], [])
    for part in range(3):
        writer.add(part, done)
    assert take_up(tmp_path, {"extent": 8}, [[]] * 3, lambda part: []) == dict.fromkeys(range(3), done)
    writer.path.write_text(writer.path.read_text().replace("\n[1, [2, 4, 57", "\n[1, [2, 4, 59"))
    assert list(take_up(tmp_path, {"extent": 8}, [[]] * 3, lambda part: [])) == [0, 2]


@pytest.mark.parametrize(
    "entry", ([0], [0, [1, 2, 3, 4], [1, 2]], [0, [1, 2, 3], []], [-1, [1, 2, 3, 4], []], [9, [1, 2, 3, 4], []], 7, "a")
)
def test_forged_lines_of_a_journal_are_left_out(entry: object, tmp_path: Path) -> None:
    writer = Journal(tmp_path, {"extent": 8}, 0, {})
    writer.begin()
    text = json.dumps(entry)
    append_text(writer.path, f"{text} {checksum_of(text.encode())}\n")
    assert take_up(tmp_path, {"extent": 8}, [[]] * 3, lambda part: []) == {}


@pytest.mark.parametrize("run", [[], [3], 3, "extent", None])
def test_forged_summaries_are_refused(run: object, tmp_path: Path) -> None:
    write_sealed_json(tmp_path / "hmg.json", {"run": run})
    with pytest.raises(InputError, match="its masks were made with other extent"):
        take_up(tmp_path, {"extent": 8}, [], lambda part: [])
