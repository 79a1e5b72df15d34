"""Measure masks and detectors as the paper does, on its data sets or your own, and predict masks for any images.

python eval.py COMMAND --help shows the options of a command and an example. Without --data a command runs on embedded
synthetic scenes. Results go to --out as JSON (with data set, settings, normalisation, seed, commit and versions).
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape

from hmg_gpu import evaluation
from hmg_gpu.checks import usable_device
from hmg_gpu.data import ImageSet, write_mask
from hmg_gpu.data.source import SYNTHETIC
from hmg_gpu.drawing import PICKS, draw_sheet
from hmg_gpu.errors import HMGError, InputError
from hmg_gpu.evaluation import Network
from hmg_gpu.figures import plot_detector, plot_sweep, require_matplotlib
from hmg_gpu.files import write_json, write_text
from hmg_gpu.inference import PADDINGS
from hmg_gpu.paper import Report, paper_points, sort_checkpoints
from hmg_gpu.prediction import open_images, predict_masks
from hmg_gpu.provenance import provenance
from hmg_gpu.report import bar, mask_table, say, size_table, steps, sweep_csv
from hmg_gpu.student import METHODS, Student
from hmg_gpu.teaching import learned_student
from hmg_gpu.updater import FUSIONS

SETTINGS = ("radius", "points", "fusion", "method", "student")  # what a result says beside PMG's
CURVE = (0.01, 0.02, *(step / 20 for step in range(1, 20)), 0.98, 0.99)  # thresholds of the detector's curves


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    console = Console()
    try:
        if options.threads is not None:
            torch.set_num_threads(evaluation.at_least(1, threads=options.threads))
        usable_device(options.device)
        if getattr(options, "plots", False):
            require_matplotlib()
        options.command(options, console)
        return 0
    except HMGError as error:
        Console(stderr=True).print("[bold red]error:[/]", escape(str(error)), highlight=False, soft_wrap=True)
        return 2


# --- commands --------------------------------------------------------------------------------------------------------


def masks(options: argparse.Namespace, console: Console) -> None:
    """Quality of pseudo masks on a split: PMG, P_g only, a student's, with --checkpoint all of the updating process."""
    data, pmg, network, folder = open_all(options, console)
    evaluation.require_truth(data)
    rows = evaluation.measure_masks(data, pmg, get_masks(options, console, data, pmg, network, folder))
    console.print(mask_table(f"Masks of {data.dataset} {data.split} ({len(data)} images, {options.points})", rows))
    console.print(size_table(rows))
    save(folder / "masks.json", options, console, data, network, pmg, rows=rows)


def detector(options: argparse.Namespace, console: Console) -> None:
    """A checkpoint on a split: IoU, Pd and Fa at --threshold, and its curves over all thresholds as PNG."""
    if not options.point_prompt:
        options.points = None
    data, pmg, network, folder = open_all(options, console)
    evaluation.require_truth(data)
    with bar(console, "predicting", len(data)) as advance:
        curve = evaluation.measure_detector(
            network,
            data,
            sorted({options.threshold} | set(CURVE if options.plots else ())),
            initial=evaluation.initial_mask(data, pmg) if options.point_prompt else None,
            radius=options.radius,
            progress=advance,
        )
    result = next(row for row in curve if row["threshold"] == options.threshold)
    name = "prompted" if options.point_prompt else "network"
    title = f"{options.checkpoint.name} on {data.dataset} {data.split}, threshold {options.threshold}"
    console.print(mask_table(title, {name: result}, pixel_fa=True))
    save(folder / "detector.json", options, console, data, network, pmg, output=name, result=result, curve=curve)
    if options.plots:
        plot_detector(folder / "detector.png", curve, options.threshold, f"{title}: {name}")
        say(console, f"curves: {folder / 'detector.png'}")


def sweep(options: argparse.Namespace, console: Console) -> None:
    """IoU, Pd, Fa and IoU by target size over one setting: CSV, JSON, and a plot with the paper's points."""
    name = options.setting.replace("-", "_")
    values = evaluation.check_values(name, options.values or evaluation.SWEEPS[name])
    if name == "radius" and not options.checkpoint:
        raise InputError("a sweep over radius filters a network's predictions: give --checkpoint")
    data, pmg, network, folder = open_all(options, console)
    evaluation.require_truth(data)
    prediction = None
    if name == "radius":
        with bar(console, "predicting", len(data)) as advance:
            prediction = network.predict(data, advance)
    with bar(console, name, len(values)) as advance:
        rows = evaluation.sweep(data, name, values, pmg, prediction=prediction, progress=advance)
    table = {f"{name} {row[name]:g}": row for row in rows}
    console.print(mask_table(f"{name} on {data.dataset} {data.split} ({len(data)} images)", table))
    console.print(size_table(table))
    write_text(folder / f"{name}.csv", sweep_csv(name, rows))
    save(folder / f"{name}.json", options, console, data, network, pmg, rows=rows)
    if options.plots:
        title = f"{'PMG' if prediction is None else 'Filtered predictions'} on {data.dataset} {data.split}"
        points = paper_points(name, data.dataset, data.split)
        plot_sweep(folder / f"{name}.png", name, rows, f"{title} ({options.points})", points)
        say(console, f"plot: {folder / name}.png, table: {folder / name}.csv")


def show(options: argparse.Namespace, console: Console) -> None:
    """Masks side by side over the images, with IoU and an enlarged target: spread, worst, best, joined, or by name."""
    evaluation.at_least(1, count=options.count, zoom=options.zoom)
    data, pmg, network, folder = open_all(options, console)
    kinds = get_masks(options, console, data, pmg, network, folder)
    last, mask = list(kinds.items())[-1]
    chosen = evaluation.choose_images(data, mask, options.pick, options.count, options.names)
    path = folder / f"{'names' if options.names else options.pick}.png"
    draw_sheet(path, data, kinds, chosen, zoom=options.zoom, whole=options.whole)
    say(console, f"{len(chosen)} images, judged by the {last} mask: {path}")


def predict(options: argparse.Namespace, console: Console) -> None:
    """Masks for images without ground truth: by a checkpoint, by points (PMG), or by both (point prompt)."""
    if not options.checkpoint and not options.points:
        raise InputError("nothing to make masks from: give --checkpoint, or --points for PMG, or both")
    source = open_images(options.images, options.points, options.batch, options.seed)
    pmg = pmg_of(options, source.dataset)
    network = open_network(options, source.normalisation)
    folder = options.out or Path("runs") / f"predict-{source.dataset}"
    if any(path.resolve().parent == (folder / "masks").resolve() for path in source.paths):
        raise InputError(f"{folder / 'masks'}: holds the images themselves; choose another --out")
    started, pixels = time.perf_counter(), 0
    with bar(console, "predicting", len(source.names)) as advance:
        sets = (batch.to(options.device) for batch in source.batches(network and network.normalisation))
        for data, found in predict_masks(sets, network, bool(options.points), pmg, options.radius):
            for name, (height, width), mask in zip(data.names, data.sizes.tolist(), found.cpu(), strict=True):
                write_mask(folder / "masks" / f"{name}.png", mask[:height, :width])
            pixels += int(data.sizes.prod(1).sum())
            advance(len(data))
    seconds = time.perf_counter() - started
    speed = {"images_per_second": len(source.names) / seconds, "megapixels_per_second": pixels / seconds / 1e6}
    about = {"dataset": source.dataset, "images": len(source.names)}
    write_json(folder / "predict.json", about | describe(options, network, pmg) | speed)
    say(console, f"{len(source.names)} masks in {folder / 'masks'}")
    rates = f"{speed['images_per_second']:.1f} images/s, {speed['megapixels_per_second']:.1f} Mpixel/s"
    say(console, f"{rates} on {options.device}, with reading and writing")


def paper(options: argparse.Namespace, console: Console) -> None:
    """Every table and figure of the paper that the data and checkpoints at hand allow: Markdown, PNG and JSON."""
    folder = options.out or Path("runs") / "paper"
    checkpoints = sort_checkpoints(options.checkpoint, options.normalisation, options.padding)
    report = Report(folder, checkpoints, options.device, options.plots, lambda text: say(console, text))
    for path in options.data:
        report.add_set(path)
    write_json(folder / "paper.json", {"versions": provenance(), **report.finish()})
    write_text(folder / "paper.md", report.markdown())
    say(console, f"report: {folder / 'paper.md'}, numbers: {folder / 'paper.json'}")


# --- what the commands share -----------------------------------------------------------------------------------------


def open_all(options: argparse.Namespace, console: Console) -> tuple[ImageSet, dict, Network | None, Path]:
    """The split on its device, PMG's settings for it, the network if one is given, and the folder for the results."""
    with console.status(f"reading {options.data}"):
        names = {"points": options.points, "seed": options.seed, "device": options.device}
        data = evaluation.load_set(options.data, options.split, **names)
    pmg = pmg_of(options, data.dataset)
    network = open_network(options, lambda: (data.mean, data.std))
    return data, pmg, network, options.out or Path("runs") / f"{options.name}-{data.dataset}-{data.split}"


def pmg_of(options: argparse.Namespace, dataset: str) -> dict[str, float]:
    evaluation.at_least(0, radius=options.radius)
    return evaluation.pmg_settings(dataset, options.extent, options.half_width, options.alpha)


def open_network(options: argparse.Namespace, own: Callable[[], tuple[float, float]]) -> Network | None:
    if options.checkpoint is None:
        return None
    names = ("normalisation", "padding", "threshold", "device")
    return evaluation.load_network(options.checkpoint, own, **{name: getattr(options, name) for name in names})


def get_masks(
    options: argparse.Namespace, console: Console, data: ImageSet, pmg: dict, network: Network | None, folder: Path
) -> dict[str, torch.Tensor]:
    student = None
    if options.method == "learned" or options.student:
        with steps(console, "student") as advance:
            path = options.student or learned_student(data, folder / "student.safetensors", progress=advance, **pmg)
        student = Student.load(path, data.images.device)
    with bar(console, "masks", len(data)) as advance:
        more = (options.radius, advance, student, options.fusion)
        return evaluation.collect_masks(data, pmg, options.masks, network, *more)


def describe(options: argparse.Namespace, network: Network | None, pmg: dict) -> dict[str, Any]:
    """What every result says about how it came to be."""
    chosen = {name: value for name in SETTINGS if (value := getattr(options, name, None)) is not None}
    return {
        "command": options.name,
        "settings": pmg | {name: str(value) if isinstance(value, Path) else value for name, value in chosen.items()},
        "network": network and network.about(),
        "seed": options.seed,
        "device": options.device,
        "versions": provenance(),
    }


def save(path: Path, options: argparse.Namespace, console: Console, data: ImageSet, network: Any, pmg: dict, **results):
    source = {"data": options.data, "dataset": data.dataset, "split": data.split, "images": len(data)}
    write_json(path, source | describe(options, network, pmg) | results)
    say(console, f"numbers: {path}")


# --- options ---------------------------------------------------------------------------------------------------------


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    weights = "--checkpoint runs/NUAA-SIRST-acm-seed0/stage2.safetensors"
    add = adder(commands)

    one = add(masks, "--data data/NUDT-SIRST --points masks_coarse", split="train")
    one("--method", choices=METHODS, default="pmg", help="learned: also the masks of a student trained on PMG's")
    one("--student", type=Path, metavar="FILE", help="also the masks of a student trained before")
    one("--fusion", choices=FUSIONS, default="union", help="of initial mask and prediction: the paper's, or soft")
    one("--masks", nargs="*", default=[], metavar="FOLDER", help="also the masks NAME.png in these folders")

    one = add(detector, f"--data data/NUAA-SIRST {weights}", split="test")
    one("--point-prompt", action="store_true", help="correct the predictions by the points (Table 5)")

    one = add(sweep, "alpha --data data/NUAA-SIRST --values 0 0.15", split="train")
    one("setting", choices=[name.replace("_", "-") for name in evaluation.SWEEPS], help="what is varied")
    one("--values", nargs="+", type=float, help="its values (default: those of the paper's figures)")

    one = add(show, "--data data/NUAA-SIRST --pick worst --count 4", split="train")
    one("--method", choices=METHODS, default="pmg", help="learned: also the masks of a student trained on PMG's")
    one("--student", type=Path, metavar="FILE", help="also the masks of a student trained before")
    one("--fusion", choices=FUSIONS, default="union", help="of initial mask and prediction: the paper's, or soft")
    one("--masks", nargs="*", default=[], metavar="FOLDER", help="also the masks NAME.png in these folders")
    one("--pick", default="spread", choices=(*PICKS, "joined"), help="images by the IoU of the last mask, or those "
        "where one component covers two targets (default: %(default)s)")  # fmt: skip
    one("--names", nargs="+", metavar="NAME", help="these images instead")
    one("--count", type=int, default=6, help="images on the sheet (default: %(default)s)")
    one("--zoom", type=int, default=30, help="side of the enlarged part, pixels (default: %(default)s)")
    one("--whole", action="store_true", help="also every mask over the whole image")

    one = add(predict, f"frames/ {weights} --points clicks.csv --out frames_masks")
    one("images", nargs="*", help="image files and folders, 8 or 16 bits (default: embedded scenes)")
    one("--points", help="points that prompt: a file or folder of any supported format")
    one("--batch", type=int, default=16, help="images held at a time (default: %(default)s)")

    one = add(paper, "--data data/NUAA-SIRST data/NUDT-SIRST --checkpoint runs/*/stage*.safetensors", settings=False)
    one("--data", nargs="*", default=[], metavar="FOLDER", help="data sets, each a folder or a packed .h5")
    one("--checkpoint", nargs="*", default=[], metavar="[ROW=]FILE", help="our checkpoints, which know what they "
        "are; published weights as full=FILE or LESPS=FILE, after their row in Table 1")  # fmt: skip
    one("--normalisation", default="SIRST3", help="of published weights (default: %(default)s)")
    one("--padding", default="lesps", choices=PADDINGS, help="of published weights (default: %(default)s)")

    return parser.parse_args(arguments)


def adder(commands: Any) -> Callable[..., Callable[..., None]]:
    """Makes the parser of one command with the options that commands share; what it returns adds its own."""

    def add(command: Callable, example: str, *, split: str | None = None, settings: bool = True):
        name, text = command.__name__, command.__doc__
        example = f"example: python eval.py {name} {example}"  # raw, so that it stays on one line
        raw = argparse.RawDescriptionHelpFormatter
        one = commands.add_parser(name, help=text, description=text, epilog=example, formatter_class=raw)
        one.set_defaults(command=command, name=name)
        option = one.add_argument
        if split:
            option("--data", default=SYNTHETIC, help="a data set's folder, a packed .h5, or synthetic (the default)")
            option("--split", default=split, help="train, test or another list (default: %(default)s)")
            option("--points", default="masks_centroid", help="masks_centroid (the default), masks_coarse, or a path")
        if settings:
            option("--extent", type=int, help="L_ep of P2B, pixels (default: 10 for NUDT-SIRST, 25 for other sets)")
            option("--half-width", type=int, default=4, help="L_dp of P2B, pixels (default: %(default)s)")
            option("--alpha", type=float, default=0.15, help="weight of the point in B2M (default: %(default)s)")
            option("--radius", type=int, default=30, help="r of FAF, pixels (default: %(default)s)")
            option(
                "--checkpoint", type=Path, required=command is detector, help="our .safetensors or published weights"
            )
            option("--normalisation", default="auto", help="auto (the checkpoint's, else the data's), SIRST3, MEAN,STD")
            option("--padding", default="least", choices=PADDINGS, help="lesps for published LESPS weights")
            option("--threshold", type=float, default=0.5, help="probability above which a pixel is target")
        if command in (detector, sweep, paper):
            option("--no-plots", dest="plots", action="store_false", help="no curves, so no matplotlib")
        option("--out", type=Path, metavar="FOLDER", help="for the results (default: runs/COMMAND-DATASET-SPLIT)")
        option("--seed", type=int, default=0, help="of the synthetic scenes (default: %(default)s)")
        option("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
        option("--threads", type=int, help="CPU threads (default: PyTorch's)")
        return option

    return add


if __name__ == "__main__":
    sys.exit(main())
