"""The estimate of a run's time: close to what its epochs take, and without a trace in the run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import small_network, tiny_set

from hmg_gpu.training import Settings, Training, loop
from hmg_gpu.training.estimate import estimate_seconds, in_words

SETTINGS = {"batch_size": 2, "patch_size": 32, "extent": 8}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "build_model", small_network)


def trained(folder: Path, epochs: tuple[int, int], estimated: bool) -> tuple[Training, list[dict], float | None]:
    rows: list[dict] = []
    training = Training(Settings(epochs=epochs, **SETTINGS), tiny_set(), None, folder, rows.append)
    seconds = estimate_seconds(training) if estimated else None
    training.run()
    return training, rows, seconds


def test_it_leaves_no_trace(tmp_path: Path) -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    training = Training(Settings(epochs=(40, 0), **SETTINGS), tiny_set(), None, tmp_path / "x", lambda event: None)
    before = {name: value.clone() for name, value in training.model.state_dict().items()}
    drawn = torch.get_rng_state()
    assert estimate_seconds(training) > 0
    assert torch.equal(torch.get_rng_state(), drawn) and not torch.equal(drawn, state)
    assert all(torch.equal(value, before[name]) for name, value in training.model.state_dict().items())
    assert training.totals.sum() == 0 and not training.optimizer.state
    with_, _, _ = trained(tmp_path / "with", (20, 20), True)
    without, _, _ = trained(tmp_path / "without", (20, 20), False)
    pairs = zip(with_.model.state_dict().values(), without.model.state_dict().values(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def test_it_scales_with_what_is_left(tmp_path: Path) -> None:
    short = Training(Settings(epochs=(2, 1), **SETTINGS), tiny_set(), None, tmp_path, lambda event: None)
    assert estimate_seconds(short) is None
    long = Training(Settings(epochs=(100, 3000), **SETTINGS), tiny_set(), None, tmp_path, lambda event: None)
    whole = estimate_seconds(long)
    long.stage, long.epoch = 1, 2900  # a resumed run
    assert estimate_seconds(long) < whole / 4
    long.stage = 2
    assert estimate_seconds(long) is None


def test_it_is_near_what_a_run_takes(tmp_path: Path) -> None:
    _, rows, seconds = trained(tmp_path, (60, 0), True)
    taken = sum(row["seconds"] for row in rows if row["event"] == "epoch")
    assert taken / 20 < seconds < 20 * taken  # machines are shared; an estimate of another order is none


def test_words() -> None:
    assert [in_words(value) for value in (0.4, 89, 90, 5399, 5400)] == ["0 s", "89 s", "2 min", "90 min", "1.5 h"]
