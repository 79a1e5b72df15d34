"""kill -9 at random moments and at every file operation: the run resumes and ends in the same bits."""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import resource
import shutil
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import safe_open
from tiny import write_folder

import train
from hmg_gpu.commands import main as cli
from hmg_gpu.models.checkpoints import read_description
from hmg_gpu.training import loop as training

SETTINGS = ("--epochs", "2", "2", "--batch-size", "2", "--patch-size", "32", "--output-bias", "0", "--save-every", "1")
MACHINE = ("--threads", "1", "--device", "cpu")
CLOCKS = ("seconds", "images_per_second", "megapixels_per_second", "peak_memory_gb")
DAMAGED = 70  # the operation of the saves of a run at which two states have been saved
ATTEMPTS = 6  # kills of one run before it is left to finish


def run(folder: Path, count: int, deadline: float, seed: int) -> dict[str, Any]:
    """``count`` runs killed at random moments (some of them again and again), then one for each operation of a save."""
    data = write_folder(folder / "tiny")
    with redirect_stdout(io.StringIO()):
        job(data, folder / "warm")  # what is imported late is imported now, not in every child
    said, started = folder / "said", time.monotonic()
    if fork(lambda: job(data, folder / "reference"), said) != 0:
        raise RuntimeError(said.read_text())
    seconds = time.monotonic() - started
    expected, failures = fingerprint(folder / "reference"), []

    rng, ended = random.Random(seed), Counter()
    half_time = time.monotonic() + (deadline - time.monotonic()) / 2
    while ended["runs"] < count and time.monotonic() < half_time:
        out, kills = folder / "out", 0
        while kills < ATTEMPTS and (kills == 0 or rng.random() < 0.5):
            if fork(lambda out=out: go_on(data, out), said, seconds=rng.uniform(0, seconds)) != -signal.SIGKILL:
                break
            failures += unreadable(out)
            kills += 1
        if kills:
            code = fork(lambda out=out: go_on(data, out), said)
            wrong = differences(f"run {ended['runs']} after {kills} kills", code, said, out, expected)
            ended += Counter(runs=1, kills=kills, same=not wrong)
            failures += wrong
        shutil.rmtree(out, ignore_errors=True)

    damaged = 0
    for share in (0.999, 0.5, 0.1, 0):
        fork(lambda: (die_in_save(folder / "out", DAMAGED), go_on(data, folder / "out")), said)
        last = folder / "out" / "run" / "last.safetensors"
        whole = last.read_bytes()
        last.unlink()  # killed between two operations of a save, it may be one file with the one before it
        last.write_bytes(whole[: int(share * len(whole))])
        code = fork(lambda: go_on(data, folder / "out"), said)
        wrong = [] if "it is skipped: going on from the checkpoint before it" in said.read_text() else ["no message"]
        wrong += differences(f"damaged to {share}", code, said, folder / "out", expected)
        failures, damaged = failures + wrong, damaged + (not wrong)
        shutil.rmtree(folder / "out")

    operations, lost = 0, 0
    while time.monotonic() < deadline and operations < 2 * count:
        out = folder / "out"
        code = fork(lambda out=out, number=operations: (die_in_save(out, number), go_on(data, out))[1], said)
        if code == 0:  # all the saves of a run have fewer operations: that was the last one
            break
        failures += unreadable(out)
        if code not in (-signal.SIGKILL, -signal.SIGXFSZ):
            failures.append(f"operation {operations}: ended with {code}: {said.read_text()[-500:]}")
        lost = max(lost, epochs_lost(out))
        code = fork(lambda out=out: go_on(data, out), said)
        failures += differences(f"operation {operations}", code, said, out, expected)
        operations += 1
        shutil.rmtree(out, ignore_errors=True)
    failures += [f"{lost} epochs lost, the save interval is 1"] if lost > 1 else []
    return {
        "seconds_of_one_run": seconds,
        "runs_killed": ended["runs"],
        "kills": ended["kills"],
        "bit_identical": ended["same"],
        "operations_of_saves_killed_at": operations,
        "epochs_lost_at_most": lost,
        "damaged_checkpoints_skipped": damaged,
        "failures": failures,
    }


# --- the run ---------------------------------------------------------------------------------------------------------


def job(data: Path, out: Path) -> int:
    """Both stages, the update between them, saving, results, then masks and COCO JSON by the trained network."""
    code = train.main(["--data", str(data), *SETTINGS, *MACHINE, "--out", str(out / "run")])
    return code or export(data, out)


def go_on(data: Path, out: Path) -> int:
    """What a user does after a crash: resume, or start again where no checkpoint had been written."""
    if (out / "run" / "last.safetensors").exists():
        return train.main(["--resume", str(out / "run"), *MACHINE]) or export(data, out)
    shutil.rmtree(out / "run", ignore_errors=True)
    return job(data, out)


def export(data: Path, out: Path) -> int:
    places = ("--images", str(data / "images"), "--points", str(data / "masks_centroid"), "--out", str(out / "masks"))
    checkpoint = str(out / "run" / "stage2.safetensors")
    return cli.main(["masks", *places, "--checkpoint", checkpoint, "--coco", "rle", *MACHINE])


def fingerprint(out: Path) -> dict[str, Any]:
    """Weights, masks and metrics of a finished run, without clocks; compared bit by bit."""
    result: dict[str, Any] = {}
    for name in ("stage1", "stage2"):
        with safe_open(out / "run" / f"{name}.safetensors", framework="pt") as handle:
            for key in handle.keys():  # noqa: SIM118, a handle is no dict
                value = handle.get_tensor(key)
                digest = hashlib.sha256(value.contiguous().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
                result[f"{name}/{key}"] = (str(value.dtype), list(value.shape), digest)
    for path in sorted(
        [*out.glob("run/masks_hybrid/[!.]*"), *out.glob("masks/[!.]*.png"), out / "masks" / "coco.json"]
    ):
        result[path.relative_to(out).as_posix()] = hashlib.sha256(path.read_bytes()).hexdigest()
    result["metrics"] = json.loads((out / "run" / "results.json").read_text())["results"]
    log = (json.loads(line) for line in (out / "run" / "log.jsonl").read_text().splitlines())
    result["log"] = [{key: value for key, value in event.items() if key not in CLOCKS} for event in log]
    return result


def differences(what: str, code: int, said: Path, out: Path, expected: dict[str, Any]) -> list[str]:
    if code != 0:
        return [f"{what}: ended with {code}: {said.read_text()[-500:]}"]
    left = [path.name for path in (out / "run").rglob(".*.part*")]
    if left:
        return [f"{what}: left behind {', '.join(left)}"]
    found = fingerprint(out)
    other = [key for key in expected | found if expected.get(key) != found.get(key)]
    return [f"{what}: {len(other)} differ: {', '.join(other[:3])}"] if other else []


def unreadable(out: Path) -> list[str]:
    """Files under their own names that cannot be read (a hidden .part file may be anything)."""
    bad = []
    for path in out.rglob("[!.]*.*"):
        try:
            match path.suffix:
                case ".safetensors":
                    with safe_open(path, framework="pt") as handle:
                        for key in handle.keys():  # noqa: SIM118
                            handle.get_tensor(key)
                case ".json":
                    json.loads(path.read_text())
                case ".png":
                    with Image.open(path) as image:
                        image.load()
        except Exception as error:  # whatever it is, it is what is looked for
            bad.append(f"{path.name}: {error}")
    return bad


def epochs_lost(out: Path) -> int:
    """Epochs in the log that the newest checkpoint does not have."""
    log, last = out / "run" / "log.jsonl", out / "run" / "last.safetensors"
    logged = log.read_text().count('"event": "epoch"') if log.exists() else 0
    if not last.exists():
        return logged
    state = read_description(last)
    return logged - sum(state["settings"]["epochs"][: state["stage"]]) - state["epoch"]


# --- processes -------------------------------------------------------------------------------------------------------


def one_thread() -> None:
    """So that this process may be forked: no thread of PyTorch holds a lock."""
    torch.set_num_threads(1)


def fork(call: Callable[[], object], said: Path, *, seconds: float | None = None) -> int:
    """Run a call in a forked process and kill it after some seconds: its exit code, or minus the signal."""
    process = start(call, said)
    code = ended(process, seconds if seconds is not None else 600)
    if code is not None:
        return code
    os.kill(process, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def start(call: Callable[[], object], said: Path) -> int:
    """Begin a call in a forked process, whose output goes to a file: its id."""
    process = os.fork()
    if process:
        return process
    code = 70
    try:
        descriptor = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        # under pytest they would be others
        sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
        os.environ["COLUMNS"] = "200"
        code = call()
    except SystemExit as error:
        code = error.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 0)


def ended(process: int, seconds: float) -> int | None:
    """The exit code of a process that was begun, or minus the signal; None where it goes on for so long."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found, status = os.waitpid(process, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    return None


def die_in_save(folder: Path, number: int) -> None:
    """Kill this process in place of the ``number``-th file operation that the saves of a run make.

    Operations: part of a checkpoint by its native writer (which a limit on the size of files stops); opening (also
    for reading), making a folder, renaming and removing, which Python announces; flushing.
    """
    left, saving, place = number, False, os.fspath(folder)
    flush, save = os.fsync, training.Training.save

    def count(kill: Callable[[], None] = lambda: os.kill(os.getpid(), signal.SIGKILL)) -> None:
        nonlocal left
        if saving:
            left -= 1
            if left == -1:
                kill()

    def announced(event: str, arguments: tuple) -> None:
        if event in ("open", "os.mkdir", "os.rename", "os.remove") and str(arguments[0]).startswith(place):
            count()

    def flushed(descriptor: int) -> None:
        count()
        flush(descriptor)

    def saved(*arguments: Any, **names: Any) -> None:
        nonlocal saving
        saving = True
        count(lambda: stop_at(2**19))
        save(*arguments, **names)
        saving = False

    os.fsync, training.Training.save = flushed, saved
    sys.addaudithook(announced)


def stop_at(limit: int) -> None:
    """Let the system kill this process when it writes past so many bytes of any file."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
