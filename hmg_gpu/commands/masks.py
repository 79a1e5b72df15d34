"""hmg-gpu masks: masks as PNG for a folder or a store of any size, part by part."""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from hmg_gpu.commands.coco import write_coco
from hmg_gpu.commands.confidence import join_confidence, write_confidence
from hmg_gpu.commands.inputs import Source, open_source
from hmg_gpu.commands.journal import (
    COUNTS,
    PIXELS,
    SUMMARY,
    Done,
    Journal,
    all_pixels,
    check_data,
    noted,
    take_up,
    unfinished,
)
from hmg_gpu.commands.options import make_correction, make_makers, make_network
from hmg_gpu.common.checks import usable_device
from hmg_gpu.common.checksums import write_sealed_json
from hmg_gpu.common.console import bar, hold, say, some_names, steps
from hmg_gpu.common.errors import InputError
from hmg_gpu.common.files import file_digest
from hmg_gpu.common.parallel import Team, joined
from hmg_gpu.common.provenance import peak_memory_gb, provenance
from hmg_gpu.data import ImageSet, PointReport, check_points, read_mask, write_mask
from hmg_gpu.data.images import map_files
from hmg_gpu.data.prefetch import prefetch
from hmg_gpu.evaluation.detector import predict_masks
from hmg_gpu.evaluation.pictures import draw_sheet
from hmg_gpu.masks import ByHand, Maker, Pmg
from hmg_gpu.masks.components import connected_components

SHEET = 8  # images on an overlay sheet


def masks(options: argparse.Namespace, console: Console) -> int:
    """Masks as PNG from images and points (PMG), with --checkpoint corrected by a network (hybrid masks)."""
    with (
        joined() as team,
        open_source(options.images, options.points, options.format, options.split, options.list) as source,
        ExitStack() as held,
    ):
        console.quiet = team.rank > 0
        return _make_masks(options, console, team, source, held)


def _make_masks(options: argparse.Namespace, console: Console, team: Team, source: Source, held: ExitStack) -> int:
    """The parts of a team's member; the images of a part are one batch, whoever makes it."""
    started = time.perf_counter()
    device = usable_device(team.device(options.device))
    names, out = source.names, options.out
    report = _check_input(options, source)
    team.first(lambda: _check_out(options, names))
    team.first(lambda: hold(held, out, console))
    if options.resume:
        team.first(lambda: check_data(out, source.digest()))
    maker = _fit(options, console, team, source)
    say(console, f"masks: {maker}")
    network = make_network(options, lambda: team.first(source.normalisation), device)
    rule = make_correction(options, maker)
    kind = "hybrid" if network else "initial"
    settings: dict[str, Any] = {"masks": maker.about()}
    if network:
        settings |= {"rule": rule.about(), "network": network.about(), "weights": file_digest(options.checkpoint)}
    about = {"kind": kind, "settings": settings, "batch": options.batch, "overlays": options.overlays}
    about |= source.digest()

    parts = [range(first, min(first + options.batch, len(names))) for first in range(0, len(names), options.batch)]
    known: dict[int, Done] | None = {}
    if options.resume:
        named = [names[part.start : part.stop] for part in parts]
        known = team.first(lambda: take_up(out, about, named, lambda part: source.pixels(parts[part]), options.coco))
    if known is None:
        say(console, f"{out}: complete already, nothing to do")
        return 0
    mine = range(len(parts))[team.rank :: team.ranks]
    todo = [part for part in mine if part not in known]
    journal = Journal(out, about, team.rank, {part: known[part] for part in mine if part in known})
    counted = [done.counts for done in journal.lines.values()]
    totals = [sum(column) for column in zip((0,) * len(COUNTS), *counted, strict=True)]
    made = 0
    with bar(console, "masks", sum(len(parts[part]) for part in todo)) as advance:
        normalisation = network and network.normalisation
        sets: Iterator[ImageSet] = prefetch(source.read(parts[part], normalisation).to(device) for part in todo)
        for part, (data, predicted) in zip(todo, predict_masks(sets, network, maker, rule), strict=True):
            predicted = predicted.cpu()
            components = len(connected_components(predicted))
            counts = [len(data), components, int(predicted.sum()), int(data.host_sizes.prod(1).sum())]
            journal.begin()
            if options.overlays:
                _write_overlays(out / "overlays", data.to("cpu"), {kind: predicted}, parts[part][0])
            _write_masks(out, data, predicted)
            write_confidence(out, part, data, maker)
            journal.add(part, Done(counts, source.pixels(parts[part])))
            totals = [total + count for total, count in zip(totals, counts, strict=True)]
            made += len(data)
            advance(len(data))

    *sums, made = team.add(torch.tensor([*totals, made])).tolist()  # no rank goes on before all have written
    numbers = dict(zip(COUNTS, sums, strict=True)) | {"points": sum(map(len, source.points.values()))}
    seconds = time.perf_counter() - started
    numbers |= {"seconds": seconds, "peak_memory_gb": peak_memory_gb(), "images_per_second": made / seconds}
    numbers |= {"megapixels_per_second": numbers["pixels"] / numbers["images"] * made / seconds / 1e6}
    how = {"kind": kind, "dataset": source.dataset, "points_from": str(options.points), "masks": str(maker)}
    how |= {"settings": settings, "device": options.device, "ranks": team.ranks, "versions": provenance()}

    def finish() -> None:
        join_confidence(out, range(len(parts)))
        if options.coco:
            with write_coco(out / "coco.json", source.files, source.sizes, options.coco) as coco:
                for part in parts:
                    written = map_files(read_mask, [out / f"{names[row]}.png" for row in part])
                    for row, mask in zip(part, written, strict=True):
                        coco.add(row + 1, torch.from_numpy(mask))
        done = noted(out)
        pixels = all_pixels([done[part].pixels for part in range(len(parts))])
        write_sealed_json(out / SUMMARY, how | numbers | {"run": about | {PIXELS: pixels}})
        for path in unfinished(out):
            path.unlink()

    team.first(finish)
    console.print(_summary(f"{kind} masks in {out}", numbers, report))
    return 0


def _check_input(options: argparse.Namespace, source: Source) -> PointReport:
    names = source.names
    twice, count = Counter(names).most_common(1)[0]
    if count > 1:
        raise InputError(f"{options.images}: {count} images are called {twice}; rename: points and masks go by stem")
    report = check_points(source.points, names, source.sizes)
    if len(report.without_points) == len(names):
        raise InputError(f"{options.points}: no point in any of the {len(names)} images; export the annotations again")
    return report


def _fit(options: argparse.Namespace, console: Console, team: Team, source: Source) -> Maker:
    """The maker with all that depends on the data settled, on one rank first; a student is kept beside the masks."""
    (maker,) = make_makers(options)
    if source.extents and maker.needs_points:
        maker = ByHand(maker, Pmg(half_width=options.half_width, alpha=options.alpha), source.extents)

    def fit(progress: Any = None) -> None:
        maker.fit(source, folder=options.out, progress=progress)

    with steps(console, "preparing") as advance:
        team.first(lambda: fit(advance))
    return maker.fit(source, folder=options.out)


def _check_out(options: argparse.Namespace, names: Sequence[str]) -> None:
    """Refuse before the work a folder in which masks would replace somebody's files."""
    if options.out.exists() and options.out.resolve() in (options.images.resolve(), options.points.resolve()):
        raise InputError(f"{options.out}: holds the input; choose another --out")
    existing = next((name for name in names if (options.out / f"{name}.png").exists()), None)
    if existing is not None and not unfinished(options.out) and not (options.out / SUMMARY).exists():
        raise InputError(
            f"{options.out}: holds {existing}.png, which hmg-gpu did not write; choose an empty folder for --out"
        )


def _summary(title: str, totals: dict[str, float], report: PointReport) -> Table:
    table = Table(title=Text(title), show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for name, value in (
        ("images", f"{totals['images']}"),
        ("points", f"{totals['points']}"),
        ("images without points", some_names(report.without_points)),
        ("points given twice", some_names([f"{name} (y={y}, x={x})" for name, y, x in report.duplicates])),
        ("components in the masks", f"{totals['components']}"),
        ("foreground", f"{1e6 * totals['foreground'] / totals['pixels']:.0f}e-6 of all pixels"),
        ("images/s, with reading and writing", f"{totals['images_per_second']:.1f}"),
        ("Mpixel/s", f"{totals['megapixels_per_second']:.1f}"),
        ("time, peak memory", f"{totals['seconds']:.1f} s, {totals['peak_memory_gb']:.2f} GB"),
    ):
        table.add_row(name, Text(value))
    return table


def _write_masks(folder: Path, data: ImageSet, masks: torch.Tensor) -> None:
    def write(row: int) -> None:
        height, width = data.sizes[row].tolist()
        write_mask(folder / f"{data.names[row]}.png", masks[row, :height, :width])

    for _ in map_files(write, range(len(data))):
        pass


def _write_overlays(folder: Path, data: ImageSet, kinds: dict[str, torch.Tensor], first: int) -> None:
    for start in range(0, len(data), SHEET):
        rows = range(start, min(start + SHEET, len(data)))
        draw_sheet(folder / f"{first + rows[0] + 1:06d}-{first + rows[-1] + 1:06d}.png", data, kinds, rows)
