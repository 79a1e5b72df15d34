"""What the extent that is chosen from images and points costs against the best fixed one: python -m bench.extent

For the sets of ``HMG_DATA``, both splits, both kinds of points: the whole split and fixed halves of it, as they are and
resampled to twice the size. Ground truth measures; the choice never sees it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bench.scenes import in_one_line, real_folder
from bench.student import POINTS, SETS, percent
from hmg_gpu.common.files import write_json
from hmg_gpu.common.provenance import provenance
from hmg_gpu.data import ImageSet, load_folder
from hmg_gpu.masks.extent import choose_extent
from hmg_gpu.masks.pmg import point_to_mask

EXTENTS = (7, 8, 10, 12, 14, 17, 20, 24, 28, 34, 40, 48, 57, 67, 80)
GROUP = 16  # images at a time


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", default=SETS, help="folders in HMG_DATA (default: %(default)s)")
    parser.add_argument("--scales", nargs="+", type=int, default=[1, 2], help="of the images (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch (default: %(default)s)")
    parser.add_argument("--json", type=Path, default=Path("extent.json"), help="(default: %(default)s)")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)

    table = Table("set", "split", "points", "scale", "part", "chosen", "IoU %", "best", "IoU %", "lost")
    measured = []
    for row in rows(options):
        measured.append(row)
        write_json(options.json, {"rows": measured, "versions": provenance()})
        chosen, best = row["iou"], row["best_iou"]
        names = (str(row[name]) for name in ("set", "split", "points", "scale", "part", "chosen"))
        table.add_row(*names, percent(chosen), str(row["best"]), percent(best), percent(best - chosen))
    Console().print(table)
    return 0


def rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for name in options.sets:
        for split in ("train", "test"):
            for points in POINTS:
                data = load_folder(real_folder(name), split, points=points)
                for scale in options.scales:
                    about = {"set": name, "split": split, "points": points, "scale": scale}
                    for row in losses(resampled(data, scale)):
                        yield about | row


def losses(data: ImageSet, extents: Sequence[int] = EXTENTS) -> Iterator[dict[str, Any]]:
    """The whole set and halves of it: the chosen extent, its IoU, the best of ``extents`` and its IoU."""
    count = len(data)
    halves = {"whole": range(count), "even": range(0, count, 2), "odd": range(1, count, 2)}
    halves |= {"first": range(count // 2), "last": range(count // 2, count)}
    known = {extent: overlaps(data, extent) for extent in extents}
    for part, index in halves.items():
        if not index:
            continue
        chosen = choose_extent(replace(data, masks=None).subset(index))
        if chosen not in known:
            known[chosen] = overlaps(data, chosen)
        ious = {extent: ratio(pixels[torch.tensor(index)]) for extent, pixels in known.items()}
        best = max(extents, key=lambda extent: ious[extent])
        yield {"part": part, "chosen": chosen, "iou": ious[chosen], "best": best, "best_iou": ious[best]}


def overlaps(data: ImageSet, extent: int) -> Tensor:
    """int64 [N, 2]: the pixels that PMG's mask and the ground truth of each image share, and have together."""
    parts = []
    for index in torch.arange(len(data)).split(GROUP):
        part = data.subset(index)
        masks = point_to_mask(part.images, part.points, extent=extent, sizes=part.sizes)
        parts.append(torch.stack(((masks & part.masks).sum((1, 2)), (masks | part.masks).sum((1, 2))), dim=1))
    return torch.cat(parts)


def ratio(pixels: Tensor) -> float:
    both, either = pixels.sum(0).tolist()
    return both / max(1, either)


def resampled(data: ImageSet, scale: int) -> ImageSet:
    """Images ``scale`` times as wide and high (bilinear), ground truth too (nearest), points scaled with them."""
    if scale == 1:
        return data
    _, height, width = data.images.shape
    last = (data.sizes - 1)[:, :, None]  # [N, 2, 1]
    rows = torch.minimum(torch.arange(height), last[:, 0])[:, :, None]  # [N, H, 1]
    columns = torch.minimum(torch.arange(width), last[:, 1])[:, None]  # [N, 1, W]
    repeated = data.images[torch.arange(len(data))[:, None, None], rows, columns]  # the border, in place of padding
    images = F.interpolate(repeated[:, None].float(), scale_factor=scale, mode="bilinear")[:, 0]
    masks = data.masks.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    points = data.points * torch.tensor([1, scale, scale])
    return replace(data, images=images, masks=masks, points=points, sizes=data.sizes * scale)


if __name__ == "__main__":
    sys.exit(in_one_line(main))
