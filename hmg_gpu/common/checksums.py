"""CRC-32 of what we write, so that a reader tells a flipped bit or a file that was cut short.

A checksum of 32 bits finds every single flipped bit and all but one in four thousand million other changes; it does not
protect from somebody who changes a file on purpose.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hmg_gpu.common.errors import InputError
from hmg_gpu.common.files import finite, parse_json, write_text

KEY = "checksum"


def checksum_of(content: bytes) -> str:
    """Eight hexadecimal digits."""
    return f"{zlib.crc32(content):08x}"


def checksum_of_json(value: Any) -> str:
    """Of a JSON value, however it is laid out in a file."""
    return checksum_of(json.dumps(finite(value), sort_keys=True).encode())


def write_sealed_json(path: str | os.PathLike, value: Mapping[str, Any]) -> None:
    """Replace a JSON file in one step; a last entry ``checksum`` is of all the others.

    Raises:
        HMGError: as :func:`hmg_gpu.common.files.write_beside`.
    """
    value = json.loads(json.dumps(finite(dict(value))))  # as it comes back: tuples are lists, keys are text
    write_text(path, json.dumps(value | {KEY: checksum_of_json(value)}, indent=2) + "\n")


def read_sealed_json(path: str | os.PathLike) -> dict[str, Any]:
    """What :func:`write_sealed_json` wrote, without the checksum.

    Raises:
        InputError: no such file, or it is not whole; the text says which.
    """
    path = Path(path)
    try:
        value = parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file; check the path") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not readable as JSON; copy it again") from error
    if not isinstance(value, dict) or KEY not in value:
        raise InputError(f"{path}: has no checksum: written by an older version, or changed since; make it anew")
    if value.pop(KEY) != checksum_of_json(value):
        raise InputError(f"{path}: damaged or changed since it was written (its checksum does not fit); copy it again")
    return value
