"""What decides a student's masks, measured against ground truth that no training sees: python -m bench.student

For the sets of ``HMG_DATA``, their centroid and coarse points, each set alone and jointly: the teacher, and the student
by round and by seed. For each set alone and seed 0 also masks without flips, by one network, where images show them, at
other thresholds, from the other kind of points, from points that moved, by class of targets, and what their confidence
is worth; for one seed students with one setting changed.

Every case is written to the file of ``--json`` when it ends; one that is there with the same settings is not run again.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bench.scenes import in_one_line, real_folder
from hmg_gpu.common.errors import InputError
from hmg_gpu.common.files import write_json
from hmg_gpu.common.provenance import provenance
from hmg_gpu.data import ImageSet, load_folder
from hmg_gpu.data.source import SYNTHETIC, load_split
from hmg_gpu.evaluation.masks import measure_targets
from hmg_gpu.evaluation.metrics import measure
from hmg_gpu.evaluation.size_classes import size_classes_of
from hmg_gpu.evaluation.tables import target_tables
from hmg_gpu.evaluation.targets import BOUNDS
from hmg_gpu.masks import Learned, Maker, Pmg
from hmg_gpu.masks.student.crops import choose, paste
from hmg_gpu.masks.student.student import Student, StudentSettings
from hmg_gpu.masks.student.train import LEVELS, agreement, train_student
from hmg_gpu.masks.windows import masks_around

WIDTH = 180  # columns of the tables in a file or a pipe
SETS = ("NUAA-SIRST", "NUDT-SIRST")  # "synthetic": the scenes that come with the project
POINTS = ("masks_centroid", "masks_coarse")
ASKED = {("NUAA-SIRST", "masks_centroid"): 79.5, ("NUAA-SIRST", "masks_coarse"): 77.5}
ASKED |= {("NUDT-SIRST", "masks_centroid"): 78.5, ("NUDT-SIRST", "masks_coarse"): 78.0}
SURE = ("not placed", "rank correlation with IoU", "IoU by target", "of the surest 80 %")
CHANGES = (
    *("steps=200", "steps=800", "members=1", "members=2", "rounds=2", "averaging=0.0", "shift=0"),
    *("crop=32", "crop=40", "crop=64"),
)


@dataclass(frozen=True)
class Case:
    """One training: sets, kind of points, seed, and what differs from the default settings."""

    sets: tuple[str, ...]
    points: str
    seed: int
    change: Mapping[str, float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        changed = "".join(f" {name}={value}" for name, value in self.change.items())
        return f"{'+'.join(self.sets)} {self.points} seed {self.seed}{changed}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", default=SETS, help="folders in HMG_DATA (default: %(default)s)")
    parser.add_argument("--points", nargs="+", default=POINTS, help="kinds of points (default: %(default)s)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="(default: %(default)s)")
    parser.add_argument("--joint", action="store_true", help="also one student for all sets")
    parser.add_argument(
        "--changes",
        nargs="*",
        type=one_change,
        metavar="NAME=VALUE",
        help=f"also one setting changed at a time, first seed (alone: {' '.join(CHANGES)})",
    )
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch (default: %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, default=Path("student.json"), help="(default: %(default)s)")
    parser.add_argument("--show", action="store_true", help="print what the file has, train nothing")
    parser.add_argument("--steps", type=int, help=argparse.SUPPRESS)  # for the tests
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    torch.set_flush_denormal(True)

    console = Console()
    results: dict[str, Any] = json.loads(options.json.read_text()) if options.json.exists() else {}
    for case in () if options.show else cases(options):
        steps = {"steps": options.steps} if options.steps else {}
        settings = StudentSettings(seed=case.seed, **{**case.change, **steps})
        if results.get(case.name, {}).get("settings") == asdict(settings):
            continue
        console.print(f"{case.name} ...", highlight=False)
        machine = {"threads": options.threads, "load": os.getloadavg(), "device": options.device}
        result = run(case, torch.device(options.device), settings)
        results[case.name] = result | {"settings": asdict(settings), "machine": machine, "versions": provenance()}
        write_json(options.json, results)
    wide = console if console.is_terminal else Console(width=WIDTH)
    for table in tables(results):
        wide.print(table)
    return 0


def cases(options: argparse.Namespace) -> Iterator[Case]:
    alone = [(name,) for name in options.sets]
    groups = [*alone, tuple(options.sets)] if options.joint and len(alone) > 1 else alone
    for seed in options.seeds:
        for group in groups:
            for points in options.points:
                yield Case(group, points, seed)
    for change in () if options.changes is None else options.changes or map(one_change, CHANGES):
        for group in alone:
            for points in options.points:
                yield Case(group, points, options.seeds[0], change)


def one_change(text: str) -> dict[str, float]:
    """ "steps=200" as a setting and its value."""
    name, _, value = text.partition("=")
    if name not in StudentSettings.__dataclass_fields__:
        raise argparse.ArgumentTypeError(f"{text!r}: no setting of a student; NAME=VALUE, for example {CHANGES[0]}")
    try:
        change = {name: json.loads(value)}
        StudentSettings(**change)
    except (ValueError, TypeError, InputError) as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from error
    return change


def run(case: Case, device: torch.device, settings: StudentSettings) -> dict[str, Any]:
    """Train one student and measure what it makes of its own points and others."""
    sets = [load(name, case.points, device) for name in case.sets]
    truths = [data.masks for data in sets]
    for data in sets:
        data.masks = None
    makers = [Pmg().fit(data) for data in sets]
    extents = [maker.extent for maker in makers]
    rounds: list[dict[str, Any]] = []
    measuring = 0.0
    start, busy = time.perf_counter(), time.process_time()

    def on_round(student: Student) -> None:
        nonlocal measuring
        begun = time.perf_counter()
        rows = {}
        for name, data, truth, pmg in zip(case.sets, sets, truths, makers, strict=True):
            masks = student.masks(data, pmg)
            known = replace(data, masks=truth)
            like_pmg = measure(masks, replace(data, masks=pmg.masks(data)))["iou"]
            rows[name] = measure(masks, known) | {"sizes": size_classes_of(masks, known), "like PMG": like_pmg}
        alike = agreement(student, sets, extents, [student.threshold])[0]
        rounds.append({"threshold": student.threshold, "agreement": alike, "sets": rows})
        measuring += time.perf_counter() - begun

    student = train_student(sets, makers, settings=settings, on_round=on_round)
    seconds = {"training": time.perf_counter() - start - measuring, "process": time.process_time() - busy}
    begun = time.perf_counter()
    more = {}
    for name, data, truth, pmg in zip(case.sets, sets, truths, makers, strict=True):
        other = None if name == SYNTHETIC else load(name, POINTS[POINTS[0] == case.points], device).points
        more[name] = variants(student, replace(data, masks=truth), pmg, case, other)
    seconds["measuring"] = measuring + time.perf_counter() - begun
    return {"rounds": rounds, "more": more, "seconds": seconds}


def load(name: str, points: str, device: torch.device) -> ImageSet:
    if name == SYNTHETIC:
        return load_split(SYNTHETIC, "train").to(device)
    return load_folder(real_folder(name), "train", points=points).to(device)


def variants(student: Student, data: ImageSet, pmg: Pmg, case: Case, other: Tensor | None) -> dict[str, Any]:
    """The teacher, and for the plain student of one set and seed 0 IoU of masks that need no training of their own.

    ``other``: the other kind of points of the same targets.
    """

    def iou(maker: Student, image_set: ImageSet) -> float:
        return measure(maker.masks(image_set, pmg), image_set)["iou"]

    result: dict[str, Any] = {"teacher": measure(pmg.masks(data), data)}
    if case.change or case.seed or len(case.sets) > 1:
        return result
    soft = student.probabilities(data.images, data.points, extent=pmg.extent, sizes=data.sizes)
    fallback, link = masks_around(data, student.settings.radius, pmg), student.settings.link
    place = (data.points, data.images.shape, data.sizes)
    result["levels"] = {
        level: measure(paste(choose(soft, fallback, level, link), *place), data)["iou"] for level in LEVELS
    }
    result["teacher"]["sizes"] = size_classes_of(pmg.masks(data), data)
    result |= measure_targets(data, *_both(data, pmg, student), [name for name in BOUNDS if name != "teacher"])
    unmoved = Student(student.networks, student.settings, student.threshold)
    result["placements"], result["not placed"] = student.placements, iou(unmoved, data)
    placed = Student(student.networks, student.settings, student.threshold, placements=student.placements)
    result["centrings"], result["one threshold"] = student.centrings, iou(placed, data)
    plain = replace(student.settings, flips=False)
    kept = {"placements": student.placements, "centrings": student.centrings}
    unturned = Student(student.networks, plain, student.threshold, **kept)
    result["no flips"] = iou(unturned, data)
    result["one network"] = [iou(student.member(number), data) for number in range(student.settings.members)]
    if other is None:
        return result
    result["other points"] = iou(student, replace(data, points=other))
    result["moved"] = {}
    for pixels in (1, 2, 3, 4):
        moved = replace(data, points=move_points(data, pixels))
        result["moved"][pixels] = {"student": iou(student, moved), "teacher": measure(pmg.masks(moved), moved)["iou"]}
    return result


def _both(data: ImageSet, pmg: Pmg, student: Student) -> tuple[dict[str, Tensor], list[Maker]]:
    maker = Learned(pmg=pmg, student=student)
    return {maker.label: maker.masks(data)}, [maker]


def move_points(data: ImageSet, pixels: int) -> Tensor:
    """Points moved so far in a random direction, held to their images: int64 [P, 3]."""
    generator = torch.Generator().manual_seed(pixels)
    angle = (torch.rand(len(data.points), generator=generator) * 2 * torch.pi).to(data.points.device)
    move = (torch.stack((angle.sin(), angle.cos()), dim=1) * pixels).round().long()
    moved = (data.points[:, 1:] + move).clamp(min=0).minimum(data.sizes[data.points[:, 0]] - 1)
    return torch.cat((data.points[:, :1], moved), dim=1)


def tables(results: Mapping[str, Any]) -> Iterator[Table]:
    """The figures of a file as tables: IoU of masks in per cent unless said otherwise."""
    plain: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for name, case in results.items():
        group, points, _, _, *change = name.split()
        if not change:
            for dataset in case["more"]:
                plain.setdefault((group, dataset, points), []).append(case)
    columns = ("teacher", "by seed", "mean", "asked", "Pd", "Fa", "seconds")
    by_seed = Table("trained on", "set", "points", *columns, title="students by seed")
    for (group, dataset, points), runs in plain.items():
        last = [case["rounds"][-1]["sets"][dataset] for case in runs]
        by_seed.add_row(
            group, dataset, points, percent(runs[0]["more"][dataset]["teacher"]["iou"]),
            " ".join(percent(row["iou"]) for row in last), mean([row["iou"] for row in last]),
            str(ASKED.get((dataset, points), "")), mean([row["pd"] for row in last]),
            f"{1e6 * statistics.mean(row['fa'] for row in last):.2f}",
            " ".join(f"{case['seconds']['training']:.0f}" for case in runs),
        )  # fmt: skip
    yield by_seed
    first = {key: runs[0] for key, runs in plain.items() if "no flips" in runs[0]["more"][key[1]]}
    moved = (f"{pixels} px off: teacher, student" for pixels in (1, 2, 3, 4))
    columns = ("no flips", "one network", "other points", *moved)
    yield filled("the first seed's masks made otherwise", first, columns, otherwise)
    yield filled("by threshold", first, tuple(map(str, LEVELS)), by_level)
    yield filled("by target size: teacher, student", first, (), sizes)
    known = {key: case for key, case in first.items() if "confidence" in case["more"][key[1]]}
    yield filled("the first seed's masks where images show them, and their confidence", known, SURE, surely)
    for key, case in known.items():
        for table in target_tables(case["more"][key[1]] | {"confidence": {}}):
            table.title = f"{' '.join(key[1:])}: {table.title}"
            yield table
    columns = ("set", "points", "seed", "changed", "by round", "like PMG", "agreement", "seconds")
    changes = Table(*columns, title="settings changed")
    for name, case in results.items():
        group, points, _, seed, *change = name.split()
        if "+" not in group:
            by_round = " ".join(percent(step["sets"][group]["iou"]) for step in case["rounds"])
            like_pmg = " ".join(percent(step["sets"][group].get("like PMG")) for step in case["rounds"])
            alike = " ".join(percent(step["agreement"]) for step in case["rounds"])
            seconds = f"{case['seconds']['training']:.0f}"
            changes.add_row(group, points, seed, " ".join(change) or "-", by_round, like_pmg, alike, seconds)
    yield changes


def filled(
    title: str,
    cases: Mapping[tuple[str, str, str], dict[str, Any]],
    columns: Sequence[str],
    row: Callable[[dict[str, Any], str], list[str]],
) -> Table:
    """A table with a row for each case: what it was trained on, the set, the points and what ``row`` makes of them."""
    table = Table("trained on", "set", "points", *columns, title=title)
    for (group, dataset, points), case in cases.items():
        table.add_row(group, dataset, points, *row(case, dataset))
    return table


def otherwise(case: Mapping[str, Any], dataset: str) -> list[str]:
    more = case["more"][dataset]
    cells = [percent(more["no flips"]), mean(more["one network"])]
    if "moved" in more:
        cells.append(percent(more["other points"]))
        cells += [f"{percent(pair['teacher'])} {percent(pair['student'])}" for pair in more["moved"].values()]
    return cells


def by_level(case: Mapping[str, Any], dataset: str) -> list[str]:
    return [percent(value) for value in case["more"][dataset]["levels"].values()]


def sizes(case: Mapping[str, Any], dataset: str) -> list[str]:
    teacher, student = case["more"][dataset]["teacher"]["sizes"], case["rounds"][-1]["sets"][dataset]["sizes"]
    return [f"{name}: {percent(teacher[name]['iou'])} {percent(student[name]['iou'])}" for name in student]


def surely(case: Mapping[str, Any], dataset: str) -> list[str]:
    (sure,) = case["more"][dataset]["confidence"].values()
    numbers = [percent(case["more"][dataset]["not placed"]), f"{sure['rank_correlation']:.3f}"]
    return numbers + [percent(sure[name]) for name in ("iou", "iou_surest")]


def percent(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{100 * value:.2f}"  # no target of this size


def mean(values: Sequence[float]) -> str:
    return percent(statistics.mean(values))


if __name__ == "__main__":
    sys.exit(in_one_line(main))
