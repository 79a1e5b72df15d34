"""hmg-gpu: pixel masks from images and one click per target; packing and looking over a data set.

Exit code: 0 all well, 1 hmg-gpu check found something, 2 an error (said in one line), 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from .bulk import SUMMARY, Journal, Source, missing, open_source, take_up, unfinished
from .checks import usable_device
from .coco import FORMS, write_coco
from .components import connected_components
from .data import (
    ImageSet,
    PointReport,
    check_points,
    read_mask,
    store_splits,
    write_mask,
)
from .data.images import map_files
from .data.point_formats import READERS
from .data.prefetch import prefetch
from .data.source import default_extent
from .data.store import iterate_store, pack_folder
from .drawing import draw_sheet
from .errors import HMGError, InputError
from .evaluation import load_network
from .extent import FALLBACK, MAX_POINTS, MIN_POINTS, choose_extent
from .files import file_digest, write_json
from .inference import PADDINGS
from .inspection import FINDINGS, NOT_COUNTED, inspect_folder
from .parallel import Team, joined, who
from .prediction import predict_masks
from .provenance import provenance
from .report import bar, peak_memory_gb, say, steps
from .size_classes import SIZE_CLASSES
from .student import METHODS, Student
from .teaching import learned_student

SAMPLE_PIXELS = 2**26  # held at once while the extent is chosen
LESSONS, LESSON_PIXELS = 20_000, 2**31  # points that a student learns from, and pixels held for that
SHEET = 8  # images on an overlay sheet


def main(arguments: list[str] | None = None) -> int:
    """Run a command; ``arguments`` as on the command line, by default the program's own. Returns the exit code."""
    options = parse(arguments)
    console = Console()
    try:
        if options.threads:
            torch.set_num_threads(options.threads)
        return options.command(options, console)
    except HMGError as error:
        # as Text: brackets in a path are no markup
        Console(stderr=True).print(Text.assemble(("error:", "bold red"), f" {who()}{error}"), soft_wrap=True)
        return 2
    except KeyboardInterrupt:
        more = "; --resume goes on from here" if options.command is masks else ""
        Console(stderr=True).print(f"stopped; files that were written are whole{more}", soft_wrap=True)
        return 130


# --- commands --------------------------------------------------------------------------------------------------------


def masks(options: argparse.Namespace, console: Console) -> int:
    """Masks as PNG from images and points (PMG), with --checkpoint corrected by a network (hybrid masks)."""
    with (
        joined() as team,
        open_source(options.images, options.points, options.format, options.split) as source,
    ):
        console.quiet = team.rank > 0
        return _make_masks(options, console, team, source)


def _make_masks(options: argparse.Namespace, console: Console, team: Team, source: Source) -> int:
    """The parts of a team's member; the images of a part are one batch, whoever makes it."""
    started = time.perf_counter()
    device = usable_device(team.device(options.device))
    names, out = source.names, options.out
    twice, count = Counter(names).most_common(1)[0]
    if count > 1:
        raise InputError(f"{options.images}: {count} images are called {twice}; rename: points and masks go by stem")
    team.first(lambda: _check_out(options, names))
    report = check_points(source.points, names, source.sizes)
    if len(report.without_points) == len(names):
        raise InputError(f"{options.points}: no point in any of the {len(names)} images; export the annotations again")
    pmg = {"half_width": options.half_width, "alpha": options.alpha}
    with console.status("choosing the extent"):
        pmg["extent"], why = team.first(lambda: _pick_extent(options, source, device, pmg))
    say(console, f"extent {pmg['extent']} pixels ({why})")
    network, used = None, {}
    if options.checkpoint:
        network = load_network(
            options.checkpoint,
            lambda: team.first(source.normalisation),
            normalisation=options.normalisation,
            padding=options.padding,
            threshold=options.threshold,
            device=device,
        )
        used = {"radius": options.radius, "network": network.about(), "weights": file_digest(options.checkpoint)}
    student = None
    if options.student or options.method == "learned":
        path = options.student or out / "student.safetensors"
        if options.student is None:
            with steps(console, "student") as advance:
                team.first(lambda: _teach(source, device, pmg, path, advance))
        student = Student.load(path, device)
        used |= {"student": file_digest(path)}
    kind = "hybrid" if network else "initial"
    about = {"kind": kind, "settings": pmg | used, "batch": options.batch, "overlays": options.overlays}
    about |= source.digest()

    parts = [range(first, min(first + options.batch, len(names))) for first in range(0, len(names), options.batch)]
    known = team.first(lambda: take_up(out, about, names, options.coco)) if options.resume else []
    if known is None:
        say(console, f"{out}: complete already, nothing to do")
        return 0
    done = {part: counts for part, counts in known if missing(out, [names[row] for row in parts[part]]) is None}
    mine = range(len(parts))[team.rank :: team.ranks]
    todo = [part for part in mine if part not in done]
    journal = Journal(out, about, team.rank, {part: done[part] for part in mine if part in done})
    totals = [sum(column) for column in zip((0,) * 4, *journal.lines.values(), strict=True)]
    made = 0
    with bar(console, "masks", sum(len(parts[part]) for part in todo)) as advance:
        sets = prefetch(source.read(parts[part], network and network.normalisation).to(device) for part in todo)
        for part, (data, found) in zip(
            todo, predict_masks(sets, network, True, pmg, options.radius, student), strict=True
        ):
            found = found.cpu()
            counts = [len(data), len(connected_components(found)), int(found.sum()), int(data.host_sizes.prod(1).sum())]
            journal.begin()
            if options.overlays:
                _write_overlays(out / "overlays", data.to("cpu"), {kind: found}, parts[part][0])
            _write_masks(out, data, found)
            journal.add(part, counts)
            totals = [total + count for total, count in zip(totals, counts, strict=True)]
            made += len(data)
            advance(len(data))

    *sums, made = team.add(torch.tensor([*totals, made])).tolist()  # no rank goes on before all have written
    totals = dict(zip(("images", "components", "foreground", "pixels"), sums, strict=True))
    seconds = time.perf_counter() - started
    totals |= {"points": sum(map(len, source.points.values())), "seconds": seconds, "peak_memory_gb": peak_memory_gb()}
    totals |= {
        "images_per_second": made / seconds,
        "megapixels_per_second": totals["pixels"] / totals["images"] * made / seconds / 1e6,
    }
    how = {"kind": kind, "dataset": source.dataset, "points_from": str(options.points), "extent": why}
    how |= {"settings": pmg | used, "device": options.device, "ranks": team.ranks, "versions": provenance()}

    def finish() -> None:
        if options.coco:
            with write_coco(out / "coco.json", source.files, source.sizes, options.coco) as coco:
                for part in parts:
                    found = map_files(read_mask, [out / f"{names[row]}.png" for row in part])
                    for row, mask in zip(part, found, strict=True):
                        coco.add(row + 1, torch.from_numpy(mask))
        write_json(out / SUMMARY, how | totals | {"run": about})
        for path in unfinished(out):
            path.unlink()

    team.first(finish)
    console.print(_summary(f"{kind} masks in {out}", totals, report))
    return 0


def pack(options: argparse.Namespace, console: Console) -> int:
    """A data set's folder (all its splits, with masks and every kind of points) to one HDF5 file."""
    if options.out.exists() and not options.overwrite:
        raise InputError(f"{options.out}: exists already; choose another name or pass --overwrite")
    if options.out.suffix != ".h5":
        raise InputError(f"{options.out}: expected a name that ends in .h5; the other commands know a store by it")
    with console.status(f"packing {escape(str(options.data))}"):
        pack_folder(options.data, options.out, points=options.points, dataset=options.dataset)
    table = Table(title=Text(f"{options.out}, {options.out.stat().st_size / 1e6:.1f} MB"))
    for heading in ("split", "images", "ground truth", "points"):
        table.add_column(heading)
    for split, kinds in store_splits(options.out).items():
        count, truth = 0, "no"
        for part in iterate_store(options.out, split, points=None):  # all of it is read back
            count, truth = count + len(part), "no" if part.masks is None else "yes"
        table.add_row(split, str(count), truth, ", ".join(kinds) or "none")
    console.print(table)
    return 0


def check(options: argparse.Namespace, console: Console) -> int:
    """Look a data set over: sizes, modes, masks, points, near-duplicates of train and test, targets by size."""
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
            table.add_row(kind, str(len(rows)), Text(_some(rows, bare=True)), cure)
    console.print(table)
    if seen.clean:
        console.print(f"nothing but {', '.join(seen.findings.keys() & NOT_COUNTED)}", style="green")
    return int(not seen.clean)


# --- what the commands share -----------------------------------------------------------------------------------------


def _summary(title: str, totals: dict[str, float], report: PointReport) -> Table:
    table = Table(title=Text(title), show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for name, value in (
        ("images", f"{totals['images']}"),
        ("points", f"{totals['points']}"),
        ("images without points", _some(report.without_points)),
        ("points given twice", _some([f"{name} (y={y}, x={x})" for name, y, x in report.duplicates])),
        ("components in the masks", f"{totals['components']}"),
        ("foreground", f"{1e6 * totals['foreground'] / totals['pixels']:.0f}e-6 of all pixels"),
        ("images/s, with reading and writing", f"{totals['images_per_second']:.1f}"),
        ("Mpixel/s", f"{totals['megapixels_per_second']:.1f}"),
        ("time, peak memory", f"{totals['seconds']:.1f} s, {totals['peak_memory_gb']:.2f} GB"),
    ):
        table.add_row(name, Text(value))
    return table


def _check_out(options: argparse.Namespace, names: Sequence[str]) -> None:
    """Refuse before the work a folder in which masks would replace somebody's files."""
    if options.out.exists() and options.out.resolve() in (options.images.resolve(), options.points.resolve()):
        raise InputError(f"{options.out}: holds the input; choose another --out")
    there = next((name for name in names if (options.out / f"{name}.png").exists()), None)
    if there is not None and not unfinished(options.out) and not (options.out / SUMMARY).exists():
        raise InputError(
            f"{options.out}: holds {there}.png, which hmg-gpu did not write; choose an empty folder for --out"
        )


def _pick_extent(
    options: argparse.Namespace, source: Source, device: torch.device, pmg: dict[str, float]
) -> tuple[int, str]:
    """L_ep and where it comes from."""
    if options.extent != "auto":
        return options.extent, "as given"
    names, sizes, points = source.names, source.sizes, source.points
    marked = [row for row, name in enumerate(names) if len(points[name])]
    total = sum(len(points[names[row]]) for row in marked)
    if total < MIN_POINTS:
        extent = default_extent(source.dataset)
        why = "the paper's for this data set" if extent != FALLBACK else "the paper's for most data sets"
        return extent, f"{why}; {total} points are too few to choose by"
    tallest, widest = (max(sizes[row][axis] for row in marked) for axis in (0, 1))
    count = max(1, min(len(marked), SAMPLE_PIXELS // (tallest * widest), MAX_POINTS * len(marked) // total))
    chosen = [marked[round(step)] for step in np.linspace(0, len(marked) - 1, count)]
    part = source.read(list(dict.fromkeys(chosen)))
    extent = choose_extent(part.to(device), **pmg)
    return extent, f"chosen from {len(part.points)} points in {len(part)} images: by how long masks hold still"


def _teach(source: Source, device: torch.device, pmg: dict[str, float], path: Path, advance: Any) -> None:
    """Train a student on images evenly spread over the source, as many as hold ``LESSONS`` points."""
    marked = [row for row, name in enumerate(source.names) if len(source.points[name])]
    total = sum(len(source.points[source.names[row]]) for row in marked)
    tallest, widest = (max(source.sizes[row][axis] for row in marked) for axis in (0, 1))
    count = min(len(marked), LESSON_PIXELS // (tallest * widest), LESSONS * len(marked) // total)
    chosen = [marked[round(step)] for step in np.linspace(0, len(marked) - 1, max(1, count))]
    data = source.read(list(dict.fromkeys(chosen))).to(device)
    learned_student(data, path, progress=advance, **pmg)


def _write_masks(folder: Path, data: ImageSet, found: torch.Tensor) -> None:
    def write(row: int) -> None:
        height, width = data.sizes[row].tolist()
        write_mask(folder / f"{data.names[row]}.png", found[row, :height, :width])

    for _ in map_files(write, range(len(data))):
        pass


def _write_overlays(folder: Path, data: ImageSet, kinds: dict[str, torch.Tensor], first: int) -> None:
    for start in range(0, len(data), SHEET):
        rows = range(start, min(start + SHEET, len(data)))
        draw_sheet(folder / f"{first + rows[0] + 1:06d}-{first + rows[-1] + 1:06d}.png", data, kinds, rows)


def _some(names: Sequence[str], bare: bool = False) -> str:
    """A count and the first few names."""
    shown = ", ".join(names[:3]) + (" ..." if len(names) > 3 else "")
    return shown if bare else f"{len(names)}" + (f" ({shown})" if names else "")


def _class_titles() -> list[str]:
    low, titles = 0, []
    for name, high in SIZE_CLASSES.items():
        titles.append(f"{name} ({low + 1}-{high} px)" if high else f"{name} (> {low} px)")
        low = high or 0
    return titles


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "hmg-gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(command: Any, example: str) -> argparse.ArgumentParser:
        one = commands.add_parser(
            command.__name__,
            help=command.__doc__,
            description=command.__doc__,
            epilog=f"example: hmg-gpu {command.__name__} {example}",
        )
        one.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's)")
        one.set_defaults(command=command)
        return one

    one = add(masks, "--images frames --points clicks.csv --out frames_masks")
    one.add_argument("--images", type=Path, required=True, metavar="PATH", help="folder of images, or a packed .h5")
    one.add_argument("--split", help="of a packed .h5 (default: train, or the only one)")
    text = f"file or folder: {', '.join(READERS)}; of a packed .h5 also a name such as masks_centroid"
    one.add_argument("--points", type=Path, required=True, metavar="PATH", help=text)
    one.add_argument("--format", choices=READERS, help="of the points (default: by their content)")
    one.add_argument("--out", type=Path, required=True, metavar="DIR", help="NAME.png for each image, 0 and 255")
    one.add_argument("--resume", action="store_true", help="go on with the unfinished run in --out, or begin one")
    one.add_argument("--coco", choices=FORMS, help="also write coco.json")
    one.add_argument("--overlays", action="store_true", help="also draw the masks over the images, in overlays/")
    one.add_argument("--method", choices=METHODS, default="pmg", help="learned: by a student trained on PMG's masks")
    one.add_argument("--student", type=Path, metavar="FILE", help="learned, by a student trained before")
    one.add_argument("--extent", type=_extent, default="auto", help="L_ep of P2B in pixels, or auto (the default)")
    one.add_argument("--half-width", type=_whole, default=4, help="L_dp of P2B, pixels (default: %(default)s)")
    one.add_argument("--alpha", type=_share, default=0.15, help="weight of the point in B2M (default: %(default)s)")
    one.add_argument("--radius", type=_whole, default=30, help="r of FAF, pixels (default: %(default)s)")
    one.add_argument("--checkpoint", type=Path, help="weights: .safetensors, .pth or .pth.tar")
    one.add_argument("--normalisation", default="auto", help="auto, a data set's name such as SIRST3, or MEAN,STD")
    one.add_argument("--padding", default="least", choices=PADDINGS, help="lesps for published LESPS weights")
    one.add_argument("--threshold", type=float, default=0.5, help="probability above which a pixel is target")
    one.add_argument("--batch", type=_extent_pixels, default=16, help="images held at a time (default: %(default)s)")
    one.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")

    one = add(pack, "data/NUAA-SIRST NUAA.h5")
    one.add_argument("data", type=Path, help="folder with images/, img_idx/ and, where there are, masks/ and points")
    one.add_argument("out", type=Path, help="the .h5 file")
    one.add_argument("--points", nargs="+", default=["masks_centroid", "masks_coarse"], help="kinds to take along")
    one.add_argument("--dataset", help="the data set's name (default: the folder's)")
    one.add_argument("--overwrite", action="store_true", help="replace a file of that name")

    one = add(check, "data/NUAA-SIRST")
    one.add_argument("data", type=Path, help="a data set's folder, or a folder of images")
    one.add_argument("--points", default="masks_centroid", help="in the folder, or a path (default: %(default)s)")
    return parser.parse_args(arguments)


def _whole(text: str, least: int = 0) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least {least}, got {text!r}")
    return int(text)


def _extent_pixels(text: str) -> int:
    return _whole(text, 1)


def _extent(text: str) -> int | str:
    return text if text == "auto" else _whole(text, 1)


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to 1, got {text!r}")
    return value
