"""What a run shows and leaves behind besides its checkpoints: progress, log, pictures, masks and tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from hmg_gpu.common.checksums import write_sealed_json
from hmg_gpu.common.errors import InputError
from hmg_gpu.common.files import append_text, finite, parse_json, remove_parts, write_text
from hmg_gpu.common.provenance import peak_memory_gb
from hmg_gpu.data import ImageSet, write_mask
from hmg_gpu.evaluation.pictures import draw_sheet, pick_examples
from hmg_gpu.evaluation.tables import mask_table, metrics_line
from hmg_gpu.training.loop import Training
from hmg_gpu.training.settings import Settings
from hmg_gpu.training.state import PREVIOUS, recover
from hmg_gpu.training.watch import verdict


class Screen:
    """Progress bar, log file and pictures, fed by the events of a ``Training``."""

    def __init__(self, console: Console, folder: Path, settings: Settings, train: ImageSet, test: ImageSet | None):
        self.console, self.folder, self.settings, self.train, self.test = console, folder, settings, train, test
        self.progress = Progress(  # fits into 80 columns
            TextColumn("{task.description}"),
            BarColumn(12),
            TextColumn("{task.percentage:3.0f} %"),
            TextColumn("{task.fields[numbers]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=False),
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
        epochs = self.settings.epochs[event["stage"] - 1]
        numbers = f"{event['epoch']}/{epochs} loss {event['loss']:.3f} IoU {100 * event['iou']:.1f}"
        self.progress.update(self.tasks[event["stage"] - 1], numbers=numbers)
        self.write(event)

    def on_note(self, event: dict[str, Any]) -> None:
        self.console.print(Text(event["text"]), soft_wrap=True)

    def on_message(self, event: dict[str, Any]) -> None:
        self.console.print(Text(event["text"], "yellow"), soft_wrap=True)
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
        """Drop log lines beyond the resumed position, and lines that a crash cut off or something damaged."""
        if not self.log.exists():
            return
        kept = []
        for line in self.log.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                event = parse_json(line)
                if (event.get("stage", 1) - 1, event.get("epoch", 0)) <= (stage, epoch):
                    kept.append(line)
            except (ValueError, AttributeError, TypeError):  # not what write() writes
                continue
        write_text(self.log, "".join(line + "\n" for line in kept))


def take_up(folder: Path) -> str | None:
    """Clear away what a killed run left half-written; a damaged newest checkpoint gives way to the one before it.

    Returns:
        What was skipped, in words, or None.
    """
    if folder.is_dir():
        remove_parts(folder)
    return recover(folder / "last.safetensors")


def check_empty(folder: Path) -> None:
    """Refuse a folder that holds a run or the rest of one."""
    if (folder / "last.safetensors").exists():
        raise InputError(f"{folder}: holds a run already; go on with --resume {folder}, or choose another --out")
    for name in ("settings.json", "log.jsonl", "results.json"):
        if (folder / name).exists():
            raise InputError(f"{folder}: holds {name} but no checkpoint; remove the folder or choose another --out")


def finish(console: Console, training: Training, seconds: float, *, resumed: bool = False) -> None:
    """Write the corrected masks and the results of a run, and print its tables; ``seconds`` are of this process."""
    folder, train, results, settings = training.folder, training.train, training.results, training.settings
    corrected = settings.supervision == "points"
    for index, (name, (height, width)) in enumerate(zip(train.names, train.host_sizes.tolist(), strict=True)):
        if corrected:
            write_mask(folder / "masks_hybrid" / f"{name}.png", training.masks[index, :height, :width].cpu())
    summary = training.describe() | {"seconds": seconds, "peak_memory_gb": peak_memory_gb()}
    write_sealed_json(folder / "results.json", summary)
    (folder / PREVIOUS).unlink(missing_ok=True)
    if "masks" in results:
        title = f"Masks of the {len(train)} training images, at the stage border"
        console.print(mask_table(title, results["masks"]))
    if tests := {name: results[name] for name in ("stage 1", "stage 2") if name in results}:
        console.print(mask_table("Network on the test images (last epoch of each stage)", tests))
    # Masks that are updated every few epochs changed after they were measured.
    if not settings.update_every and (words := verdict(results, settings)):
        console.print(Text(words, "yellow"), soft_wrap=True)
    weights = ", ".join(f"stage{number}.safetensors" for number in (1, 2) if settings.epochs[number - 1])
    since = " since the resume" if resumed else ""
    console.print(
        f"{seconds / 60:.1f} min{since}, peak memory {summary['peak_memory_gb']:.2f} GB. In {folder}: sheets/*.png, "
        f"{'masks_hybrid/*.png, ' if corrected else ''}{weights}, log.jsonl, results.json",
        highlight=False,
        markup=False,
    )
