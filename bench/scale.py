"""What a set larger than the memory costs: write a store of synthetic scenes, make its masks, say what a million take.

    python -m bench.scale --gigabytes 4 --out /scratch/scale

Scenes are 256 x 256, each the sum of a made scene and noise of its own, so that no two are alike and nothing can be
compressed away. The masks are made by the command that users call; its own peak of memory is reported.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from hmg_gpu.common.files import write_json
from hmg_gpu.common.provenance import peak_memory_gb, provenance
from hmg_gpu.data import ImageSet, write_store
from hmg_gpu.data.synthetic import make_split

SIDE, PART, MADE = 256, 256, 512  # side of a scene; scenes written at a time; scenes made before noise is added
MILLION = 1_000_000


def scenes(count: int, seed: int = 0) -> Iterator[ImageSet]:
    """Parts of one split: ``count`` scenes of 256 x 256 in all."""
    made = make_split("train", seed=seed, count=MADE, size=SIDE)
    generator = torch.Generator().manual_seed(seed)
    for first in range(0, count, PART):
        rows = torch.randint(0, MADE, (min(PART, count - first),), generator=generator)
        part = made.subset(rows)
        noise = torch.randint(-3, 4, part.images.shape, generator=generator, dtype=torch.int16)
        part.images = (part.images + noise).clamp(0, 255).to(torch.uint8)
        part.names = [f"scene_{first + row:07d}" for row in range(len(rows))]
        part.masks, part.split = None, "train"
        yield part


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=4.0, help="pixels of the store (default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="folder to work in; about 1.1 times the size is needed")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", help="write the figures to this file")
    parser.add_argument("--keep", action="store_true", help="leave store and masks where they are")
    options = parser.parse_args()
    store, masks = options.out / "scenes.h5", options.out / "masks"
    count = max(PART, round(options.gigabytes * 1e9 / SIDE**2))

    start = time.perf_counter()
    write_store(store, scenes(count))
    writing = time.perf_counter() - start
    command = [sys.executable, "-m", "hmg_gpu", "masks", "--images", store, "--points", "masks_centroid"]
    command += ["--out", masks, "--extent", "10", "--batch", "64", "--device", options.device]
    start = time.perf_counter()
    subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL)
    making = time.perf_counter() - start
    summary = json.loads((masks / "hmg.json").read_text())

    figures = {
        "images": count,
        "store_bytes": store.stat().st_size,
        "mask_bytes": sum(path.stat().st_size for path in masks.glob("*.png")),
        "writing_seconds": writing,
        "writing_peak_gb": peak_memory_gb(),
        "masks_seconds": making,
        "masks_peak_gb": summary["peak_memory_gb"],
        "points": summary["points"],
        "device": options.device,
        "threads": torch.get_num_threads(),
        "versions": provenance(),
    }
    table = Table("", f"{count} images", "a million, at this rate", title="256 x 256, 8 bits, on " + options.device)
    scale = MILLION / count
    for name, value, unit, factor in (
        ("writing the store", writing, "s", 1),
        ("store on disk", figures["store_bytes"], "GB", 1e-9),
        ("masks from the store, reading and writing included", making, "s", 1),
        ("masks on disk, PNG", figures["mask_bytes"], "GB", 1e-9),
    ):
        table.add_row(name, f"{value * factor:.2f} {unit}", f"{value * factor * scale:.0f} {unit}")
    # A process begins with the peak of the one that started it, so this is a bound for the masks.
    table.add_row("peak memory of both, at most", f"{figures['masks_peak_gb']:.2f} GB", "")
    Console().print(table)
    if options.json:
        write_json(options.json, figures)
    if not options.keep:
        store.unlink()
        shutil.rmtree(masks)
    return 0


if __name__ == "__main__":
    sys.exit(main())
