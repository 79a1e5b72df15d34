"""The extent chosen from images and points, against the best fixed one by the ground truth that it never sees."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import sweep
from tiny import tiny_set, write_folder

import bench.extent
from bench.extent import losses, resampled
from hmg_gpu.data import ImageSet, load_folder
from hmg_gpu.masks.extent import FALLBACK, MIN_POINTS, STILL, _sample, choose_extent, first_hold, mask_rates
from hmg_gpu.masks.pmg import point_to_mask


def disks(radius: float, crowd: int, *, count: int = 12, side: int = 160) -> ImageSet:
    """Bright disks, each with a point; ``crowd`` brighter bars a little way off invite its box to run away."""
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:side, :side]
    images, points = [], []
    for index in range(count):
        image = 50 + rng.normal(0, 2, (side, side))
        for y, x in ((40, 40), (40, 120), (120, 40), (120, 120)):
            image[np.hypot(rows - y, columns - x) <= radius * rng.uniform(0.7, 1)] += 80
            for _ in range(crowd):
                far = round(rng.uniform(2.2, 3.5) * radius) + 2
                axis = rng.integers(2)
                image[
                    (np.abs((rows - y, columns - x)[axis] - far) < 2) & (np.abs((columns - x, rows - y)[axis]) < 6)
                ] = 250
            points.append((index, y, x))
        images.append(image.round().clip(0, 255))
    sizes = torch.full((count, 2), side)
    return ImageSet(
        [str(i) for i in range(count)], torch.from_numpy(np.array(images)).to(torch.uint8), sizes, torch.tensor(points)
    )


def test_the_choice_reaches_over_the_targets() -> None:
    """Lone disks: from the target's radius on every length is good, and the larger targets get the longer search."""
    small, large = (choose_extent(disks(radius, crowd=0)) for radius in (5, 10))
    assert 5 <= small <= 25 and 10 <= large <= 40 and large > small


def test_crowded_scenes_get_a_shorter_search() -> None:
    crowded, lone = disks(5, crowd=2), disks(5, crowd=0)
    assert choose_extent(crowded) < choose_extent(lone)
    lengths, rates = mask_rates(crowded)
    assert max(rates[lengths.index(14) : lengths.index(28)]) > STILL


def test_rates_by_hand() -> None:
    data = disks(6, crowd=1, count=2)
    grid = [5, 6, 7, 8, 10, 12, 14, 17, 20, 24, 28, 34, 40, 48, 57]  # up to 0.4 of 160
    masks = {extent: point_to_mask(data.images, data.points, extent=extent) for extent in grid}
    wanted = []
    for low, high in itertools.pairwise(grid):
        share = float((masks[low] & masks[high]).sum() / (masks[low] | masks[high]).sum())
        wanted.append(-math.log(share) / math.log(high / low))
    lengths, rates = mask_rates(data)
    assert lengths == grid and rates == pytest.approx(wanted, rel=1e-5, abs=1e-7)


def test_the_first_hold_by_hand() -> None:
    """Lengths an octave apart with rates far below the level (0) or far above (1)."""

    def hold(steps: str) -> tuple[float, float]:
        rates = [STILL / 100 if step == "0" else STILL * 100 for step in steps]
        return tuple(map(math.log2, first_hold([2**power for power in range(len(steps) + 1)], rates)))

    # Smoothing moves nothing where both sides are long; a crossing lies within the octave between two rates' places.
    start, end = hold("1111100000011111")
    assert 5 <= start <= 6 and 10 <= end <= 11
    assert hold("000000") == pytest.approx((0, 6)) and hold("00000111110000000")[0] == pytest.approx(0)
    start, end = hold("111101111000000")  # one low rate among high ones is smoothed away
    assert start > 8 and end == pytest.approx(15)
    never = [9.0] * 12 + [5.0] + [9.0] * 6
    assert first_hold([2**power for power in range(20)], never) == (2**12, 2**12)
    assert first_hold([5, 6], [0.0]) == pytest.approx((5, 6))  # shorter than half an octave, but all there is
    assert first_hold([5, 6, 7], [math.inf, math.inf])[0] == 5


def test_gain_offset_and_ground_truth_do_not_matter() -> None:
    data = disks(7, crowd=1)
    chosen = choose_extent(data)
    data.images = data.images.float() * 4 + 1000
    data.masks = torch.ones(data.images.shape, dtype=torch.bool)
    assert choose_extent(data) == chosen


def test_few_points_and_odd_sets() -> None:
    data = tiny_set()
    assert len(data.points) < MIN_POINTS and choose_extent(data) == FALLBACK
    flat = disks(5, crowd=0)
    flat.images = torch.full_like(flat.images, 9)  # nothing grows: every length gives the same masks
    assert mask_rates(flat)[1] == [0] * 14 and choose_extent(flat) == 20  # four times the shortest
    small = disks(2, crowd=0, side=160)
    small = ImageSet(
        small.names,
        small.images[:, 30:46, 30:46],
        torch.full((12, 2), 16),
        small.points[::4] - torch.tensor([0, 30, 30]),
    )
    assert mask_rates(small)[0] == [5, 6]


def test_images_without_points_are_not_looked_at() -> None:
    """Every second image has points, and so many that only every other of those is looked at."""
    data = disks(6, crowd=1)
    index = torch.arange(24).repeat_interleave(2)[1::2]
    spread = replace(data, points=data.points * torch.tensor([2, 1, 1]) + torch.tensor([1, 0, 0]))
    spread.images, spread.sizes = data.images[index // 2], data.sizes[index // 2]
    spread.names = [str(row) for row in range(24)]
    many = replace(spread, points=spread.points.repeat_interleave(21, 0))  # 1,008: every second image
    assert choose_extent(spread) == choose_extent(data)
    _, rates = mask_rates(_sample(many))
    assert len(_sample(many)) == 6 and max(rates) > STILL


def test_the_bench_tells_what_the_choice_costs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    root = write_folder(tmp_path / "tiny")
    shutil.copytree(root / "masks_centroid", root / "masks_coarse")
    monkeypatch.setenv("HMG_DATA", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "200")
    threads = torch.get_num_threads()
    try:
        assert bench.extent.main(["--sets", root.name, "--threads", "1", "--json", str(tmp_path / "e.json")]) == 0
    finally:
        torch.set_num_threads(threads)
    rows = json.loads((tmp_path / "e.json").read_text())["rows"]
    assert len(rows) == 2 * 2 * 2 * 5 and {row["chosen"] for row in rows} == {FALLBACK}
    data = load_folder(root, "test", points="masks_coarse")
    (row,) = (r for r in rows if (r["split"], r["points"], r["scale"], r["part"]) == ("test", "masks_coarse", 1, "odd"))
    odd = data.subset(range(1, len(data), 2))
    masks = point_to_mask(odd.images, odd.points, extent=row["best"], sizes=odd.sizes)
    assert row["best_iou"] == pytest.approx(float((masks & odd.masks).sum() / (masks | odd.masks).sum()))
    assert "odd" in capsys.readouterr().out
    assert [row["part"] for row in losses(data.subset([0]), (8, 10))] == ["whole", "even", "last"]


def test_twice_the_size_knows_no_padding() -> None:
    data = tiny_set()
    data.images = torch.where(data.images > 0, data.images, 1)
    larger = resampled(data, 2)
    for image, (height, width) in zip(larger.images, larger.sizes.tolist(), strict=True):
        assert float(image[:height, :width].min()) >= 1
    assert int(larger.masks.sum()) == 4 * int(data.masks.sum())


@pytest.mark.parametrize(
    ("dataset", "split", "points"),
    sweep(
        [
            ("NUAA-SIRST", "train", "masks_centroid"),
            ("NUAA-SIRST", "train", "masks_coarse"),
            ("NUAA-SIRST", "test", "masks_centroid"),
            ("NUAA-SIRST", "test", "masks_coarse"),
            ("NUDT-SIRST", "train", "masks_coarse"),
            ("NUDT-SIRST", "test", "masks_centroid"),
        ]
    ),
)
def test_within_one_of_the_best_fixed_extent(dataset: str, split: str, points: str, data_root) -> None:
    """The whole split and its halves; lengths around the best one (python -m bench.extent has all)."""
    near = (10, 12, 14) if dataset == "NUDT-SIRST" else (17, 20, 24, 28, 34)
    rows = list(losses(load_folder(data_root / dataset, split, points=points), near))
    assert [row["part"] for row in rows] == ["whole", "even", "odd", "first", "last"]
    for row in rows:
        assert (row["chosen"] <= 14) == (dataset == "NUDT-SIRST")
        assert row["iou"] >= row["best_iou"] - 0.01, row


@pytest.mark.slow
def test_within_one_of_the_best_at_twice_the_size(data_root) -> None:
    data = load_folder(data_root / "NUAA-SIRST", "train")
    data = data.subset(range(0, len(data), 2))
    whole = next(losses(resampled(data, 2), (34, 40, 48, 57, 67)))
    assert whole["chosen"] >= 30 and whole["iou"] >= whole["best_iou"] - 0.01
