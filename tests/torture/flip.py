"""Flipped bits and swapped files: of every kind of file that we write, a reader tells, or reads what it would have."""

from __future__ import annotations

import random
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tiny import tiny_set

from hmg_gpu.commands import journal
from hmg_gpu.common.checksums import read_sealed_json, write_sealed_json
from hmg_gpu.common.errors import HMGError
from hmg_gpu.data import load_store, read_mask, write_mask, write_store
from hmg_gpu.masks import Pmg
from hmg_gpu.masks.student import Student, StudentSettings, train_student
from hmg_gpu.models import build_model
from hmg_gpu.models.checkpoints import read_description, read_tensors, save_checkpoint
from hmg_gpu.models.weights import load_model

SWAPS = 10  # flips for each pair of swapped files


def _network(path: Path) -> list[Any]:
    model, description = load_model(path)
    return [description, *model.state_dict().values()]


def _state(path: Path) -> list[Any]:
    tensors = read_tensors(path)
    return [read_description(path), *(tensors[name] for name in sorted(tensors))]


def _student(path: Path) -> list[Any]:
    student = Student.load(path)
    networks = [network for members in student.networks.values() for network in members]
    return [student.threshold, *(value for network in networks for value in network.state_dict().values())]


def _store(path: Path) -> list[Any]:
    data = load_store(path, "train")
    return [data.names, data.mean, data.std, data.images, data.masks, data.points, data.sizes]


def _journal(path: Path) -> list[Any]:
    """A part whose line is not whole is made anew: what is left must be true."""
    return sorted(journal.take_up(path.parent, {"extent": 8}, [[]] * 12, lambda part: []).items())


def write_files(folder: Path, seed: int) -> dict[str, tuple[Path, Callable[[Path], list[Any]]]]:
    """One file of each kind and how it is read; ``seed`` makes them differ."""
    folder.mkdir(parents=True)
    data, generator = tiny_set(seed=seed), torch.Generator().manual_seed(seed)
    about = {"settings": {"model": "unet"}, "normalisation": [63.0, 21.0 + seed], "stage": 1}
    torch.manual_seed(seed)
    weights = {f"model.{name}": value for name, value in build_model("unet").state_dict().items()}
    state = {"totals": torch.rand(5, generator=generator), "masks.current": data.masks}
    save_checkpoint(folder / "stage2.safetensors", weights, about)
    save_checkpoint(folder / "last.safetensors", state, about)
    quick = StudentSettings(crop=24, shift=2, steps=1, batch_size=4, members=1, seed=seed)
    train_student(data, Pmg(extent=8), settings=quick).save(folder / "student.safetensors")
    write_sealed_json(folder / "results.json", {"settings": about, "results": {"iou": 0.5 + seed / 7}})
    write_store(folder / "set.h5", [data])
    write_mask(folder / "mask.png", np.asarray(data.masks[0]))
    masks = folder / "masks"
    masks.mkdir()
    writer = journal.Journal(masks, {"extent": 8}, 0, {})
    writer.begin()
    for part in range(12):
        writer.add(part, journal.Done([part + seed, 2 * part, 300 + part, 4000], []))
    return {
        "weights": (folder / "stage2.safetensors", _network),
        "state": (folder / "last.safetensors", _state),
        "student": (folder / "student.safetensors", _student),
        "JSON beside the weights": (folder / "stage2.json", lambda path: _network(path.with_suffix(".safetensors"))),
        "results.json": (folder / "results.json", lambda path: [read_sealed_json(path)]),
        "packed store": (folder / "set.h5", _store),
        "mask": (folder / "mask.png", lambda path: [read_mask(path)]),
        "journal of masks": (masks / "hmg.part.0", _journal),
    }


def same(theirs: list[Any], mine: list[Any]) -> bool:
    """Whether what was read is equal, tensor for tensor."""

    def equal(one: Any, other: Any) -> bool:
        if isinstance(one, (torch.Tensor, np.ndarray)):
            return type(one) is type(other) and one.shape == other.shape and bool((one == other).all())
        return one == other

    return len(theirs) == len(mine) and all(map(equal, theirs, mine))


def outcome(path: Path, read: Callable[[Path], list[Any]], wanted: list[Any], subset: bool) -> str:
    """told, without effect, or silent."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            found = read(path)
        except HMGError as error:
            return "told" if "\n" not in str(error) else "silent"
    if told:
        return "told"
    good = all(entry in wanted for entry in found) if subset else same(found, wanted)
    return "without effect" if good else "silent"


def flipped(content: bytes, position: int) -> bytes:
    """With one bit turned over."""
    changed = bytearray(content)
    changed[position // 8] ^= 1 << position % 8
    return bytes(changed)


def run(folder: Path, count: int, deadline: float, seed: int) -> dict[str, Any]:
    """Turn ``count`` random bits, spread evenly over the kinds of files, and swap a tenth as many between two runs."""
    draw = random.Random(seed)
    runs = [write_files(folder / str(number), number) for number in (0, 1)]
    wanted = [{kind: read(path) for kind, (path, read) in files.items()} for files in runs]
    counts: dict[str, Counter] = {kind: Counter() for kind in runs[0]}
    failures: list[str] = []
    done = swaps = 0
    for number in range(count):
        if time.monotonic() > deadline:
            break
        kind = list(runs[0])[number % len(runs[0])]
        path, read = runs[0][kind]
        content = path.read_bytes()
        position = draw.randrange(8 * len(content))
        path.write_bytes(flipped(content, position))
        result = outcome(path, read, wanted[0][kind], kind == "journal of masks")
        path.write_bytes(content)
        counts[kind][result] += 1
        done += 1
        if result == "silent":
            failures.append(f"{kind}: bit {position} of {path.name}")
        if number % SWAPS == 0:  # one of a pair of files that belong together comes from the other run
            swaps += 1
            result = _swap(runs, wanted, draw)
            counts.setdefault("swapped", Counter())[result] += 1
            if result == "silent":
                failures.append(f"swap {number}")
    return {"flips": done, "swaps": swaps, "by kind": {k: dict(v) for k, v in counts.items()}, "failures": failures}


def _swap(runs: list[dict], wanted: list[dict], draw: random.Random) -> str:
    """Put the weights, or the JSON beside them, of one run in the place of the other's."""
    here = draw.randrange(2)
    name = draw.choice(["weights", "JSON beside the weights"])
    path, other = runs[here][name][0], runs[1 - here][name][0]
    weights, read = runs[here]["weights"]
    content = path.read_bytes()
    path.write_bytes(other.read_bytes())
    result = outcome(weights, read, wanted[here]["weights"], False)
    path.write_bytes(content)
    return result
