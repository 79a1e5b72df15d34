"""What --extent auto gives on sets of different kinds in one: python -m bench.mixed

NUAA-SIRST and NUDT-SIRST of ``HMG_DATA`` are joined, as SIRST3 joins them. Each part is measured against ground truth:
with the extents that ``auto`` chooses for the whole, with one extent for all, and with the part's own best fixed one.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from bench.scenes import in_one_line, real_folder
from bench.student import POINTS, SETS
from hmg_gpu.common.files import write_json
from hmg_gpu.common.provenance import provenance
from hmg_gpu.data import ImageSet, load_folder
from hmg_gpu.evaluation import measure
from hmg_gpu.masks import Pmg

FIXED = (5, 8, 10, 12, 14, 17, 20, 24, 28, 32, 40)  # extents that the best is taken from


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to this file")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    rows = []
    for points in POINTS:
        sets = [load_folder(real_folder(name), "train", points=points) for name in SETS]
        joined = join(sets)
        maker = Pmg(extent="auto").fit(joined)
        single = Pmg(extent=maker.extent)
        first = 0
        for data in sets:
            part = joined.subset(range(first, first + len(data)))
            first += len(data)
            best = max((iou(Pmg(extent=extent), data), extent) for extent in FIXED)
            row = {"set": data.dataset, "points": points, "auto": iou(maker, part), "one extent": iou(single, part)}
            row |= {"best": best[0], "best extent": best[1], "maker": maker.about(), "why": maker.why}
            rows.append(row)
    table = Table(title="initial masks of the joined sets, IoU %")
    headings = ("set", "points", "auto", "lost against the best fixed", "best fixed (extent)", "one extent for all")
    for heading in headings:
        table.add_column(heading)
    for row in rows:
        lost, best = row["best"] - row["auto"], f"{100 * row['best']:.2f} ({row['best extent']})"
        numbers = (f"{100 * row['auto']:.2f}", f"{100 * lost:.2f}", best, f"{100 * row['one extent']:.2f}")
        table.add_row(row["set"], row["points"], *numbers)
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table)
    for why in dict.fromkeys(row["why"] for row in rows):
        console.print(why, highlight=False)
    if options.json:
        write_json(options.json, {"rows": rows, "versions": provenance()})
    return 0


def iou(maker: Pmg, data: ImageSet) -> float:
    return measure(maker.masks(data), data)["iou"]


def join(sets: Sequence[ImageSet]) -> ImageSet:
    """Sets in one padded batch, as if they had been one folder."""
    height, width = (max(data.images.shape[axis] for data in sets) for axis in (1, 2))
    count = sum(map(len, sets))
    images = torch.zeros(count, height, width, dtype=sets[0].images.dtype)
    masks = torch.zeros(images.shape, dtype=torch.bool)
    points, first = [], 0
    for data in sets:
        rows = slice(first, first + len(data))
        images[rows, : data.images.shape[1], : data.images.shape[2]] = data.images
        masks[rows, : data.images.shape[1], : data.images.shape[2]] = data.masks
        points.append(data.points + torch.tensor([first, 0, 0]))
        first += len(data)
    names = [f"{data.dataset} {name}" for data in sets for name in data.names]
    sizes = torch.cat([data.sizes for data in sets])
    joined = replace(sets[0], names=names, images=images, sizes=sizes, points=torch.cat(points), masks=masks)
    joined.dataset = "+".join(data.dataset for data in sets)
    return joined


if __name__ == "__main__":
    sys.exit(in_one_line(main))
