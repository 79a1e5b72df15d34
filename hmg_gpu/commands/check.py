"""hmg-gpu check."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from hmg_gpu.commands.inspection import FINDINGS, NOT_COUNTED, inspect_folder
from hmg_gpu.common.console import say, some_names
from hmg_gpu.common.errors import InputError
from hmg_gpu.data.record import find_record, in_words
from hmg_gpu.evaluation.size_classes import SIZE_CLASSES
from hmg_gpu.masks.student.student import find_lessons
from hmg_gpu.models.checkpoints import read_description, read_tensors

SHOWN = ("dataset", "settings", "student", "teacher", "extents", "masks", "rule", "stage", "epoch", "data_changed")


def check(options: argparse.Namespace, console: Console) -> int:
    """Look a data set over: sizes, modes, masks, points, near-duplicates of train and test, targets by size; or say
    what a .safetensors file of ours is, whether it is whole, and from which data it comes."""
    if options.data.suffix == ".safetensors" and not options.data.is_dir():
        return _check_file(options.data, console)
    with console.status("looking at the images"):
        seen = inspect_folder(options.data, points=options.points)
    table = Table(title=Text(str(options.data)))
    for heading in ("split", "images", "targets", *_class_titles(), "points"):
        table.add_column(heading, justify="left" if heading == "split" else "right")
    for split, row in seen.splits.items():
        table.add_row(split, *(str(row[key]) for key in ("images", "targets", *SIZE_CLASSES, "points")))
    console.print(table)
    if seen.sizes:
        sizes = np.array(seen.sizes)
        low, high = sizes.min(0), sizes.max(0)
        kinds = ", ".join(f"{mode}: {count}" for mode, count in sorted(seen.modes.items()))
        say(
            console,
            f"sizes {low[0]} x {low[1]} to {high[0]} x {high[1]} (height x width), {len(set(seen.sizes))} distinct; "
            f"modes {kinds}",
        )
    if not seen.findings:
        console.print("nothing found that deserves a look", style="green")
        return 0
    table = Table(title="deserves a look", show_lines=True)
    for heading in ("what", "how often", "where", "what to do"):
        table.add_column(heading, justify="right" if heading == "how often" else "left")
    for kind, cure in FINDINGS.items():
        if rows := seen.findings.get(kind):
            table.add_row(kind, str(len(rows)), Text(some_names(rows, bare=True)), cure)
    console.print(table)
    if seen.clean:
        console.print(f"nothing but {', '.join(seen.findings.keys() & NOT_COUNTED)}", style="green")
    return int(not seen.clean)


def _check_file(path: Path, console: Console) -> int:
    description = read_description(path)
    if description is None:
        raise InputError(f"{path}: weights of others, which say nothing about themselves")
    tensors = read_tensors(path)
    records = [find_record(tensors), *find_lessons(tensors)]
    about = {name: description[name] for name in SHOWN if name in description}
    about |= {"data": "; ".join(map(in_words, filter(None, records))) or description.get("data", "unknown")}
    say(console, f"{path}: {'a student' if 'student' in description else 'of a run'}")
    for name, value in about.items():
        say(console, f"{name}: {value if isinstance(value, str) else json.dumps(value)}")
    return 0


def _class_titles() -> list[str]:
    low, titles = 0, []
    for name, high in SIZE_CLASSES.items():
        titles.append(f"{name} ({low + 1}-{high} px)" if high else f"{name} (> {low} px)")
        low = high or 0
    return titles
