"""Weights from files, our own and the published ones, without ever running code that a file carries."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from hmg_gpu.common.errors import InputError
from hmg_gpu.common.files import write_bytes, write_json

MODEL_PREFIX = "model."  # in our own safetensors files; the other tensors there are the trainer's state
HEADER_KEY = "hmg_gpu"  # under which our safetensors files carry their description


def save_checkpoint(path: str | os.PathLike, tensors: Mapping[str, Tensor], description: Mapping[str, Any]) -> None:
    """Write tensors and what they are to one safetensors file, and the description also to a JSON file beside it.

    The safetensors file alone is complete (its header carries the description) and replaces the old one in one step;
    the JSON is for people and other tools.

    Args:
        path: ends in .safetensors.
        tensors: any device; weights under ``model.``, anything else under other names.
        description: settings, normalisation, epoch, metrics, versions: JSON values.

    Raises:
        HMGError: the file cannot be written.
    """
    path = Path(path)
    plain = {name: value.detach().to("cpu").contiguous() for name, value in tensors.items()}
    content = save(plain, metadata={HEADER_KEY: json.dumps(description)})  # safetensors' own file would be 0600
    write_bytes(path, content)
    write_json(path.with_suffix(".json"), description)


def read_description(path: str | os.PathLike) -> dict[str, Any] | None:
    """What :func:`save_checkpoint` wrote beside the tensors, or None for a file that is not ours."""
    path = Path(path)
    if path.suffix != ".safetensors":
        return None
    try:
        with safe_open(path, framework="pt", device="cpu") as handle:
            text = (handle.metadata() or {}).get(HEADER_KEY)
        description = None if text is None else json.loads(text)
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
