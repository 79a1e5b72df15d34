"""One writer at a time: a second process is refused by name, a dead one's place is taken, nothing is left behind."""

from __future__ import annotations

import json
import os
import platform
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import filelock
import pytest
from tiny import write_folder

from hmg_gpu.common import locks
from hmg_gpu.common.errors import HMGError, InputError
from hmg_gpu.common.locks import one_writer

PROJECT = Path(__file__).parents[2]
HOLD = """
import sys, time
from hmg_gpu.common.locks import one_writer
with one_writer(sys.argv[1], file=sys.argv[1].endswith(".h5")):
    print("held", flush=True)
    time.sleep(100)
"""


def holder(path: Path) -> subprocess.Popen:
    """A process that holds the lock until it is killed."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True, cwd=PROJECT)
    assert process.stdout.readline() == "held\n"
    return process


@pytest.mark.parametrize("name", ["run", "set.h5", "run.old"])
def test_a_second_process_is_told_who_the_first_is(name: str, tmp_path: Path) -> None:
    path = tmp_path / "new" / name
    process = holder(path)
    said: list[str] = []
    try:
        words = rf"{re.escape(str(path))}: process {process.pid} on {re.escape(platform.node())} is writing there"
        with pytest.raises(InputError, match=words), one_writer(path, file=name == "set.h5"):
            pass
        with one_writer(tmp_path / "new" / "other", said.append):  # beside it
            pass
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    with one_writer(path, said.append, file=name == "set.h5"):
        pass
    assert said == [f"{path}: process {process.pid} on {platform.node()} died while it wrote here; going on"]
    with one_writer(path, said.append, file=name == "set.h5"):
        pass
    assert len(said) == 1


def test_who_took_it_just_now_has_a_moment_to_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between taking the lock and writing who has it; what a dead process left there is nobody's name."""
    process = holder(tmp_path)
    owner = tmp_path / ".hmg.owner"
    whole = owner.read_text()
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    try:
        for left in ("", '{"process": ', json.dumps({"process": gone.pid, "host": platform.node()})):
            owner.write_text(left)
            later = threading.Timer(0.3, owner.write_text, (whole,))
            later.start()
            with pytest.raises(InputError, match=f"process {process.pid} on"), one_writer(tmp_path):
                pass
            later.join()
        monkeypatch.setattr(locks, "MOMENT", 0.1)
        for left in ('{"process": 1, "host": "a\\nb"}', '{"process": -1, "host": "a"}', "[" * 9999, "[]", "3"):
            owner.write_text(left)
            with pytest.raises(InputError, match="another process is writing"), one_writer(tmp_path):
                pass
    finally:
        process.kill()
        process.wait()


def test_nothing_is_left(tmp_path: Path) -> None:
    with one_writer(tmp_path / "a" / "b"):
        owner = json.loads((tmp_path / "a" / "b" / ".hmg.owner").read_text())
        assert owner == {"process": os.getpid(), "host": platform.node()}
    assert not (tmp_path / "a" / "b").exists()
    with pytest.raises(ZeroDivisionError), one_writer(tmp_path / "c"):
        (tmp_path / "c" / "kept").touch()
        _ = 1 / 0
    assert (tmp_path / "c" / "kept").exists() and not (tmp_path / "c" / ".hmg.owner").exists()


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Without(filelock.FileLock):
        def _acquire(self) -> None:
            raise NotImplementedError("FileSystem does not appear to support flock")

    monkeypatch.setattr(locks, "FileLock", Without)
    said: list[str] = []
    with one_writer(tmp_path, said.append):
        assert len(said) == 1 and "its file system has no locks" in said[0] and ".hmg.lock" in said[0]
        with pytest.raises(InputError, match=f"process {os.getpid()}"), one_writer(tmp_path):
            pass
    with one_writer(tmp_path, said.append):
        pass


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(HMGError, match=r"cannot be written .*; choose another"), one_writer(tmp_path / "file" / "run"):
        pass


COMMANDS = {
    "train": "train.py --data DATA --epochs 2 1 --batch-size 2 --patch-size 32 --out OUT",
    "resume": "train.py --resume OUT",
    "masks": "-m hmg_gpu masks --images DATA/images --points DATA/masks_centroid --extent 8 --batch 1 --out OUT",
    "pack": "-m hmg_gpu pack DATA OUT.h5",
    "eval": "eval.py masks --data DATA --extent 8 --out OUT",
    "predict": "eval.py predict DATA/images --points DATA/masks_centroid --extent 8 --out OUT",
    "learned": "-m hmg_gpu masks --images DATA/images --points DATA/masks_centroid --masks learned --out OUT",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_every_writing_command_refuses_a_folder_that_is_held(name: str, tmp_path: Path) -> None:
    data, out = write_folder(tmp_path / "tiny"), tmp_path / "out"
    arguments = COMMANDS[name].replace("DATA", str(data)).replace("OUT", str(out)).split()
    if name == "resume":
        (out / "kept").mkdir(parents=True)
    process = holder(out.with_suffix(".h5") if name == "pack" else out)
    before = sorted(path.name for path in tmp_path.rglob("*"))
    try:
        command = [sys.executable, *arguments]
        done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=300, check=False)
    finally:
        process.kill()
        process.wait()
    assert done.returncode == 2 and f"process {process.pid} on" in done.stderr, done.stderr
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


@pytest.mark.slow
def test_of_two_processes_at_once_one_goes_on(tmp_path: Path) -> None:
    data = write_folder(tmp_path / "tiny")
    for number in range(4):
        out = tmp_path / f"out{number}"
        arguments = COMMANDS["train"].replace("DATA", str(data)).replace("OUT", str(out)).split()
        pair = []
        for seed in ("0", "1"):
            command = [sys.executable, *arguments, "--seed", seed, "--device", "cpu"]
            pair.append(
                subprocess.Popen(command, cwd=PROJECT, stderr=subprocess.PIPE, text=True, stdout=subprocess.DEVNULL)
            )
            time.sleep(0.2 * number)
        errors = [process.communicate(timeout=300)[1] for process in pair]
        codes = sorted(process.returncode for process in pair)
        assert codes == [0, 2], errors  # refused while the other wrote, or after it: the folder holds a run
        seed = [process.returncode for process in pair].index(0)
        assert json.loads((out / "results.json").read_text())["settings"]["seed"] == seed
