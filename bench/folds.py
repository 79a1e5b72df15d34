"""Compare settings of train.py without the test set: python -m bench.folds --data FOLDER --out FOLDER -- OPTIONS

The training images are dealt into folds. Each fold in turn is held out: train.py runs stage 1, or both stages, on the
others with the OPTIONS, which may be any of its own, and its last network is measured on the fold. Counts of the folds
are added up. Labels come from points; the held-out images are measured by their ground truth.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

import train
from hmg_gpu.common.checks import at_least
from hmg_gpu.common.console import tell_error
from hmg_gpu.common.errors import HMGError, InputError
from hmg_gpu.common.files import write_json
from hmg_gpu.data.folder import find_list
from hmg_gpu.evaluation.runs import read_run
from hmg_gpu.training.recipes import complete

COUNTS = ("intersection", "union", "matched", "targets", "false_alarm_pixels", "pixels")


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    cut = argv.index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a data set's folder, with ground truth")
    parser.add_argument("--out", type=Path, required=True, help="folder for the folds and the runs")
    parser.add_argument("--folds", type=int, default=3, help="that the images are dealt into (default: %(default)s)")
    parser.add_argument("--take", type=int, help="how many of them are held out, one after another (default: all)")
    parser.add_argument("--stages", type=int, choices=(1, 2), default=1, help="to train (default: %(default)s)")
    parser.add_argument("--epochs", type=int, help="of each stage (default: the network's recipe)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to this file")
    options, more = parser.parse_args(argv[:cut]), argv[cut + 1 :]
    console = Console(width=None if sys.stdout.isatty() else 120)
    try:
        at_least(1, take=1 if options.take is None else options.take)
        roots = deal(options.data, options.out, options.folds)[: options.take]
        runs = [run(root, options.stages, options.epochs, more) for root in roots]
    except HMGError as error:
        return tell_error(error)
    parts = [run["results"][f"stage {options.stages}"] for run in runs]
    total = {name: sum(part[name] for part in parts) for name in COUNTS}
    table = Table(title=f"{options.data.name}, {' '.join(more) or 'the defaults'}")
    for heading in ("held out", "IoU %", "Pd %", "Fa 1e-6"):
        table.add_column(heading, justify="right")
    for name, counts in [*((f"fold {fold}", part) for fold, part in enumerate(parts)), ("together", total)]:
        iou, pd = counts["intersection"] / counts["union"], counts["matched"] / counts["targets"]
        fa = counts["false_alarm_pixels"] / counts["pixels"]
        table.add_row(name, f"{100 * iou:.2f}", f"{100 * pd:.2f}", f"{1e6 * fa:.1f}")
    console.print(table)
    if options.json:
        about = {key: runs[0][key] for key in ("settings", "versions", "machine")}
        write_json(options.json, about | {"options": more, "folds": parts, "together": total})
    return 0


def deal(data: Path, out: Path, count: int) -> list[Path]:
    """Data sets of the same name in which one fold of the training images is the test set; images are links.

    Raises:
        InputError: fewer than two folds, or fewer images than folds.
    """
    names = find_list(data, "train").read_text(encoding="utf-8").split()
    if not 2 <= count <= len(names):
        raise InputError(f"--folds {count}: expected 2 to {len(names)}, the number of training images")
    random.Random(0).shuffle(names)
    roots = []
    for fold in range(count):
        held = names[fold::count]
        root = out / f"fold{fold}" / data.resolve().name
        (root / "img_idx").mkdir(parents=True, exist_ok=True)
        for folder in data.iterdir():
            link = root / folder.name
            if folder.is_dir() and not link.exists():
                link.symlink_to(folder.resolve())
        for split, part in (("train", [name for name in names if name not in set(held)]), ("test", held)):
            (root / "img_idx" / f"{split}_{root.name}.txt").write_text("\n".join(part) + "\n", encoding="utf-8")
        roots.append(root)
    return roots


def run(root: Path, stages: int, epochs: int | None, more: Sequence[str]) -> dict:
    """Stage 1, or both, on one fold's training images; what train.py says of it.

    Raises:
        InputError: train.py refused or was stopped.
    """
    folder = root.parent / "run"
    chosen = train.parse(["--data", str(root), *more])
    wanted = {"data": str(root)} | ({"model": chosen.model} if chosen.model else {})
    both = [epochs or number for number in complete(wanted).epochs]
    numbers = map(str, (both[0], both[1] if stages == 2 else 0))
    if train.main(["--data", str(root), "--epochs", *numbers, "--out", str(folder), *more]):
        raise InputError(f"{folder}: train.py did not end; its own message says why")
    return read_run(folder)


if __name__ == "__main__":
    sys.exit(main())
