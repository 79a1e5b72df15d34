"""What a command shows while it works, and how it ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from hmg_gpu.common.errors import HMGError
from hmg_gpu.common.locks import one_writer
from hmg_gpu.common.parallel import who


def tell_error(error: HMGError) -> int:
    """Print an error as one line on stderr and give the exit code for it: 2."""
    # as Text: brackets in a path are no markup
    Console(stderr=True).print(Text.assemble(("error:", "bold red"), f" {who()}{error}"), soft_wrap=True)
    return 2


def say(console: Console, text: str) -> None:
    """A line as it is: brackets in a path are no markup, and it is never wrapped."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def hold(held: ExitStack, path: Path, console: Console) -> None:
    """Keep a folder or file for this process alone until ``held`` ends; see :func:`hmg_gpu.common.locks.one_writer`."""
    held.enter_context(one_writer(path, lambda text: say(console, text)))


@contextmanager
def bar(console: Console, text: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar: ``with bar(console, "predicting", 100) as advance: advance(1)``."""
    columns = (TextColumn(text), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=total)
        yield lambda count: progress.advance(task, count)


@contextmanager
def steps(console: Console, text: str) -> Iterator[Callable[[int, int], None]]:
    """As :func:`bar` where the total comes with each call: ``advance(3, 100)``; nothing is shown before the first."""
    columns = (TextColumn(text), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    progress = Progress(*columns, console=console, transient=True)
    task = progress.add_task("", total=None)

    def advance(done: int, total: int) -> None:
        progress.start()
        progress.update(task, completed=done, total=total)

    try:
        yield advance
    finally:
        if progress.live.is_started:
            progress.stop()


def some_names(names: Sequence[str], bare: bool = False) -> str:
    """A count and the first few names."""
    shown = ", ".join(names[:3]) + (" ..." if len(names) > 3 else "")
    return shown if bare else f"{len(names)}" + (f" ({shown})" if names else "")
