"""Measure masks and detectors as the paper does, on its data sets or your own, and predict masks for any images.

python eval.py COMMAND --help shows the options of a command and an example. Without --data a command runs on embedded
synthetic scenes. Results go to --out as JSON (with data set, settings, normalisation, seed, commit and versions).
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import torch
from rich.console import Console

from hmg_gpu.commands.evaluation import Inputs, add_command, fit_makers, open_inputs, settings_of
from hmg_gpu.commands.inputs import open_images
from hmg_gpu.commands.options import make_correction, make_makers, make_network
from hmg_gpu.common.checks import at_least, usable_device
from hmg_gpu.common.console import bar, hold, say, tell_error
from hmg_gpu.common.errors import HMGError, InputError
from hmg_gpu.common.files import write_json, write_text
from hmg_gpu.common.provenance import provenance
from hmg_gpu.data import write_mask
from hmg_gpu.evaluation import masks as evaluation
from hmg_gpu.evaluation.compare import compare_maker, compare_markdown, compare_tables, over_sides
from hmg_gpu.evaluation.detector import measure_detector, predict_masks
from hmg_gpu.evaluation.paper import Report, paper_points, sort_checkpoints
from hmg_gpu.evaluation.pictures import PICKS, draw_sheet
from hmg_gpu.evaluation.plots import plot_detector, plot_sides, plot_sweep, require_matplotlib
from hmg_gpu.evaluation.runs import read_run, runs_markdown, runs_rows, runs_tables
from hmg_gpu.evaluation.tables import lost_in_words, mask_table, size_table, sweep_csv, target_tables
from hmg_gpu.evaluation.targets import MEANING
from hmg_gpu.masks import make_maker
from hmg_gpu.models.predict import PADDINGS

CURVE = (0.01, 0.02, *(step / 20 for step in range(1, 20)), 0.98, 0.99)  # thresholds of the detector's curves


def masks(options: argparse.Namespace, console: Console) -> None:
    """Quality of initial masks on a split, by each maker of --masks; with --checkpoint of all the updating process."""
    inputs = open_inputs(options, console)
    evaluation.require_truth(inputs.data)
    found = collect(inputs, console)
    rows = evaluation.measure_masks(inputs.data, found, inputs.makers)
    console.print(mask_table(f"Masks of {inputs.title} ({len(inputs.data)} images, {options.points})", rows))
    console.print(size_table(rows))
    more = evaluation.measure_targets(inputs.data, found, inputs.makers, options.by)
    for table in target_tables(more):
        console.print(table)
    inputs.save("masks.json", console, rows=rows, **more)


def detector(options: argparse.Namespace, console: Console) -> None:
    """A checkpoint on a split: IoU, Pd and Fa at --threshold, and its curves over all thresholds as PNG."""
    if not options.point_prompt:
        options.points = None
    inputs = open_inputs(options, console, makers=options.point_prompt)
    evaluation.require_truth(inputs.data)
    thresholds = sorted({options.threshold} | set(CURVE if options.plots else ()))
    with bar(console, "predicting", len(inputs.data)) as advance:
        maker = inputs.maker if options.point_prompt else None
        settings = {"maker": maker, "rule": inputs.rule, "progress": advance}
        curve = measure_detector(inputs.network, inputs.data, thresholds, **settings)
    result = next(row for row in curve if row["threshold"] == options.threshold)
    name = "prompted" if options.point_prompt else "network"
    title = f"{options.checkpoint.name} on {inputs.title}, threshold {options.threshold}"
    console.print(mask_table(title, {name: result}, pixel_fa=True))
    say(console, lost_in_words(result["lost"]))
    inputs.save("detector.json", console, output=name, result=result, curve=curve)
    if options.plots:
        plot_detector(inputs.folder / "detector.png", curve, options.threshold, f"{title}: {name}")
        say(console, f"curves: {inputs.folder / 'detector.png'}")


def sweep(options: argparse.Namespace, console: Console) -> None:
    """IoU, Pd, Fa and IoU by target size over one setting: CSV, JSON, and a plot with the paper's points."""
    name = options.setting.replace("-", "_")
    (maker,) = make_makers(options)
    rule = make_correction(options, maker)
    by_rule = name in rule.settings()
    if not options.values and name not in evaluation.SWEEPS:
        raise InputError(f"no values are known for {name}; give --values")
    values = evaluation.check_values(rule if by_rule else maker, name, options.values or evaluation.SWEEPS[name])
    if by_rule and not options.checkpoint:
        raise InputError(f"a sweep over {name} corrects a network's predictions: give --checkpoint")
    inputs = open_inputs(options, console, makers=by_rule)
    if not by_rule:
        inputs.makers = [maker]  # each row says what became of it
    data = inputs.data
    evaluation.require_truth(data)
    if by_rule:
        with bar(console, "predicting", len(data)) as advance:
            evidence = evaluation.evidence_of(inputs.network, data, inputs.maker, rule, advance)
    with bar(console, name, len(values)) as advance:
        if by_rule:
            rows = evaluation.sweep_rule(data, name, values, rule, evidence, progress=advance)
        else:
            rows = evaluation.sweep_maker(data, name, values, maker, folder=inputs.folder, progress=advance)
    table = {f"{name} {row[name]:g}": row for row in rows}
    console.print(mask_table(f"{name} on {inputs.title} ({len(data)} images)", table))
    console.print(size_table(table))
    write_text(inputs.folder / f"{name}.csv", sweep_csv(name, rows))
    inputs.save(f"{name}.json", console, rows=rows)
    if options.plots:
        title = f"{'Filtered predictions' if by_rule else options.masks} on {inputs.title}"
        points = paper_points(name, data.dataset, data.split) if options.masks == "pmg" else []
        plot_sweep(inputs.folder / f"{name}.png", name, rows, f"{title} ({options.points})", points)
        say(console, f"plot: {inputs.folder / name}.png, table: {inputs.folder / name}.csv")


def show(options: argparse.Namespace, console: Console) -> None:
    """Masks side by side over the images, with IoU and an enlarged target: spread, worst, best, joined, or by name."""
    at_least(1, count=options.count, zoom=options.zoom)
    inputs = open_inputs(options, console)
    kinds = collect(inputs, console)
    last, mask = list(kinds.items())[-1]
    chosen = evaluation.choose_images(inputs.data, mask, options.pick, options.count, options.names)
    path = inputs.folder / f"{'names' if options.names else options.pick}.png"
    draw_sheet(path, inputs.data, kinds, chosen, zoom=options.zoom, whole=options.whole)
    say(console, f"{len(chosen)} images, judged by the {last} mask: {path}")


def compare(options: argparse.Namespace, console: Console) -> None:
    """Makers of masks side by side: quality, time, the published value of each, a sheet of pictures, Markdown."""
    inputs = open_inputs(options, console, makers=False)
    data, folder = inputs.data, inputs.folder
    evaluation.require_truth(data)
    seeds = options.seeds or [options.seed]
    by_seed = {seed: make_makers(options, seed) for seed in seeds}
    results = []
    with bar(console, "comparing", len(options.masks) * len(seeds)) as advance:
        for row, name in enumerate(options.masks):
            makers = {seed: makers[row] for seed, makers in by_seed.items()}
            results.append(compare_maker(data, name, makers, folder=folder, progress=advance))
    title = f"Masks of {inputs.title} ({len(data)} images, {len(data.points)} points, {options.points})"
    console.print(*compare_tables(title, results, data))
    masks = {result.name: result.mask for result in results}
    chosen = evaluation.choose_images(data, results[-1].mask, "spread", options.count, None)
    draw_sheet(folder / "compare.png", data, masks, chosen, whole=False)
    command = shlex.join(["python", "eval.py", *options.arguments])
    write_text(folder / "compare.md", compare_markdown(title, results, data, command))
    inputs.makers = [result.maker for result in results]
    sides = {}
    if options.sides:
        with bar(console, "sides", len(results)) as advance:
            for result in results:
                rows = over_sides(data, result.maker, options.sides)
                sides |= {result.name: rows} if rows else {}
                advance(1)
    inputs.save("compare.json", console, rows=[result.about(len(data.points)) for result in results], sides=sides)
    if sides and options.plots:
        plot_sides(folder / "sides.png", sides, title)
    say(console, f"table: {folder / 'compare.md'}, pictures: {folder / 'compare.png'}")


def runs(options: argparse.Namespace, console: Console) -> None:
    """Trained runs side by side, means over seeds, with the share of full supervision that each reaches."""
    folder = options.out or Path("runs") / "compared"
    hold(options.held, folder, console)
    rows = runs_rows(read_run(folder) for folder in options.folders)
    console.print(*runs_tables(rows))
    write_json(folder / "runs.json", {"rows": rows, "runs": [str(path) for path in options.folders]})
    write_text(folder / "runs.md", runs_markdown(rows))
    say(console, f"table: {folder / 'runs.md'}, numbers: {folder / 'runs.json'}")


def predict(options: argparse.Namespace, console: Console) -> None:
    """Masks for images without ground truth: by a checkpoint, by points (--masks), or by both (point prompt)."""
    if not options.checkpoint and not options.points:
        raise InputError("nothing to make masks from: give --checkpoint, or --points for PMG, or both")
    source = open_images(options.images, options.points, options.batch, options.seed)
    network = make_network(options, source.normalisation, options.device)
    folder = options.out or Path("runs") / f"predict-{source.dataset}"
    if any(path.resolve().parent == (folder / "masks").resolve() for path in source.paths):
        raise InputError(f"{folder / 'masks'}: holds the images themselves; choose another --out")
    hold(options.held, folder, console)
    makers = fit_makers(options, console, source, folder) if options.points else [None]
    rule = make_correction(options, makers[-1])
    started, pixels = time.perf_counter(), 0
    with bar(console, "predicting", len(source.names)) as advance:
        sets = (batch.to(options.device) for batch in source.batches(network and network.normalisation))
        for data, predicted in predict_masks(sets, network, makers[-1], rule):
            for name, (height, width), mask in zip(data.names, data.sizes.tolist(), predicted.cpu(), strict=True):
                write_mask(folder / "masks" / f"{name}.png", mask[:height, :width])
            pixels += int(data.sizes.prod(1).sum())
            advance(len(data))
    seconds = time.perf_counter() - started
    speed = {"images_per_second": len(source.names) / seconds, "megapixels_per_second": pixels / seconds / 1e6}
    about = {"dataset": source.dataset, "images": len(source.names)}
    about |= settings_of(options, network, [maker for maker in makers if maker], rule)
    write_json(folder / "predict.json", about | speed)
    say(console, f"{len(source.names)} masks in {folder / 'masks'}")
    rates = f"{speed['images_per_second']:.1f} images/s, {speed['megapixels_per_second']:.1f} Mpixel/s"
    say(console, f"{rates} on {options.device}, with reading and writing")


def paper(options: argparse.Namespace, console: Console) -> None:
    """Every table and figure of the paper that the data and checkpoints at hand allow: Markdown, PNG and JSON."""
    folder = options.out or Path("runs") / "paper"
    hold(options.held, folder, console)
    checkpoints = sort_checkpoints(options.checkpoint, options.normalisation, options.padding, options.model)
    makers = {name: make_maker(name, seed=options.seed) for name in options.masks}
    report = Report(folder, checkpoints, options.device, options.plots, lambda text: say(console, text), makers)
    for path in options.data:
        report.add_set(path)
    write_json(folder / "paper.json", {"versions": provenance(), **report.finish()})
    write_text(folder / "paper.md", report.markdown())
    say(console, f"report: {folder / 'paper.md'}, numbers: {folder / 'paper.json'}")


def collect(inputs: Inputs, console: Console) -> dict[str, torch.Tensor]:
    """All masks that the makers and the network give."""
    with bar(console, "masks", len(inputs.data)) as advance:
        return evaluation.collect_masks(inputs.data, inputs.makers, inputs.network, inputs.rule, advance)


# --- the command -----------------------------------------------------------------------------------------------------


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    weights = "--checkpoint runs/NUAA-SIRST-unet-seed0/stage2.safetensors"

    option = add_command(
        commands, masks, "--data data/NUDT-SIRST --masks pmg learned --by size reach", split="train", several=True
    )
    text = "also IoU and what is lost by class of targets, of the last mask: " + ", ".join(MEANING)
    option("--by", nargs="+", default=[], choices=[*MEANING], metavar="WHAT", help=text)

    option = add_command(commands, detector, f"--data data/NUAA-SIRST {weights}", split="test", plots=True)
    option("--point-prompt", action="store_true", help="correct the predictions by the points (Table 5)")

    option = add_command(commands, sweep, "alpha --data data/NUAA-SIRST --values 0 0.15", split="train", plots=True)
    option("setting", help="what is varied: a setting of the maker or the rule, such as extent, alpha, radius")
    option("--values", nargs="+", type=float, help="its values (default: those of the paper's figures)")

    example = "--data data/NUAA-SIRST --pick worst --count 4"
    option = add_command(commands, show, example, split="train", several=True)
    text = "images by the IoU of the last mask, or those where one component covers two targets (default: %(default)s)"
    option("--pick", default="spread", choices=(*PICKS, "joined"), help=text)
    option("--names", nargs="+", metavar="NAME", help="these images instead")
    option("--count", type=int, default=6, help="images on the sheet (default: %(default)s)")
    option("--zoom", type=int, default=30, help="side of the enlarged part, pixels (default: %(default)s)")
    option("--whole", action="store_true", help="also every mask over the whole image")

    example = "--data data/NUAA-SIRST --masks pmg learned mclc --seeds 0 1 2"
    option = add_command(commands, compare, example, split="train", several=True, plots=True)
    option("--seeds", nargs="+", type=int, help="one measurement each of makers that draw at random (default: --seed)")
    option("--count", type=int, default=6, help="images on the sheet (default: %(default)s)")
    option("--sides", nargs="+", type=int, metavar="PIXELS", help="also IoU over the side of the crop (Fig. 4)")

    option = add_command(commands, runs, "runs/NUAA-SIRST-unet-seed*", settings=False)
    option("folders", nargs="+", type=Path, metavar="RUN", help="folders of finished runs of train.py")

    option = add_command(commands, predict, f"frames/ {weights} --points clicks.csv --out frames_masks")
    option("images", nargs="*", help="image files and folders, 8 or 16 bits (default: embedded scenes)")
    option("--points", help="points that prompt: a file or folder of any supported format")
    option("--batch", type=int, default=16, help="images held at a time (default: %(default)s)")

    example = "--data data/NUAA-SIRST data/NUDT-SIRST --checkpoint runs/*/stage*.safetensors"
    option = add_command(commands, paper, example, settings=False, plots=True)
    option("--data", nargs="*", default=[], metavar="FOLDER", help="data sets, each a folder or a packed .h5")
    text = "other systems' rows of Tables 2 and 3, such as mclc mclc:crop=prior p2b-mclc com"
    option("--masks", nargs="*", default=[], metavar="MAKER", help=text)
    text = "our checkpoints, which know what they are; published weights as full=FILE or LESPS=FILE, after their row"
    option("--checkpoint", nargs="*", default=[], metavar="[ROW=]FILE", help=text)
    option("--model", metavar="FILE.py:Class", help="the network of checkpoints that were trained with one of your own")
    option("--normalisation", default="SIRST3", help="of published weights (default: %(default)s)")
    option("--padding", default="lesps", choices=PADDINGS, help="of published weights (default: %(default)s)")
    options = parser.parse_args(arguments)
    options.arguments = sys.argv[1:] if arguments is None else list(arguments)
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    try:
        if options.threads is not None:
            torch.set_num_threads(at_least(1, threads=options.threads))
        usable_device(options.device)
        if getattr(options, "plots", False):
            require_matplotlib()
        with ExitStack() as options.held:  # the output folder, for this process alone
            options.command(options, Console())
        return 0
    except HMGError as error:
        return tell_error(error)


if __name__ == "__main__":
    sys.exit(main())
