"""Train a detector from one point per target (HMG, both stages): python train.py [--data FOLDER] [options].

Without --data it runs on embedded synthetic scenes. Ends with the table of the masks, the test metrics, and pictures.
On several GPUs: torchrun --nproc-per-node N train.py [options]; each process takes its part of every batch.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from hmg_gpu.checkpoints import PREVIOUS, read_description, recover
from hmg_gpu.checks import usable_device
from hmg_gpu.data import write_mask
from hmg_gpu.data.source import default_extent, load_split
from hmg_gpu.drawing import draw_sheet, pick_examples
from hmg_gpu.errors import HMGError, InputError
from hmg_gpu.files import append_text, finite, remove_parts, write_json, write_text
from hmg_gpu.parallel import Team, joined, who
from hmg_gpu.provenance import provenance
from hmg_gpu.report import mask_table, metrics_line, peak_memory_gb
from hmg_gpu.training import Settings, StopRequest, Training

SYNTHETIC = {"epochs": (60, 40), "patch_size": 128, "eval_every": 20}  # what the embedded scenes ask for
HELP = {
    "data": "a data set's folder (images/, masks_centroid/, img_idx/; masks/ if there are), a packed .h5, or synthetic",
    "points": "folder of point labels inside the data set: masks_centroid or masks_coarse",
    "supervision": "points (HMG) or full (ground truth: the upper bound)",
    "initial": "initial masks by pmg (the paper), or learned: by a small network that learns from PMG's masks first",
    "extent": "L_ep of P2B, pixels; by default 10 for NUDT-SIRST and 25 for other sets",
    "half_width": "L_dp of P2B, pixels",
    "alpha": "weight of the point's intensity in B2M",
    "radius": "r of FAF, pixels",
    "fusion": "union of initial mask and filtered prediction (the paper), or soft: by their probabilities",
    "model": "acm or dnanet",
    "output_bias": "logit that the output layer starts from (-4: 2 %% foreground); 0 for an even start",
    "loss": "soft-IoU averaged over the images, or summed over the batch",
    "epochs": "epochs of stage 1 and of stage 2 (0: none)",
    "stage2": "continue with stage 1's weights or start from scratch",
    "update_every": "0: correct the masks once, after stage 1 (the paper); N: also every N epochs of stage 2",
    "bf16": "autocast to bfloat16",
    "step": "eager, compile (torch.compile) or graph (CUDA graph)",
    "eval_every": "epochs between looks at the test set",
    "save_every": "epochs between checkpoints",
}


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    try:
        with joined() as team:
            return run(options, Console(quiet=team.rank > 0), team)
    except HMGError as error:
        # as Text: brackets in a path are no markup
        Console(stderr=True).print(Text.assemble(("error:", "bold red"), f" {who()}{error}"), soft_wrap=True)
        return 2


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in fields(Settings):
        flag, default = "--" + field.name.replace("_", "-"), field.default
        text = f"{HELP.get(field.name, field.name.replace('_', ' '))} (default: {default})"
        if field.name == "extent":
            parser.add_argument(flag, type=int, help=HELP["extent"])
        elif isinstance(default, bool):
            parser.add_argument(flag, action="store_const", const=True, help=text)
        elif isinstance(default, tuple):
            parser.add_argument(flag, type=int, nargs=2, metavar=("STAGE1", "STAGE2"), help=text)
        else:
            parser.add_argument(flag, type=type(default), help=text)
    parser.add_argument("--out", type=Path, help="folder of the run (default: runs/DATASET-MODEL-seedN)")
    parser.add_argument("--resume", type=Path, metavar="FOLDER", help="go on with the run in FOLDER, with its settings")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's)")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace, console: Console, team: Team) -> int:
    if options.threads is not None:
        if options.threads < 1:
            raise InputError(f"--threads {options.threads}: expected at least 1")
        torch.set_num_threads(options.threads)
    device = usable_device(team.device(options.device))
    # Gradients far below float32's normal range carry nothing and slow the CPU down.
    torch.set_flush_denormal(True)
    given = {f.name: value for f in fields(Settings) if (value := getattr(options, f.name)) is not None}
    if options.resume:
        if given or options.out:
            raise InputError("--resume takes every setting from the run; leave out the other options")
        folder = options.resume
        skipped = team.first(lambda: take_up(folder))
        if skipped:
            console.print(Text(skipped, "yellow"), soft_wrap=True)
        description = read_description(folder / "last.safetensors")
        if description is None:
            raise InputError(f"{folder}: holds no run of train.py")
        settings = Settings.from_dict(description.get("settings"))
    else:
        defaults = SYNTHETIC if given.get("data", "synthetic") == "synthetic" else {}
        settings = Settings(**(defaults | given))

    started = time.perf_counter()
    with console.status(f"reading {escape(settings.data)}"):
        points = settings.points if settings.supervision == "points" else None
        train = load_split(settings.data, "train", points=points, seed=0).to(device)
        test = load_split(settings.data, "test", points=None, seed=0, missing_ok=True)
        test = None if test is None else test.to(device)
    if not options.resume:
        if options.extent is None:
            settings.extent = default_extent(train.dataset)
        folder = options.out or Path("runs") / f"{train.dataset}-{settings.model}-seed{settings.seed}"
        team.first(lambda: check_empty(folder))  # before this run's own files are there
    console.print(
        f"[bold]{escape(train.dataset)}[/]: {len(train)} training images, {len(train.points)} points"
        + ("" if test is None else f"; {len(test)} test images")
        + f"; normalisation {train.mean:.2f} / {train.std:.2f}; {settings.model} on {device}, seed {settings.seed}"
        + (f"; {team.ranks} processes" if team.ranks > 1 else ""),
        highlight=False,
    )

    with Screen(console, folder, settings, train, test) as screen:
        first = team.rank == 0
        training = Training(settings, train, test, folder, screen.report if first else lambda event: None, team)
        if options.resume:
            training.resume()
            team.first(lambda: screen.forget_after(training.stage, training.epoch))
            console.print(f"resumed at stage {training.stage + 1}, epoch {training.epoch + 1}, step {training.step}")
        else:
            about = {"settings": asdict(settings), "versions": provenance()}
            team.first(lambda: write_json(folder / "settings.json", about))
        received: list[int] = []

        def stop(number: int, _: object) -> None:
            received.append(number)
            training.stop = True

        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            results = training.run()
        except StopRequest as request:
            console.print(Text(str(request)), soft_wrap=True)
            # As shells and schedulers report a process that a signal ended; another rank may have been sent it.
            return 128 + (received or [signal.SIGTERM])[0]
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    seconds = time.perf_counter() - started
    team.first(lambda: finish(console, folder, settings, train, training, results, seconds))
    return 0


def take_up(folder: Path) -> str | None:
    """Clear away what a killed run left half-written; a damaged newest checkpoint gives way to the one before it."""
    if folder.is_dir():
        remove_parts(folder)
    return recover(folder / "last.safetensors")


def check_empty(folder: Path) -> None:
    """Refuse a folder that holds a run or the rest of one."""
    if (folder / "last.safetensors").exists():
        raise InputError(f"{folder}: holds a run already; go on with --resume {folder}, or choose another --out")
    if there := [name for name in ("settings.json", "log.jsonl", "results.json") if (folder / name).exists()]:
        raise InputError(f"{folder}: holds {there[0]} but no checkpoint; remove the folder or choose another --out")


def finish(
    console: Console,
    folder: Path,
    settings: Settings,
    train: Any,
    training: Training,
    results: dict[str, Any],
    seconds: float,
) -> None:
    """Write the corrected masks and the results, and print the tables."""
    corrected = settings.supervision == "points"
    for index, name in enumerate(train.names if corrected else ()):
        height, width = train.sizes[index].tolist()
        write_mask(folder / "masks_hybrid" / f"{name}.png", training.masks[index, :height, :width].cpu())
    summary = training.describe() | {"seconds": seconds, "peak_memory_gb": peak_memory_gb()}
    write_json(folder / "results.json", summary)
    (folder / PREVIOUS).unlink(missing_ok=True)
    if "masks" in results:
        console.print(mask_table(f"Masks of the {len(train)} training images", results["masks"]))
    tests = {name: results[name] for name in ("stage 1", "stage 2") if name in results}
    if tests:
        console.print(mask_table("Network on the test images (last epoch of each stage)", tests))
    weights = ", ".join(f"stage{number}.safetensors" for number in (1, 2) if settings.epochs[number - 1])
    console.print(
        f"{seconds / 60:.1f} min, peak memory {summary['peak_memory_gb']:.2f} GB. In {folder}: sheets/*.png, "
        f"{'masks_hybrid/*.png, ' if corrected else ''}{weights}, log.jsonl, results.json",
        highlight=False,
        markup=False,
    )


class Screen:
    """Progress bar, log file and pictures, fed by the events of a ``Training``."""

    def __init__(self, console: Console, folder: Path, settings: Settings, train: Any, test: Any):
        self.console, self.folder, self.settings, self.train, self.test = console, folder, settings, train, test
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
        )
        self.tasks = {
            stage: self.progress.add_task(f"stage {stage + 1}", total=None, numbers="", start=False, visible=False)
            for stage in (0, 1)
        }
        self.student: TaskID | None = None
        self.log = folder / "log.jsonl"

    def __enter__(self) -> Screen:
        self.progress.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.progress.__exit__(*error)

    def report(self, event: dict[str, Any]) -> None:
        getattr(self, "on_" + event["event"])(event)

    def on_step(self, event: dict[str, Any]) -> None:
        task = self.tasks[event["stage"]]
        done, total = event["epoch"] * event["of"] + event["step"], self.settings.epochs[event["stage"]] * event["of"]
        self.progress.start_task(task)
        self.progress.update(task, completed=done, total=total, visible=True)

    def on_student(self, event: dict[str, Any]) -> None:
        if self.student is None:
            self.student = self.progress.add_task("student", total=event["of"], numbers="")
        self.progress.update(self.student, completed=event["step"])

    def on_epoch(self, event: dict[str, Any]) -> None:
        numbers = f"epoch {event['epoch']} loss {event['loss']:.3f} IoU {100 * event['iou']:.1f} %"
        self.progress.update(
            self.tasks[event["stage"] - 1], numbers=f"{numbers} {event['images_per_second']:.0f} images/s"
        )
        self.write(event)

    def on_message(self, event: dict[str, Any]) -> None:
        self.console.print(f"[yellow]{event['text']}[/]", highlight=False)
        self.write(event)

    def on_test(self, event: dict[str, Any]) -> None:
        prediction = event.pop("prediction", None)
        self.console.print(
            f"stage {event['stage']} epoch {event['epoch']} test: {metrics_line(event)}", highlight=False
        )
        self.write(event)
        if prediction is not None:
            examples = pick_examples(self.test, prediction, 6)
            sheet = self.folder / "sheets" / f"test_stage{event['stage']}.png"
            draw_sheet(sheet, self.test, {"prediction": prediction}, examples, whole=False)

    def on_masks(self, event: dict[str, Any]) -> None:
        masks = event["masks"]
        examples = pick_examples(self.train, masks["hybrid"], 6)
        draw_sheet(self.folder / "sheets" / "train_masks.png", self.train, masks, examples, whole=False)
        if event["metrics"]:
            self.console.print(mask_table("Masks on the training images at the stage border", event["metrics"]))
        self.write({name: value for name, value in event.items() if name != "masks"})

    def write(self, event: dict[str, Any]) -> None:
        append_text(self.log, json.dumps(finite(event)) + "\n")

    def forget_after(self, stage: int, epoch: int) -> None:
        """Drop log lines beyond the resumed position, and a last line that a crash cut off."""
        if not self.log.exists():
            return
        kept = []
        for line in self.log.read_text(encoding="utf-8").splitlines():
            try:
                event = json.loads(line)
            except ValueError:
                continue
            position = (event.get("stage", 1) - 1, event.get("epoch", 0))
            if position <= (stage, epoch):
                kept.append(line)
        write_text(self.log, "".join(line + "\n" for line in kept))


if __name__ == "__main__":
    sys.exit(main())
