"""The extent chosen from images and points, against the best fixed one by the ground truth that it never sees."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from tiny import tiny_set

from hmg_gpu.data import ImageSet, load_folder
from hmg_gpu.extent import FALLBACK, MIN_POINTS, WEIGHTS, choose_extent, mask_changes
from hmg_gpu.pmg import point_to_mask

LENGTHS = (6, 8, 10, 12, 14, 17, 20, 24, 28, 34, 40, 48, 57)


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


def iou(data: ImageSet, extent: int) -> float:
    """Percent over the set."""
    masks = point_to_mask(data.images, data.points, extent=extent, sizes=data.sizes)
    return 100 * float((masks & data.masks).sum() / (masks | data.masks).sum())


def test_the_choice_follows_the_targets_size() -> None:
    """Lone disks: lengths beyond the target are good, below it none is; for twice the target at least 1.6 times."""
    small, large = (choose_extent(disks(radius, crowd=0)) for radius in (5, 10))
    assert 5 <= small <= 14 and 10 <= large <= 28 and large >= 1.6 * small


def test_crowded_scenes_get_a_shorter_search() -> None:
    assert choose_extent(disks(5, crowd=2)) <= choose_extent(disks(5, crowd=0))
    changes = mask_changes(disks(5, crowd=2))
    assert changes[20] > 2 * min(changes.values())


def test_change_by_hand() -> None:
    data = disks(6, crowd=1, count=2)
    grid = [5, 6, 7, 8, 10, 12, 14, 17, 20, 24, 28, 34, 40, 48, 57, 67, 80]
    masks = {extent: point_to_mask(data.images, data.points, extent=extent) for extent in grid}
    rates = []
    for low, high in itertools.pairwise(grid):
        share = float((masks[low] & masks[high]).sum() / (masks[low] | masks[high]).sum())
        rates.append(-math.log(share) / math.log(high / low))
    wanted = {grid[i]: sum(w * r for w, r in zip(WEIGHTS, rates[i : i + 4], strict=True)) for i in range(13)}
    assert max(wanted) == 40  # a quarter of 160
    found = mask_changes(data)
    assert found.keys() == wanted.keys()
    assert all(math.isclose(found[key], wanted[key], rel_tol=1e-5, abs_tol=1e-7) for key in wanted)


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
    assert choose_extent(flat) == 5
    small = disks(2, crowd=0, side=160)
    small = ImageSet(
        small.names,
        small.images[:, 30:46, 30:46],
        torch.full((12, 2), 16),
        small.points[::4] - torch.tensor([0, 30, 30]),
    )
    assert mask_changes(small).keys() == {5}


@pytest.mark.parametrize("points", ["masks_centroid", "masks_coarse"])
@pytest.mark.parametrize("dataset", ["NUAA-SIRST", "NUDT-SIRST"])
def test_within_one_of_the_best_fixed_extent(dataset: str, points: str, data_root) -> None:
    """On a third of the training set, and the two sets get different lengths (NUDT's best is far below NUAA's)."""
    data = load_folder(data_root / dataset, "train", points=points)
    data = data.subset(range(0, len(data), 3))
    chosen = choose_extent(data)
    assert (chosen <= 14) == (dataset == "NUDT-SIRST")
    best = max(iou(data, extent) for extent in {*LENGTHS, chosen})
    assert iou(data, chosen) >= best - 1.0
