"""Whether a run comes out the same elsewhere: its first epoch once more, beside what its log says."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hmg_gpu.common.errors import InputError
from hmg_gpu.common.files import finite, parse_json
from hmg_gpu.common.provenance import provenance
from hmg_gpu.data.record import differences, find_record
from hmg_gpu.data.sets import ImageSet
from hmg_gpu.models.checkpoints import read_description, read_tensors
from hmg_gpu.training.loop import Training
from hmg_gpu.training.settings import Settings

COMPARED = ("loss", "iou", "foreground")  # of an epoch's row: the same bits where the epoch was the same


def first_epoch(folder: Path) -> dict[str, Any]:
    """The row of a run's first epoch in its log.

    Raises:
        InputError: the log has none.
    """
    try:
        lines = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [parse_json(line) for line in lines]
        return next(row for row in rows if (row["event"], row.get("stage"), row.get("epoch")) == ("epoch", 1, 1))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StopIteration) as error:
        raise InputError(f"{folder}: its log.jsonl has no first epoch; give the folder of a run of train.py") from error


def check_run(folder: Path, settings: Settings, train: ImageSet, report: Any) -> list[str]:
    """Train the first epoch of a run again, in a folder of its own, and say what differs; empty: the same bits.

    Args:
        folder: the run's.
        settings: its settings. train: its training set, on the device to train on.
        report: as :class:`Training`.

    Raises:
        InputError: the folder holds no run.
    """
    wanted = first_epoch(folder)
    path = folder / "last.safetensors"
    description, tensors = read_description(path) or {}, read_tensors(path)
    rows: list[dict[str, Any]] = []

    def listen(event: dict[str, Any]) -> None:
        if event["event"] == "epoch":
            rows.append(event)
        else:
            report(event)

    with tempfile.TemporaryDirectory() as scratch:
        training = Training(settings, train, None, Path(scratch), listen)
        theirs = find_record(tensors)
        if theirs is None:
            raise InputError(f"{path}: the record of its data is missing or damaged; nothing to compare with")
        found = [f"data: {text}" for text in differences(theirs, training.record)]
        training.train_epoch()
    values = [
        f"first epoch: {name} {rows[0][name]!r}, the run's {wanted.get(name)!r}"
        for name in COMPARED
        if finite(rows[0][name]) != wanted.get(name)
    ]
    if not found and not values:
        return []
    here = training.describe()
    versions = _changed("version of ", description.get("versions"), provenance())
    return [*found, *versions, *_changed("", description.get("machine"), here["machine"]), *values]


def _changed(what: str, theirs: Any, mine: Mapping[str, Any]) -> list[str]:
    theirs = theirs if isinstance(theirs, dict) else {}
    names = [name for name, value in mine.items() if theirs.get(name) != value]
    return [f"{what}{name}: {mine[name]}, the run's {theirs.get(name)}" for name in names]
