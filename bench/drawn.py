"""Would a few masks drawn by hand make learned masks better? python -m bench.drawn

Takes students of the sets (as train.py or hmg-gpu masks leaves them), lets the ground truth of some random images stand
for masks drawn by hand, moves the student's threshold by them, and measures the masks of all other images:

    python -m bench.drawn --set data/NUAA-SIRST student.safetensors --set data/NUDT-SIRST other.safetensors

Two ways: the threshold with the best IoU on the drawn targets; or the same only where the gain is sure, that is above
its standard error (of the IoU by target) times ``SURE``.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from hmg_gpu.data import load_folder
from hmg_gpu.evaluation.targets import compared, describe_targets
from hmg_gpu.masks import Pmg
from hmg_gpu.masks.student.crops import choose, paste
from hmg_gpu.masks.student.student import Student
from hmg_gpu.masks.windows import masks_around

LEVELS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
SURE = 2.0  # standard errors
WAYS = ("best", "sure")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", nargs=2, action="append", required=True, metavar=("FOLDER", "STUDENT"), type=Path)
    parser.add_argument("--points", default="masks_centroid", help="(default: %(default)s)")
    parser.add_argument("--drawn", nargs="+", type=int, default=[5, 10, 20, 50], help="targets (default: %(default)s)")
    parser.add_argument("--draws", type=int, default=30, help="of each number (default: %(default)s)")
    options = parser.parse_args(argv)
    table = Table("set", "drawn", "way", "gain: mean", "worst", "best", "moved in", title="IoU of the images not drawn")
    for folder, student in options.set:
        images, hit, union, both, either, base = levels(folder, options.points, Student.load(student))
        for drawn in options.drawn:
            picks = [pick_images(images, drawn, seed) for seed in range(options.draws)]
            for way in WAYS:
                found = [gain(chosen, way, images, hit, union, both, either, base) for chosen in picks]
                moved = sum(value is not None for value in found)
                gains = [100 * (value or 0.0) for value in found]
                cells = (f"{value:+.2f}" for value in (statistics.mean(gains), min(gains), max(gains)))
                table.add_row(folder.name, str(drawn), way, *cells, f"{moved} of {len(found)}")
    Console().print(table)
    return 0


def levels(folder: Path, points: str, student: Student) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, int]:
    """What masks at each level share with the ground truth, and their union with it.

    Returns:
        The image of each target with a point of its own [K]; hit and union by level and target [L, K]; both and either
        by level and image [L, N]; the level that the student has.
    """
    data = load_folder(folder, "train", points=points)
    pmg, targets, known = Pmg().fit(data), describe_targets(data), data.masks.bool()
    soft = student.probabilities(data.images, data.points, extent=pmg.extent, sizes=data.sizes)
    fallback = masks_around(data, student.settings.radius, pmg)
    found = []
    for level in LEVELS:
        each = choose(soft, fallback, level, student.settings.link)
        masks = paste(each, data.points, data.images.shape, data.sizes)
        whole = ((masks & known).sum((1, 2)), (masks | known).sum((1, 2)))
        found.append((*compared(masks, data, targets), *whole))
    columns = (torch.stack(values).double() for values in zip(*found, strict=True))
    return data.points[targets.rows, 0], *columns, LEVELS.index(student.threshold)


def pick_images(images: Tensor, drawn: int, seed: int) -> set[int]:
    """Random images until they hold so many targets."""
    numbers, targets = images.unique(return_counts=True)
    order = torch.randperm(len(numbers), generator=torch.Generator().manual_seed(seed))
    needed = int((targets[order].cumsum(0) < drawn).sum()) + 1
    return set(numbers[order[:needed]].tolist())


def gain(
    chosen: set[int], way: str, images: Tensor, hit: Tensor, union: Tensor, both: Tensor, either: Tensor, base: int
) -> float | None:
    """IoU that the images not drawn gain by the threshold that the drawn ones ask for; None: it stays."""
    drawn = torch.tensor(sorted(chosen))
    rows = torch.isin(images, drawn)
    if way == "best":
        score = hit[:, rows].sum(1) / union[:, rows].sum(1)
    else:
        by_target = hit[:, rows] / union[:, rows]
        more = by_target - by_target[base]
        count = int(rows.sum())
        error = more.std(1) / math.sqrt(count) if count > 1 else torch.inf
        score = more.mean(1) - SURE * error
        score[base] = 0
    level = int(score.argmax())
    if level == base:
        return None
    rest = ~torch.isin(torch.arange(both.shape[1]), drawn)
    iou = both[:, rest].sum(1) / either[:, rest].sum(1)
    return float(iou[level] - iou[base])


if __name__ == "__main__":
    sys.exit(main())
