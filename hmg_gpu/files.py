"""Writing files so that a crash at any moment leaves the old one whole: write beside, flush to disk, rename."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import HMGError


@contextmanager
def write_beside(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path in the same folder; when the block ends well, flush it and rename it to ``path``.

    ``path`` holds either its old content or the whole new content, never a part. The temporary file keeps the suffix of
    ``path`` (writers choose their format by it) and is removed when the block fails.

    Raises:
        HMGError: the folder cannot be made or written; the message names the path and the system's reason.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.part{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, path)
        _flush_folder(path.parent)
    except OSError as error:
        raise HMGError(
            f"{path}: cannot be written ({error.strerror or error}); free some space or choose another output folder"
        ) from error
    finally:
        with suppress(OSError):  # already renamed, or its folder is no folder
            temporary.unlink()


def write_text(path: str | os.PathLike, text: str) -> None:
    """Replace the text file ``path`` in one step (UTF-8)."""
    with write_beside(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike, value: object) -> None:
    """Replace the JSON file ``path`` in one step; NaN becomes null so that every reader accepts the file."""
    write_text(path, json.dumps(finite(value), indent=2) + "\n")


def finite(value: object) -> object:
    """The same JSON value with None for NaN and infinities, which JSON does not have."""
    if isinstance(value, dict):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(entry) for entry in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return value


def _flush_folder(folder: Path) -> None:
    """Make the rename itself durable; file systems that cannot flush a folder are left alone."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:
        pass
    finally:
        os.close(descriptor)
