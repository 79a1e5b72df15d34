"""Trained runs side by side: what their labels were worth, and how much of full supervision they reach."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from hmg_gpu.common.checksums import read_sealed_json
from hmg_gpu.common.errors import InputError

MASKS = ("initial", "prediction", "filtered", "hybrid")
LABELS = ("supervision", "masks", "rule", "points", "update_every")  # settings that say where the labels come from
OF_MASKS = ("extent", "half_width", "alpha", "radius")  # settings of labels made from points, of no use without
NOT_COMPARED = ("seed", "eval_every", "save_every", "step")  # settings that a row does not depend on
SHOWN = (*LABELS, *NOT_COMPARED, "data", "model", "epochs")  # settings that a row shows anyway
TEST = {"iou": 100, "pd": 100, "fa": 1e6}
TEST_HEADINGS = ("seeds", "test IoU %", "its range", "Pd %", "Fa 1e-6", "of full")
TEXTS = ("set", "labels", "network, epochs", "settings")  # headings of what is no number


def read_run(folder: Path) -> dict[str, Any]:
    """What a finished run of train.py says about itself.

    Raises:
        InputError: there is no ``results.json`` in the folder, it is damaged, or none of ours.
    """
    path = folder / "results.json"
    if not path.exists():
        raise InputError(f"{folder}: no results.json; give the folder of a finished run of train.py")
    run = read_sealed_json(path)
    if not all(isinstance(run.get(name), dict) for name in ("settings", "results")):
        raise InputError(f"{path}: not what train.py writes; give the folder of a finished run")
    if "rule" not in run["settings"]:
        raise InputError(f"{path}: of an older version, whose settings had other names; train it anew")
    try:
        settings = run["settings"]
        if not all(type(number) is int for number in (settings["seed"], *settings["epochs"])):
            raise TypeError(settings)
        if not isinstance(settings["positive"], list):  # of a version that had one for both stages
            settings |= {"positive": [settings["positive"]] * 2, "hard_negatives": 0.0}
        if settings.get("hard_negatives") == 0:  # of a version that showed false alarms again, and no missed targets
            settings |= {"hard_examples": settings.pop("hard_negatives")}
        runs_markdown(runs_rows([run | {"seconds": run["seconds"] + 0.0}]))
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise InputError(f"{path}: lacks what train.py writes, or was changed; give the folder of a run") from error
    return run


def group_runs(runs: Iterable[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Runs that differ in the seed alone belong together; groups come in the order of their first run."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        compared = {name: value for name, value in run["settings"].items() if name not in NOT_COMPARED}
        groups.setdefault(json.dumps([run["dataset"], compared], sort_keys=True), []).append(run)
    return list(groups.values())


def runs_rows(runs: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each group: means over its seeds.

    Returns:
        ``dataset``, ``labels``, ``network``, ``differs`` (settings that rows of the set do not share, in words),
        ``seeds``; IoU of ``initial``, ``prediction``, ``filtered``, ``hybrid`` on the training set where there are any;
        ``test``: iou, pd, fa of the last network; ``range``: the lowest and highest test IoU of the seeds; ``of_full``:
        test IoU over that of the group with full supervision and otherwise the same settings, or None.
    """
    groups = group_runs(runs)
    rows = []
    for group in groups:
        settings, first = group[0]["settings"], group[0]
        tests = [_last_test(run) for run in group]
        known = all(test is not None for test in tests)
        row = {
            "dataset": first["dataset"],
            "labels": _labels(settings),
            "network": f"{settings['model']}, {' + '.join(map(str, settings['epochs']))}",
            "seeds": sorted(run["settings"]["seed"] for run in group),
            "masks": _mean_masks(group),
            "test": {key: _mean(test[key] for test in tests) for key in ("iou", "pd", "fa")} if known else None,
            "range": [pick(test["iou"] for test in tests) for pick in (min, max)] if known and len(tests) > 1 else None,
            "seconds": statistics.median(run["seconds"] for run in group),
            "of_full": None,
            "settings": settings,
        }
        rows.append(row)
    for row in rows:
        full = next((other for other in rows if _is_upper_bound(other, row)), None)
        if full is not None and full["test"] and row["test"] and full["test"]["iou"] > 0:
            row["of_full"] = row["test"]["iou"] / full["test"]["iou"]
        row["differs"] = _differences(row, [other for other in rows if other["dataset"] == row["dataset"]])
    return rows


def _differences(row: dict[str, Any], rows: Sequence[dict[str, Any]]) -> str:
    """The row's values of the settings that the rows do not share and that its labels and network do not tell."""
    by_points = [other for other in rows if other["settings"]["supervision"] != "full"]
    words = []
    for name, value in row["settings"].items():
        compared = by_points if name in OF_MASKS else rows
        if name not in SHOWN and row in compared and any(row["settings"].get(name) != value for row in compared):
            words.append(f"{name} {' '.join(map(str, value)) if isinstance(value, list | tuple) else value}")
    return ", ".join(words)


def _labels(settings: dict[str, Any]) -> str:
    if settings["supervision"] == "full":
        return "ground truth"
    points = {"masks_centroid": "", "masks_coarse": ", coarse"}.get(settings["points"], f", {settings['points']}")
    every = f" every {settings['update_every']}" if settings["update_every"] else ""
    return f"{settings['masks']}, {settings['rule']}{every}{points}"


def _mean_masks(group: Sequence[dict[str, Any]]) -> dict[str, float]:
    tables = [run["results"].get("masks", {}) for run in group]
    return {name: _mean(table[name]["iou"] for table in tables) for name in MASKS if name in tables[0]}


def _mean(values: Iterable[float | None]) -> float:
    """NaN, which JSON holds as null, where a value is undefined, such as Pd without targets."""
    return statistics.fmean(math.nan if value is None else value for value in values)


def _last_test(run: dict[str, Any]) -> dict[str, float] | None:
    return run["results"].get("stage 2", run["results"].get("stage 1"))


def _is_upper_bound(full: dict[str, Any], row: dict[str, Any]) -> bool:
    """Whether a row is full supervision with the other's schedule: the same set and, besides the labels, settings."""
    theirs, mine = full["settings"], row["settings"]
    labels = (*LABELS, *OF_MASKS, *NOT_COMPARED)
    same = all(theirs.get(name) == value for name, value in mine.items() if name not in (*labels, "epochs", "stage2"))
    schedule = theirs["epochs"] == mine["epochs"] or sum(theirs["epochs"]) == sum(mine["epochs"])
    return theirs["supervision"] == "full" and full["dataset"] == row["dataset"] and same and schedule


def _tables(rows: Sequence[dict[str, Any]]) -> list[tuple[str, tuple[str, ...], list[list[str]]]]:
    """(title, headings, rows of text) on the test set, and of the training masks where there are any."""
    columns = {"set": "dataset"} if len({row["dataset"] for row in rows}) > 1 else {}
    columns |= {"labels": "labels", "network, epochs": "network"}
    columns |= {"settings": "differs"} if any(row["differs"] for row in rows) else {}
    tests, masks = [], []
    for row in rows:
        names = [row[key] for key in columns.values()]
        numbers = [f"{scale * row['test'][key]:.2f}" if row["test"] else "" for key, scale in TEST.items()]
        numbers.insert(1, " to ".join(f"{100 * value:.2f}" for value in row["range"] or ()))
        full = f"{100 * row['of_full']:.1f} %" if row["of_full"] is not None else ""
        tests.append([*names, ", ".join(map(str, row["seeds"])), *numbers, full])
        if row["masks"]:
            shares = (f"{100 * row['masks'][name]:.2f}" if name in row["masks"] else "" for name in MASKS)
            masks.append([*names, *shares])
    tables = [("Last network, test set", (*columns, *TEST_HEADINGS), tests)]
    return tables + ([("IoU % of the training masks after stage 1", (*columns, *MASKS), masks)] if masks else [])


def runs_tables(rows: Sequence[dict[str, Any]]) -> list[Table]:
    """For the terminal."""
    tables = []
    for title, headings, lines in _tables(rows):
        table = Table(title=title)
        for heading in headings:
            table.add_column(heading, justify="left" if heading in TEXTS else "right", overflow="fold")
        for line in lines:
            table.add_row(*map(escape, line))
        tables.append(table)
    return tables


def runs_markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The same as Markdown."""
    text = []
    for title, headings, lines in _tables(rows):
        text += [f"{title}:", "", "| " + " | ".join(headings) + " |", "|" + "---|" * len(headings)]
        text += ["| " + " | ".join(line) + " |" for line in lines] + [""]
    return "\n".join([*text, "Means over the seeds; last epoch, no choice by the test set."]) + "\n"
