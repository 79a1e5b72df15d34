"""Where a result comes from: the commit and the versions that every artefact carries."""

from __future__ import annotations

import platform
import resource
import subprocess
import sys
from functools import cache
from importlib import metadata
from pathlib import Path

import torch


@cache
def provenance() -> dict[str, str]:
    """Commit (with "+changes" where the checkout differs), package versions and device names; "unknown" without git."""
    versions = {"hmg_gpu": _commit(), "python": platform.python_version(), "torch": torch.__version__}
    for package in ("numpy", "scipy", "triton", "kornia"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "absent"
    versions["cuda"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "absent"
    return versions


def _commit() -> str:
    folder = Path(__file__).resolve().parents[2]
    if not (folder / ".git").exists():
        return "unknown"

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def peak_memory_gb() -> float:
    """The largest resident memory of this process so far, in 1e9 bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e9
