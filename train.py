"""Train a detector from one point per target (HMG, both stages): python train.py [--data FOLDER] [options].

Without --data it runs on embedded synthetic scenes. Ends with the table of the masks, the test metrics, and pictures.
On several GPUs: torchrun --nproc-per-node N train.py [options]; each process takes its part of every batch.
"""

from __future__ import annotations

import argparse
import re
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, fields
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.text import Text

from hmg_gpu.common.checks import usable_device
from hmg_gpu.common.console import hold, say, tell_error
from hmg_gpu.common.errors import HMGError, InputError
from hmg_gpu.common.files import write_json
from hmg_gpu.common.options import add_options
from hmg_gpu.common.parallel import Team, joined
from hmg_gpu.common.provenance import provenance
from hmg_gpu.data import ImageSet
from hmg_gpu.data.source import load_split
from hmg_gpu.models.checkpoints import quote, read_description
from hmg_gpu.models.custom import as_option, is_custom
from hmg_gpu.training import Settings, StopRequest, Training, recipes
from hmg_gpu.training.check import check_run
from hmg_gpu.training.estimate import expected_time
from hmg_gpu.training.screen import Screen, check_empty, finish, take_up
from hmg_gpu.training.state import check_data_of


def run(options: argparse.Namespace, console: Console, team: Team, held: ExitStack) -> int:
    """The method: initial masks, stage 1, correction, stage 2; ``held`` keeps the run's folder for this run alone."""
    device = prepare(options, team)
    if options.resume and options.resume.is_dir():
        team.first(lambda: hold(held, options.resume, console))
    settings, folder = choose_settings(options, console, team)
    started = time.perf_counter()
    train, test = load_data(settings, device, console)
    if folder is None:
        folder = options.out or Path("runs") / f"{train.dataset}-{model_title(settings)}-seed{settings.seed}"
        team.first(lambda: hold(held, folder, console))
        team.first(lambda: check_empty(folder))  # before this run's own files are there
    tell(console, settings, train, test, device, team)

    if options.check:
        return check(options, console, settings, train)
    if options.resume:  # before a student learns anew from data that changed
        check_data_of(folder / "last.safetensors", train, go_on=options.changed_data)
    with Screen(console, folder, settings, train, test) as screen:
        report = screen.report if team.rank == 0 else lambda event: None
        training = Training(settings, train, test, folder, report, team)  # points -> initial masks (Sec. 3.1)
        begin(options, training, screen, console)
        if expected := expected_time(training):
            say(console, expected)
        try:
            with stopped_by_signals(training) as received:
                training.train_stage(1)  # on the initial masks (Sec. 4)
                training.correct()  # predictions -> FAF -> MDR -> hybrid masks (Sec. 3.2)
                training.train_stage(2)  # on the hybrid masks
        except StopRequest as request:
            console.print(Text(str(request)), soft_wrap=True)
            # As shells and schedulers report a process that a signal ended; another rank may have been sent it.
            return 128 + (received or [signal.SIGTERM])[0]

    seconds = time.perf_counter() - started
    team.first(lambda: finish(console, training, seconds, resumed=bool(options.resume)))
    return 0


# --- what a run needs ------------------------------------------------------------------------------------------------


def prepare(options: argparse.Namespace, team: Team) -> torch.device:
    if options.threads is not None:
        if options.threads < 1:
            raise InputError(f"--threads {options.threads}: expected at least 1")
        torch.set_num_threads(options.threads)
    torch.set_flush_denormal(True)  # gradients far below float32's normal range carry nothing and slow the CPU down
    return usable_device(team.device(options.device))


def choose_settings(options: argparse.Namespace, console: Console, team: Team) -> tuple[Settings, Path | None]:
    """The settings of the command line, or of the run that is resumed or checked, and that run's folder."""
    given = {field.name: value for field in fields(Settings) if (value := getattr(options, field.name)) is not None}
    folder = options.resume or options.check
    if not folder:
        return recipes.complete(given), None
    option = "--resume" if options.resume else "--check"
    if given.keys() - {"model"} or options.out or (options.resume and options.check):
        raise InputError(f"{option} takes every setting from the run; leave out the other options")
    skipped = team.first(lambda: take_up(folder)) if options.resume else None
    if skipped:
        console.print(Text(skipped, "yellow"), soft_wrap=True)
    description = read_description(folder / "last.safetensors")
    if description is None:
        raise InputError(f"{folder}: holds no run of train.py")
    settings = description.get("settings")
    model = settings.get("model") if isinstance(settings, dict) else None
    if isinstance(model, str) and is_custom(model) and options.model != model:
        raise InputError(
            f"{folder}: its network is {quote(model)}, code that a run may not start by itself; if it is yours, add "
            f"{as_option(model)}"
        )
    if options.model not in (None, model):
        raise InputError(f"{option} takes every setting from the run; leave out the other options")
    return Settings.from_dict(settings), folder


def load_data(settings: Settings, device: torch.device, console: Console) -> tuple[ImageSet, ImageSet | None]:
    with console.status(f"reading {escape(settings.data)}"):
        points = settings.points if settings.supervision == "points" else None
        train = load_split(settings.data, "train", points=points).to(device)
        test = load_split(settings.data, "test", points=None, missing_ok=True)
    return train, None if test is None else test.to(device)


def tell(
    console: Console, settings: Settings, train: ImageSet, test: ImageSet | None, device: torch.device, team: Team
) -> None:
    console.print(
        f"[bold]{escape(train.dataset)}[/]: {len(train)} training images, {len(train.points)} points"
        + ("" if test is None else f"; {len(test)} test images")
        + f"; normalisation {train.mean:.2f} / {train.std:.2f}; {escape(settings.model)} on {device}, "
        + f"seed {settings.seed}"
        + (f"; {team.ranks} processes" if team.ranks > 1 else ""),
        highlight=False,
    )


def begin(options: argparse.Namespace, training: Training, screen: Screen, console: Console) -> None:
    """Take up the state of a resumed run, or note the settings of a new one."""
    if options.resume:
        training.resume(changed_data=options.changed_data)
        for text in training.data_changed:
            console.print(Text(f"the data changed since the run began: {text}", "yellow"), soft_wrap=True)
        training.team.first(lambda: screen.forget_after(training.stage, training.epoch))
        place = f"stage {training.stage + 1}, epoch {training.epoch + 1}, step {training.step}"
        console.print(f"resumed at {place}")
    else:
        about = {"settings": asdict(training.settings), "versions": provenance()}
        training.team.first(lambda: write_json(training.folder / "settings.json", about))


def check(options: argparse.Namespace, console: Console, settings: Settings, train: ImageSet) -> int:
    """Say whether the first epoch of a run comes out the same here."""

    def report(event: dict[str, object]) -> None:
        if event["event"] == "note":
            say(console, event["text"])

    with console.status("training the first epoch"):
        found = check_run(options.check, settings, train, report)
    for text in found:
        say(console, text)
    say(console, "the first epoch differs" if found else "the first epoch comes out the same, bit for bit")
    return int(bool(found))


@contextmanager
def stopped_by_signals(training: Training) -> Iterator[list[int]]:
    """Ctrl-C and SIGTERM ask the run to stop at its next step; yields the numbers of the signals received."""
    received: list[int] = []

    def stop(number: int, _: object) -> None:
        received.append(number)
        training.stop = True

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def model_title(settings: Settings) -> str:
    if is_custom(settings.model):
        return settings.model.rpartition(":")[2]
    return re.sub(r"[^a-z0-9-]+", "-", settings.model)


# --- the command -----------------------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    try:
        with joined() as team, ExitStack() as held:
            return run(options, Console(quiet=team.rank > 0), team, held)
    except HMGError as error:
        return tell_error(error)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=recipes.in_words(), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(parser, Settings, unset=True)
    parser.add_argument("--out", type=Path, help="folder of the run (default: runs/DATASET-MODEL-seedN)")
    parser.add_argument("--resume", type=Path, metavar="FOLDER", help="go on with the run in FOLDER, with its settings")
    text = "train the first epoch of the run in FOLDER again, and say whether it is the same and if not what differs"
    parser.add_argument("--check", type=Path, metavar="FOLDER", help=text)
    text = "with --resume: go on with points or pixels that changed since the run began; results say so"
    parser.add_argument("--changed-data", action="store_true", help=text)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
