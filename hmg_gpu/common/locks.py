"""One writer at a time: a second process is refused, and told which process the first one is."""

from __future__ import annotations

import errno
import json
import os
import platform
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, SoftFileLock, Timeout

from hmg_gpu.common.errors import HMGError, InputError
from hmg_gpu.common.files import write_text

MOMENT = 2.0  # seconds from taking a lock to saying who has it, at most


@contextmanager
def one_writer(
    path: str | os.PathLike, tell: Callable[[str], None] = lambda text: None, *, file: bool = False
) -> Iterator[None]:
    """Hold a folder, or a file that is to be written, for this process alone while the block runs.

    The operating system lets go of the lock when its process dies, however it does. On a file system without such locks
    (some network file systems) a file stands for the lock, which a crash leaves behind; ``tell`` is called then.

    Args:
        path: a folder, made where it is missing.
        tell: called with one line where an owner has died or where the lock is such a file.
        file: ``path`` is a file; others in its folder are not held.

    Raises:
        InputError: another process holds it; the text names its process id and host.
        HMGError: the folder cannot be made or written.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder, one_writer(folder), one_writer(folder):
        ...     pass
        Traceback (most recent call last):
        hmg_gpu.common.errors.InputError: ...
    """
    path = Path(path)
    folder, name = (path.parent, f".{path.name}") if file else (path, ".hmg")
    lock_file, owner_file = folder / f"{name}.lock", folder / f"{name}.owner"
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = _take(path, lock_file, owner_file, tell)
    except OSError as error:
        reason = error.strerror or str(error)
        raise HMGError(f"{folder}: cannot be written ({reason}); choose another output folder") from error
    try:
        before = _owner(owner_file)
        if before is not None:  # its process ended without letting go
            tell(f"{path}: process {before['process']} on {before['host']} died while it wrote here; going on")
        write_text(owner_file, json.dumps({"process": os.getpid(), "host": platform.node()}))
        yield
    finally:
        try:
            with suppress(OSError):  # the folder may have been removed meanwhile
                owner_file.unlink(missing_ok=True)
                if made and os.listdir(folder) == [lock_file.name]:  # nothing was written: as it was before
                    lock_file.unlink()
                    folder.rmdir()
        finally:
            lock.release()


def _take(path: Path, lock_file: Path, owner_file: Path, tell: Callable[[str], None]) -> FileLock | SoftFileLock:
    for kind in (FileLock, SoftFileLock):
        lock = kind(lock_file)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # where filelock falls back by itself, it is told below
                owner = _acquire(lock, owner_file)
        except NotImplementedError:
            continue
        except OSError as error:
            if kind is SoftFileLock or error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
            continue
        if not lock.is_locked:
            who = f"process {owner['process']} on {owner['host']}" if owner else "another process"
            raise InputError(f"{path}: {who} is writing there; wait for it, stop it, or choose another place")
        if isinstance(lock, SoftFileLock):
            tell(f"{path}: its file system has no locks; {lock_file} stands for one: remove it after a crash")
        return lock
    raise HMGError(f"{path}: cannot be locked; choose another place")


def _acquire(lock: FileLock | SoftFileLock, owner_file: Path) -> dict | None:
    """Take a lock, or give who has it: whoever took or lets go of it just now has a moment to say so."""
    until = time.monotonic() + MOMENT
    while True:
        with suppress(Timeout):
            lock.acquire(blocking=False)
            return None
        owner = _owner(owner_file)
        if owner is not None and _lives(owner):
            return owner
        if time.monotonic() > until:  # what a crash left behind names who made it
            return owner if isinstance(lock, SoftFileLock) else None
        time.sleep(0.02)


def _lives(owner: dict) -> bool:
    """Whether the process may be there; of another host nobody knows."""
    try:
        if owner["host"] == platform.node():
            os.kill(owner["process"], 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # another user's
        pass
    return True


def _owner(owner_file: Path) -> dict | None:
    try:
        owner = json.loads(owner_file.read_text())
        process, host = owner["process"], owner["host"]
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None
    valid = type(process) is int and process > 0 and isinstance(host, str) and host.isprintable()
    return owner if valid else None
