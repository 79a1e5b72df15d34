"""An update of each rule of label evolution against its loop over images and regions: python -m bench.rules

The training sets of ``HMG_DATA``, or made-up scenes of many targets with --scenes. Labels start at the points and have
evolved four times. The probabilities are a stand-in for a network's: the ground truth, smoothed, with noise. The loops
are those of tests/reference_rules.py; a rule whose labels differ from its loop's shows no time.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bench.scenes import in_one_line, real_folder
from bench.student import SETS
from bench.timer import time_together
from hmg_gpu.common.files import write_json
from hmg_gpu.common.provenance import provenance
from hmg_gpu.data import ImageSet, load_folder
from hmg_gpu.masks import RULES, Evidence, Points, to_masks
from tests import reference_rules

EVOLVING = [name for name, rule in RULES.items() if rule.evolves]
LATE = (99, 100)  # no image enters PAL's pool
UPDATES = 4  # before the one that is timed


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="*", default=SETS, help="folders in HMG_DATA (default: %(default)s)")
    parser.add_argument(
        "--scenes", type=int, default=0, metavar="P", help="also 16 scenes with P targets each (default: none)"
    )
    parser.add_argument("--batch", type=int, default=64, help="images an update (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=12, help="for each pair (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to this file")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    sets = [load_folder(real_folder(name), "train") for name in options.sets]
    if options.scenes:
        sets.append(crowd(options.scenes))
    table = Table("set", "regions", "rule", "loop, ms", "ours, ms", "ratio")
    rows = []
    for data in sets:
        for name in EVOLVING:
            row = compare(data, name, options.batch, options.seconds)
            rows.append(row)
            times = [f"{1000 * row[key]:.1f}" if key in row else "-" for key in ("loop", "ours")]
            ratio = f"{row['ratio']:.1f}" if "ratio" in row else "labels differ"
            table.add_row(row["set"], str(row["regions"]), name, *times, ratio)
    Console(width=None if sys.stdout.isatty() else 100).print(table)
    if options.json:
        about = {"batch": options.batch, "threads": options.threads, "versions": provenance()}
        write_json(options.json, about | {"rows": rows})
    return 0 if all("ratio" in row for row in rows) else 1


def compare(data: ImageSet, name: str, batch: int, seconds: float) -> dict[str, Any]:
    """One rule on a set: seconds of its loop and of the library where both give the same labels."""
    rule = RULES[name]()
    given = []
    for first in range(0, len(data), batch):
        part = data.subset(range(first, min(first + batch, len(data))))
        probability, initial = stand_in(part), Points().masks(part)
        state = rule.start(initial, torch.ones(len(part), dtype=torch.bool))
        for update in range(UPDATES + 1):
            masks = to_masks(state.labels)
            evidence = Evidence(
                probability > 0.5, part.points, part.sizes, initial, masks, probability, None, 0.5, state, LATE
            )
            state = rule.evolve(evidence) if update < UPDATES else state
        given.append(evidence)
    loop: Callable = getattr(reference_rules, name)
    arrays = [pair for evidence in given for pair in cut(evidence)]

    def ours() -> list[Tensor]:
        return [rule.evolve(evidence).labels for evidence in given]

    def theirs() -> list[np.ndarray]:
        return [loop(label, probability) for label, probability in arrays]

    regions = sum(1 for label, _ in arrays for _ in reference_rules.regions(label))
    row: dict[str, Any] = {"set": data.dataset, "images": len(data), "regions": regions, "rule": name}
    found = [label for one, evidence in zip(ours(), given, strict=True) for label, _ in cut(evidence, one)]
    if all(np.array_equal(one, other) for one, other in zip(found, theirs(), strict=True)):
        timing = time_together({"loop": theirs, "ours": ours}, seconds=seconds, least=3)
        row |= {key: value.median for key, value in timing.items()}
        row["ratio"] = row["loop"] / row["ours"]
    return row


def crowd(targets: int) -> ImageSet:
    """16 scenes of 256 x 256 pixels with so many targets of 3 x 3 pixels, which may touch."""
    generator = torch.Generator().manual_seed(0)
    places = torch.stack([torch.randperm(256 * 256, generator=generator)[:targets].sort().values for _ in range(16)])
    image = torch.arange(16).repeat_interleave(targets)
    points = torch.stack((image, places.flatten() // 256, places.flatten() % 256), dim=1)
    sizes = torch.full((16, 2), 256)
    data = ImageSet([str(i) for i in range(16)], torch.zeros(16, 256, 256), sizes, points, dataset=f"{targets} targets")
    data.masks = F.max_pool2d(Points().masks(data).float()[:, None], 3, 1, 1)[:, 0] > 0
    return data


def stand_in(data: ImageSet) -> Tensor:
    """Probabilities as a network's: the ground truth, smoothed by two means of 3 x 3, and noise: [N, H, W]."""
    generator = torch.Generator().manual_seed(0)
    truth = data.masks
    smooth = F.avg_pool2d(F.avg_pool2d(truth.float()[:, None], 3, 1, 1), 3, 1, 1)[:, 0]
    return (0.95 * smooth + 0.04 * torch.rand(truth.shape, generator=generator)).clamp(0, 1)


def cut(evidence: Evidence, labels: Tensor | None = None) -> list[tuple[np.ndarray, np.ndarray]]:
    """Labels (the old ones by default) and probabilities of each image without its padding."""
    labels = evidence.state.labels if labels is None else labels
    pairs = zip(labels.numpy(), evidence.probability.numpy(), evidence.sizes.tolist(), strict=True)
    return [(label[:h, :w].copy(), probability[:h, :w].copy()) for label, probability, (h, w) in pairs]


if __name__ == "__main__":
    sys.exit(in_one_line(main))
