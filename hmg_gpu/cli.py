"""hmg-gpu: pixel masks from images and one click per target; packing and looking over a data set.

Exit code: 0 all well, 1 hmg-gpu check found something, 2 an error (said in one line), 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from .coco import FORMS, write_coco
from .components import connected_components
from .data import (
    ImageSet,
    PointReport,
    check_points,
    find_images,
    load_images,
    read_points,
    store_splits,
    write_mask,
)
from .data.images import map_files, read_header
from .data.points import READERS
from .data.source import default_extent
from .data.store import iterate_store, pack_folder
from .drawing import draw_sheet
from .errors import HMGError, InputError
from .evaluation import check_device, load_network
from .extent import FALLBACK, MAX_POINTS, MIN_POINTS, choose_extent
from .files import write_json
from .inference import PADDINGS
from .inspection import FINDINGS, NOT_COUNTED, inspect_folder
from .prediction import Images, predict_masks
from .provenance import provenance
from .report import bar, peak_memory_gb, say
from .size_classes import SIZE_CLASSES

SUMMARY = "hmg.json"  # beside the masks: how they were made
SAMPLE_PIXELS = 2**26  # held at once while the extent is chosen
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
        Console(stderr=True).print(Text.assemble(("error:", "bold red"), f" {error}"), soft_wrap=True)
        return 2
    except KeyboardInterrupt:
        Console(stderr=True).print("stopped; files that were written are whole")
        return 130


# --- commands --------------------------------------------------------------------------------------------------------


def masks(options: argparse.Namespace, console: Console) -> int:
    """Masks as PNG from images and points (PMG), with --checkpoint corrected by a network (hybrid masks)."""
    started = time.perf_counter()
    check_device(options.device)
    source, sizes, report = _open(options, console)
    pmg = {"half_width": options.half_width, "alpha": options.alpha}
    with console.status("choosing the extent"):
        pmg["extent"], why = _pick_extent(options, source, sizes, pmg)
    say(console, f"extent {pmg['extent']} pixels ({why})")
    network, used = None, {}
    if options.checkpoint:
        network = load_network(
            options.checkpoint,
            source.normalisation,
            normalisation=options.normalisation,
            padding=options.padding,
            threshold=options.threshold,
            device=options.device,
        )
        used = {"radius": options.radius, "network": network.about()}

    kind = "hybrid" if network else "initial"
    totals = dict.fromkeys(("images", "components", "foreground", "pixels"), 0)
    with ExitStack() as stack:
        coco = None
        if options.coco:
            files = [path.name for path in source.paths]
            coco = stack.enter_context(write_coco(options.out / "coco.json", files, sizes, options.coco))
        advance = stack.enter_context(bar(console, "masks", len(source.paths)))
        sets = (batch.to(options.device) for batch in source.batches(network and network.normalisation))
        for data, found in predict_masks(sets, network, True, pmg, options.radius):
            found, done = found.cpu(), totals["images"]
            _write_masks(options.out, data, found)
            if coco:
                for row, (height, width) in enumerate(data.sizes.tolist()):
                    coco.add(done + row + 1, found[row, :height, :width])
            if options.overlays:
                _write_overlays(options.out / "overlays", data.to("cpu"), {kind: found}, done)
            totals["images"] += len(data)
            totals["components"] += len(connected_components(found))
            totals["foreground"] += int(torch.count_nonzero(found))
            totals["pixels"] += int(data.sizes.prod(1).sum())
            advance(len(data))
    seconds = time.perf_counter() - started
    totals |= {"points": sum(map(len, source.points.values())), "seconds": seconds, "peak_memory_gb": peak_memory_gb()}
    totals |= {
        "images_per_second": totals["images"] / seconds,
        "megapixels_per_second": totals["pixels"] / seconds / 1e6,
    }
    how = {"kind": kind, "dataset": source.dataset, "points_from": str(options.points), "extent": why}
    how |= {"settings": pmg | used, "device": options.device, "versions": provenance()}
    write_json(options.out / SUMMARY, how | totals)
    console.print(_summary(f"{kind} masks in {options.out}", totals, report))
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


def _open(options: argparse.Namespace, console: Console) -> tuple[Images, list[tuple[int, int]], PointReport]:
    """The images and their points, the images' sizes, and what is odd about the points."""
    paths = find_images(options.images)
    names = [path.stem for path in paths]
    twice, count = Counter(names).most_common(1)[0]
    if count > 1:
        raise InputError(f"{options.images}: {count} images are called {twice}; rename: points and masks go by stem")
    _check_out(options, names)
    with console.status("reading sizes and points"):
        sizes = [header[:2] for header in map_files(read_header, paths)]
        points = read_points(options.points, options.format, names, sizes)
    report = check_points(points, names, sizes)
    if len(report.without_points) == len(names):
        raise InputError(f"{options.points}: no point in any of the {len(names)} images; export the annotations again")
    return Images(paths, points, options.batch), sizes, report


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
    if there is not None and not (options.out / SUMMARY).exists():
        raise InputError(
            f"{options.out}: holds {there}.png, which hmg-gpu did not write; choose an empty folder for --out"
        )


def _pick_extent(
    options: argparse.Namespace, source: Images, sizes: Sequence[tuple[int, int]], pmg: dict[str, float]
) -> tuple[int, str]:
    """L_ep and where it comes from."""
    if options.extent != "auto":
        return options.extent, "as given"
    paths, points = source.paths, source.points
    marked = [row for row, path in enumerate(paths) if len(points[path.stem])]
    total = sum(len(points[paths[row].stem]) for row in marked)
    if total < MIN_POINTS:
        extent = default_extent(source.dataset)
        source = "the paper's for this data set" if extent != FALLBACK else "the paper's for most data sets"
        return extent, f"{source}; {total} points are too few to choose by"
    tallest, widest = (max(sizes[row][axis] for row in marked) for axis in (0, 1))
    count = max(1, min(len(marked), SAMPLE_PIXELS // (tallest * widest), MAX_POINTS * len(marked) // total))
    chosen = [marked[round(step)] for step in np.linspace(0, len(marked) - 1, count)]
    part = load_images([paths[row] for row in dict.fromkeys(chosen)], points=points, normalisation=(0.0, 1.0))
    extent = choose_extent(part.to(options.device), **pmg)
    return extent, f"chosen from {len(part.points)} points in {len(part)} images: masks change least beyond it"


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
    one.add_argument("--images", type=Path, required=True, metavar="DIR", help="PNG, TIFF, BMP or JPEG, 8 or 16 bits")
    one.add_argument("--points", type=Path, required=True, metavar="PATH", help=f"file or folder: {', '.join(READERS)}")
    one.add_argument("--format", choices=READERS, help="of the points (default: by their content)")
    one.add_argument("--out", type=Path, required=True, metavar="DIR", help="NAME.png for each image, 0 and 255")
    one.add_argument("--coco", choices=FORMS, help="also write coco.json")
    one.add_argument("--overlays", action="store_true", help="also draw the masks over the images, in overlays/")
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
