"""What a student remembers of the data that it learned from, and who is told when it is other data."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import tiny_set, write_folder

import train
from hmg_gpu.commands.main import main
from hmg_gpu.data import read_mask, write_mask
from hmg_gpu.data.record import data_digest, differences, in_words, record_of
from hmg_gpu.masks import Learned, Pmg
from hmg_gpu.masks.makers import learned as learned_maker
from hmg_gpu.masks.student import Student, StudentSettings, train_student
from hmg_gpu.masks.student import train as teaching
from hmg_gpu.models.checkpoints import read_description, save_checkpoint

QUICK = StudentSettings(crop=24, shift=2, steps=3, batch_size=4, members=2)


@pytest.mark.parametrize("kind", ["point", "pixel", "teacher"])
def test_a_student_that_is_kept_learns_anew_from_changed_data_and_says_so(
    kind: str, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    data, path, pmg = tiny_set(), tmp_path / "student.safetensors", Pmg(8)
    teaching.learned_student(data, path, pmg, settings=QUICK)
    first = path.read_bytes()
    (record,) = Student.load(path).learned_from
    assert differences(record, record_of(data)) == [] == recwarn.list
    assert read_description(path)["learned_from"] == [{"data": in_words(record)} | data_digest(record)]
    assert str(Learned(str(path), pmg).fit(data)).startswith(
        f"learned by {path}, which learned from 6 points in 6 images, train0 and more; PMG, extent 8"
    )
    if kind == "point":
        data.points[3, 1] += 1
    if kind == "pixel":
        data.images[4, 3, 3] ^= 1
    pmg = Pmg(9) if kind == "teacher" else pmg
    words = {"point": "1 points of 6 differ, first in train3", "pixel": "1 images of 6 differ, first train4"}
    with pytest.warns(UserWarning) as told:
        teaching.learned_student(data, path, pmg, settings=QUICK)
    assert f"{path}: its student learned from other data: {words.get(kind, 'its teacher was')}" in str(told[0].message)
    (record,) = Student.load(path).learned_from
    assert differences(record, record_of(data)) == [] and path.read_bytes() != first
    teaching.learned_student(data, path, pmg, settings=QUICK)
    assert len(told) == 1 and len(recwarn) == 0


@pytest.mark.parametrize("name", ["train.py", "hmg-gpu masks"])
def test_changed_points_are_refused_before_a_student_is_replaced(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(learned_maker, "StudentSettings", lambda *, seed: replace(QUICK, seed=seed))
    root, out = write_folder(tmp_path / "tiny"), tmp_path / "out"
    if name == "train.py":
        arguments = ["--data", root, "--masks", "learned", "--epochs", 1, 0, "--batch-size", 2, "--patch-size", 32]
        command, again = train.main, ["--resume", out]
        assert command([*map(str, [*arguments, "--out", out])]) == 0
        words = "the data changed since the run began: 1 points of 6 differ, first in train0"
    else:
        arguments = ["masks", "--images", root / "images", "--points", root / "masks_centroid", "--masks", "learned"]
        command, again = main, [*arguments, "--resume", "--out", out]
        assert command([*map(str, [*arguments, "--out", out])]) == 0
        about = json.loads((out / "hmg.json").read_text())["run"]
        (out / "hmg.json").unlink()
        (out / "hmg.part.0").write_text(json.dumps(about) + "\n")
        words = "its masks were made with other points"
    student = (out / "student.safetensors").read_bytes()
    path = root / "masks_centroid" / "train0.png"
    plane = read_mask(path)
    write_mask(path, np.roll(plane, 1, axis=0))
    capsys.readouterr()
    assert command([*map(str, again)]) == 2
    assert words in capsys.readouterr().err and (out / "student.safetensors").read_bytes() == student


def test_what_a_file_of_ours_comes_from(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "student.safetensors"
    train_student([tiny_set(), tiny_set(seed=1)], Pmg(8), settings=QUICK).save(path)
    assert main(["check", str(path)]) == 0
    said = capsys.readouterr().out
    assert "a student" in said and said.count("6 points in 6 images, train0 and more") == 2
    save_checkpoint(path, {"model.weight": torch.zeros(2)}, {"dataset": "tiny", "data": {"points": "0123abcd"}})
    assert main(["check", str(path)]) == 0
    said = capsys.readouterr().out
    assert "of a run" in said and "0123abcd" in said
    path.write_bytes(path.read_bytes()[:-1])
    assert main(["check", str(path)]) == 2
    assert "copy it again" in capsys.readouterr().err
