"""Several processes: what they agree on, that they end in the same bits, and that no one waits for one that is gone."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from command_tools import stopped, summary
from refusal import refused
from test_training import BASE, TEST_SIZES, Recorder, rows, same
from tiny import small_network, tiny_set, write_folder
from torch import Tensor, nn

import train
from hmg_gpu.commands import main as cli
from hmg_gpu.common.errors import HMGError
from hmg_gpu.common.parallel import ALONE, Team, joined
from hmg_gpu.models import build_model
from hmg_gpu.models.checkpoints import read_description, read_tensors
from hmg_gpu.models.predict import predict, share
from hmg_gpu.training import loop as training
from hmg_gpu.training.loop import StopRequest, Training
from hmg_gpu.training.settings import Settings
from hmg_gpu.training.state import PREVIOUS

ROOT = Path(train.__file__).parent
RANKS = 2
SETTINGS = replace(BASE, batch_size=4, update_every=1)  # two steps an epoch, eight in all


def plain_network(name: str, *, output_bias: float) -> nn.Module:
    """Without batch norm and dropout a batch in parts gives the gradients of the whole."""
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 1, 1))


def prepared(settings: Settings, folder: Path, team: Team, **interrupt: int) -> tuple[Training, Recorder]:
    recorder = Recorder(**interrupt)
    test = tiny_set(TEST_SIZES, seed=9, split="test")
    recorder.training = Training(settings, tiny_set(), test, folder, recorder, team)
    return recorder.training, recorder


def outcome(run: Training, recorder: Recorder) -> dict[str, Any]:
    state = {name: value.clone() for name, value in run.model.state_dict().items()}
    return {"weights": state, "masks": run.masks, "results": run.results, "log": rows(recorder.events)}


# ---- what each rank does; one process start for all of it -----------------------------------------------------------


def whole(team: Team, folder: Path) -> dict[str, Any]:
    run, recorder = prepared(SETTINGS, folder / "whole", team)
    run.run()
    return outcome(run, recorder)


def stopped_by_one(team: Team, folder: Path) -> int:
    run, recorder = prepared(SETTINGS, folder / "stopped", team, stop_at=5 * team.rank)
    with pytest.raises(StopRequest):
        run.run()
    return recorder.steps


def resumed(team: Team, folder: Path) -> dict[str, Any]:
    if team.rank == 0:
        shutil.copytree(folder / "stopped", folder / "resumed")
    team.any(False)
    run, recorder = prepared(SETTINGS, folder / "resumed", team)
    run.resume()
    run.run()
    return outcome(run, recorder)


def without_batch_norm(team: Team, folder: Path, loss: str = "image") -> dict[str, Any]:
    training.build_model = plain_network
    run, recorder = prepared(replace(SETTINGS, loss=loss), folder / f"plain-{loss}", team)
    run.run()
    return outcome(run, recorder)


def loss_of_the_batch(team: Team, folder: Path) -> dict[str, Any]:
    return without_batch_norm(team, folder, "batch")


def predicted(team: Team, folder: Path) -> Tensor:
    torch.manual_seed(0)
    return predict(build_model("acm", output_bias=0.0), tiny_set(), batch_size=2, team=team)


def agreed(team: Team, folder: Path) -> list[Any]:
    calls: list[int] = []

    def work() -> dict[str, Any]:
        calls.append(team.rank)
        return {"rank": team.rank, "text": "ä"}

    found = [team.any(False), team.any(team.rank == 1), team.first(work), calls]
    values = torch.arange(3.0) + team.rank
    team.add(values)
    found.append(values.tolist())
    team.same([values.fill_(team.rank)])
    return [*found, values.tolist()]


def failed_on_the_first(team: Team, folder: Path) -> str:
    def fail() -> None:
        raise HMGError("the disk is full")

    with pytest.raises(HMGError) as caught:
        team.first(fail)
    return str(caught.value)


def masks(folder: Path, out: Path, *more: object) -> int:
    """Eight masks in four parts."""
    arguments = ("--images", folder / "tiny" / "images", "--points", folder / "tiny" / "masks_centroid", "--out", out)
    more = ("--batch", 2, "--extent", 8, "--coco", "rle", "--overlays", "--device", "cpu", *more)
    return cli.main([str(argument) for argument in ("masks", *arguments, *more)])


def gone(team: Team, folder: Path) -> str:
    run, _ = prepared(SETTINGS, folder / "gone", team, crash_at=3 * team.rank)
    run.run()
    return "reached the end"


SCENES: dict[str, Callable[[Team, Path], Any]] = {
    scene.__name__: scene
    for scene in (
        whole,
        stopped_by_one,
        resumed,
        without_batch_norm,
        loss_of_the_batch,
        predicted,
        agreed,
        failed_on_the_first,
    )
}


@contextmanager
def environment(rank: int, port: int) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": RANKS,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }.items():
            patch.setenv(name, str(value))
        yield


def run_rank(rank: int, folder: Path, ports: list[int]) -> None:
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    with environment(rank, ports[0]), joined() as team:
        for name, scene in SCENES.items():
            training.build_model = small_network
            found[name] = scene(team, folder)
    training.build_model = small_network
    with environment(rank, ports[1]):
        try:
            with joined() as team:
                found["gone"] = gone(team, folder)
        except (HMGError, MemoryError) as error:
            found["gone"] = f"{type(error).__name__}: {error}"
    for port, out, more in ((ports[2], "pair", ()), (ports[3], "taken up", ("--resume",))):
        with environment(rank, port):
            found[out] = masks(folder, folder / out, *more)
    torch.save(found, folder / f"rank{rank}.pt")


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    write_folder(folder / "tiny")
    stopped(folder / "tiny", folder / "taken up", 2, "--overlays")
    torch.multiprocessing.spawn(run_rank, (folder, free_ports(4)), nprocs=RANKS)
    return folder


@pytest.fixture(scope="module")
def found(folder: Path) -> list[dict[str, Any]]:
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(RANKS)]


def alike(first: dict[str, Any], second: dict[str, Any]) -> bool:
    return (
        same(first["weights"], second["weights"])
        and torch.equal(first["masks"], second["masks"])
        and first["results"] == second["results"]
    )


# ---- training -------------------------------------------------------------------------------------------------------


def test_ranks_end_alike(folder: Path, found: list[dict[str, Any]]) -> None:
    """Weights, running statistics, masks, numbers and log; rank 0 wrote what a run writes."""
    first, second = (one["whole"] for one in found)
    assert alike(first, second) and first["log"] == second["log"]
    assert [row["epoch"] for row in first["log"] if row["event"] == "epoch"] == [1, 2, 1, 2]
    saved = read_tensors(folder / "whole" / "stage2.safetensors")
    assert same({name.removeprefix("model."): value for name, value in saved.items()}, first["weights"])
    names = ["last", "stage1", "stage2"]
    wanted = {f"{name}.{kind}" for name in names for kind in ("json", "safetensors")} | {PREVIOUS}
    assert {path.name for path in (folder / "whole").iterdir()} == wanted


def test_a_signal_to_one_rank_stops_all_at_the_same_step(folder: Path, found: list[dict[str, Any]]) -> None:
    assert [one["stopped_by_one"] for one in found] == [5, 5]
    description = read_description(folder / "stopped" / "last.safetensors")
    assert (description["stage"], description["epoch"], description["step"]) == (1, 0, 1)


def test_ranks_resume_to_the_same_bits(found: list[dict[str, Any]]) -> None:
    for one in found:
        assert alike(one["resumed"], one["whole"])
        done = [row for row in one["whole"]["log"] if row["stage"] == 2]
        assert [row for row in one["resumed"]["log"] if row["stage"] == 2] == done  # the interrupted epoch whole


def test_another_number_of_ranks_resumes(
    folder: Path, found: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """One process goes on from the step at which two were stopped, with the same batches."""
    monkeypatch.setattr(training, "build_model", small_network)
    shutil.copytree(folder / "stopped", tmp_path / "run")
    run, recorder = prepared(SETTINGS, tmp_path / "run", ALONE)
    run.resume()
    assert run.totals[4] == 4 * 32 * 32  # pixels of the step that two ranks took together
    run.run()
    assert recorder.steps == 3
    ends = [row for row in rows(recorder.events) if row["event"] == "epoch"]
    wanted = [row for row in found[0]["whole"]["log"] if row["event"] == "epoch" and row["stage"] == 2]
    assert [row["epoch"] for row in ends] == [1, 2]
    for row, other in zip(ends, wanted, strict=True):  # statistics and dropout of a rank's rows differ, not the data
        assert row["loss"] == pytest.approx(other["loss"], abs=0.05) and row["loss"] != other["loss"]


@pytest.mark.parametrize(("scene", "loss"), [("without_batch_norm", "image"), ("loss_of_the_batch", "batch")])
def test_without_batch_norm_ranks_train_as_one(
    found: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, scene: str, loss: str
) -> None:
    """The gradients are those of the whole batch; only the order of the sums differs."""
    monkeypatch.setattr(training, "build_model", plain_network)
    run, recorder = prepared(replace(SETTINGS, loss=loss), tmp_path, ALONE)
    run.run()
    alone, pair = outcome(run, recorder), found[0][scene]
    for name, value in alone["weights"].items():
        torch.testing.assert_close(pair["weights"][name], value, rtol=1e-3, atol=1e-4)
    for row, other in zip(alone["log"], pair["log"], strict=True):
        if row["event"] == "epoch":
            assert row["loss"] == pytest.approx(other["loss"], abs=1e-4)
    assert alike(pair, found[1][scene])


def test_predictions_are_those_of_one_process(found: list[dict[str, Any]]) -> None:
    alone = predicted(ALONE, Path())
    assert 0 < alone.sum() < alone.numel()
    for one in found:
        assert torch.equal(one["predicted"], alone)


def test_shares_are_the_batches_of_one_process() -> None:
    sizes = torch.tensor([(32, 32), (40, 33), (32, 30), (20, 20), (64, 64), (31, 32)])  # four, then two of one size
    assert [share(sizes, rank, 2, batch_size=2) for rank in (0, 1)] == [[0, 2, 1, 4], [3, 5]]
    assert share(sizes, 0, 1, batch_size=2) == [0, 2, 3, 5, 1, 4]
    assert share(sizes, 6, 7) == []


def test_what_cannot_be_shared(tmp_path: Path) -> None:
    pair = Team(0, 2)
    for size, settings in ((3, replace(SETTINGS, batch_size=3)), (2, replace(SETTINGS, batch_size=2))):
        refused(lambda s=settings: prepared(s, tmp_path, pair), f"batch_size = {size}: expected a multiple of the 2")


# ---- agreement ------------------------------------------------------------------------------------------------------


def test_what_a_team_agrees_on(found: list[dict[str, Any]]) -> None:
    for rank, one in enumerate(found):
        flag, either, value, calls, total, broadcast = one["agreed"]
        assert (flag, either) == (False, True)
        assert value == {"rank": 0, "text": "ä"} and calls == [0] * (rank == 0)
        assert total == [1.0, 3.0, 5.0] and broadcast == [0.0] * 3


def test_what_fails_on_the_first_fails_on_all(found: list[dict[str, Any]]) -> None:
    texts = [one["failed_on_the_first"] for one in found]
    assert texts == ["the disk is full", "rank 0 failed; its own message says why"]


def test_a_rank_that_is_gone_ends_the_others(found: list[dict[str, Any]]) -> None:
    assert found[0]["gone"] == "HMGError: another process of the run has ended; its own message says why"
    assert found[1]["gone"].startswith("MemoryError")


def test_one_process_is_a_team(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with joined() as team:
        assert team == ALONE and team.any(True) and not team.any(False) and team.first(lambda: (1, 2)) == (1, 2)
        assert team.device("cuda") == "cuda" and Team(1, 2, local=3).device("cuda") == "cuda:3"
    monkeypatch.setenv("WORLD_SIZE", "many")
    refused(lambda: joined().__enter__(), "WORLD_SIZE=many", "torchrun")


# ---- masks in bulk --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("out", ["pair", "taken up"])  # from the start; after a stop of one process
def test_ranks_make_one_set_of_masks(out: str, folder: Path, found: list[dict[str, Any]], tmp_path: Path) -> None:
    assert [one[out] for one in found] == [0, 0]
    assert masks(folder, tmp_path) == 0
    files = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(folder / out) for path in (folder / out).rglob("*") if path.is_file())
    for path in files:
        if path.name != "hmg.json":
            assert (folder / out / path).read_bytes() == (tmp_path / path).read_bytes(), path
    assert summary(folder / out) == summary(tmp_path)


# ---- torchrun -------------------------------------------------------------------------------------------------------


def test_torchrun_and_sigterm(tmp_path: Path) -> None:
    """train.py on two processes, ended in the middle: one line from rank 0, and a state to go on from."""
    data, out = write_folder(tmp_path / "tiny"), tmp_path / "run"
    options = ["--data", data, "--out", out, "--batch-size", 4, "--patch-size", 32, "--epochs", 400, 1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", RANKS, "--standalone", "train.py"]
    process = subprocess.Popen(
        [*map(str, command + options), "--device", "cpu"],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    waited = time.monotonic() + 120
    while not (out / "log.jsonl").exists():
        assert time.monotonic() < waited and process.poll() is None, process.communicate()
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)  # torchrun hands it on
    text, errors = process.communicate(timeout=120)
    assert text.count("stopped and saved") == 1 and "2 processes" in text, (text, errors)  # rank 0 alone prints
    assert "Traceback" not in text
    stopped = read_description(out / "last.safetensors")
    assert stopped["stage"] == 0 and stopped["epoch"] + stopped["step"] > 0
