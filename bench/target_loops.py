"""Makers of other papers as loops over targets, in the manner of their authors' scripts.

    python -m bench.target_loops --data NUAA-SIRST

times each loop and its batched maker in turn, in one process on one thread, and prints CPU milliseconds a target.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from bench.peers import split_points
from hmg_gpu.data import ImageSet
from hmg_gpu.data.source import load_split
from hmg_gpu.masks import Com, LelcmMaker, Maker
from tests import reference_makers as reference

Loop = Callable[[NDArray, Iterable[Sequence[int]]], NDArray]  # (image uint8 [H, W], points (y, x)) -> mask bool [H, W]


def lelcm_loop(image: NDArray, points: Iterable[Sequence[int]]) -> NDArray:
    """LELCM's first labels."""
    return reference.union_of(reference.lelcm_mask, image, points)


def com_loop(image: NDArray, points: Iterable[Sequence[int]], half: int = 20) -> NDArray:
    """COM's evolution without the term that changes nothing, and the component at the point."""
    return reference.union_of(lambda image, point: reference.com_mask(image, point, half), image, points)


def com_script_loop(image: NDArray, points: Iterable[Sequence[int]], half: int = 20) -> NDArray:
    """COM as its script runs it: the band's pixels listed one by one, matplotlib's line, a fill from the corner."""
    return reference.com_script_masks(image, points, half)


PAIRS: dict[str, tuple[Loop, Maker]] = {
    "lelcm": (lelcm_loop, LelcmMaker()),
    "com, the script's computation": (com_script_loop, Com()),
    "com, our computation": (com_loop, Com()),
    "com faithful": (com_script_loop, Com(faithful=True)),
}


def loop_masks(loop: Loop, data: ImageSet) -> NDArray:
    """The masks of a set by a loop over its images."""
    masks = np.zeros(data.images.shape, dtype=bool)
    for index, points in enumerate(split_points(data.points, len(data))):
        height, width = data.sizes[index].tolist()
        masks[index, :height, :width] = loop(data.images[index, :height, :width].numpy(), points)
    return masks


def cpu_time(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def compare(loop: Loop, maker: Maker, data: ImageSet, rounds: int) -> tuple[float, float, float]:
    """CPU milliseconds a target of the loop and of the maker, and the ratio; each the median of rounds."""
    maker.masks(data)
    slow, fast = [], []
    for _ in range(rounds):
        slow.append(cpu_time(lambda: loop_masks(loop, data)))
        fast.append(cpu_time(lambda: maker.masks(data)))
    once, batched = (1000 * statistics.median(times) / len(data.points) for times in (slow, fast))
    return once, batched, statistics.median(a / b for a, b in zip(slow, fast, strict=True))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", default="synthetic", help="a data set's folder (default: synthetic)")
    parser.add_argument("--images", type=int, default=64, help="of the training set (default: 64)")
    parser.add_argument("--rounds", type=int, default=5, help="of which the median counts (default: 5)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    data = load_split(options.data, "train")
    data = data.subset(range(min(options.images, len(data))))
    for name, (loop, maker) in PAIRS.items():
        once, batched, ratio = compare(loop, maker, data, options.rounds)
        times = f"loop {once:.3f}, batched {batched:.3f} CPU ms a target"
        print(f"{name}: {times}, {ratio:.1f} x ({len(data.points)} targets)")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
