"""Odd numbers, crowds of points and extreme sizes: the result is defined, equals the reference, and no mask is lost."""

from __future__ import annotations

import cases
import numpy as np
import pytest
import reference
import torch
from numpy.typing import NDArray
from test_pmg import TOLERANCE, assert_close_masks, assert_equals_reference
from tiny import tiny_set
from torch import Tensor, nn

import hmg_gpu
from hmg_gpu import MaskUpdater
from hmg_gpu.evaluation.metrics import DetectionMetrics
from hmg_gpu.masks import Union

Point = tuple[int, int]


def corners(shape: tuple[int, int]) -> list[Point]:
    bottom, right = shape[0] - 1, shape[1] - 1
    return [(0, 0), (0, right), (bottom, 0), (bottom, right)]


# ---- intensities ----------------------------------------------------------------------------------------------------

RANGES = {
    "16 bits, noise over the whole range": lambda rng, image: rng.integers(0, 65536, image.shape),
    "16 bits, one step below the top": lambda rng, image: 65535 - rng.integers(0, 2, image.shape),
    "16 bits, one pixel at the top": lambda rng, image: np.where(image == image.max(), 65535, 0),
    "all negative": lambda rng, image: image - 300,
    "signed 16 bits": lambda rng, image: rng.integers(-32768, 32768, image.shape),
    "about zero": lambda rng, image: image - np.median(image),
    "upside down, dark targets": lambda rng, image: -image,
    "huge": lambda rng, image: image * 2.0**100,
    "tiny": lambda rng, image: image * 2.0**-100,
    "constant zero": lambda rng, image: np.zeros_like(image),
    "constant negative": lambda rng, image: np.full_like(image, -3.7),
    "constant 16 bits": lambda rng, image: np.full_like(image, 65535),
}


@pytest.mark.parametrize("name", RANGES)
def test_any_range_of_intensities(name: str, rng: np.random.Generator) -> None:
    scenes = [cases.scene(rng, shape, "bytes") for shape in ((40, 52), (9, 60), (1, 1))]
    images = [np.asarray(RANGES[name](rng, scene), dtype=np.float32) for scene in scenes]
    points = [
        [*cases.scene_points(rng, image.shape, 6), (image.shape[0] // 2, image.shape[1] // 2)] for image in images
    ]
    assert_equals_reference(images, points, extent=12)


def finite_boundary(strip: NDArray, boundary_index=reference.boundary_index) -> int:
    """A region that holds NaN or Inf ends at the point, unless it is too short for a profile."""
    return boundary_index(strip) if np.isfinite(strip).all() or strip.shape[1] < 3 else 0


def finite_probability(image: NDArray, point: Point, box: reference.Box) -> NDArray:
    """A box that holds NaN or Inf has P = 0.5 at its point and 0 elsewhere."""
    y0, x0, y1, x1 = box
    if np.isfinite(image[y0:y1, x0:x1]).all():
        return reference.box_to_probability(image, point, box)
    probability = np.zeros((y1 - y0, x1 - x0))
    probability[point[0] - y0, point[1] - x0] = 0.5
    return probability


BROKEN = {
    "a pixel here and there": 0.002,
    "many": 0.05,
    "half of them": 0.5,
    "all": 1.0,
}


@pytest.mark.parametrize("values", [(np.nan,), (np.inf,), (-np.inf,), (np.nan, np.inf, -np.inf)], ids=str)
@pytest.mark.parametrize("share", BROKEN)
def test_broken_pixels(share: str, values: tuple[float, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Images between clean ones: no box leaves its image, no point loses its mask, the neighbours keep theirs."""
    rng = np.random.default_rng(len(values))
    images = [cases.scene(rng, (50, 60), "bytes") for _ in range(8)]
    clean = torch.from_numpy(np.stack(images))
    points = [[*cases.scene_points(rng, (50, 60), 20)] for _ in images]
    for image in images[1::2]:
        image[rng.random(image.shape) < BROKEN[share]] = rng.choice(values)
        image[points[1][-1]] = values[0]  # a point that was clicked on a broken pixel
    batch, rows = torch.from_numpy(np.stack(images)), cases.point_rows(points)

    boxes, masks = hmg_gpu.point_to_box(batch, rows), hmg_gpu.point_to_mask(batch, rows)
    soft = hmg_gpu.point_to_probability(batch, rows)
    assert torch.equal(hmg_gpu.point_to_mask(clean, rows)[::2], masks[::2])
    with monkeypatch.context() as patch:
        patch.setattr(reference, "boundary_index", finite_boundary)
        wanted = [
            reference.point_to_box(image, point) for image, own in zip(images, points, strict=True) for point in own
        ]
    assert boxes.tolist() == [list(box) for box in wanted]

    expected = np.zeros(batch.shape)
    for (index, *point), (y0, x0, y1, x1) in zip(rows.tolist(), wanted, strict=True):
        inside = expected[index, y0:y1, x0:x1]
        found = finite_probability(images[index], tuple(point), (y0, x0, y1, x1))
        np.maximum(inside, found, out=inside)
        if not np.isfinite(images[index][y0:y1, x0:x1]).all():
            assert masks[index, point[0], point[1]]
    assert_close_masks(masks.numpy(), soft.numpy(), expected)
    assert torch.equal(hmg_gpu.box_to_mask(batch, rows, boxes), masks)


# ---- points ---------------------------------------------------------------------------------------------------------


def test_a_thousand_points_in_one_image(rng: np.random.Generator) -> None:
    """Beside an image without any; each pixel of the crowd's image is the point of several."""
    shape = (24, 30)
    images = [cases.scene(rng, shape, "bytes") for _ in range(2)]
    crowd = [(int(y), int(x)) for y, x in zip(rng.integers(0, 24, 1000), rng.integers(0, 30, 1000), strict=True)]
    assert_equals_reference(images, [crowd, []], extent=6, half_width=1)

    prediction = rng.random((2, *shape)) < 0.2
    initial = torch.zeros(2, *shape, dtype=torch.bool)
    rows = cases.point_rows([crowd, []])
    for radius in (0, 1):
        hybrid = hmg_gpu.update(torch.from_numpy(prediction), initial, rows, radius=radius)
        for index, own in enumerate((crowd, [])):
            expected = reference.update(prediction[index], initial[index].numpy(), own, radius)
            np.testing.assert_array_equal(hybrid[index].numpy(), expected)
        assert 0 < hybrid.sum() < prediction.sum()


def test_identical_points_count_once(rng: np.random.Generator) -> None:
    image = torch.from_numpy(cases.scene(rng, (33, 41), "bytes"))[None]
    once = cases.point_rows([[(16, 20), (0, 0)]])
    often = once.repeat(300, 1)
    assert torch.equal(hmg_gpu.point_to_mask(image, often), hmg_gpu.point_to_mask(image, once))
    assert torch.equal(hmg_gpu.point_to_probability(image, often), hmg_gpu.point_to_probability(image, once))
    prediction, initial = torch.rand(image.shape) < 0.1, torch.zeros(image.shape, dtype=torch.bool)
    filtered = [hmg_gpu.update(prediction, initial, points, radius=9) for points in (often, once)]
    assert torch.equal(*filtered) and filtered[0].any()


# ---- sizes ----------------------------------------------------------------------------------------------------------

SHAPES = [(1, 1), (1, 2), (2, 1), (1, 4096), (4096, 1), (3, 4096), (4096, 4096)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_point_in_each_corner(shape: tuple[int, int], rng: np.random.Generator) -> None:
    """From one pixel to 4096 x 4096, and one target in the middle."""
    image = np.full(shape, 20, dtype=np.uint8)
    points = [*corners(shape), (shape[0] // 2, shape[1] // 2)]
    for y, x in points:
        part = image[max(y - 2, 0) : y + 3, max(x - 2, 0) : x + 3]
        part[:] = rng.integers(90, 250, part.shape)
    rows = cases.point_rows([points])
    boxes = hmg_gpu.point_to_box(torch.from_numpy(image)[None], rows, extent=10)
    mask = hmg_gpu.point_to_mask(torch.from_numpy(image)[None], rows, extent=10)[0].numpy()
    assert boxes.tolist() == [list(reference.point_to_box(image, point, extent=10)) for point in points]
    left = mask.copy()  # what no box explains
    for point, (y0, x0, y1, x1) in zip(points, boxes.tolist(), strict=True):
        own = mask[y0:y1, x0:x1]
        probability = reference.box_to_probability(image.astype(np.float32), point, (y0, x0, y1, x1))
        assert own[probability > 0.5 + TOLERANCE].all()
        left[y0:y1, x0:x1] &= probability < 0.5 - TOLERANCE
        if max(shape) > 40 and min(shape) > 2:  # the boxes do not overlap
            assert not own[probability < 0.5 - TOLERANCE].any()
    assert mask.any()
    if max(shape) > 40 and min(shape) > 2:
        assert not left.any()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", ["all", "none", "corners"])
def test_any_size_of_prediction(shape: tuple[int, int], kind: str) -> None:
    """All foreground, all background, and one pixel in each corner: updating and metrics as the reference has them."""
    full = {"all": np.ones, "none": np.zeros, "corners": np.zeros}[kind]
    prediction = full(shape, dtype=bool)
    if kind == "corners":
        prediction[tuple(zip(*corners(shape), strict=True))] = True
    middle = (shape[0] // 2, shape[1] // 2)
    initial = cases.single(*shape, *middle)
    points = [middle, (0, 0)]
    hybrid = hmg_gpu.update(
        torch.from_numpy(prediction)[None], torch.from_numpy(initial)[None], cases.point_rows([points])
    )[0].numpy()
    np.testing.assert_array_equal(hybrid, reference.update(prediction, initial, points))
    assert hybrid[middle]

    metrics = DetectionMetrics()
    metrics.update(torch.from_numpy(prediction)[None], torch.from_numpy(initial)[None])
    ours, theirs = metrics.compute(), reference.detection_metrics([(prediction, initial)])
    assert {name: ours[name] for name in theirs} == pytest.approx(theirs, nan_ok=True)


# ---- a network that diverged ----------------------------------------------------------------------------------------


class Constant(nn.Module):
    """Gives one value everywhere, or several in stripes, whatever it sees."""

    def __init__(self, *values: float):
        super().__init__()
        self.values = torch.tensor(values)

    def forward(self, images: Tensor) -> Tensor:
        stripes = torch.arange(images.shape[-1]) // 5 % len(self.values)
        return self.values[stripes].expand(images.shape)


DIVERGED = {
    "NaN": ((torch.nan,), "logits"),
    "Inf": ((torch.inf,), "logits"),
    "minus Inf": ((-torch.inf,), "logits"),
    "zero": ((0.0,), "logits"),
    "huge": ((3e38, -3e38), "logits"),
    "everything at once": ((torch.nan, torch.inf, -torch.inf, 5.0), "logits"),
    "probabilities NaN": ((torch.nan,), "probabilities"),
    "probabilities 1": ((1.0,), "probabilities"),
    "probabilities NaN and 1": ((torch.nan, 1.0), "probabilities"),
}


@pytest.mark.parametrize("name", DIVERGED)
def test_a_diverged_network_costs_no_mask(name: str) -> None:
    """NaN is background, the initial masks stay, and one good update makes up for it."""
    values, output = DIVERGED[name]
    data = tiny_set()
    updater, untouched = (MaskUpdater(data, "pmg:extent=8", Union(radius=6), guard=None) for _ in range(2))
    changes = updater.update(Constant(*values), output)
    masks = updater.masks
    assert not (updater.initial & ~masks).any() and updater.initial.flatten(1).any(1).all()

    level = 0.5 if output == "probabilities" else 0.0
    foreground = np.array([value > level for value in values])[np.arange(masks.shape[2]) // 5 % len(values)]
    broken = ~np.isfinite(values)[np.arange(masks.shape[2]) // 5 % len(values)]
    for index, (height, width) in enumerate(data.sizes.tolist()):
        prediction = np.broadcast_to(foreground[:width], (height, width))
        points = data.points[data.points[:, 0] == index, 1:].tolist()
        initial = updater.initial[index, :height, :width].numpy()
        np.testing.assert_array_equal(
            masks[index, :height, :width].numpy(), reference.update(prediction, initial, points, 6)
        )
    assert changes.non_finite == sum(int(broken[:width].sum()) * height for height, width in data.sizes.tolist())

    good = Constant(-1.0, 1.0)
    updater.update(good, "logits")
    untouched.update(good, "logits")
    assert torch.equal(updater.masks, untouched.masks)
