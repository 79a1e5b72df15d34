"""Damaged and forged files through every reader and command, in processes that may not hang, grow, write or reach out.

Whatever happens, a reader answers or raises our own error. A fault is any other exception, an end by a signal, ten
seconds of computing, memory beyond the bound, a file written outside the output folder, a process started, a socket
used or a pickled name looked up.
"""

from __future__ import annotations

import contextlib
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
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from test_points import NAMES, SIZE, SIZES
from tiny import write_folder

import eval as evaluate
import train
from hmg_gpu.commands import main as cli
from hmg_gpu.common.errors import HMGError
from hmg_gpu.data import iterate_store, load_folder, load_store, read_image, read_mask, read_points, store_splits
from hmg_gpu.data.images import read_header
from hmg_gpu.masks.student.network import CropNet
from hmg_gpu.masks.student.student import Student, StudentSettings
from hmg_gpu.models import build_model
from hmg_gpu.models.checkpoints import read_description, read_tensors
from hmg_gpu.models.weights import load_model
from hmg_gpu.training import loop as training

from .damage import mutate, write_corpus
from .kill import fork

MEMORY = 2 * 2**30  # bytes on top of what the process has when it starts
SECONDS = 10  # of computing, so that a busy machine does not look like a hang
SMALL = ("--batch-size", "2", "--patch-size", "32", "--output-bias", "0")
PICTURES = ("png", "tiff", "bmp", "jpg")
LABELS = ("csv", "labelme", "cvat", "coco", "labelstudio", "sirst-v2")
FORBIDDEN = ("subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "socket.connect", "pty.")
FORBIDDEN += ("socket.getaddrinfo", "socket.gethostby", "socket.sendto", "socket.bind", "urllib.", "pickle.find_class")
MAKES = (
    "os.mkdir",
    "os.rename",
    "os.remove",
    "os.rmdir",
    "os.link",
    "os.symlink",
    "os.truncate",
    "os.chmod",
    "os.chown",
)


Corpus = dict[str, list[tuple[str, bytes]]]  # kind -> valid files: (name, content)
Jobs = list[tuple[str, Callable[[], object]]]


class Attack(NamedTuple):
    """What is done to files, and who reads them then.

    ``mutate(kind, name, content, other, rng, scratch)`` gives new content, and whether a checksum in it was left as it
    was. ``jobs(folder, box, kind, name, content, index, whole)`` writes the file into ``box`` and gives its readers;
    ``whole`` is what the file held before where the checksum was left, else None.
    """

    corpus: Corpus
    mutate: Callable[..., tuple[bytes, bool]]
    jobs: Callable[..., Jobs]


def run(folder: Path, count: int, deadline: float, seed: int) -> dict[str, Any]:
    """``count`` files, each through every reader of its kind and one command."""
    corpus = write_corpus(folder / "corpus")
    corpus["safetensors"] += prepare(folder)
    return attack(folder, Attack(corpus, forged, jobs), count, deadline, seed)


def forged(kind: str, name: str, content: bytes, other: bytes, rng: random.Random, scratch: Path) -> tuple[bytes, bool]:
    """As :class:`Attack` has it; what is read is not compared with what was written."""
    return mutate(kind, content, other, rng, scratch), False


def attack(folder: Path, plan: Attack, count: int, deadline: float, seed: int) -> dict[str, Any]:
    """Send ``count`` damaged or forged files through their readers; each 200 in a process of their own."""
    kinds = [*plan.corpus]
    notes, done, faults, tally = folder / "notes.jsonl", 0, [], Counter()
    peak = slowest = 0.0
    while done < count and time.monotonic() < deadline:
        notes.write_text("")
        stop = min(done + 200, count)
        code = fork(lambda first=done, stop=stop: work(folder, plan, range(first, stop), seed), folder / "said")
        said = [json.loads(line) for line in notes.read_text().splitlines()]
        begun = max((note["begun"] for note in said if "begun" in note), default=done)
        faults += [note for note in said if "fault" in note]
        for note in said:
            if "ended" in note:
                tally += Counter(note["ended"])
                peak, slowest = max(peak, note["peak_gb"]), max(slowest, note["seconds"])
        done = stop
        if code != 0:
            calls = [note["call"] for note in said if note.get("begun") == begun]
            reason = {-signal.SIGPROF: f"{SECONDS} s of computing"}.get(code, (folder / "said").read_text()[-300:])
            faults.append(
                {
                    "fault": f"ended with {code}: {reason}",
                    "index": begun,
                    "kind": kinds[begun % len(kinds)],
                    "call": calls[-1:],
                }
            )
            done = begun + 1
    kept = {}
    for fault in faults:
        kept.setdefault((fault["fault"].splitlines()[-1][:60], fault["kind"], str(fault["call"])), fault)
    return {
        "inputs": done,
        "kinds": len(kinds),
        "calls": tally["calls"],
        "refused": tally["refused"],
        "accepted": tally["calls"] - tally["refused"],
        "slowest_call_s": slowest,
        "peak_memory_gb": peak,
        "faults": len(faults),
        "failures": list(kept.values()),
    }


def prepare(folder: Path) -> list[tuple[str, bytes]]:
    """What the commands need besides the file under test, never written to; gives a run's state and a student."""
    write_folder(folder / "good")
    write_folder(folder / "one")  # image of each split
    for old in (folder / "one").glob("*/*[1-5].png"):
        old.unlink()
    for split in ("train", "test"):
        (folder / "one" / "img_idx" / f"{split}_tiny.txt").write_text(f"{split}0\n")
    (folder / "pictures").mkdir()
    for name in NAMES:
        Image.new("L", SIZE[::-1], 60).save(folder / "pictures" / f"{name}.png")
    (folder / "clicks.csv").write_text("image,y,x\na.png,3,4\n")
    with contextlib.redirect_stdout(io.StringIO()):  # what is imported late is imported now
        arguments = ["--out", str(folder / "warm"), "--device", "cpu", "--threads", "1"]
        evaluate.main(
            ["detector", "--data", str(folder / "good"), "--checkpoint", str(warm_weights(folder)), *arguments]
        )
        cli.main(["check", str(folder / "good")])
        arguments = ["--out", str(folder / "run"), *arguments[2:], "--epochs", "1", "1", *SMALL]
        train.main(["--data", str(folder / "good"), *arguments])
    student = Student({25: [CropNet()]}, StudentSettings(crop=24, members=1))
    student.save(folder / "student.safetensors")
    states = [("last.safetensors", (folder / "run" / "last.safetensors").read_bytes())] * 3
    return states + [("student.safetensors", (folder / "student.safetensors").read_bytes())] * 2


def warm_weights(folder: Path) -> Path:
    torch.save(build_model("acm", output_bias=0.0).state_dict(), folder / "warm.pth")
    return folder / "warm.pth"


def work(folder: Path, plan: Attack, indices: range, seed: int) -> None:
    """Some of the files, in a process of its own; what happens goes to ``notes.jsonl`` at once."""
    sys.dont_write_bytecode = True
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
    notes = os.open(folder / "notes.jsonl", os.O_WRONLY | os.O_APPEND)
    watch = Watch(folder / "box" / "out")
    corpus, kinds = plan.corpus, [*plan.corpus]
    started = Path(os.path.abspath(os.curdir))
    training.Training.train_epoch = only_short(training.Training.train_epoch)

    def note(**row: Any) -> None:
        os.write(notes, (json.dumps(row) + "\n").encode())

    for index in indices:
        rng = random.Random(f"{seed}/{index}")
        kind = kinds[index % len(kinds)]
        box = folder / "box"
        shutil.rmtree(box, ignore_errors=True)
        (box / "cwd").mkdir(parents=True)
        (box / "out").mkdir()
        os.chdir(box / "cwd")
        name, whole = rng.choice(corpus[kind])
        other = rng.choice(corpus[rng.choice([kind, rng.choice(kinds)])])[1]
        note(begun=index, call="making the file")
        content, honest = plan.mutate(kind, name, whole, other, rng, folder / "scratch.h5")
        before = tree(folder)
        calls = Counter()
        slowest = 0.0
        for title, call in plan.jobs(folder, box, kind, name, content, index, whole if honest else None):
            note(begun=index, call=title)
            fault, clock = None, time.process_time()
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
            try:
                with watch:
                    calls["refused"] += not call()
            except HMGError as error:
                calls["refused"] += 1
                if "\n" in str(error):
                    fault = f"an error of several lines: {error!r}"
            except BaseException:
                fault = traceback.format_exc(limit=-6)
            signal.setitimer(signal.ITIMER_PROF, 0)
            calls["calls"] += 1
            slowest = max(slowest, time.process_time() - clock)
            for one in filter(None, (fault, *watch.take())):
                note(fault=one, index=index, kind=kind, call=title)
        after = tree(folder)
        inputs = {path for path in after if path.is_relative_to(box / "in")}
        for path in (before ^ after) - inputs:
            if not path.is_relative_to(box / "out"):
                note(fault=f"{path}: appeared or vanished", index=index, kind=kind, call="")
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        note(ended=dict(calls), peak_gb=peak, seconds=slowest)
    os.chdir(started)


def jobs(folder: Path, box: Path, kind: str, name: str, content: bytes, index: int, whole: bytes | None) -> Jobs:
    """Every reader of this kind of file and one of its commands, by turns; writes the file where they look for it."""
    path, out = box / "in" / name, box / "out"
    if kind in (*PICTURES, "png points", "list"):
        place = {"list": "img_idx", "png points": "masks_centroid"}.get(
            kind, ("images", "masks", "masks_centroid")[index // 16 % 3]
        )
        shutil.copytree(folder / "one", box / "in")
        path = box / "in" / place / (f"train0{path.suffix}" if kind != "list" else "train_tiny.txt")
        for old in path.parent.glob("train0.*"):
            old.unlink()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    machine, clicks = ("--device", "cpu", "--threads", "1"), str(folder / "clicks.csv")
    pictures, good = str(folder / "pictures"), str(folder / "good")

    def command(main: Callable, *arguments: object) -> tuple[str, Callable[[], object]]:
        return " ".join(map(str, arguments[:2])), lambda: told(main, [*map(str, arguments)])

    def export(points: object, *more: object) -> tuple[str, Callable[[], object]]:
        return command(
            cli.main, "masks", "--images", pictures, "--points", points, "--out", out / "masks", *more, *machine
        )

    if kind in (*PICTURES, "png points", "list"):
        readers = [read_header, read_image, read_mask, lambda path: read_points(path, "png")]
        readers = [] if kind == "list" else readers
        readers += [lambda _: load_folder(box / "in", "train")]
        commands = [
            command(
                cli.main,
                "masks",
                "--images",
                box / "in" / "images",
                "--points",
                box / "in" / "masks_centroid",
                "--out",
                out / "masks",
                "--coco",
                "polygons",
                *machine,
            ),
            command(cli.main, "pack", box / "in", out / "s.h5"),
            command(cli.main, "check", box / "in"),
            command(evaluate.main, "predict", path, "--points", clicks, "--out", out, *machine),
            command(evaluate.main, "masks", "--data", box / "in", "--out", out, *machine),
        ]
    elif kind in LABELS:
        readers = [read_points, lambda path: read_points(path, kind, NAMES, SIZES)]
        commands = [
            export(path, "--coco", "rle"),
            export(path.parent),
            command(evaluate.main, "predict", pictures, "--points", path, "--out", out, *machine),
            command(evaluate.main, "masks", "--data", good, "--points", path, "--out", out, *machine),
        ]
    elif kind == "h5":
        readers = [
            store_splits,
            lambda path: load_store(path, "train"),
            lambda path: list(iterate_store(path, "train", 2)),
        ]
        commands = [
            command(evaluate.main, "masks", "--data", path, "--out", out, *machine),
            command(evaluate.main, "show", "--data", path, "--out", out, *machine),
            command(train.main, "--data", path, "--epochs", 1, 0, *SMALL, "--out", out / "run", *machine),
        ]
    else:
        readers = [load_model] if kind == "pth" else [load_model, read_description, read_tensors, Student.load]
        commands = [
            command(evaluate.main, "predict", pictures, "--checkpoint", path, "--out", out, *machine),
            export(clicks, "--checkpoint", path),
            command(
                evaluate.main, "detector", "--data", good, "--checkpoint", path, "--out", out, "--no-plots", *machine
            ),
        ]
        if kind == "safetensors":
            (out / "run").mkdir()
            (out / "run" / "last.safetensors").write_bytes(content)
            commands = (
                [command(train.main, "--resume", out / "run", *machine)] if name == "last.safetensors" else commands
            )
            commands = [export(clicks, "--masks", f"learned:{path}")] if name == "student.safetensors" else commands
    read = [
        (getattr(reader, "__name__", "reader"), lambda reader=reader: (reader(path), True)[1]) for reader in readers
    ]
    return [*read, commands[index // 16 % len(commands)]]


def told(main: Callable[[list[str]], int], arguments: list[str]) -> bool:
    """Run a command: True if it ended well, False if it refused in one line."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they would stand before the line
        try:
            code = main(arguments)
        except SystemExit as error:
            code = error.code
    if code == 2 and not (err.getvalue().startswith("error: ") and err.getvalue().count("\n") == 1):
        raise AssertionError(f"exit code 2 with {err.getvalue()!r}")
    if code not in (0, 1, 2):
        raise AssertionError(f"exit code {code}")
    return code != 2


def only_short(train_epoch: Callable[[Any], None]) -> Callable[[Any], None]:
    """Settings in a forged checkpoint may ask for a million epochs of large crops, which is no fault of a reader."""

    def train_small(run: Any) -> None:
        if sum(run.settings.epochs) > 4 or run.settings.batch_size * run.settings.patch_size**2 > 2**16:
            raise HMGError("too long a run for this test")
        train_epoch(run)

    return train_small


def tree(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.name != "scratch.h5"}


class Watch:
    """While it is entered: everything that Python announces and that no reader may do."""

    def __init__(self, allowed: Path):
        self.allowed, self.on, self.seen = os.fspath(allowed), False, []
        sys.addaudithook(self.hear)

    def __enter__(self) -> None:
        self.on = True

    def __exit__(self, *error: object) -> None:
        self.on = False

    def hear(self, event: str, arguments: tuple) -> None:
        if not self.on:
            return
        if event.startswith(FORBIDDEN):
            self.seen.append(f"{event} {str(arguments)[:200]}")
        elif event == "open" and self.writes(*arguments[1:3]):
            self.check(event, arguments[0])
        elif event in MAKES:
            for path in arguments[:2] if event in ("os.rename", "os.link", "os.symlink") else arguments[:1]:
                self.check(event, path)

    def writes(self, mode: str | None, flags: int) -> bool:
        return bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)) or bool(set(mode or "") & set("wax+"))

    def check(self, event: str, path: object) -> None:
        if isinstance(path, (str, bytes, os.PathLike)):
            place = os.path.realpath(os.fsdecode(path))
            if place != "/dev/null" and os.path.commonpath((place, self.allowed)) != self.allowed:
                self.seen.append(f"{event} outside the output folder: {place}")

    def take(self) -> list[str]:
        seen, self.seen = self.seen, []
        return seen
