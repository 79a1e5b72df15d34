"""confidence.csv beside masks, and what a confidence is worth: by hand, and through the commands."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import tiny_set, write_folder

import eval as script
from hmg_gpu.commands.main import main
from hmg_gpu.data import ImageSet, load_images
from hmg_gpu.evaluation.targets import by_class, compared, describe_targets, sureness
from hmg_gpu.masks import ByHand, Learned, Pmg
from hmg_gpu.masks.makers import learned as learned_maker
from hmg_gpu.masks.student import Student, StudentSettings

QUICK = StudentSettings(crop=24, shift=2, steps=3, batch_size=4, members=2)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learned_maker, "StudentSettings", lambda *, seed: replace(QUICK, seed=seed))


@pytest.mark.parametrize("batch", [1, 100])
def test_every_target_is_told_the_least_sure_first(batch: int, quick: None, tmp_path: Path) -> None:
    root = write_folder(tmp_path / "tiny")
    images = ("--images", root / "images", "--points", root / "masks_centroid", "--extent", 8, "--batch", batch)
    assert main(list(map(str, ("masks", *images, "--masks", "learned", "--out", tmp_path / "out")))) == 0
    rows = list(csv.reader((tmp_path / "out" / "confidence.csv").open()))
    data = load_images(root / "images", points=root / "masks_centroid")
    student = Student.load(tmp_path / "out" / "student.safetensors")
    wanted = student.confidence(data, Pmg(8)).tolist()
    assert bool(((torch.tensor(wanted) > 0) & (torch.tensor(wanted) < 1)).all())
    place = [(data.names[image], str(y), str(x)) for image, y, x in data.points.tolist()]
    assert rows[0] == ["image", "y", "x", "confidence"]
    found = {tuple(row[:3]): float(row[3]) for row in rows[1:]}
    assert found == pytest.approx(dict(zip(place, wanted, strict=True)), abs=1e-4)
    assert len(rows) == len(place) + 1 and [row[3] for row in rows[1:]] == sorted(row[3] for row in rows[1:])
    assert not list((tmp_path / "out").glob("confidence.part*"))
    assert main(list(map(str, ("masks", *images, "--masks", "pmg", "--out", tmp_path / "out")))) == 0
    assert not (tmp_path / "out" / "confidence.csv").exists()  # it told of other masks


def test_what_is_by_hand_has_no_confidence() -> None:
    data = tiny_set()
    student = Student({8: [_network()]}, replace(QUICK, members=1))
    base = Learned(pmg=Pmg(8), student=student)
    (image, y, x), *others = data.points.tolist()
    points, values = ByHand(base, Pmg(), {data.names[image]: {(y, x): 5}}).confidence(data)
    assert points.tolist() == others and len(values) == len(others)
    every = {name: {} for name in data.names}
    for image, y, x in data.points.tolist():
        every[data.names[image]][y, x] = 5
    assert ByHand(base, Pmg(), every).confidence(data) is None
    assert Pmg(8).confidence(data) is None


def _network() -> torch.nn.Module:
    from hmg_gpu.masks.student.network import CropNet

    torch.manual_seed(0)
    return CropNet()


def test_the_command_tells_where_masks_lose(quick: None, tmp_path: Path) -> None:
    root = write_folder(tmp_path / "tiny")
    by = ("size", "contrast", "shape", "neighbours", "reach", "border", "teacher")
    arguments = ["masks", "--data", str(root), "--masks", "pmg", "learned", "--by", *by, "--out", str(tmp_path / "out")]
    assert script.main(arguments) == 0
    found = json.loads((tmp_path / "out" / "masks.json").read_text())
    assert list(found["by"]) == list(by) and list(found["confidence"]) == ["learned"]
    for rows in found["by"].values():
        assert sum(row["targets"] for row in rows) == found["by"]["size"][0]["targets"] + sum(
            row["targets"] for row in found["by"]["size"][1:]
        )
        assert sum(row["lost"] for row in rows) == pytest.approx(1)


def test_targets_described_by_hand() -> None:
    """A bar of 2 x 6, bright but for its last column, beside a pixel: what is seen of both."""
    image = torch.zeros(1, 40, 80)
    image[0, ::2] = 2.0  # surroundings: mean 1, deviation 1, median 0 or 2
    masks = torch.zeros(1, 40, 80, dtype=torch.bool)
    masks[0, 10:12, 10:16] = masks[0, 10, 30] = True
    image[masks] = 12.0
    image[0, 10:12, 15] = 7.0
    data = ImageSet(["a"], image, torch.tensor([[40, 80]]), torch.tensor([[0, 10, 12], [0, 10, 30]]), masks)
    found = describe_targets(data)
    assert found.rows.tolist() == [0, 1]
    for name, wanted in {"size": [12, 1], "shape": [3, 1], "neighbours": [1, 1], "reach": [3, 0]}.items():
        assert found.described[name].tolist() == wanted
    ground = found.described["contrast"].new_tensor([(12 * 10 + 7 * 2) / 12, 12.0])
    assert bool(((found.described["contrast"] - ground).abs() < 2.5).all())
    level = (12 * 10 + 7 * 2) / 12  # every pixel of a bar two pixels wide is an outer one
    bottom = float(found.described["border"][0])
    assert (level - 2) / 10 - 1e-4 <= bottom <= level / 12 + 1e-4
    assert float(found.described["border"][1]) == 1
    prediction = masks.clone()
    prediction[0, 10, 10] = False
    prediction[0, 12, 12:15] = True
    prediction[0, 30, 70] = True  # touches nothing
    hit, union = compared(prediction, data, found)
    assert hit.tolist() == [11, 1] and union.tolist() == [15, 1]
    small, large = by_class(found.described["size"], (9,), found.described["size"], hit, union)
    assert (small["upto"], small["iou"], small["lost"], large["upto"]) == (9, 1.0, 0.0, None)
    assert (large["missed"], large["extra"], large["lost"]) == pytest.approx((1 / 12, 3 / 12, 1))


def test_rank_correlation_by_hand() -> None:
    hit, union = torch.tensor([1, 3, 2, 4]), torch.tensor([4, 4, 4, 4])
    assert sureness(torch.tensor([0.9, 0.2, 0.5, 0.1]), hit, union)["rank_correlation"] == -1
    # ranks 1, 3, 2, 4 against 1.5, 1.5, 3, 4
    tied = sureness(torch.tensor([0.1, 0.1, 0.5, 0.9]), hit, union, share=0.5)
    assert tied["rank_correlation"] == pytest.approx(3 / math.sqrt(5 * 4.5), abs=1e-5)
    assert tied["iou_surest"] == 6 / 8 and tied["iou"] == 10 / 16
    assert math.isnan(sureness(torch.ones(4), hit, union)["rank_correlation"])
