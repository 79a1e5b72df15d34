"""The hmg-gpu command: what it writes equals the library's functions, and every mistake ends in one line."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from command_tools import decode, make, refused, run
from PIL import Image
from tiny import SIZES, write_folder

from hmg_gpu import point_to_mask
from hmg_gpu.data import load_folder, load_images, load_store, read_mask
from hmg_gpu.masks import Pmg
from hmg_gpu.masks.extent import choose_extent
from hmg_gpu.masks.update import update
from hmg_gpu.models import build_model
from hmg_gpu.models.checkpoints import save_checkpoint
from hmg_gpu.models.predict import predict


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Eight images of the tiny set: six for training, two for testing."""
    return write_folder(tmp_path / "tiny")


# ---- masks ----------------------------------------------------------------------------------------------------------


def test_masks_are_those_of_the_library(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "out"
    assert make(root, out, "--extent", 8, "--coco", "rle", "--overlays", "--batch", 3) == 0
    data = load_images(root / "images", points=root / "masks_centroid")
    wanted = point_to_mask(data.images, data.points, extent=8, sizes=data.sizes)
    assert {path.stem for path in out.glob("*.png")} == set(data.names)
    for row, (name, (height, width)) in enumerate(zip(data.names, data.sizes.tolist(), strict=True)):
        with Image.open(out / f"{name}.png") as picture:
            assert picture.mode == "L" and set(np.unique(picture)) == {0, 255}
        assert np.array_equal(read_mask(out / f"{name}.png"), wanted[row, :height, :width].numpy())

    coco = json.loads((out / "coco.json").read_text())
    assert [one["file_name"] for one in coco["images"]] == [f"{name}.png" for name in data.names]
    united = [np.zeros(size, bool) for size in data.sizes.tolist()]
    for one in coco["annotations"]:
        united[one["image_id"] - 1] |= decode(one["segmentation"])
    assert all(np.array_equal(read_mask(out / f"{n}.png"), mask) for n, mask in zip(data.names, united, strict=True))

    assert [path.name for path in sorted((out / "overlays").iterdir())] == [
        "000001-000003.png",
        "000004-000006.png",
        "000007-000008.png",
    ]
    summary = json.loads((out / "hmg.json").read_text())
    assert summary["images"] == 8 and summary["points"] == 8 and summary["kind"] == "initial"
    about = {"maker": "pmg", "half_width": 4, "alpha": 0.15, "extent": 8, "directional": True}
    assert summary["settings"] == {"masks": about}
    assert summary["foreground"] == int(wanted.sum()) and summary["components"] == len(coco["annotations"])
    text = capsys.readouterr().out
    assert summary["masks"] == str(Pmg(extent=8)) and "as given" in summary["masks"]
    assert f"masks: {summary['masks']}\n" in text and "images/s" in text and "peak memory" in text


def test_a_network_corrects_the_masks(root: Path, tmp_path: Path) -> None:
    torch.manual_seed(1)
    net = build_model("acm", output_bias=0.0).eval()
    description = {"settings": {"model": "acm"}, "normalisation": [63.0, 21.0]}
    weights = {f"model.{name}": value for name, value in net.state_dict().items()}
    save_checkpoint(tmp_path / "net.safetensors", weights, description)
    assert make(root, tmp_path / "out", "--extent", 8, "--checkpoint", tmp_path / "net.safetensors", "--batch", 8) == 0
    data = load_images(root / "images", points=root / "masks_centroid", normalisation=(63.0, 21.0))
    initial = point_to_mask(data.images, data.points, extent=8, sizes=data.sizes)
    wanted = update(predict(net, data), initial, data.points, sizes=data.sizes)
    assert not torch.equal(wanted, initial)
    for row, (name, (height, width)) in enumerate(zip(data.names, data.sizes.tolist(), strict=True)):
        assert np.array_equal(read_mask(tmp_path / "out" / f"{name}.png"), wanted[row, :height, :width].numpy())
    summary = json.loads((tmp_path / "out" / "hmg.json").read_text())
    assert summary["kind"] == "hybrid" and summary["settings"]["network"]["normalisation"] == [63.0, 21.0]


def test_csv_of_clicks_with_an_image_left_out(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    data = load_images(root / "images", points=root / "masks_centroid")
    rows = [f"{data.names[i]}.png,{y},{x}" for i, y, x in data.points.tolist() if i != 2]
    (tmp_path / "clicks.csv").write_text("\n".join(["image,y,x", *rows, rows[0]]) + "\n")
    code = run("masks", "--images", root / "images", "--points", tmp_path / "clicks.csv", "--out", tmp_path / "out")
    assert code == 0
    assert not read_mask(tmp_path / "out" / f"{data.names[2]}.png").any()
    text = capsys.readouterr().out
    assert f"1 ({data.names[2]})" in text and "are too few to choose by" in text


def test_again_into_the_same_folder(root: Path, tmp_path: Path) -> None:
    assert make(root, tmp_path / "out") == 0
    assert make(root, tmp_path / "out", "--extent", 5) == 0


def test_files_of_others_are_not_replaced(root: Path, capsys: pytest.CaptureFixture) -> None:
    before = {path: path.read_bytes() for path in root.rglob("*.png")}
    refused(capsys, make(root, root / "masks"), "which hmg-gpu did not write", "empty folder")
    refused(capsys, make(root, root / "images"), "holds the input")
    refused(capsys, make(root, root / "masks_centroid"), "holds the input")
    assert {path: path.read_bytes() for path in root.rglob("*.png")} == before


def test_a_failed_run_leaves_the_masks_that_were_there(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "out"
    assert make(root, out, "--coco", "rle") == 0
    before = {path: path.read_bytes() for path in out.iterdir()}
    (root / "images" / "train5.png").write_bytes((root / "images" / "train5.png").read_bytes()[:-40])
    refused(capsys, make(root, out, "--coco", "rle", "--batch", 8), "train5.png", "cannot be read")
    assert {path: path.read_bytes() for path in out.iterdir()} == before


def test_mistakes(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    images, out = root / "images", tmp_path / "out"
    missing = tmp_path / "[red]missing"
    refused(capsys, run("masks", "--images", missing, "--points", images, "--out", out), "[red]missing: no such folder")
    (tmp_path / "none.csv").write_text("image,y,x\ntrain0.png,,\n")
    none = ("masks", "--images", images, "--points", tmp_path / "none.csv", "--out", out)
    refused(capsys, run(*none), "no point in any of the 8 images")
    (tmp_path / "far.csv").write_text("image,y,x\ntrain0.png,99,1\n")
    far = ("masks", "--images", images, "--points", tmp_path / "far.csv", "--out", out)
    refused(capsys, run(*far), "far.csv, row 2", "outside the image train0")
    refused(capsys, make(root, out, "--checkpoint", tmp_path / "no.pth"), "no.pth")
    shutil.copyfile(images / "train0.png", images / "train0.bmp")
    refused(capsys, make(root, out), "2 images are called train0")
    assert not out.exists()
    for bad in (["--extent", "0"], ["--alpha", "2"], ["--batch", "0"], ["--coco", "xml"], ["--extent", "1.5"]):
        with pytest.raises(SystemExit) as caught:
            make(root, out, *bad)
        assert caught.value.code == 2


def test_memory_does_not_grow_with_the_folder(tmp_path: Path) -> None:
    """Peak memory of 1,200 images against 200, each in a process of its own."""
    peaks = {}
    image = np.full((48, 48), 60, np.uint8)
    image[20:23, 30:33] = 200
    for count in (200, 1200):
        root = tmp_path / str(count)
        (root / "images").mkdir(parents=True)
        Image.fromarray(image).save(root / "images" / "0.png")
        for index in range(1, count):
            shutil.copyfile(root / "images" / "0.png", root / "images" / f"{index}.png")
        (root / "points.csv").write_text("image,y,x\n" + "".join(f"{index}.png,21,31\n" for index in range(count)))
        command = [
            sys.executable,
            "-m",
            "hmg_gpu",
            "masks",
            "--images",
            root / "images",
            "--points",
            root / "points.csv",
        ]
        options = ["--out", root / "out", "--threads", "1", "--coco", "polygons", "--device", "cpu"]
        subprocess.run([*map(str, command), *map(str, options)], check=True, capture_output=True, timeout=600)
        summary = json.loads((root / "out" / "hmg.json").read_text())
        assert summary["images"] == summary["components"] == count and summary["foreground"] == 9 * count
        peaks[count] = summary["peak_memory_gb"]
    assert peaks[1200] < peaks[200] + 0.02, peaks  # 1,000 images of 48 x 48 held as float32 take 0.009 GB, twice that


# ---- pack, check ----------------------------------------------------------------------------------------------------


def test_pack(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    store = tmp_path / "tiny.h5"
    assert run("pack", root, store) == 0
    text = capsys.readouterr().out
    assert "train" in text and "test" in text and "masks_centroid" in text and "yes" in text
    for split in ("train", "test"):
        folder, packed = load_folder(root, split), load_store(store, split)
        assert torch.equal(folder.images, packed.images) and torch.equal(folder.points, packed.points)
        assert torch.equal(folder.masks, packed.masks)
    refused(capsys, run("pack", root, store), "exists already", "--overwrite")
    assert run("pack", root, store, "--overwrite") == 0
    refused(capsys, run("pack", root, tmp_path / "tiny.bin"), "ends in .h5")
    refused(capsys, run("pack", tmp_path / "nowhere", tmp_path / "b.h5"), "img_idx")


def test_check_of_a_clean_set(root: Path, capsys: pytest.CaptureFixture, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "250")
    assert run("check", root) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "nothing found that deserves a look" in text
    data = load_folder(root, "train")
    areas = data.masks.sum((1, 2))  # one target an image
    classes = [int((areas <= 9).sum()), int(((areas > 9) & (areas <= 81)).sum()), int((areas > 81).sum())]
    assert "│ ".join(["", "train ", "6 ", "6 ", *(f"{count} " for count in classes), "6 │"]) in text
    assert "sizes 24 x 30 to 48 x 48 (height x width), 6 distinct; modes L: 8" in text


def spoil_size(root: Path) -> None:
    Image.new("L", (31, 32)).save(root / "masks" / "train0.png")


def spoil_binary(root: Path) -> None:
    mask = np.array(Image.open(root / "masks" / "train1.png"))
    mask[0, 0] = 64
    Image.fromarray(mask).save(root / "masks" / "train1.png")


def spoil_duplicate(root: Path) -> None:
    image = np.array(Image.open(root / "images" / "train1.png")).astype(int)
    noise = np.random.default_rng(0).integers(-1, 2, image.shape)
    Image.fromarray((image + noise).clip(0, 255).astype(np.uint8)).save(root / "images" / "test1.png")
    shutil.copyfile(root / "masks" / "train1.png", root / "masks" / "test1.png")
    shutil.copyfile(root / "masks_centroid" / "train1.png", root / "masks_centroid" / "test1.png")


def spoil_point(root: Path) -> None:
    point = np.array(Image.open(root / "masks_centroid" / "train2.png"))
    Image.fromarray(np.roll(point, 10, 0)).save(root / "masks_centroid" / "train2.png")


def spoil_second_target(root: Path) -> None:
    mask = np.array(Image.open(root / "masks" / "train3.png"))
    mask[:2, :2] = 255
    Image.fromarray(mask).save(root / "masks" / "train3.png")


def spoil_lists(root: Path) -> None:
    with open(root / "img_idx" / "test_tiny.txt", "a") as handle:
        handle.write("train4\nnobody\n")


def spoil_image(root: Path) -> None:
    (root / "images" / "train5.png").write_bytes(b"\x89PNG, not really")


def spoil_constant(root: Path) -> None:
    Image.new("L", SIZES[0][::-1], 7).save(root / "images" / "train0.png")


def spoil_mask_missing(root: Path) -> None:
    (root / "masks" / "test0.png").unlink()


def spoil_csv(root: Path) -> None:
    (root / "clicks.csv").write_text("image,y,x\ntrain0.png,500,3\ntrain1.png,1,1\ntrain1.png,1,1\n")


@pytest.mark.parametrize(
    ("spoil", "points", "parts"),
    [
        (spoil_size, None, ["mask of another size", "train0 (mask 32 x 31, image 32 x 32)"]),
        (spoil_binary, None, ["mask not binary", "train1 (3 values: 0, 64, 255)"]),
        (spoil_duplicate, None, ["near-duplicate of train and test", "train1 and test1"]),
        (spoil_point, None, ["point off target", "train2 (y="]),
        (spoil_second_target, None, ["target without point", "train3 (1)"]),
        (spoil_lists, None, ["in two splits", "train4 (test and train)", "listed but missing", "nobody (test)"]),
        (spoil_image, None, ["unreadable", "train5.png"]),
        (spoil_constant, None, ["constant image", "train0 (7 everywhere)"]),
        (spoil_mask_missing, None, ["image without mask", "test0"]),
        (
            spoil_csv,
            "clicks.csv",
            ["point outside its image", "train0 (y=500, x=3)", "point twice", "train1 (y=1, x=1)"],
        ),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_check_finds(
    spoil, points: str | None, parts: list[str], root: Path, capsys: pytest.CaptureFixture, monkeypatch
) -> None:
    monkeypatch.setenv("COLUMNS", "250")
    spoil(root)
    assert run("check", root, *(["--points", points] if points else [])) == 1
    text = capsys.readouterr().out
    for part in parts:
        assert part in text, text


def test_check_of_a_folder_of_images(root: Path, capsys: pytest.CaptureFixture) -> None:
    assert run("check", root / "images") == 0
    assert "all" in capsys.readouterr().out
    refused(capsys, run("check", root / "nowhere"), "no such folder")
    refused(capsys, run("check", root, "--points", "clicks.csv"), "clicks.csv: no such points")


@pytest.mark.parametrize("dataset", ["NUAA-SIRST"])
def test_check_of_real_data(dataset: str, data_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """A tenth of the set: sizes, modes and counts by class as the readers give them."""
    source, root = data_root / dataset, tmp_path / dataset
    for folder in ("images", "masks", "masks_centroid", "img_idx"):
        (root / folder).mkdir(parents=True)
    names = (source / "img_idx" / f"train_{dataset}.txt").read_text().split()[::10]
    for folder in ("images", "masks", "masks_centroid"):
        for name in names:
            shutil.copyfile(source / folder / f"{name}.png", root / folder / f"{name}.png")
    (root / "img_idx" / f"train_{dataset}.txt").write_text("\n".join(names))
    code = run("check", root)
    text = capsys.readouterr().out
    data = load_folder(root, "train")
    assert f" {len(names)} " in text and f" {len(data.points)} " in text
    off = int((~data.masks[tuple(data.points.T)]).sum())
    assert code == int("point off target" in text or "target without point" in text)
    assert ("point off target" in text) == (off > 0)


# ---- the program ----------------------------------------------------------------------------------------------------


def test_as_a_module(root: Path, tmp_path: Path) -> None:
    """The exit code reaches the shell; the same program answers to python -m."""
    command = [sys.executable, "-m", "hmg_gpu", "check", str(root / "nowhere")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and "Traceback" not in done.stderr


def test_auto_extent_is_the_librarys(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Enough points: the sample is the whole folder here."""
    for index in range(16):
        for folder in ("images", "masks_centroid"):
            shutil.copyfile(root / folder / f"train{index % 6}.png", root / folder / f"more{index}.png")
    assert make(root, tmp_path / "out") == 0
    data = load_images(root / "images", points=root / "masks_centroid")
    chosen, why = choose_extent(data), "chosen from 24 points in 24 images: by how long masks hold still"
    found = json.loads((tmp_path / "out" / "hmg.json").read_text())
    assert found["settings"]["masks"]["extent"] == chosen
    assert found["masks"] == str(Pmg(extent=chosen, why=why))
    assert f"masks: {found['masks']}\n" in capsys.readouterr().out
