"""LELCM's first labels: equal to a loop over targets, and to the counts of that loop on the real sets."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import reference_makers as reference
import torch
from cases import SCENE_SHAPES, pad, point_rows, scene, scene_points, sweep
from refusal import refused

from hmg_gpu.data import ImageSet, load_folder
from hmg_gpu.masks import LelcmMaker as Lelcm
from hmg_gpu.masks import make_maker
from hmg_gpu.masks.makers import lelcm as lelcm_maker


def scenes(rng: np.random.Generator, kind: str) -> tuple[ImageSet, list[np.ndarray], list[list[tuple[int, int]]]]:
    """Scenes of every shape with points at corners, borders and anywhere, as a set and one by one."""
    images = [scene(rng, shape, kind) for shape in SCENE_SHAPES]
    points = [sorted(set(scene_points(rng, shape))) for shape in SCENE_SHAPES]
    batch, sizes = pad(images, fill=300)  # whatever lies in the padding
    names = [str(index) for index in range(len(images))]
    return ImageSet(names, batch, sizes, point_rows(points)), images, points


@pytest.mark.parametrize(("ratio", "side"), sweep([(0.8, 15), (0.5, 3), (1.0, 31), (0.0, 5)], fast=2))
@pytest.mark.parametrize("kind", ["bytes", "deep", "steps", "rows", "flat", "floats", "signed"])
def test_equals_the_loop(kind: str, ratio: float, side: int, rng: np.random.Generator) -> None:
    data, images, points = scenes(rng, kind)
    masks = Lelcm(ratio, side).masks(data)
    for index, (image, own) in enumerate(zip(images, points, strict=True)):
        height, width = image.shape
        wanted = reference.union_of(lambda i, p: reference.lelcm_mask(i, p, ratio, side), image, own)
        found = masks[index].numpy()
        assert np.array_equal(found[:height, :width], wanted), (index, image.shape)
        found[:height, :width] = False
        assert not found.any()  # nothing in the padding


@pytest.mark.parametrize(("dataset", "counts"), [("NUAA-SIRST", (5365, 9513)), ("NUDT-SIRST", (19059, 38214))])
def test_counts_on_real_data(dataset: str, counts: tuple[int, int], data_root: Path) -> None:
    data = load_folder(data_root / dataset, "train")
    masks = make_maker("lelcm").masks(data)
    assert (int((masks & data.masks).sum()), int((masks | data.masks).sum())) == counts


def test_a_mask_that_can_be_checked_by_eye() -> None:
    """A line of five bright pixels in a dark field: windows of 3 and 5 end in it, that of 7 does not."""
    image = torch.full((1, 15, 15), 10, dtype=torch.uint8)
    image[0, 7, 5:10] = 100
    image[0, 2, 7] = 100  # bright, but outside the window
    data = ImageSet(["a"], image, torch.tensor([[15, 15]]), torch.tensor([[0, 7, 7]]))
    assert Lelcm().masks(data).nonzero().tolist() == [[0, 7, x] for x in range(5, 10)]
    assert Lelcm(side=3).masks(data).nonzero().tolist() == [[0, 7, x] for x in range(5, 10)]  # of 5 pixels, at most
    assert Lelcm(ratio=1.0).masks(data).nonzero().tolist() == [[0, 7, x] for x in range(6, 9)]


def test_order_and_grouping_of_points_do_not_matter(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    data, *_ = scenes(rng, "bytes")
    maker = Lelcm()
    masks = maker.masks(data)
    shuffled = data.points[torch.randperm(len(data.points))]
    assert torch.equal(maker.masks(replace(data, points=torch.cat((shuffled, shuffled[:5])))), masks)
    for pixels in (1, 1000):
        monkeypatch.setitem(lelcm_maker.GROUP_PIXELS, "cpu", pixels)
        assert torch.equal(maker.masks(data), masks)
    assert torch.equal(maker.probabilities(data), masks.float()) and maker.knows_each(data)
    seen, canvas = [], torch.zeros_like(masks)
    for points, position, own in maker.each(data, data.points):
        seen.append(points)
        for (image, *_), where, mask in zip(points.tolist(), position, own, strict=True):
            canvas[image].view(-1)[where[mask]] = True
    assert torch.equal(torch.cat(seen), data.points) and torch.equal(canvas, masks)


def test_no_points_and_bad_settings() -> None:
    data = ImageSet(["a"], torch.zeros(1, 4, 5), torch.tensor([[4, 5]]), torch.zeros(0, 3, dtype=torch.int64))
    assert not Lelcm().masks(data).any() and list(Lelcm().each(data, data.points)) == []
    refused(lambda: make_maker("lelcm:side=4"), "side = 4", "odd")
    refused(lambda: make_maker("lelcm:side=1"), "side = 1", "from 3 to 99")
    refused(lambda: make_maker("lelcm:ratio=nan"), "ratio = nan", "from 0 to 1")
    refused(lambda: make_maker("lelcm:size=4"), "lelcm:size=4", "NAME=VALUE of ratio, side")
    assert make_maker("lelcm:ratio=1,side=7") == Lelcm(1.0, 7)
    assert Lelcm().about() == {"maker": "lelcm", "ratio": 0.8, "side": 15}
