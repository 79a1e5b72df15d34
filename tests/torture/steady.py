"""The same again and again: memory that does not grow, and runs of one seed that end in the same bits."""

from __future__ import annotations

import hashlib
import json
import resource
import time
from pathlib import Path
from typing import Any

import torch
from tiny import tiny_set, write_folder

from hmg_gpu import MaskUpdater
from hmg_gpu.models import build_model
from hmg_gpu.training.loop import Training
from hmg_gpu.training.settings import Settings

from .kill import fingerprint, fork, job

WARM = 0.1  # of the rounds are left for warming up
BOUND = 8.0  # MiB that the process may grow by after that


def run_memory(folder: Path, count: int, deadline: float, seed: int) -> dict[str, Any]:
    """``count`` updates of a MaskUpdater by ACM, then a fifth as many epochs, each in a process of its own."""
    shown = folder / "shown.json"
    rows: dict[str, Any] = {}
    for title, call in (("updates", updates), ("epochs", epochs)):
        rounds = count if title == "updates" else max(count // 5, 10)
        until = time.monotonic() + (deadline - time.monotonic()) / (2 if title == "updates" else 1)
        code = fork(lambda call=call, rounds=rounds, until=until: call(folder, rounds, until, shown), folder / "said")
        if code != 0:
            return {"failures": [f"{title}: ended with {code}: {(folder / 'said').read_text()[-500:]}"]}
        rows[title] = json.loads(shown.read_text())
    grown = {title: row for title, row in rows.items() if row["grown_mib"] > BOUND}
    return rows | {
        "bound_mib": BOUND,
        "failures": [f"{title} grew by {row['grown_mib']} MiB" for title, row in grown.items()],
    }


def updates(folder: Path, rounds: int, until: float, shown: Path) -> None:
    torch.manual_seed(0)  # some first weights give logits that all lie within 0 and 1, which update refuses
    updater = MaskUpdater(tiny_set(), "pmg:extent=10")
    net, sizes = build_model("acm", output_bias=0.0), []
    while len(sizes) < rounds and time.monotonic() < until:
        changes = updater.update(net, "logits")
        assert changes.pixels >= 0  # reads what an update counts
        sizes.append(resident())
    shown.write_text(json.dumps(grown(sizes)))


def epochs(folder: Path, rounds: int, until: float, shown: Path) -> None:
    """Both stages with a checkpoint and a correction every few epochs."""
    half = rounds // 2
    settings = Settings(
        epochs=(half, rounds - half), batch_size=2, patch_size=32, save_every=10, eval_every=10, update_every=10
    )
    sizes: list[float] = []

    def report(event: dict[str, Any]) -> None:
        if event["event"] == "epoch":
            sizes.append(resident())
            training.stop |= time.monotonic() > until

    training = Training(settings, tiny_set(), tiny_set(split="test", seed=1), folder / "run", report)
    training.run()
    shown.write_text(json.dumps(grown(sizes)))


def resident() -> float:
    """MiB of memory that this process has now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def grown(sizes: list[float]) -> dict[str, float]:
    """How much the largest of the last tenth is above the largest of the first tenth."""
    part = max(1, round(len(sizes) * WARM))
    return {"rounds": len(sizes), "grown_mib": max(sizes[-part:]) - max(sizes[:part]), "peak_mib": max(sizes)}


def run_determinism(folder: Path, count: int, deadline: float, seed: int) -> dict[str, Any]:
    """One run ``count`` times in new processes: SHA-256 of all weights, masks and metrics together."""
    data = write_folder(folder / "tiny")
    digests, failures = [], []
    while len(digests) + len(failures) < count and time.monotonic() < deadline:
        out = folder / f"run{len(digests)}"
        code = fork(lambda out=out: job(data, out), folder / "said")
        if code != 0:
            failures.append(f"ended with {code}: {(folder / 'said').read_text()[-500:]}")
            continue
        digests.append(hashlib.sha256(json.dumps(fingerprint(out), sort_keys=True).encode()).hexdigest())
    same = max(map(digests.count, digests), default=0)
    failures += [f"{len(set(digests))} different results"] if same < len(digests) else []
    return {"runs": len(digests), "same": same, "sha256": digests[:1], "failures": failures}
