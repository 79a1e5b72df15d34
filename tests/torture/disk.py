"""A full disk and a read-only one under every command that writes: old files stay, one line says what is wrong."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tiny import tiny_set, write_folder

import eval as evaluate
import train
from hmg_gpu import MaskUpdater
from hmg_gpu.commands import main as cli
from hmg_gpu.commands.coco import write_coco
from hmg_gpu.common.errors import HMGError
from hmg_gpu.models.checkpoints import save_checkpoint

from .kill import MACHINE, SETTINGS, fork

SIZE = 24 * 2**20  # bytes of the disk
NEW_MOUNTS, NEW_USER = 0x00020000, 0x10000000  # of unshare(2)


def run(folder: Path, count: int, deadline: float, seed: int) -> dict[str, Any]:
    """Every operation once on a full disk and once on a read-only one, up to ``count`` cases."""
    data = write_folder(folder / "tiny")
    disk, shown = folder / "disk", folder / "shown.json"
    disk.mkdir()
    code = fork(lambda: own_mounts(lambda: cases(data, disk, shown, count, deadline)), folder / "said")
    if code != 0:
        return {"cases": 0, "failures": [f"no mounts here (ended with {code}): {(folder / 'said').read_text()[-300:]}"]}
    rows = json.loads(shown.read_text())
    failures = [row for row in rows if row["wrong"]]
    return {"cases": len(rows), "held": len(rows) - len(failures), "rows": rows, "failures": failures}


def own_mounts(call: Callable[[], None]) -> int:
    """Run a call where this process alone sees what it mounts; all of it is gone when the process ends."""
    user, group = os.getuid(), os.getgid()
    library = ctypes.CDLL(None, use_errno=True)
    if library.unshare(NEW_MOUNTS if user == 0 else NEW_MOUNTS | NEW_USER):
        raise OSError(ctypes.get_errno(), "unshare")
    if user:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    mount("--make-rprivate", "/")
    call()
    return 0


def mount(*arguments: object) -> None:
    subprocess.run(["mount", *map(str, arguments)], check=True)


def operations(data: Path, disk: Path) -> dict[str, tuple[Callable[[int], object], int]]:
    """What is done, first with 0 on an empty disk, then with 1 on a bad one; bytes left on the full disk."""
    images, points = ("--images", data / "images"), ("--points", data / "masks_centroid")
    tensors, blank = {"model.weight": torch.zeros(2**20)}, torch.zeros(2, 32, 32, dtype=torch.bool)
    blank[:, ::2, ::2] = True

    def command(main: Callable[[list[str]], int], *arguments: object) -> Callable[[int], object]:
        return lambda turn: main([*map(str, arguments), *MACHINE])

    def trained(turn: int) -> object:
        if turn:
            return train.main(["--resume", str(disk / "run"), *MACHINE])
        stop = partial(stop_after, 1)
        return stop(lambda: train.main(["--data", str(data), *SETTINGS, *MACHINE, "--out", str(disk / "run")]))

    def coco(turn: int) -> None:
        with write_coco(disk / "coco.json", ["a.png"] * 50, [(32, 32)] * 50, "polygons") as writer:
            for image in range(1, 51):
                writer.add(image, blank[0])

    def export(turn: int) -> None:
        MaskUpdater(tiny_set(seed=turn), "pmg:extent=10").export(disk / "masks")

    def packed(turn: int) -> object:
        return cli.main(["pack", str(data), str(disk / "s.h5"), "--overwrite", "--threads", "1"])

    return {
        "checkpoint": (lambda turn: save_checkpoint(disk / "last.safetensors", tensors, {"turn": turn}), 2**18),
        "train.py: checkpoint": (trained, 2**18),
        "train.py: log": (trained, 0),
        "export": (export, 0),
        "pack": (packed, 2**12),
        "COCO JSON": (coco, 2**13),
        "hmg-gpu masks": (command(cli.main, "masks", *images, *points, "--out", disk / "m", "--coco", "rle"), 0),
        "eval.py masks": (command(evaluate.main, "masks", "--data", data, "--out", disk / "e"), 0),
        "eval.py predict": (command(evaluate.main, "predict", data / "images", *points, "--out", disk / "p"), 0),
        "eval.py show": (command(evaluate.main, "show", "--data", data, "--out", disk / "w"), 2**13),
    }


def stop_after(saves: int, call: Callable[[], object]) -> int:
    """Run a call in a process that ends after so many saves, as a killed run would."""

    def limited() -> None:
        save, left = train.Training.save, saves

        def counted(*arguments: Any, **names: Any) -> None:
            nonlocal left
            save(*arguments, **names)
            left -= 1
            if left == 0:
                os._exit(0)

        train.Training.save = counted
        call()

    return fork(limited, Path(os.devnull))


def cases(data: Path, disk: Path, shown: Path, count: int, deadline: float) -> None:
    rows: list[dict[str, Any]] = []
    for title, (call, free) in operations(data, disk).items():
        for state in ("full", "read-only"):
            if len(rows) == count or time.monotonic() > deadline:
                break
            mount("-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", disk)
            said = shown.with_suffix(".said")
            first = fork(lambda call=call: call(0), said)
            if state == "full":
                fill(disk / "filler", free)
            else:
                mount("-o", "remount,ro", disk)
            before = contents(disk)
            code = fork(lambda call=call: refused(call), said)
            text = next((line for line in said.read_text().splitlines() if line.startswith("error: ")), "")
            wrong = [f"the first time it ended with {first}"] if first else []
            wrong += [f"ended with {code}: {said.read_text()[-300:]}"] if code != 2 else []
            wrong += changes(before, contents(disk))
            wrong += [] if str(disk) in text else ["no path in the message"]
            need = (
                ("No space left on device", "it needs at least", "kB are free", "free some space")
                if state == "full"
                else ("Read-only file system",)
            )
            wrong += [f"no {word!r} in the message" for word in need if word not in text]
            rows.append({"operation": title, "disk": state, "said": text.replace(str(disk), "DISK"), "wrong": wrong})
            subprocess.run(["umount", disk], check=True)
    shown.write_text(json.dumps(rows))


def refused(call: Callable[[int], object]) -> object:
    """The exit code of a command, or that of a script which says what the library raised."""
    try:
        return call(1)
    except HMGError as error:
        print(f"error: {error}")
        return 2


def fill(path: Path, free: int) -> None:
    """Leave so many bytes free on a disk."""
    with open(path, "wb", buffering=0) as handle:
        try:
            while True:
                handle.write(bytes(2**12))
        except OSError:
            pass
    os.truncate(path, path.stat().st_size - free)


def contents(folder: Path) -> dict[str, bytes]:
    """What must stay; who holds a folder is no content."""
    paths = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".hmg."))
    return {str(path): path.read_bytes() for path in paths}


def changes(before: dict[str, bytes], after: dict[str, bytes]) -> list[str]:
    """Old files that are no longer the same (a log may have grown), and pieces of new ones left behind."""
    grown = {path for path in before if path.endswith(".jsonl") and after.get(path, b"").startswith(before[path])}
    changed = [path for path in before if path not in grown and after.get(path) != before[path]]
    return [f"{path}: changed" for path in changed] + [f"{path}: left behind" for path in after if ".part" in path]
