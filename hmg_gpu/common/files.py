"""Writing files so that a crash at any moment leaves the old one whole: write beside, flush to disk, rename."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from hmg_gpu.common.errors import HMGError

DEPTH = 100  # levels of a JSON value that is read


@contextmanager
def write_beside(path: str | os.PathLike, size: int = 0) -> Iterator[Path]:
    """Yield a temporary path in the same folder; when the block ends well, flush it and rename it to ``path``.

    ``path`` holds either its old content or the whole new content, never a part. The temporary file is removed
    when the block fails.

    Args:
        path: the file to replace or make.
        size: bytes that will be written, where they are known before; for the message on a full disk.

    Raises:
        HMGError: the folder cannot be made or written; the message names the path, the system's reason and, on a full
            disk, how much is needed and free.
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
        with suppress(OSError):
            size = max(size, temporary.stat().st_size)  # at least what was written so far
        raise _not_written(path, size, error) from error
    finally:
        with suppress(OSError):  # already renamed, or its folder is no folder
            temporary.unlink()


def remove_parts(folder: str | os.PathLike) -> None:
    """Remove what writers that were killed left in a folder; only where nobody else writes."""
    for path in Path(folder).rglob(".*.part*"):
        if re.fullmatch(r"\..+\.\d+\.part(\.\w+)?", path.name):
            path.unlink(missing_ok=True)


def write_bytes(path: str | os.PathLike, *parts: bytes | bytearray | memoryview) -> None:
    """Replace the file ``path`` in one step by some parts, one after the other."""
    with write_beside(path, sum(map(len, parts))) as temporary, open(temporary, "wb") as handle:
        for part in parts:
            handle.write(part)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Replace the text file ``path`` in one step (UTF-8)."""
    write_bytes(path, text.encode())


def append_text(path: str | os.PathLike, text: str) -> None:
    """Add to the end of a text file (UTF-8), which is made, with its folder, where it is missing.

    Raises:
        HMGError: as :func:`write_beside`.
    """
    path, content = Path(path), text.encode()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab") as handle:
            handle.write(content)
    except OSError as error:
        raise _not_written(path, len(content), error) from error


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


def parse_json(text: str | bytes) -> Any:
    """A JSON value from a file that may be damaged or forged.

    Raises:
        ValueError: it is none, or nested deeper than anything that is written here.
    """
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    level = [value]
    for _ in range(DEPTH):
        holders = [inner for inner in level if isinstance(inner, dict | list)]
        if not holders:
            return value
        level = [inner for one in holders for inner in (one.values() if isinstance(one, dict) else one)]
    raise ValueError("nested too deeply")


def file_digest(path: str | os.PathLike) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _not_written(path: Path, size: int, error: OSError) -> HMGError:
    """The system's reason and the cure; on a full disk also the space needed for so many bytes."""
    reason, cure = error.strerror or str(error), "free some space or choose another output folder"
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        cure = "choose another output folder"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = shutil.disk_usage(path.parent).free if path.parent.is_dir() else 0
        need = f"it needs at least {size / 1e3:.1f} kB, " if size else ""
        reason = f"{reason}: {need}{free / 1e3:.1f} kB are free"
    return HMGError(f"{path}: cannot be written ({reason}); {cure}")


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
