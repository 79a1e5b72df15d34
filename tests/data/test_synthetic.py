"""The embedded scenes: reproducible, within the sizes they promise, and as hard for PMG as they were chosen to be."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from scipy import ndimage

from hmg_gpu.common.errors import InputError
from hmg_gpu.data.sets import ImageSet
from hmg_gpu.data.source import load_split
from hmg_gpu.data.synthetic import COUNTS, GROUP, NORMALISATION, SIZE, make_scenes, make_split
from hmg_gpu.masks.pmg import point_to_mask

EIGHT = np.ones((3, 3), bool)


@pytest.fixture
def train() -> ImageSet:
    return default_train(0)


@cache
def default_train(seed: int) -> ImageSet:
    return make_split("train", seed=seed)


def components(mask: torch.Tensor) -> list[np.ndarray]:
    """Each 8-connected component of one mask as int64 [n, 2] rows (y, x)."""
    labels, count = ndimage.label(mask.numpy(), EIGHT)
    return [np.argwhere(labels == label) for label in range(1, count + 1)]


def test_form_of_a_split(train):
    count = COUNTS["train"]
    assert (train.dataset, train.split, len(train)) == ("synthetic", "train", count)
    assert train.images.dtype == torch.uint8 and train.images.shape == (count, SIZE, SIZE)
    assert train.masks.dtype == torch.bool and train.masks.shape == train.images.shape
    assert train.points.dtype == torch.int64 and train.points.shape[1] == 3
    assert train.sizes.tolist() == [[SIZE, SIZE]] * count
    assert len(set(train.names)) == count


def test_load_split_finds_the_scenes():
    loaded, made = load_split("synthetic", "test"), make_split("test")
    assert torch.equal(loaded.images, made.images) and torch.equal(loaded.points, made.points)
    assert (loaded.mean, loaded.std) == NORMALISATION


def test_scenes_are_a_function_of_seed_and_index():
    count = GROUP + 5  # the second group is cut short
    images, masks = make_scenes(count, height=64, width=72, seed=7)
    assert images.shape == masks.shape == (count, 64, 72)
    again = make_scenes(count, height=64, width=72, seed=7)
    assert torch.equal(images, again[0]) and torch.equal(masks, again[1])
    for fewer in (1, 3):
        part = make_scenes(fewer, height=64, width=72, seed=7)
        assert torch.equal(images[:fewer], part[0]) and torch.equal(masks[:fewer], part[1])
    assert not torch.equal(images, make_scenes(count, height=64, width=72, seed=8)[0])
    assert len({image.numpy().tobytes() for image in images}) == count


def test_splits_share_no_scene():
    train, test = (make_split(split, count=8, size=64) for split in COUNTS)
    assert not {image.numpy().tobytes() for image in train.images} & {image.numpy().tobytes() for image in test.images}


def test_kind_of_points_leaves_the_scenes_alone(train):
    for points in ("masks_coarse", None):
        other = make_split("train", points=points, count=8)
        assert torch.equal(other.images, train.images[:8]) and torch.equal(other.masks, train.masks[:8])
    assert other.points.shape == (0, 3)


@pytest.mark.parametrize("seed", (0, 1, 2))
def test_targets(seed):
    """1 to 3 targets a scene of 4 to 150 pixels each, one point each, clear of the border and of each other."""
    data = default_train(seed)
    for index, mask in enumerate(data.masks):
        parts = components(mask)
        assert 1 <= len(parts) <= 3
        assert all(4 <= len(part) <= 150 for part in parts)
        points = data.points[data.points[:, 0] == index, 1:].tolist()
        assert sorted(points) == sorted(np.floor(part.mean(0)).astype(int).tolist() for part in parts)
    assert not data.masks[:, [0, -1]].any() and not data.masks[:, :, [0, -1]].any()


def test_sizes_and_contrasts_vary(train):
    areas, contrasts = [], []
    for image, mask in zip(train.images.double(), train.masks, strict=True):
        for part in components(mask):
            areas.append(len(part))
            contrasts.append((image[tuple(part.T)].max() - image.median()).item())
    assert min(areas) <= 9 and max(areas) > 81
    low, high = np.quantile(contrasts, (0.1, 0.9))
    assert high > 3 * low > 0


def test_coarse_points():
    """Each lies on a target of its own, scattered around the centroid by about an eighth of the box."""
    data = make_split("train", points="masks_coarse", count=48)
    image, y, x = data.points.T
    assert data.masks[image, y, x].all()
    shifts = []
    for index, mask in enumerate(data.masks):
        points = data.points[data.points[:, 0] == index, 1:].tolist()
        parts = components(mask)
        assert len(points) == len(parts)
        for part in parts:
            own = [point for point in points if point in part.tolist()]
            assert len(own) == 1
            if len(part) >= 40:
                shifts.append((np.array(own[0]) + 0.5 - part.mean(0)) / (np.ptp(part, 0) + 1))
    assert np.std(shifts) == pytest.approx(1 / 8, rel=0.3)


def test_normalisation_follows_the_rule(train):
    images = torch.cat((train.images, make_split("test").images)).double()
    rule = images.mean((1, 2)).mean().item(), images.std((1, 2), correction=0).mean().item()
    assert rule == pytest.approx(NORMALISATION, abs=0.01)


@pytest.mark.parametrize("seed", (0, 1, 2))
def test_initial_masks_leave_something_to_learn(seed):
    """The scenes were chosen so that PMG at its defaults reaches an IoU between 65 and 80."""
    data = default_train(seed)
    masks = point_to_mask(data.images, data.points)
    iou = (masks & data.masks).sum() / (masks | data.masks).sum()
    assert 0.65 < iou < 0.80


@pytest.mark.parametrize(
    "arguments, text",
    [
        ({"split": "val"}, "no split 'val'; take one of train, test"),
        ({"split": "train", "points": "centre"}, "no points 'centre'; take masks_centroid, masks_coarse or None"),
        ({"split": "train", "count": 0}, "0 scenes; expected at least 1"),
        ({"split": "train", "size": 32}, "32 x 32 pixels; expected at least 64 x 64"),
    ],
)
def test_refusals(arguments, text):
    with pytest.raises(InputError, match=text):
        make_split(**arguments)
