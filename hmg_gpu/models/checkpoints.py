"""Weights from files, our own and the published ones, without ever running code that a file carries."""

from __future__ import annotations

import json
import os
import warnings
import zlib
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from hmg_gpu.common.checksums import KEY
from hmg_gpu.common.errors import InputError
from hmg_gpu.common.files import finite, parse_json, write_bytes, write_text

BLANK = "0" * 8  # what stands in the checksum's place while it is taken
MODEL_PREFIX = "model."  # in our own safetensors files; the other tensors there are the trainer's state
HEADER_KEY = "hmg_gpu"  # under which our safetensors files carry their description


def save_checkpoint(path: str | os.PathLike, tensors: Mapping[str, Tensor], description: Mapping[str, Any]) -> None:
    """Write tensors and what they are to one safetensors file, and the description also to a JSON file beside it.

    The safetensors file alone is complete (its header carries the description) and replaces the old one in one step;
    the JSON is for people and other tools. Both carry a CRC-32 of the safetensors file, which readers check.

    Args:
        path: ends in .safetensors.
        tensors: any device; weights under ``model.``, anything else under other names.
        description: settings, normalisation, epoch, metrics, versions: JSON values.

    Raises:
        HMGError: the file cannot be written.
    """
    path = Path(path)
    plain = {name: value.detach().to("cpu").contiguous() for name, value in tensors.items()}
    # safetensors' own file would be 0600
    content = memoryview(save(plain, metadata={HEADER_KEY: json.dumps(description), KEY: BLANK}))
    head = bytearray(content[: 8 + int.from_bytes(content[:8], "little")])
    values = content[len(head) :]
    checksum = f"{zlib.crc32(values, zlib.crc32(head)):08x}"
    slot = _slot(head, BLANK)
    head[slot : slot + len(BLANK)] = checksum.encode()
    write_bytes(path, head, values)
    write_text(path.with_suffix(".json"), _sidecar(description, checksum))


def _slot(content: bytes | bytearray, checksum: str) -> int:
    """Where the checksum stands; quotes inside the description are escaped, so that nothing there looks like it."""
    return content.index(f'"{KEY}":"{checksum}"'.encode()) + len(f'"{KEY}":"')


def _sidecar(description: Mapping[str, Any], checksum: str) -> str:
    return json.dumps(finite({**description, KEY: checksum}), indent=2) + "\n"


def write_sidecar(path: str | os.PathLike) -> None:
    """Write the JSON file beside a checkpoint of ours anew, from the checkpoint itself."""
    path = Path(path)
    metadata = _metadata(path)
    if metadata.keys() >= {HEADER_KEY, KEY}:
        write_text(path.with_suffix(".json"), _sidecar(parse_json(metadata[HEADER_KEY]), metadata[KEY]))


def check_whole(path: str | os.PathLike) -> None:
    """Refuse a checkpoint of ours that is not what was written; files of others have no checksum and pass.

    A file of ours without one, and a JSON file beside it that belongs to another, are told by a warning: the weights
    do not depend on it.

    Raises:
        InputError: the checksum does not fit.
    """
    path = Path(path)
    if path.suffix == ".safetensors" and path.is_file():
        sidecar = path.with_suffix(".json")
        files = (path, sidecar) if sidecar.is_file() else (path,)
        _check_whole(path, *((about.st_mtime_ns, about.st_size, about.st_ino) for about in map(Path.stat, files)))


@lru_cache(maxsize=16)
def _check_whole(path: Path, *_: tuple[int, int, int]) -> None:
    """Once for each state of the files."""
    metadata = _metadata(path)
    if HEADER_KEY not in metadata and KEY not in metadata:
        return
    checksum = metadata.get(KEY)
    if checksum is None:
        warnings.warn(
            f"{path}: has no checksum: written by an older version, or damaged; nothing tells whether it is whole",
            stacklevel=4,
        )
        return
    if _taken(path, checksum) != checksum:
        raise InputError(f"{path}: damaged or cut short (its checksum does not fit); copy it again")
    sidecar = path.with_suffix(".json")
    if not sidecar.is_file():
        return
    try:
        expected = _sidecar(parse_json(metadata[HEADER_KEY]), checksum).encode()
    except (KeyError, ValueError, TypeError):  # who reads the description says so
        return
    if sidecar.read_bytes() != expected:
        warnings.warn(
            f"{sidecar}: does not belong to {path.name}, or was changed; it was not used: the weights file itself is "
            "whole and says what it is",
            stacklevel=4,
        )


def _metadata(path: Path) -> dict[str, str]:
    """The texts in the header; none where it is unreadable, which whoever opens the file tells."""
    try:
        with safe_open(path, framework="pt", device="cpu") as handle:
            return handle.metadata() or {}
    except (SafetensorError, OSError, ValueError, RuntimeError):
        return {}


def _taken(path: Path, checksum: str) -> str:
    """The checksum of a file, the one that stands in its header left out."""
    with open(path, "rb") as handle:
        start = handle.read(8)
        header = bytearray(handle.read(int.from_bytes(start, "little")))
        try:
            slot = _slot(header, checksum)
        except ValueError:  # written in another way than ours
            return ""
        header[slot : slot + len(BLANK)] = BLANK.encode()
        value = zlib.crc32(header, zlib.crc32(start))
        while block := handle.read(1 << 20):
            value = zlib.crc32(block, value)
    return f"{value:08x}"


def read_description(path: str | os.PathLike) -> dict[str, Any] | None:
    """What :func:`save_checkpoint` wrote beside the tensors, or None for a file that is not ours."""
    path = Path(path)
    if path.suffix != ".safetensors":
        return None
    check_whole(path)
    try:
        with safe_open(path, framework="pt", device="cpu") as handle:
            text = (handle.metadata() or {}).get(HEADER_KEY)
        description = None if text is None else parse_json(text)
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such checkpoint; check the path") from error
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise InputError(f"{path}: not a readable safetensors file ({one_line(error)}); copy it again") from error
    if description is not None and not isinstance(description, dict):
        raise InputError(
            f"{path}: the description in its header is not an object; the file was not written by train.py"
        )
    if description is not None and not _is_normalisation(description.get("normalisation", [0, 1])):
        raise InputError(
            f"{path}: normalisation {quote(str(description['normalisation']))} in its header is no mean and positive "
            "std; copy the file again"
        )
    return description


def read_tensors(path: str | os.PathLike) -> dict[str, Tensor]:
    """All tensors of a checkpoint of ours, on the CPU."""
    path = Path(path)
    check_whole(path)
    try:
        with safe_open(path, framework="pt", device="cpu") as handle:
            return {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118, a handle is no dict
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such checkpoint; check the path") from error
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise InputError(f"{path}: not a readable safetensors file ({one_line(error)}); copy it again") from error


def _is_normalisation(value: Any) -> bool:
    numbers = isinstance(value, list) and len(value) == 2 and all(type(number) in (int, float) for number in value)
    return numbers and all(abs(number) <= 1e30 for number in value) and value[1] > 0


def quote(name: str) -> str:
    return name if name.isprintable() and len(name) <= 80 else ascii(name[:80])


def one_line(error: BaseException | str) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:160] if lines else type(error).__name__
