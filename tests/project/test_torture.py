"""The parts of tests/torture in short: a few rounds hold, and each part notices what it looks for."""

from __future__ import annotations

import math
import os
import resource
import signal
from collections.abc import Iterator
from pathlib import Path

import filelock
import pytest
import torch
import torch._dynamo  # what an optimiser imports at its first use: here once, not in every child
from refusal import refused
from tiny import tiny_set, write_folder

from hmg_gpu.common.errors import HMGError
from hmg_gpu.common.files import remove_parts
from hmg_gpu.data import write_store
from hmg_gpu.data.points import csv_file
from hmg_gpu.models import checkpoints, weights
from hmg_gpu.models.checkpoints import read_description, read_tensors, save_checkpoint
from hmg_gpu.training.state import check_state, keep_previous, recover
from tests.torture import disk, flip, fuzz, kill, own, pairs, steady
from tests.torture.kill import die_in_save, differences, fingerprint, fork, go_on, job, unreadable


@pytest.fixture(autouse=True)
def own_floats() -> Iterator[None]:
    yield
    torch.set_flush_denormal(False)  # which train.py turns on


def test_flipped_bits_and_swapped_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = flip.run(tmp_path / "held", 80, math.inf, 0)
    assert (found["flips"], found["swaps"], found["failures"]) == (80, 8, [])
    assert found["by kind"]["weights"] == {"told": 10} and found["by kind"]["swapped"] == {"told": 8}
    for module in (checkpoints, weights):  # without the checksum most flips of a weight go by
        monkeypatch.setattr(module, "check_whole", lambda path: None)
    blind = flip.run(tmp_path / "blind", 80, math.inf, 0)
    assert any(failure.startswith("weights: bit") for failure in blind["failures"])


@pytest.mark.slow
def test_killed_in_a_save_and_resumed(tmp_path: Path) -> None:
    data, out, said = write_folder(tmp_path / "tiny"), tmp_path / "out", tmp_path / "said"
    assert fork(lambda: job(data, tmp_path / "whole"), said) == 0, said.read_text()
    expected = fingerprint(tmp_path / "whole")
    for number, death in ((0, signal.SIGXFSZ), (4, signal.SIGKILL)):  # within the file; before it is renamed
        code = fork(lambda number=number: (die_in_save(out, number), go_on(data, out)), said)
        assert code == -death, (number, said.read_text())
        assert unreadable(out) == [] and kill.epochs_lost(out) == 1
    assert differences("run", fork(lambda: go_on(data, out), said), said, out, expected) == []
    mask = next((out / "run" / "masks_hybrid").glob("*.png"))
    mask.write_bytes(mask.read_bytes()[:45])
    assert len(unreadable(out)) == 1
    assert "1 differ" in differences("run", 0, said, out, expected)[0]


def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(tmp_path: Path) -> None:
    last = tmp_path / "last.safetensors"
    for epoch in range(3):
        keep_previous(last)
        save_checkpoint(last, {"model.weight": torch.full((99,), float(epoch))}, {"stage": 0, "epoch": epoch})
    assert recover(last) is None and read_description(last)["epoch"] == 2
    whole = last.read_bytes()
    for damaged in (whole[:-7], b"", None):  # cut short, empty, gone
        last.unlink(missing_ok=True)
        if damaged is not None:
            last.write_bytes(damaged)
        said = recover(last)
        assert said.startswith(f"{last}: ") and said.endswith("the checkpoint before it, stage 1, epoch 2")
        assert read_description(last)["epoch"] == 1 and read_tensors(last)["model.weight"][0] == 1
    (tmp_path / "previous.safetensors").write_bytes(whole[:9])
    assert recover(last) is None
    last.write_bytes(whole[:9])
    refused(lambda: recover(last), "previous.safetensors: not a readable safetensors file")
    (tmp_path / "previous.safetensors").unlink()
    refused(lambda: recover(last), "last.safetensors: not a readable safetensors file")


def test_only_what_writers_left_is_cleared_away(tmp_path: Path) -> None:
    (tmp_path / "masks").mkdir()
    left = (".last.17.part.safetensors", "masks/.a.b.3.part.png")
    others = (".hidden", "a.part.png", ".a.part.png", "masks/.a.x.part.png", "last.safetensors")
    for name in (*left, *others):
        (tmp_path / name).touch()
    remove_parts(tmp_path)
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == {tmp_path / name for name in others}


def test_a_full_disk_does_not_crash_the_hdf5_library(tmp_path: Path) -> None:
    path, old = tmp_path / "s.h5", [tiny_set()]
    write_store(path, old)
    before = path.read_bytes()

    def limited() -> int:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
        try:
            write_store(path, [tiny_set(seed=1), tiny_set(split="test")])
        except HMGError as error:
            return 0 if str(error).startswith(f"{path}: cannot be written (File too large)") else 1
        return 2

    assert fork(limited, tmp_path / "said") == 0, (tmp_path / "said").read_text()
    assert path.read_bytes() == before and [one.name for one in tmp_path.glob("*.h5")] == ["s.h5"]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("stage", 3), ("stage", True), ("epoch", -1), ("epoch", "2"), ("step", 1.0), ("warned", [3]), ("warned", "x"),
        ("results", []), ("results", {"stage 1": {"iou": 1}}), ("results", {"masks": [1]}), ("results", {"masks": 1e9}),
        ("totals", torch.zeros(4)), ("masks.current", torch.zeros(2)), ("optimizer.9.step", torch.zeros(())),
        ("data_changed", [1]), ("optimizer.0.exp_avg", torch.zeros(3)), ("optimizer.0.other", torch.zeros(2)),
    ],
)  # fmt: skip
def test_forged_states_of_a_run_are_refused(key: str, value: object) -> None:
    metrics = dict.fromkeys(("iou", "niou", "fa", "pixel_fa", "matched", "targets"), 0.5) | {"pd": math.nan}
    state = {"stage": 1, "epoch": 2, "step": 3, "warned": ["x"], "over": False, "data_changed": []}
    state |= {"results": {"stage 1": metrics, "masks": {"initial": metrics}}}
    tensors = {"totals": torch.zeros(5, dtype=torch.float64), "masks.current": torch.zeros(2, dtype=torch.bool)}
    tensors |= {"optimizer.0.step": torch.zeros(()), "optimizer.0.exp_avg": torch.zeros(2)}
    tensors |= {"optimizer.0.exp_avg_sq": torch.zeros(2)}
    check_state(Path("last"), state, tensors, [torch.zeros(2)])
    (tensors if isinstance(value, torch.Tensor) else state)[key] = value
    refused(lambda: check_state(Path("last"), state, tensors, [torch.zeros(2)]), "last: ", key.split()[0])


def test_full_and_read_only(tmp_path: Path) -> None:
    found = disk.run(tmp_path, 2, math.inf, 0)
    if not found["cases"]:
        pytest.skip(f"no mounts here: {found['failures'][0][-100:]}")
    assert found["cases"] == found["held"] == 2, found
    assert disk.changes({"a": b"1", "log.jsonl": b"1"}, {"a": b"2", "log.jsonl": b"12", ".x.3.part.png": b""}) == [
        "a: changed",
        ".x.3.part.png: left behind",
    ]


@pytest.mark.slow
def test_of_two_processes_one_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    every = pairs.commands
    for folder in ("held", "blind"):
        (tmp_path / folder).mkdir()
    monkeypatch.setattr(pairs, "commands", lambda folder: {"learned": every(folder)["hmg-gpu masks --masks learned"]})
    found = pairs.run(tmp_path / "held", 1, math.inf, 0)
    assert (found["commands"], found["pairs"], found["failures"]) == (1, 1, []), found

    def none(*arguments: object) -> filelock.FileLock:
        return filelock.FileLock(tmp_path / "blind" / f"{os.getpid()}.lock")

    monkeypatch.setattr(pairs.locks, "_take", none)
    blind = pairs.run(tmp_path / "blind", 1, math.inf, 0)
    assert any("both held the folder at once" in text for text in blind["failures"]), blind


@pytest.mark.slow
def test_every_kind_of_damaged_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def planted(path: Path) -> None:
        raise KeyError("planted")

    monkeypatch.setattr(fuzz, "read_mask", planted)
    found = fuzz.run(tmp_path, 30, math.inf, 0)
    assert found["inputs"] == 30 and found["calls"] > 80 and 0 < found["refused"] < found["calls"]
    assert found["faults"] > 0 and {fault["fault"].splitlines()[-1] for fault in found["failures"]} == {
        "KeyError: 'planted'"
    }


@pytest.mark.slow
def test_files_of_ours_are_told_or_read_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("held", "blind"):
        (tmp_path / folder).mkdir()
    found = own.run(tmp_path / "held", 36, math.inf, 0)
    assert (found["inputs"], found["kinds"], found["failures"]) == (36, 9, []), found
    assert 0 < found["refused"] < found["calls"]
    for module in (checkpoints, weights):  # without the checksum damage goes by
        monkeypatch.setattr(module, "check_whole", lambda path: None)
    monkeypatch.setattr(csv_file._Marks, "plain", lambda marks, text, where: text.replace(",", ""))  # of thousands
    blind = own.run(tmp_path / "blind", 90, math.inf, 0)
    said = [fault["fault"] for fault in blind["failures"]]
    assert any("without a word" in text for text in said) and any("read as {" in text for text in said), said


def test_a_hang_is_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def endless(path: Path) -> None:
        while True:
            pass

    monkeypatch.setattr(fuzz, "SECONDS", 0.3)
    monkeypatch.setattr(
        fuzz, "write_corpus", lambda folder: {"csv": [("a.csv", b"image,y,x")], "safetensors": [("w", b"")]}
    )
    monkeypatch.setattr(fuzz, "prepare", lambda folder: [])
    monkeypatch.setattr(fuzz, "jobs", lambda *_: [("endless", lambda: endless(tmp_path))])
    found = fuzz.run(tmp_path, 1, math.inf, 0)
    assert found["faults"] == 1 and "0.3 s of computing" in found["failures"][0]["fault"]


@pytest.mark.slow
def test_the_same_bits_and_no_growth(tmp_path: Path) -> None:
    assert steady.run_determinism(tmp_path, 2, math.inf, 0)["same"] == 2
    assert steady.grown([9.0, 5, 5, 5, 5, 5, 5, 5, 5, 5]) == {"rounds": 10, "grown_mib": -4, "peak_mib": 9}
    assert steady.grown([5.0 + step for step in range(100)])["grown_mib"] == 90
    assert fork(lambda: steady.updates(tmp_path, 8, math.inf, tmp_path / "shown"), tmp_path / "said") == 0
