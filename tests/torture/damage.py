"""Files of every kind that the readers take, and ways to damage or forge them; the same seed gives the same files."""

from __future__ import annotations

import json
import random
import re
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from test_points import WRITERS
from tiny import tiny_set

from hmg_gpu.data import store, write_store
from hmg_gpu.models import build_model
from hmg_gpu.models.checkpoints import save_checkpoint

WHOLE = (
    0,
    1,
    2,
    3,
    7,
    127,
    128,
    255,
    256,
    1000,
    32767,
    32768,
    65535,
    65536,
    100_000,
    2**24,
    2**31 - 1,
    2**31,
    2**32 - 1,
)
LARGE = (2**53, 2**63 - 1, 2**63, 2**64 - 1, 10**400)
NUMBERS = (*WHOLE, *LARGE, -1, -(2**31), 0.5, 1e-300, 1e308)
TEXTS = (
    "",
    ".",
    "..",
    "../../a",
    "/etc/passwd",
    "a\0b",
    "a\nb",
    "\ud800",
    "é" * 300,
    "%s%n",
    "[bold]",
    "nan",
    "1e999",
    "-0",
)
DEEP = "[" * 3000 + "]" * 3000


def write_corpus(folder: Path) -> dict[str, list[tuple[str, bytes]]]:
    """Valid files by kind: (name, content), small except for the weights."""
    corpus: dict[str, list[tuple[str, bytes]]] = {}
    folder.mkdir()
    rng = np.random.default_rng(0)
    grey = rng.integers(0, 255, (24, 30)).astype(np.uint8)
    deep = (grey.astype(np.uint16) * 257).astype(np.uint16)
    pictures = {
        "png": [grey, deep, np.dstack([grey] * 3), np.dstack([grey] * 4), grey > 99],
        "tiff": [grey, deep, grey.astype(np.float32), grey.astype(np.int32), np.dstack([grey] * 3)],
        "bmp": [grey, np.dstack([grey] * 3)],
        "jpg": [grey, np.dstack([grey] * 3)],
    }
    for suffix, arrays in pictures.items():
        for number, array in enumerate(arrays):
            path = folder / f"{number}.{suffix}"
            more = {"compression": ("raw", "tiff_lzw", "tiff_deflate")[number % 3]} if suffix == "tiff" else {}
            Image.fromarray(array).save(path, **more)
            corpus.setdefault(suffix, []).append((f"a.{suffix}", path.read_bytes()))
    for format, write in WRITERS.items():
        place = folder / format
        place.mkdir()
        write(place)
        corpus["png points" if format == "png" else format] = [
            (f"a{path.suffix}", path.read_bytes()) for path in sorted(place.iterdir())
        ]
    corpus["list"] = [("train_in.txt", b"a\nb.png\n\nc\n"), ("train_in.txt", "\ufeffa\r\nb\r\nc".encode())]

    write_store(folder / "s.h5", [tiny_set(), tiny_set(split="test")])
    corpus["h5"] = [("s.h5", (folder / "s.h5").read_bytes())]
    torch.manual_seed(0)
    state = build_model("acm", output_bias=0.0).state_dict()
    description = {
        "settings": {"model": "acm", "data": "x", "epochs": [1, 1]},
        "normalisation": [60.0, 12.0],
        "stage": 2,
        "epoch": 0,
        "results": {"stage 1": {"iou": 0.5}},
    }
    save_checkpoint(folder / "w.safetensors", {f"model.{key}": value for key, value in state.items()}, description)
    save_file({"weight": torch.ones(2, 3)}, folder / "few.safetensors")
    torch.save({"state_dict": state}, folder / "w.pth")
    torch.save({"weight": torch.ones(2, 3)}, folder / "few.pth", _use_new_zipfile_serialization=False)
    for suffix in ("safetensors", "pth"):
        corpus[suffix] = [(f"w.{suffix}", (folder / f"{stem}.{suffix}").read_bytes()) for stem in ("w", "w", "few")]
    shutil.rmtree(folder)
    return corpus


def mutate(kind: str, content: bytes, other: bytes, rng: random.Random, scratch: Path) -> bytes:
    """One damaged or forged version of a file."""
    ways: list[Callable[[bytes, random.Random], bytes]] = [damage, damage]
    if kind in ("labelme", "coco", "labelstudio"):
        ways += [forge_json, forge_json, forge_text]
    if kind in ("csv", "cvat", "sirst-v2", "list"):
        ways += [forge_text, forge_text, forge_text]
    if kind.startswith("png"):
        ways += [forge_png, forge_png]
    if kind == "safetensors":
        ways += [forge_safetensors, forge_safetensors]
    if kind == "h5":
        ways = [damage, sealed(damage, scratch), lambda data, rng: forge_store(data, rng, scratch)]
    way = rng.choice(ways)
    if way is damage and rng.random() < 0.2:
        return splice(content, other, rng)
    return way(content, rng)


# --- ways ------------------------------------------------------------------------------------------------------------


def damage(data: bytes, rng: random.Random) -> bytes:
    """Bits, numbers and pieces changed, lost, doubled; one to four such faults, near the ends more often."""
    content = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        if not content:
            break
        low, high = rng.choice([(0, 64), (0, 2048), (len(content) - 2048, len(content)), (0, len(content))])
        at = min(max(rng.randrange(low, max(high, low + 1)), 0), len(content) - 1)
        length = rng.choice((1, 2, 4, 8, 64, 1000))
        match rng.randrange(8):
            case 0 | 1:
                for _ in range(rng.choice((1, 1, 3, 16))):
                    content[(at + rng.randrange(length)) % len(content)] ^= 1 << rng.randrange(8)
            case 2 | 3:
                code = rng.choice(("<H", ">H", "<I", ">I", "<Q"))
                number = rng.choice(WHOLE + LARGE) & (256 ** struct.calcsize(code) - 1)
                content[at : at + struct.calcsize(code)] = struct.pack(code, number)
            case 4:
                del content[at:]
            case 5:
                del content[at : at + length]
            case 6:
                content[at:at] = content[at : at + length] * rng.choice((1, 3))
            case 7:
                content[at : at + length] = rng.randbytes(length)
    return bytes(content)


def splice(data: bytes, other: bytes, rng: random.Random) -> bytes:
    """The head of one file and the tail of another."""
    return data[: rng.randrange(len(data) + 1)] + other[rng.randrange(len(other) + 1) :]


def forge_text(data: bytes, rng: random.Random) -> bytes:
    """A word or number of a text replaced, or a line doubled or moved."""
    text = data.decode("utf-8-sig")
    words = list(re.finditer(r"[\w.+-]+", text))
    for word in sorted(rng.sample(words, min(len(words), rng.choice((1, 1, 2, 5)))), key=lambda word: -word.start()):
        new = str(rng.choice((*TEXTS, *NUMBERS[:-5], rng.choice(words)[0], '"', "<", "&x;", ",", ";")))
        text = text[: word.start()] + new + text[word.end() :]
    if rng.random() < 0.2:
        lines = text.splitlines(keepends=True)
        rng.shuffle(lines)
        text = "".join(lines + lines[:1])
    return text.encode("utf-8", "surrogatepass")


def forge_json(data: bytes, rng: random.Random) -> bytes:
    """Values of a JSON file replaced by others of any type."""
    return to_json(forge_tree(json.loads(data), rng))


def to_json(tree: Any) -> bytes:
    return json.dumps(tree).replace('"DEEP"', DEEP).encode()


def forge_tree(tree: Any, rng: random.Random) -> Any:
    """A JSON value with one to three of its parts replaced, removed or doubled; changes it in place."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        parts = [
            (holder, key)
            for holder in walk(tree)
            for key in (holder if isinstance(holder, dict) else range(len(holder)))
        ]
        if not parts:
            break
        holder, key = rng.choice(parts)
        match rng.randrange(8):
            case 0:
                del holder[key]
            case 1 if isinstance(holder, list):
                holder.extend(holder[:1] * rng.choice((1, 5)))
            case 2:
                holder[key] = rng.choice(
                    (None, True, False, [], {}, [[]], {"a": 1}, "DEEP", float("nan"), float("inf"))
                )
            case 3 | 4:
                holder[key] = rng.choice(TEXTS)
            case 5:
                holder[key] = [holder[key]] * rng.choice((0, 1, 3))
            case _:
                holder[key] = rng.choice(NUMBERS)
    return tree


def walk(tree: Any) -> list[Any]:
    """Every dict and list in a JSON value."""
    if not isinstance(tree, (dict, list)):
        return []
    inner = tree.values() if isinstance(tree, dict) else tree
    return [tree, *(holder for value in inner for holder in walk(value))]


def forge_png(data: bytes, rng: random.Random) -> bytes:
    """Header fields or any chunk changed, with checksums that fit again."""
    chunks, at = [], 8
    while at + 8 <= len(data):
        (length,) = struct.unpack_from(">I", data, at)
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + length]))
        at += length + 12
    if rng.random() < 0.5:
        header = bytearray(chunks[0][1])
        if rng.random() < 0.6:
            struct.pack_into(">I", header, rng.choice((0, 4)), rng.choice(WHOLE))
        else:
            header[rng.randrange(8, 13)] = rng.randrange(256)
        chunks[0] = (chunks[0][0], bytes(header))
    elif rng.random() < 0.5:
        bomb = zlib.compress(bytes(2**24))
        chunks.insert(rng.randrange(1, len(chunks)), (rng.choice((b"zTXt", b"iCCP")), b"a\0\0" + bomb))
    else:
        place = rng.randrange(len(chunks))
        chunks[place] = (chunks[place][0], damage(chunks[place][1] or b"\0", rng))
    parts = (
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in chunks
    )
    return data[:8] + b"".join(parts)


def forge_safetensors(data: bytes, rng: random.Random) -> bytes:
    """Offsets, types and shapes in the header changed, or our description in it."""
    (length,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + length])
    about = header.get("__metadata__")
    if about and rng.random() < 0.6:
        about["hmg_gpu"] = to_json(forge_tree(json.loads(about["hmg_gpu"]), rng)).decode()
    else:
        forge_tree(header, rng)
    text = to_json(header)
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def sealed(way: Callable[[bytes, random.Random], bytes], scratch: Path) -> Callable[[bytes, random.Random], bytes]:
    """The same with a checksum that fits again: a forger's file, which reaches the HDF5 library."""

    def forge(data: bytes, rng: random.Random) -> bytes:
        return seal(data[:512] + way(data[512:], rng), scratch)

    return forge


def seal(data: bytes, scratch: Path) -> bytes:
    scratch.write_bytes(data)
    with open(scratch, "rb") as handle:
        return store._header(handle).ljust(512, b"\n") + data[512:]


def forge_store(data: bytes, rng: random.Random, scratch: Path) -> bytes:
    """A dataset of a store replaced by one of another type, shape or claim; a billion rows cost nothing to claim."""
    scratch.write_bytes(data)
    with h5py.File(scratch, "r+") as file:
        names: list[str] = []
        file.visititems(lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None)
        for name in rng.sample(names, rng.choice((1, 1, 2))):
            value = file[name][()]
            del file[name]
            match rng.randrange(8):
                case 0:
                    pass
                case 1:
                    shape = rng.choice([(10**9,), (10**9, 2), (10**9, 3), (2**40,), (2**20, 2**20)])
                    file.create_dataset(
                        name,
                        shape,
                        rng.choice([value.dtype, "i8", "f4"]),
                        chunks=tuple(min(side, 1000) for side in shape),
                    )
                case 2:
                    file.create_dataset(name, value.shape, value.dtype, fillvalue=value.reshape(-1)[0])
                case 3:
                    file[name] = value.reshape(-1)[: rng.randrange(value.size)]
                case 4 if value.dtype.kind in "iuf":
                    flat = value.astype(np.float64).reshape(-1)
                    flat[rng.randrange(flat.size)] = rng.choice((-1, 0, 2**20, 2**40, 1e30, np.nan, np.inf))
                    with np.errstate(invalid="ignore"):
                        file[name] = flat.reshape(value.shape).astype(value.dtype)
                case 5:
                    file[name] = rng.choice([h5py.SoftLink("/train/sizes"), h5py.ExternalLink("/etc/passwd", "/")])
                case 6:
                    file[name] = rng.choice(
                        [7, "text", np.zeros((2, 0)), np.array([b"../x"] * len(np.atleast_1d(value)))]
                    )
                case _:
                    file.create_group(name)
    return seal(scratch.read_bytes(), scratch)
