"""Makers of initial masks against the per-target loops that they replace: python -m bench.makers [--maker NAME ...]

Both run in turn in one process on the same points, so the figure to quote is the ratio. IoU stands beside it: the two
may draw other random numbers, so masks are alike and not equal. `eval.py compare` measures makers without their loops.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bench.__main__ import machine
from bench.loops import com_loop, com_script_loop, lelcm_loop, mclc_loop, over_images
from bench.peers import installed
from bench.timer import time_together
from hmg_gpu.common.console import tell_error
from hmg_gpu.common.errors import HMGError, InputError
from hmg_gpu.common.files import write_json
from hmg_gpu.common.provenance import provenance
from hmg_gpu.data import ImageSet
from hmg_gpu.data.source import SYNTHETIC, load_split
from hmg_gpu.evaluation.metrics import measure
from hmg_gpu.masks import make_maker

NUAA = "NUAA-SIRST"


@dataclass(frozen=True)
class Race:
    """A maker and the loop that does the same.

    Attributes:
        maker: as --masks takes it.
        loop: makes the masks of a set, one target at a time. what: it is, in words.
        packages: that the loop needs.
        goal: the least ratio asked for.
    """

    maker: str
    loop: Callable[[ImageSet], Tensor]
    what: str
    packages: Sequence[str] = ()
    goal: float = 20


RACES = {
    "mclc": Race("mclc", mclc_loop, "scikit-image slic and a NumPy CRF, target by target", ("skimage",)),
    "lelcm": Race("lelcm", over_images(lelcm_loop), "NumPy, target by target", goal=10),
    "com": Race("com", over_images(com_script_loop), "the computation of its script"),
    "com, the same computation": Race("com", over_images(com_loop), "NumPy, target by target"),
    "com faithful": Race("com:faithful=true", over_images(com_script_loop), "the computation of its script"),
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.makers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    option = parser.add_argument
    option("--maker", nargs="+", choices=RACES, default=list(RACES), help="that race their loops (default: all)")
    option("--data", nargs="+", help=f"sets, folders of HMG_DATA among them (default: {NUAA}, else {SYNTHETIC})")
    option("--images", type=int, help="that a loop takes, the first with points (default: all)")
    option("--rounds", type=int, default=3, help="in which maker and loop take turns (default: %(default)s)")
    option("--threads", type=int, default=1, help="of PyTorch (default: %(default)s)")
    option("--device", default="cpu", help="of the maker (default: %(default)s)")
    option("--json", type=Path, metavar="FILE", help="write the figures to this file")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    torch.set_flush_denormal(True)
    console = Console(width=None if sys.stdout.isatty() else 150)
    try:
        rows: list[dict[str, Any]] = []
        for data in map(load, options.data or [NUAA if "HMG_DATA" in os.environ else SYNTHETIC]):
            rows += [run(name, data, options) for name in options.maker]
        if options.json:
            about = machine("cuda" if options.device.startswith("cuda") else None)
            write_json(options.json, {"machine": about, "versions": provenance(), "rows": rows})
    except HMGError as error:
        return tell_error(error)
    console.print(table(rows))
    return 0


def load(name: str) -> ImageSet:
    """The training images of a set: a folder of HMG_DATA, or what --data of the commands takes."""
    folder = Path(os.environ.get("HMG_DATA", "")) / name
    return load_split(str(folder) if folder.is_dir() else name, "train")


def run(name: str, data: ImageSet, options: argparse.Namespace) -> dict[str, Any]:
    """Time one maker and its loop in turn, and measure the masks of both."""
    race = RACES[name]
    if why := installed(*race.packages):
        raise InputError(f"{name}: {why}; pip install -e '.[test]'")
    some = data
    if options.images is not None:
        some = data.subset(data.points[:, 0].unique()[: options.images])
    moved = data.to(options.device)
    maker = make_maker(race.maker).fit(moved)
    ours, theirs = maker.masks(moved).cpu(), race.loop(some)
    calls = {"maker": lambda: maker.masks(moved), "loop": lambda: race.loop(some)}
    on_gpu = ["maker"] if options.device.startswith("cuda") else []
    timings = time_together(calls, seconds=0, least=options.rounds, on_gpu=on_gpu)
    points = {"maker": len(data.points), "loop": len(some.points)}
    result = {
        key: {"points": points[key], "points_per_second": points[key] / timings[key].median, **asdict(timings[key])}
        for key in calls
    }
    result["maker"]["iou"], result["loop"]["iou"] = measure(ours, data)["iou"], measure(theirs, some)["iou"]
    ratio = result["maker"]["points_per_second"] / result["loop"]["points_per_second"]
    about = {"name": name, "set": data.dataset, "what": race.what, "settings": maker.about(), "device": options.device}
    return about | result | {"ratio": ratio, "goal": race.goal, "threads": options.threads, "load": os.getloadavg()[0]}


def table(rows: Sequence[dict[str, Any]]) -> Table:
    columns = ("set", "points/s", "loop", "points/s", "ratio", "asked", "IoU", "IoU of the loop")
    result = Table("maker", *columns, title="makers against loops, in one run")
    for row in rows:
        maker, loop = row["maker"], row["loop"]
        result.add_row(
            row["name"], row["set"], f"{maker['points_per_second']:.1f}", row["what"],
            f"{loop['points_per_second']:.1f}", f"{row['ratio']:.1f}", f"{row['goal']:.0f}",
            f"{100 * maker['iou']:.2f}", f"{100 * loop['iou']:.2f} ({loop['points']} points)",
        )  # fmt: skip
    return result


if __name__ == "__main__":
    sys.exit(main())
