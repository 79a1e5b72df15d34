"""Files that we write ourselves, damaged or forged: whatever a checksum covers is told or read as it was written.

Half of the files are damaged and keep their checksum; what is read from them without a word must be what was written.
The others get a checksum that fits, so that what lies behind it is tried: they are refused in one line, or used. The
points of a table are known, so that a reader of CSV must give them or refuse.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import random
import shutil
import struct
import tempfile
import warnings
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import filelock
import numpy as np
import torch
from tiny import tiny_set, write_folder
from torch import Tensor

import eval as evaluate
import train
from hmg_gpu import MaskUpdater
from hmg_gpu.commands import journal
from hmg_gpu.commands import main as cli
from hmg_gpu.commands.inputs import open_source
from hmg_gpu.common import locks
from hmg_gpu.common.checksums import KEY, checksum_of_json, read_sealed_json
from hmg_gpu.common.errors import InputError
from hmg_gpu.data import read_points
from hmg_gpu.masks.makers import learned
from hmg_gpu.masks.student import StudentSettings
from hmg_gpu.models.checkpoints import BLANK, read_description, read_tensors, save_checkpoint
from hmg_gpu.updater import state as updater_state

from . import flip
from .damage import NUMBERS, TEXTS, damage, forge_json, forge_store, forge_text, sealed, splice, to_json
from .damage import forge_tree as forge_value
from .disk import stop_after
from .fuzz import SMALL, Attack, Corpus, Jobs, attack, told
from .kill import MACHINE

KINDS = ("student", "weights", "run", "updater", "lock", "store", "sealed JSON", "journal", "table")
COMMANDS = 3  # one file of so many goes through a command, too
QUICK = StudentSettings(crop=24, shift=2, steps=1, batch_size=4, members=1)
CLICKS = {"a b": [(3.25, 4.5), (17.0, 29.5)], "c-d": [(0.0, 0.75)], "é1": [(12.5, 8.25), (1.0, 2.0), (9.75, 21.0)]}
NAMES = [*CLICKS]


def run(folder: Path, count: int, deadline: float, seed: int) -> dict[str, Any]:
    """``count`` files of the kinds that we write, and tables as spreadsheets export them."""
    quick = mock.patch.object(learned, "StudentSettings", lambda *, seed: replace(QUICK, seed=seed))
    with quick, mock.patch.object(locks, "MOMENT", 0.05):
        return attack(folder, Attack(prepare(folder), mutate, jobs), count, deadline, seed)


def prepare(folder: Path) -> Corpus:
    """One valid file of each kind or several, and what the commands need beside it, which is never written to."""
    good = write_folder(folder / "good")
    files = {kind: path for kind, (path, _) in flip.write_files(folder / "files", 0).items()}
    run = folder / "run"
    with contextlib.redirect_stdout(io.StringIO()):
        fresh = ["--data", str(good), *SMALL, "--epochs", "1", "1", "--save-every", "1", *MACHINE]
        train.main([*fresh, "--out", str(folder / "whole")])
        stop_after(2, lambda: train.main([*fresh, "--epochs", "3", "1", "--out", str(run)]))
        shutil.copytree(run, folder / "ended")
        train.main(["--resume", str(folder / "ended"), *MACHINE])
        train.main([*fresh, "--masks", "learned", "--epochs", "1", "0", "--out", str(folder / "taught")])
        images = ("--images", good / "images", "--points", good / "masks_centroid", "--extent", 8)
        cli.main([*map(str, ["masks", *images, "--out", folder / "made", "--batch", 2, *MACHINE])])
    updater = MaskUpdater(tiny_set(), "pmg:extent=8")
    torch.save(updater.state_dict(), folder / "state.pt")
    soft = MaskUpdater(tiny_set(), "pmg:extent=8", "lesps")
    torch.save(soft.state_dict(), folder / "labels.pt")
    owner = json.dumps({"process": os.getpid(), "host": "elsewhere"}).encode()
    states = [run / "last.safetensors", run / "previous.safetensors"]

    def some(*paths: Path) -> list[tuple[str, bytes]]:
        return [(path.name, path.read_bytes()) for path in paths]

    return {
        "student": some(folder / "taught" / "student.safetensors", files["student"]),
        "weights": some(folder / "whole" / "stage2.safetensors", files["weights"]),
        "run": some(*states * 3, *(path for path in run.iterdir() if path.suffix in (".json", ".jsonl"))),
        "updater": some(folder / "state.pt", folder / "labels.pt"),
        "lock": [(".hmg.owner", owner), (".hmg.lock", b"")],
        "store": some(files["packed store"]),
        "sealed JSON": some(folder / "whole" / "results.json"),
        "journal": [*some(folder / "made" / "hmg.json"), ("hmg.part.0", _journal(folder))],
        "table": [("points.csv", b"")],
    }


def _journal(folder: Path) -> bytes:
    """Of the masks in ``made``, had they been stopped before the last part."""
    about = json.loads((folder / "made" / "hmg.json").read_text())["run"]
    del about[journal.PIXELS]
    writer = journal.Journal(folder / "files" / "masks", about, 1, {})
    writer.begin()
    with open_source(folder / "good" / "images", folder / "good" / "masks_centroid", None, None) as source:
        for part in range(3):
            writer.add(part, journal.Done([2, 2, 40, 3000], source.pixels([2 * part, 2 * part + 1])))
    return writer.path.read_bytes()


# --- damage and forgery ----------------------------------------------------------------------------------------------


def mutate(kind: str, name: str, content: bytes, other: bytes, rng: random.Random, scratch: Path) -> tuple[bytes, bool]:
    """New content, and whether it has the old checksum."""
    if kind == "table":
        return rng.randbytes(8), False  # decides the table, which is made where it is read
    way = rng.choice(("damage", "damage", "splice", "forge", "seal", "seal"))
    if way == "damage" or kind == "lock":
        return damage(content, rng) if rng.random() < 0.7 or kind != "lock" else _owner(rng), True
    if way == "splice":
        return splice(content, other, rng), True
    suffix = Path(name).suffix
    if suffix == ".safetensors":
        if way == "forge":
            return _forge_header(content, rng), True
        return (
            _reseal(_forge_header(content, rng)) if rng.random() < 0.4 else _forge_tensors(content, rng, scratch)
        ), False
    if suffix == ".pt":
        return _forge_state(content, rng, way == "seal")
    if suffix == ".h5":
        return (damage(content, rng), True) if way == "forge" else _forge_h5(content, rng, scratch)
    if suffix == ".json":
        value = json.loads(content)
        if way == "forge" or KEY not in value:
            return forge_json(content, rng), KEY in value
        del value[KEY]
        value = forge_value(value, rng)
        with contextlib.suppress(ValueError, RecursionError):
            value |= {KEY: checksum_of_json(json.loads(to_json(value)))}
        return to_json(value), False
    return _forge_lines(content, rng), False


def _owner(rng: random.Random) -> bytes:
    process = rng.choice((*NUMBERS, *TEXTS, None, True, [1], os.getpid(), 2**22 + 1))
    return to_json({"process": process, "host": rng.choice((*TEXTS, 3, None, os.uname().nodename))})


def _forge_header(data: bytes, rng: random.Random) -> bytes:
    """Offsets, types and shapes in the header, or our description in it; its checksum stays."""
    (length,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + length])
    about = header["__metadata__"]
    if rng.random() < 0.6:
        about["hmg_gpu"] = to_json(forge_value(json.loads(about["hmg_gpu"]), rng)).decode()
    else:
        tensors = forge_value({name: value for name, value in header.items() if name != "__metadata__"}, rng)
        header = {"__metadata__": about} | tensors
    text = to_json(header)
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def _reseal(data: bytes) -> bytes:
    """The same with a checksum that fits."""
    (length,) = struct.unpack_from("<Q", data)
    try:
        header = json.loads(data[8 : 8 + length])
    except (ValueError, RecursionError):
        return data
    header["__metadata__"][KEY] = BLANK
    text = json.dumps(header, separators=(",", ":")).encode()
    content = struct.pack("<Q", len(text)) + text + data[8 + length :]
    mark = f'"{KEY}":"'.encode()
    return content.replace(mark + BLANK.encode(), mark + f"{zlib.crc32(content):08x}".encode(), 1)


def _forge_tensors(data: bytes, rng: random.Random, scratch: Path) -> bytes:
    """One or two tensors of another type, shape or value, those of the data record more often; the checksum fits."""
    path = scratch.with_suffix(".safetensors")
    path.write_bytes(data)
    tensors, description = read_tensors(path), read_description(path)
    names = sorted(tensors)
    records = [name for name in names if "data." in name]
    for _ in range(rng.choice((1, 1, 2))):
        name = rng.choice(records) if records and rng.random() < 0.6 else rng.choice(names)
        if rng.random() < 0.1:
            tensors.pop(name, None)
        elif name in tensors:
            tensors[name] = _other(tensors[name], rng)
    save_checkpoint(path, tensors, description)
    content = path.read_bytes()
    for left in (path, path.with_suffix(".json")):
        left.unlink()
    return content


def _other(value: Tensor, rng: random.Random) -> Tensor:
    flat = value.clone().flatten()
    match rng.randrange(6):
        case 0:
            return value.to(rng.choice((torch.float32, torch.int64, torch.uint8, torch.bool, torch.float64)))
        case 1:
            return flat[: rng.randrange(len(flat) + 1)].clone()
        case 2:
            return value[None].clone()
        case 3:
            return torch.zeros(0, dtype=value.dtype)
        case _:
            for _ in range(rng.choice((1, 3))):
                if len(flat):
                    number = rng.choice((-1, 0, 1, 255, 2**31, 2**62, float("nan"), float("inf"), -(2**40)))
                    if value.is_floating_point():
                        flat[rng.randrange(len(flat))] = number
                    elif number == number and abs(number) < 2**63:
                        flat[rng.randrange(len(flat))] = torch.tensor(int(number)).to(value.dtype)
            return flat.view(value.shape)


def _forge_state(data: bytes, rng: random.Random, seal: bool) -> tuple[bytes, bool]:
    """An entry of an updater's state replaced by anything that torch saves."""
    state = torch.load(io.BytesIO(data), weights_only=True)
    for _ in range(rng.choice((1, 1, 2))):
        key = rng.choice([*state])
        match rng.randrange(8):
            case 0:
                del state[key]
            case 1:
                state[rng.choice(TEXTS)] = 1
            case 2 if isinstance(state.get(key), dict):
                state[key] = json.loads(to_json(forge_value(json.loads(json.dumps(state[key])), rng)))
            case 3:
                state[key] = rng.choice((None, 3, "x", [1], {"a": torch.ones(2)}, torch.ones(2, 2).to_sparse(), ()))
            case _ if isinstance(state.get(key), Tensor) and state[key].layout == torch.strided:
                state[key] = _other(state[key], rng)
            case _:
                state[key] = [torch.ones(2)]
    if seal:
        with contextlib.suppress(Exception):
            state[KEY] = updater_state._checksum_of(state)
    content = io.BytesIO()
    torch.save(state, content)
    return content.getvalue(), not seal


def _forge_h5(data: bytes, rng: random.Random, scratch: Path) -> tuple[bytes, bool]:
    way = rng.choice((sealed(damage, scratch), lambda data, rng: forge_store(data, rng, scratch)))
    return way(data, rng), False


def _forge_lines(data: bytes, rng: random.Random) -> bytes:
    """Words of lines that have no checksum, or one of their own."""
    head, _, rest = data.partition(b"\n")
    if rng.random() < 0.5 and head.startswith(b"{"):
        with contextlib.suppress(ValueError, RecursionError):
            return to_json(forge_value(json.loads(head), rng)) + b"\n" + rest
    return forge_text(data, rng)


# --- readers ---------------------------------------------------------------------------------------------------------


def jobs(folder: Path, box: Path, kind: str, name: str, content: bytes, index: int, whole: bytes | None) -> Jobs:
    """Every reader of this kind of file and one of its commands, by turns."""
    out, good = box / "out", folder / "good"
    tempfile.tempdir = str(out)
    path, was, place = out / "in" / name, out / "was" / name, out / "place"
    for one, data in ((path, content), (was, whole)):
        if data is not None:
            one.parent.mkdir()
            one.write_bytes(data)
    images = ("--images", good / "images", "--points", good / "masks_centroid", "--extent", 8)

    def command(main: Callable[[list[str]], int], *arguments: object) -> tuple[str, Callable[[], object]]:
        words = [*map(str, (*arguments, *(() if arguments[0] == "check" else MACHINE)))]
        return " ".join(words[:2]), lambda: told(main, words)

    def masks(*more: object) -> tuple[str, Callable[[], object]]:
        return command(cli.main, "masks", *images, *more)

    def measure(*more: object) -> tuple[str, Callable[[], object]]:
        return command(evaluate.main, *more, "--out", out / "e")

    def put(source: Path) -> None:
        """A folder of ours with the file in it."""
        shutil.copytree(source, place)
        (place / name).write_bytes(content)

    def reader(read: Callable[[Path], list[Any]]) -> tuple[str, Callable[[], object]]:
        return "reader", lambda: faithful(read, path, whole is not None and was)

    readers, commands = [], []
    match kind:
        case "student":
            place.mkdir()
            (place / "student.safetensors").write_bytes(content)
            readers = [reader(flip._student)]
            commands = [
                masks("--masks", f"learned:{path}", "--out", out / "m"),
                masks("--masks", "learned", "--out", place),
                command(cli.main, "check", path),
            ]
        case "weights":
            readers = [reader(flip._network)]
            commands = [
                measure("detector", "--data", good, "--checkpoint", path, "--no-plots"),
                masks("--checkpoint", path, "--out", out / "m"),
                command(cli.main, "check", path),
            ]
        case "run":
            put(folder / "run")
            readers = [reader(flip._state)] if path.suffix == ".safetensors" else []
            resume = command(train.main, "--resume", place)
            commands = [
                ("train.py --resume", lambda: resume[1]() and _ended_well(place, folder / "ended", whole)),
                command(train.main, "--resume", place, "--changed-data"),
                command(train.main, "--check", place),
                command(cli.main, "check", place / "last.safetensors"),
            ]
        case "updater":
            readers = [("load_state_dict", lambda: _updater(path, whole is not None and was))]
        case "lock":
            readers = [
                ("free", lambda: _lock(path.parent, held=False)),
                ("held", lambda: _lock(path.parent, held=True)),
            ]
        case "store":
            readers = [reader(flip._store)]
            commands = [
                measure("masks", "--data", path),
                command(train.main, "--data", path, "--epochs", 1, 0, *SMALL, "--out", place),
                command(cli.main, "masks", "--images", path, "--points", "masks_centroid", "--out", out / "m"),
            ]
        case "sealed JSON":
            readers = [reader(lambda path: [read_sealed_json(path)])]
            commands = [
                command(evaluate.main, "runs", path.parent, folder / "whole", "--out", out / "e"),
                command(evaluate.main, "runs", path.parent, "--out", out / "e"),
            ]
        case "journal":
            put(folder / "made")
            if name != "hmg.json":
                (place / "hmg.json").unlink()
            commands = [
                (title, lambda call=call: call() and _same_masks(place, folder / "made"))
                for title, call in (
                    masks("--resume", "--out", place, "--batch", 2),
                    masks("--out", place, "--batch", 2),
                )
            ]
        case _:
            readers = [("table", lambda: _table(path, random.Random(content)))]
    turn, rest = divmod(index // len(KINDS), COMMANDS)
    return [*readers, *([commands[turn % len(commands)]] if commands and (rest == 0 or not readers) else [])]


def faithful(read: Callable[[Path], list[Any]], path: Path, was: Path | bool) -> bool:
    """Read a file: True if it was read; what is read without a word must be what stood there before.

    Args:
        was: the file before it was damaged; False: its checksum was made to fit.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if not was:
            read(path)
            return True
        wanted = read(was)
    result = flip.outcome(path, read, wanted, subset=False)
    if result == "silent":
        raise AssertionError("read as something else, without a word")
    return result != "told"


def _ended_well(place: Path, wanted: Path, whole: bytes | None) -> bool:
    """A run that was resumed from damaged files ends as it would have."""
    last = "stage2.safetensors"
    if whole is not None and not flip.same(flip._state(place / last)[1:], flip._state(wanted / last)[1:]):
        raise AssertionError("the run went on to other weights")
    return True


def _same_masks(place: Path, wanted: Path) -> bool:
    for path in wanted.glob("*.png"):
        if (place / path.name).read_bytes() != path.read_bytes():
            raise AssertionError(f"{path.name} is another")
    return True


def _updater(path: Path, was: Path | bool) -> bool:
    updater = MaskUpdater(tiny_set(), "pmg:extent=8", "lesps" if path.name == "labels.pt" else "union")
    try:
        state = torch.load(path, weights_only=True)
    except Exception:  # PyTorch's reader, whatever it says
        return False
    updater.load_state_dict(state)
    found = updater.state_dict()
    if was:
        wanted = torch.load(was, weights_only=True)
        if found.keys() != wanted.keys() or not flip.same([*found.values()], [wanted[name] for name in found]):
            raise AssertionError("taken up as something else, without a word")
    return True


def _lock(folder: Path, held: bool) -> bool:
    """Whatever lies where locks lie: one goes on, and a second is refused."""
    said: list[str] = []
    if not held:
        with locks.one_writer(folder, said.append), contextlib.suppress(InputError), locks.one_writer(folder):
            raise AssertionError("a second was not refused")
        if any("\n" in line for line in said):
            raise AssertionError(f"several lines: {said}")
        return True
    lock = filelock.FileLock(folder / ".hmg.lock")
    with lock, locks.one_writer(folder):
        raise AssertionError("a second was not refused")


# --- tables ----------------------------------------------------------------------------------------------------------


def _table(path: Path, rng: random.Random) -> bool:
    """A table of known points as some spreadsheet or annotator may export it: read as meant, or refused."""
    separator, mark = rng.choice(",,;;;\t"), rng.choice(".,")
    rows = [(name, *point) for name, points in CLICKS.items() for point in points]
    rng.shuffle(rows)
    suffix = rng.choice(("", ".png", ".TIF"))
    digits = rng.choice((1, 2, 4, 6, None, 3))

    def number(value: float) -> str:
        text = f"{value:g}" if digits is None else f"{value:.{digits}f}"
        return text.replace(".", mark)

    header = [
        rng.choice(("image", "Image", "IMAGE", "filename", "File", "name", "image_name")),
        *rng.choice(("yx", "YX")),
    ]
    columns = [0, 1, 2]
    if rng.random() < 0.5:
        rng.shuffle(columns)
    lines = [[name + suffix, number(y), number(x)] for name, y, x in rows]
    fault = rng.choice(("", "", "", *FAULTS))
    if fault:
        FAULTS[fault](lines, header, rng)
    quoting = rng.choice((csv.QUOTE_MINIMAL, csv.QUOTE_ALL))
    text = io.StringIO()
    end = rng.choice(("\n", "\r\n"))
    writer = csv.writer(text, delimiter=separator, quoting=quoting, lineterminator=end)
    for cells in (header, *lines):
        cells = [cells[column] for column in columns if column < len(cells)] + cells[3:]
        if fault == "unquoted commas":
            text.write(separator.join(cells) + end)
        else:
            writer.writerow(cells)
    content = rng.choice(("", "\ufeff")) + text.getvalue() + rng.choice(("", end, f"{separator * 2}{end}"))
    path.write_text(content, encoding="utf-8", newline="")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = read_points(path, rng.choice((None, "csv")))
    found = {name: sorted(map(tuple, np.asarray(points).tolist())) for name, points in found.items() if len(points)}
    wanted = {name: sorted((int(y), int(x)) for y, x in points) for name, points in CLICKS.items()}
    if found != wanted:
        raise AssertionError(f"{fault or 'no fault'}: read as {found}: {content!r}")
    return True


def _thousands(lines: list[list[str]], header: list[str], rng: random.Random) -> None:
    """All numbers a thousand times as large, as a spreadsheet shows them."""
    point, comma = rng.choice(((".", ","), (",", "."), (".", "'"), (",", " ")))
    for cells in lines:
        for column in (1, 2):
            cells[column] = f"{1000 + 7 * len(cells[column])}"
            cells[column] = f"{cells[column][0]}{comma}{cells[column][1:]}" + rng.choice(("", f"{point}5"))


def _cell(change: Callable[[str, random.Random], str]) -> Callable[..., None]:
    def one(lines: list[list[str]], header: list[str], rng: random.Random) -> None:
        cells = rng.choice(lines)
        column = rng.choice((1, 2))
        cells[column] = change(cells[column], rng)

    return one


def _header(change: Callable[[list[str], random.Random], None]) -> Callable[..., None]:
    def one(lines: list[list[str]], header: list[str], rng: random.Random) -> None:
        change(header, rng)

    return one


def _second_name(lines: list[list[str]], header: list[str], rng: random.Random) -> None:
    """Another column that may name the image."""
    header.append(rng.choice(("file", "name", "filename")))
    for cells in lines:
        cells.append(rng.choice(NAMES))


NO_NUMBERS = ("nan", "-inf", "1e999", "x", "--", "1/2", "3 4", "0x1", "1_0", "TRUE", "#REF!")
FAULTS: dict[str, Callable[..., None]] = {
    "thousands": _thousands,
    "other mark": _cell(lambda text, rng: text.translate(str.maketrans(".,", ",."))),
    "unit": _cell(lambda text, rng: text + rng.choice((" px", "%", "°", "'", "e", "\u00a0"))),
    "no number": _cell(
        lambda text, rng: rng.choice(("nan", "-inf", "1e999", "x", "--", "1/2", "3 4", "0x1", "1_0", "TRUE", "#REF!"))
    ),
    "both marks": _cell(lambda text, rng: f"1.{text},5"),
    "unquoted commas": lambda lines, header, rng: None,
    "second name": _second_name,
    "header twice": _header(lambda header, rng: header.append(rng.choice("yxYX"))),
    "no header": _header(lambda header, rng: header.__setitem__(slice(None), ["a", "3", "4"])),
    "header of another kind": _header(lambda header, rng: header.__setitem__(1, rng.choice(("row", "top", "y1", "")))),
}
