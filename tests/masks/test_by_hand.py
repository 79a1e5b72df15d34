"""Extents of single points: read from a CSV, made by PMG, and honoured by hmg-gpu masks with every maker."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from command_tools import refused as told
from command_tools import run
from refusal import refused
from tiny import tiny_set, write_folder

from hmg_gpu import point_to_mask
from hmg_gpu.data import load_folder, load_images, read_extents, read_mask, read_points
from hmg_gpu.masks import ByHand, Pmg


def test_the_column_is_read_and_others_are_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    path.write_text("who,image,extent,x,y\nme,a.png,12,7,3\nme,a.png,,9,9\nme,b, 5 ,1.9,2.2\nme,b,,,\nme,b,7,1,2\n")
    assert read_extents(path) == {"a": {(3, 7): 12}, "b": {(2, 1): 7}}  # the last of a pixel counts
    assert read_points(path)["a"].tolist() == [[3, 7], [9, 9]]
    assert read_extents(tmp_path) == read_extents(path)
    path.write_text("image,y,x\na,1,2\n")
    assert read_extents(path) == {}
    path.write_text("image,y,x,extent\na,1,2\n")  # a short row has none
    assert read_extents(path) == {}
    (tmp_path / "p.json").write_text("{}")
    assert read_extents(tmp_path / "p.json") == {}


@pytest.mark.parametrize("text", ["0", "-3", "2.5", "x", "4097", "99999999999999", "²", "1e2"])
def test_an_extent_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "p.csv").write_text(f"image,y,x,extent\na,1,2,\na,1,3,{text}\n", encoding="utf-8")
    refused(lambda: read_extents(tmp_path / "p.csv"), "p.csv, row 3: extent", "whole pixels from 1 to 4096")


def test_masks_of_both_kinds_are_united() -> None:
    data = tiny_set()
    extents = {data.names[image]: {(y, x): 3 + image} for image, y, x in data.points.tolist()[::2]}
    made = ByHand(Pmg(extent=8), Pmg(), extents)
    for row, (image, y, x) in enumerate(data.points.tolist()):
        one = replace(data, points=data.points[row : row + 1])
        extent = extents.get(data.names[image], {}).get((y, x), 8)
        wanted = point_to_mask(data.images, one.points, extent=extent, sizes=data.sizes)
        assert torch.equal(made.masks(one), wanted)
        assert torch.equal(made.probabilities(one) >= 0.5, wanted)
    apart = [made.masks(replace(data, points=data.points[row : row + 1])) for row in range(len(data.points))]
    assert torch.equal(made.masks(data), torch.stack(apart).any(0))
    nothing = replace(data, points=data.points[:0])
    assert not made.masks(nothing).any()
    assert made.about()["by_hand"]["points"] == 3 and "by hand for 3 points" in str(made)
    other = ByHand(Pmg(extent=8), Pmg(), extents | {data.names[1]: {(0, 0): 9}})
    assert other.about() != made.about()


@pytest.mark.parametrize("batch", [1, 8])
def test_hmg_gpu_masks_honours_them(tmp_path: Path, batch: int, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_folder(tmp_path / "tiny")
    data = load_folder(root, "train")
    lines = [f"{data.names[image]}.png,{y},{x},{4 if image % 2 else ''}" for image, y, x in data.points.tolist()]
    (tmp_path / "p.csv").write_text("\n".join(["image,y,x,extent", *lines]))
    command = ["masks", "--images", root / "images", "--points", tmp_path / "p.csv", "--extent", 8, "--batch", batch]
    command += ["--device", "cpu", "--out", tmp_path / "out"]
    assert run(*command) == 0
    for image, name in enumerate(data.names):
        one = load_images(root / "images" / f"{name}.png", points=root / "masks_centroid")
        wanted = point_to_mask(one.images, one.points, extent=4 if image % 2 else 8)[0].numpy()
        assert np.array_equal(read_mask(tmp_path / "out" / f"{name}.png"), wanted)
    assert json.loads((tmp_path / "out" / "hmg.json").read_text())["settings"]["masks"]["by_hand"]["points"] == 3
    # Another extent is another set of masks: --resume says so.
    (tmp_path / "p.csv").write_text((tmp_path / "p.csv").read_text().replace(",4", ",5"))
    capsys.readouterr()
    told(capsys, run(*command, "--resume"), "made with other settings")
    folder = [*command, "--masks", f"folder:{root / 'masks'}"]  # looks at no point
    assert run(*folder) == 0
    assert "by_hand" not in json.loads((tmp_path / "out" / "hmg.json").read_text())["settings"]["masks"]
