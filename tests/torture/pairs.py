"""Two processes on one folder, begun within a second, for every command that writes: one goes on, one is refused.

Both of a pair write other things. What is left in the end must be what the one that went on writes alone.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import platform
import random
import re
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from served import Client
from tiny import write_folder

import eval as evaluate
import train
from hmg_gpu.commands import journal, review
from hmg_gpu.commands import main as cli
from hmg_gpu.common import locks
from hmg_gpu.masks.makers import learned
from hmg_gpu.masks.student import StudentSettings
from hmg_gpu.models.checkpoints import read_description, read_tensors

from .disk import stop_after
from .kill import CLOCKS, MACHINE, SETTINGS, ended, fork, start

SECOND = 1.0  # within which both begin
SHARE = 0.8  # of the time that a command alone holds its folder, so that both are there at once
FORK = 0.02  # seconds until the second is there
TRIES = 8  # pairs for each that meets, at most
LIMIT = 120.0  # seconds for a process
NOT_COMPARED = {*CLOCKS, "checksum", "seconds_preparing", "points_per_second"}
SAVINGS = {"saving", "saved"}  # lines of a session's journal that come by the clock
STOPPED = 130  # the exit code of a command that Ctrl-C ends


class Command(NamedTuple):
    """What a pair of processes runs: ``call(out, variant)`` with variant 0 and 1."""

    call: Callable[[Path, int], object]
    prepare: Callable[[Path], object] = lambda out: None  # what stands there before
    differs: bool = True  # the variants write other things
    good: int = 0  # its exit code


def run(folder: Path, count: int, deadline: float, seed: int) -> dict[str, Any]:
    """``count`` pairs of each command of which one was refused; a process that came too late is not counted."""
    rng, rows, failures = random.Random(seed), {}, []
    every = commands(folder)
    for number, (name, command) in enumerate(every.items()):
        until = time.monotonic() + (deadline - time.monotonic()) / (len(every) - number)
        tally, wrong = Counter(), []
        alone, held = zip(*(_alone(folder, command, variant) for variant in (0, 1)), strict=True)
        if command.differs == (alone[0] == alone[1]):
            wrong.append("the variants are no variants")
        longest = min(SECOND, max(0.0, SHARE * min(held) - FORK))
        while tally["refused"] < count and sum(tally.values()) < TRIES * count and time.monotonic() < until:
            outcome, more = _pair(folder, command, alone, tally["refused"] % 2, rng.uniform(0, longest))
            tally[outcome] += 1
            wrong += more
        if tally["refused"] < min(count, sum(tally.values()) // TRIES):
            wrong.append(f"only {tally['refused']} of {sum(tally.values())} pairs met")
        rows[name] = dict(tally) | {"held alone for s": round(min(held), 3)}
        failures += [f"{name}: {text}" for text in wrong]
    return {"commands": len(rows), "pairs": sum(row.get("refused", 0) for row in rows.values()), "by command": rows} | {
        "failures": failures
    }


def _alone(folder: Path, command: Command, variant: int) -> tuple[dict[str, Any], float]:
    """What a process leaves that nobody disturbs, and for how many seconds it holds the folder."""
    out, held = _fresh(folder, command), folder / "held"
    held.unlink(missing_ok=True)
    code = fork(lambda: watched(lambda: command.call(out, variant), held), folder / "said")
    if code != command.good:
        raise RuntimeError(f"ended with {code}: {(folder / 'said').read_text()[-2000:]}")
    taken, released = json.loads(held.read_text())
    return contents(out), released - taken


def _pair(
    folder: Path, command: Command, alone: tuple[dict[str, Any], ...], first: int, wait: float
) -> tuple[str, list[str]]:
    """Two processes, the second some seconds after the first: "refused" or "late", and what was wrong."""
    out = _fresh(folder, command)
    variants, held = (first, 1 - first), [folder / f"held{place}" for place in (0, 1)]
    said = [folder / f"said{place}" for place in (0, 1)]
    processes = []
    for place, variant in enumerate(variants):
        held[place].unlink(missing_ok=True)
        if place:
            time.sleep(wait)
        call = partial(watched, partial(command.call, out, variant), held[place])
        processes.append(start(call, said[place]))
    codes = [_end(process) for process in processes]
    spans = [json.loads(path.read_text()) if path.exists() else [] for path in held]
    texts = [path.read_text() for path in said]
    wrong = []
    winners = [place for place in (0, 1) if codes[place] == command.good]
    losers = [place for place in (0, 1) if codes[place] == 2]
    if len(winners) + len(losers) < 2 or not winners:
        return "failed", [f"ended with {codes}: {texts[0][-300:]} {texts[1][-300:]}"]
    if any(not spans[place] for place in winners):
        wrong.append("went on without a lock")
    if len(winners) == 2:
        if spans[0] and spans[1] and spans[0][0] < spans[1][1] and spans[1][0] < spans[0][1]:
            wrong.append("both held the folder at once")
        return "late", wrong
    (winner,), (loser,) = winners, losers
    if contents(out) != alone[variants[winner]]:
        wrong.append(f"other contents than of one alone: {_difference(contents(out), alone[variants[winner]])}")
    text = f"process {processes[winner]} on {platform.node()} is writing there"
    if text in texts[loser]:
        return "refused", wrong
    begun = spans[loser] and spans[winner] and spans[loser][0] > spans[winner][1]
    return ("late", wrong) if begun else ("failed", [*wrong, f"refused in other words: {texts[loser][-300:]}"])


def _fresh(folder: Path, command: Command) -> Path:
    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    command.prepare(out)
    return out


def _end(process: int) -> int | None:
    code = ended(process, LIMIT)
    if code is None:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
    return code


def watched(call: Callable[[], object], held: Path) -> object:
    """Run a call and note when it took its first lock and let go of it; for the process that it runs in."""
    take = locks._take

    def noted(*arguments: Any) -> Any:
        lock = take(*arguments)
        taken, release = time.monotonic(), lock.release

        def released(*more: Any, **named: Any) -> None:
            if not held.exists():
                held.write_text(json.dumps([taken, time.monotonic()]))
            release(*more, **named)

        lock.release = released
        return lock

    locks._take = noted
    return call()


def contents(out: Path) -> dict[str, Any]:
    """What lies in a folder, without clocks; pieces of files and the names of owners count, locks do not."""
    found: dict[str, Any] = {}
    for path in sorted(path for path in out.rglob("*") if path.is_file() and path.suffix != ".lock"):
        name = path.relative_to(out).as_posix()
        match path.suffix:
            case ".json" | ".jsonl":
                lines = [path.read_text()] if path.suffix == ".json" else path.read_text().splitlines()
                rows = [_without_clocks(json.loads(line)) for line in lines]
                found[name] = [row for row in rows if not SAVINGS & set(row)]
            case ".safetensors":
                found[name] = [read_description(path), *map(_digest, _sorted(read_tensors(path)))]
            case ".md":
                found[name] = re.sub(r"( \| [\d.,]+){3} \|$", "", path.read_text(), flags=re.MULTILINE)  # times
            case _:
                found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def _sorted(tensors: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    return [tensors[name] for name in sorted(tensors)]


def _digest(value: torch.Tensor) -> str:
    return hashlib.sha256(value.contiguous().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()


def _without_clocks(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_clocks(inner) for key, inner in value.items() if key not in NOT_COMPARED}
    return [_without_clocks(inner) for inner in value] if isinstance(value, list) else value


def _difference(found: dict[str, Any], wanted: dict[str, Any]) -> str:
    return ", ".join(name for name in sorted(found | wanted) if found.get(name) != wanted.get(name))


def commands(folder: Path) -> dict[str, Command]:
    """Every command that writes, on a set so small that it takes about a second."""
    data = write_folder(folder / "tiny")
    images, points = ("--images", data / "images"), ("--points", data / "masks_centroid")

    def command(main: Callable[[list[str]], int], *arguments: object, **more: Any) -> Command:
        """``arguments`` with the output in the place of OUT and one of two words in the place of a tuple."""

        def call(out: Path, variant: int) -> object:
            words = [word[variant] if isinstance(word, tuple) else word for word in arguments]
            return main([str(out) if word == "OUT" else str(word) for word in words])

        return Command(call, **more)

    def fresh(variant: int, out: Path) -> object:
        return train.main(["--data", str(data), *SETTINGS, *MACHINE, "--seed", str(variant), "--out", str(out)])

    with redirect_stdout(io.StringIO()):
        for variant in (0, 1):
            fresh(variant, folder / f"run{variant}")
    weights = [folder / f"run{variant}" / "stage2.safetensors" for variant in (0, 1)]

    def stopped_run(out: Path) -> None:
        """A run that was killed after its first save."""
        stop_after(1, lambda: fresh(0, out))

    def stopped_masks(out: Path) -> None:
        fork(lambda: die_after_part(3, lambda: masks_of(out, 0)), folder / "said")

    def masks_of(out: Path, variant: int) -> object:
        extent = ("--extent", str(8 + variant), "--batch", "1", "--coco", "rle", "--overlays")
        return cli.main(["masks", *map(str, [*images, *points]), *extent, "--out", str(out), "--resume", *MACHINE])

    def learned_masks(out: Path, variant: int) -> object:
        quick = StudentSettings(crop=24, shift=2, steps=40, batch_size=4, members=1)
        learned.StudentSettings = lambda *, seed: replace(quick, seed=seed)
        words = ["masks", *images, *points, "--masks", "learned", "--extent", 8 + variant, "--out", out, *MACHINE]
        return cli.main([*map(str, words)])

    def packed(out: Path, variant: int) -> object:
        return cli.main(["pack", str(data), str(out / "s.h5"), "--dataset", f"set{variant}", "--threads", "1"])

    def measured(name: str, *arguments: object) -> Command:
        return command(evaluate.main, name, "--data", data, *arguments, "--out", "OUT", *MACHINE)

    plain = ("--no-plots",)
    return {
        "train.py": Command(lambda out, variant: fresh(variant, out)),
        "train.py --resume": Command(
            lambda out, variant: train.main(["--resume", str(out), *MACHINE]), stopped_run, differs=False
        ),
        "hmg-gpu masks": command(
            *(cli.main, "masks", *images, *points, "--extent", ("8", "9"), "--batch", 1, "--coco", "rle"),
            *("--overlays", "--out", "OUT", *MACHINE),
        ),
        "hmg-gpu masks --resume": Command(lambda out, variant: masks_of(out, 0), stopped_masks, differs=False),
        "hmg-gpu masks --masks learned": Command(learned_masks),
        "hmg-gpu pack": Command(packed, Path.mkdir),
        "hmg-gpu review": Command(lambda out, variant: reviewed(data, out, variant), good=STOPPED),
        "eval.py masks": measured("masks", "--masks", ("pmg", "points")),
        "eval.py detector": measured("detector", "--checkpoint", tuple(weights), *plain),
        "eval.py sweep": measured("sweep", "alpha", "--values", 0, (0.1, 0.2), *plain),
        "eval.py show": measured("show", "--masks", ("pmg", "points"), "--whole"),
        "eval.py compare": measured("compare", "--masks", "pmg", ("points", "pmg:extent=9"), *plain),
        "eval.py predict": command(
            evaluate.main,
            "predict",
            data / "images",
            "--checkpoint",
            tuple(weights),
            "--batch",
            1,
            "--out",
            "OUT",
            *MACHINE,
        ),
        "eval.py runs": command(
            *(evaluate.main, "runs", *[(folder / "run0", folder / "run1")] * 50),  # so many that it takes a while
            *("--out", "OUT", *MACHINE),
        ),
        "eval.py paper": command(
            evaluate.main, "paper", "--data", data, "--masks", ("points", "pal"), "--out", "OUT", *plain, *MACHINE
        ),
    }


def die_after_part(parts: int, call: Callable[[], object]) -> object:
    """Run hmg-gpu masks in a process that ends after so many parts, as a killed one would."""
    add, left = journal.Journal.add, parts

    def counted(*arguments: Any) -> None:
        nonlocal left
        add(*arguments)
        left -= 1
        if left == 0:
            os._exit(0)

    journal.Journal.add = counted
    return call()


def reviewed(data: Path, out: Path, variant: int) -> object:
    """hmg-gpu review, with a click on the page and then Ctrl-C."""
    serve = review.serve

    @contextmanager
    def clicked(session: Any, port: int) -> Iterator[str]:
        with serve(session, port) as address:
            client = Client(address)
            for y in range(10):
                client.edit(0, "add", y=3 + y, x=5 + variant)
                time.sleep(0.02)
            raise KeyboardInterrupt

    review.serve = clicked
    save = ("--save", str(out / "clicks.csv"), "--no-browser", "--extent", "8")
    return cli.main(["review", "--images", str(data / "images"), *save, "--threads", "1"])
