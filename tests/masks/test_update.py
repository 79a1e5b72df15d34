"""Sec. 3.2 against tests/reference.py, bit for bit: FAF, MDR and both together."""

from __future__ import annotations

import sys
from itertools import pairwise

import cases
import numpy as np
import pytest
import reference
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

import hmg_gpu
from hmg_gpu.common.tensors import valid_area
from hmg_gpu.masks.update import corrections


@pytest.fixture(params=["scipy", "torch"], autouse=True)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The way of host memory, and that of a device whose values are never read."""
    monkeypatch.setenv("HMG_BACKEND", request.param)
    if request.param == "torch":
        monkeypatch.setattr(sys.modules["hmg_gpu.masks.update"], "can_read", lambda tensor: False)
    return request.param


def assert_equals_reference(predictions: list[NDArray], points: list[cases.Points], radius: int) -> None:
    """One padded batch, its padding predicted as target, against one image at a time."""
    batch, sizes = cases.pad(predictions, fill=True)
    rows = cases.point_rows(points)
    initial = torch.rand(batch.shape) < 0.1
    initial &= valid_area(sizes, batch)
    filtered = hmg_gpu.false_alarm_filter(batch, rows, radius=radius, sizes=sizes)
    hybrid = hmg_gpu.update(batch, initial, rows, radius=radius, sizes=sizes)
    assert filtered.dtype == hybrid.dtype == torch.bool
    assert filtered.shape == hybrid.shape == batch.shape
    initials, outputs = (
        cases.cut(initial, sizes),
        zip(cases.cut(filtered, sizes), cases.cut(hybrid, sizes), strict=True),
    )
    for index, (ours_filtered, ours_hybrid) in enumerate(outputs):
        where = f"image {index}, radius {radius}, points {points[index]}"
        theirs = reference.false_alarm_filter(predictions[index], points[index], radius)
        np.testing.assert_array_equal(ours_filtered, theirs, err_msg=where)
        theirs = reference.update(predictions[index], initials[index], points[index], radius)
        np.testing.assert_array_equal(ours_hybrid, theirs, err_msg=where)
    outside = ~valid_area(sizes, batch)
    assert not filtered[outside].any() and not hybrid[outside].any()


# ---- by eye ---------------------------------------------------------------------------------------------------------


def test_one_case_by_eye() -> None:
    """Three predicted blobs, one label at (1, 1), radius 3: the first is under it, the others are too far away."""
    rows = ["##......#", "##......#", ".........", "....##...", "....##..."]
    prediction = torch.tensor([[mark == "#" for mark in row] for row in rows])[None]
    points = torch.tensor([[0, 1, 1]])
    filtered = hmg_gpu.false_alarm_filter(prediction, points, radius=3)
    assert filtered.nonzero().tolist() == [[0, 0, 0], [0, 0, 1], [0, 1, 0], [0, 1, 1]]

    # The blob at the bottom has its centroid at (3.5, 4.5): 2.5 + 3.5 = 6 pixels away.
    assert hmg_gpu.false_alarm_filter(prediction, points, radius=5).sum() == 4
    assert hmg_gpu.false_alarm_filter(prediction, points, radius=6).sum() == 8

    initial = torch.zeros_like(prediction)
    initial[0, 4, 8] = True
    hybrid = hmg_gpu.update(prediction, initial, points, radius=3)
    assert torch.equal(hybrid, filtered | initial)
    assert torch.equal(hmg_gpu.retrieve_missed(initial, filtered), hybrid)


# ---- equal to the reference -----------------------------------------------------------------------------------------


def test_thousand_cases_equal_reference(rng: np.random.Generator) -> None:
    """Adversarial and random masks, none to five points an image, radii from 0 to further than any image."""
    masks = [mask for mask in cases.ADVERSARIAL_MASKS.values() for _ in range(10)]
    masks += [cases.random_mask(rng, cases.random_shape(rng)) for _ in range(1000 - len(masks))]
    assert len(masks) == 1000
    order = rng.permutation(len(masks)).tolist()
    radii = [0, 1, 2, 3, 5, 8, 13, 30, 30, 1000]
    for start in range(0, len(order), 25):
        chosen = [masks[index] for index in order[start : start + 25]]
        points = [cases.random_points(rng, mask.shape) for mask in chosen]
        assert_equals_reference(chosen, points, radii[start // 25 % len(radii)])


def test_corrections_are_what_the_filter_erases_and_what_it_leaves_untouched(rng: np.random.Generator) -> None:
    """Centroids of the components that the reference's filter erases, and of the initial ones that it misses."""
    found = [0, 0]
    for _ in range(40):
        shapes = [cases.random_shape(rng) for _ in range(5)]
        masks, initial = ([cases.random_mask(rng, shape) for shape in shapes] for _ in range(2))
        points = [cases.random_points(rng, shape) for shape in shapes]
        (batch, sizes), (targets, _) = cases.pad(masks, fill=True), cases.pad(initial, fill=True)
        radius = int(rng.integers(0, 12))
        results = corrections(batch, targets, cases.point_rows(points), radius=radius, sizes=sizes)
        wanted: tuple[list, list] = [], []
        for index, mask in enumerate(masks):
            kept = reference.false_alarm_filter(mask, points[index], radius)
            wanted[0].extend((index, round(y), round(x)) for _, y, x in reference.components(mask & ~kept))
            labels, count = ndimage.label(initial[index], np.ones((3, 3)))
            missed = np.isin(labels, np.setdiff1d(np.arange(1, count + 1), labels[kept]))
            wanted[1].extend((index, round(y), round(x)) for _, y, x in reference.components(missed))
        for place, rows in enumerate(results):
            assert rows.dtype == torch.int64 and list(map(tuple, rows.tolist())) == wanted[place]
            found[place] += len(rows)
    assert min(found) > 100
    nothing = torch.zeros(2, 4, 4, dtype=torch.bool)
    assert [rows.shape for rows in corrections(nothing, nothing, torch.zeros(0, 3, dtype=torch.int64))] == [(0, 3)] * 2


def test_corrections_refuse_masks_of_another_kind() -> None:
    prediction, points = torch.zeros(1, 4, 4, dtype=torch.bool), torch.tensor([[0, 1, 1]])
    with pytest.raises(TypeError, match="initial"):
        corrections(prediction, prediction.float(), points)
    with pytest.raises(ValueError, match="initial"):
        corrections(prediction, prediction[:, :3], points)


def test_default_radius_is_the_papers() -> None:
    prediction = torch.zeros(1, 3, 70, dtype=torch.bool)
    prediction[0, 1, [5, 35, 66]] = True
    points = torch.tensor([[0, 1, 35]])
    assert hmg_gpu.false_alarm_filter(prediction, points)[0, 1].nonzero()[:, 0].tolist() == [5, 35]
    assert hmg_gpu.update(prediction, prediction.new_zeros(1, 3, 70), points).sum() == 2
    assert reference.false_alarm_filter(prediction[0].numpy(), [(1, 35)]).sum() == 2


SHAPES_OF_BLOBS = {
    "one pixel": [[1]],
    "pair": [[1, 1]],
    "three in a row": [[1], [1], [1]],
    "corner": [[1, 1], [1, 0]],
    "step": [[1, 0], [1, 1], [0, 1], [0, 1]],
    "diagonal": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    "ring, empty at its centroid": [[1, 1, 1], [1, 0, 1], [1, 1, 1]],
    "hook, centroid outside": [[1, 1, 1, 1, 1], [1, 0, 0, 0, 0], [1, 0, 0, 0, 0], [1, 0, 0, 0, 0]],
}


@pytest.mark.parametrize("name", SHAPES_OF_BLOBS)
@pytest.mark.parametrize("radius", [0, 1, 7, 30])
def test_the_edge_of_the_radius(name: str, radius: int) -> None:
    """A point for every pixel of the image: exactly r away is kept, one area-unit further is not."""
    blob = np.array(SHAPES_OF_BLOBS[name], dtype=bool)
    side = 2 * radius + 14
    mask = np.zeros((side, side), dtype=bool)
    mask[radius + 5 : radius + 5 + blob.shape[0], radius + 5 : radius + 5 + blob.shape[1]] = blob
    ys, xs = np.nonzero(mask)
    area, sum_y, sum_x = len(ys), int(ys.sum()), int(xs.sum())
    y, x = np.mgrid[:side, :side]
    excess = np.abs(sum_y - area * y) + np.abs(sum_x - area * x) - radius * area  # in units of 1 / area

    # Of the points kept, those that lie closest to the edge; and of the points lost.
    closest = excess[excess <= 0].max() if (excess <= 0).any() else None
    edge = [(excess == value) for value in (closest, excess[excess > 0].min()) if value is not None]
    chosen = np.argwhere(np.logical_or.reduce(edge))
    batch = torch.from_numpy(mask).expand(len(chosen), side, side)
    rows = torch.cat((torch.arange(len(chosen))[:, None], torch.from_numpy(chosen)), dim=1)
    kept = hmg_gpu.false_alarm_filter(batch, rows, radius=radius).flatten(1).any(1)
    assert kept.tolist() == (excess[tuple(chosen.T)] <= 0).tolist()
    for answer, point in zip(kept.tolist(), chosen.tolist(), strict=True):
        assert reference.false_alarm_filter(mask, [point], radius).any() == answer


def test_both_sides_of_the_edge_by_numbers() -> None:
    """Three pixels with sum_y = 1 + 3 y, sum_x = 2 + 3 x: distances of r and of r + 1 / 3 from the centroid exist."""
    mask = torch.zeros(1, 60, 60, dtype=torch.bool)
    mask[0, 20, 20] = mask[0, 20, 21] = mask[0, 21, 21] = True  # sum_y = 61, sum_x = 62
    exact, past = torch.tensor([[0, 5, 7]]), torch.tensor([[0, 37, 7]])
    assert abs(61 - 3 * 5) + abs(62 - 3 * 7) == 3 * 29
    assert abs(61 - 3 * 37) + abs(62 - 3 * 7) == 3 * 30 + 1
    assert hmg_gpu.false_alarm_filter(mask, exact, radius=29).sum() == 3
    assert hmg_gpu.false_alarm_filter(mask, exact, radius=28).sum() == 0
    assert hmg_gpu.false_alarm_filter(mask, past, radius=30).sum() == 0
    assert hmg_gpu.false_alarm_filter(mask, past, radius=31).sum() == 3


def test_centroid_outside_its_component() -> None:
    """The label lies in the hole of a ring, and the distance is measured from there."""
    mask = torch.from_numpy(cases.ring(21))[None]
    assert hmg_gpu.false_alarm_filter(mask, torch.tensor([[0, 10, 10]]), radius=0).equal(mask)
    assert not hmg_gpu.false_alarm_filter(mask, torch.tensor([[0, 0, 0]]), radius=19).any()
    assert hmg_gpu.false_alarm_filter(mask, torch.tensor([[0, 0, 0]]), radius=20).equal(mask)


def test_large_sums_are_exact() -> None:
    """Area times radius passes 2**31."""
    side = 1500
    prediction = torch.ones(1, side, side, dtype=torch.bool)
    corner = torch.tensor([[0, 0, 0]])  # the centroid is 749.5 + 749.5 = 1499 pixels away
    assert side * side * 1499 > 2**31
    assert hmg_gpu.false_alarm_filter(prediction, corner, radius=1499).all()
    assert not hmg_gpu.false_alarm_filter(prediction, corner, radius=1498).any()


def test_points_save_only_their_own_image() -> None:
    prediction = torch.zeros(3, 9, 9, dtype=torch.bool)
    prediction[:, 4, 4] = True
    filtered = hmg_gpu.false_alarm_filter(prediction, torch.tensor([[2, 4, 4]]))
    assert filtered.flatten(1).any(1).tolist() == [False, False, True]


# ---- what must hold whatever the masks ------------------------------------------------------------------------------

Batch = tuple[Tensor, Tensor, Tensor]


@pytest.fixture
def batch(rng: np.random.Generator) -> Batch:
    """(prediction, initial, points) of sixteen images of one size."""
    shape = (31, 45)
    prediction = torch.from_numpy(np.stack([cases.random_mask(rng, shape) for _ in range(16)]))
    initial = torch.from_numpy(np.stack([cases.blobs(rng, shape, 2, 5) for _ in range(16)]))
    return prediction, initial, cases.point_rows([cases.random_points(rng, shape) for _ in range(16)])


RADIUS = 9  # in these images some components are kept, some are not


def test_supersets_and_subsets(batch: Batch) -> None:
    prediction, initial, points = batch
    filtered = hmg_gpu.false_alarm_filter(prediction, points, radius=RADIUS)
    hybrid = hmg_gpu.update(prediction, initial, points, radius=RADIUS)
    assert 0 < filtered.sum() < prediction.sum()
    assert not (filtered & ~prediction).any()
    assert not (initial & ~hybrid).any() and not (filtered & ~hybrid).any()
    assert not (hybrid & ~(initial | prediction)).any()


def test_filtering_twice_is_filtering_once(batch: Batch) -> None:
    prediction, _, points = batch
    once = hmg_gpu.false_alarm_filter(prediction, points, radius=RADIUS)
    assert torch.equal(hmg_gpu.false_alarm_filter(once, points, radius=RADIUS), once)


def test_a_larger_radius_keeps_more(batch: Batch) -> None:
    prediction, _, points = batch
    masks = [hmg_gpu.false_alarm_filter(prediction, points, radius=radius) for radius in (0, 4, 9, 20, 1000)]
    for smaller, larger in pairwise(masks):
        assert not (smaller & ~larger).any()
    labelled = torch.isin(torch.arange(len(prediction)), points[:, 0])
    assert torch.equal(masks[-1], prediction & labelled[:, None, None])  # further than any image: the prediction


def test_order_does_not_matter(batch: Batch) -> None:
    prediction, initial, points = batch
    hybrid = hmg_gpu.update(prediction, initial, points, radius=RADIUS)
    assert torch.equal(hmg_gpu.update(prediction, initial, points[torch.randperm(len(points))], radius=RADIUS), hybrid)
    assert torch.equal(hmg_gpu.update(prediction, initial, points.repeat(2, 1), radius=RADIUS), hybrid)

    order = torch.randperm(len(prediction))
    moved = points.clone()
    moved[:, 0] = order.argsort()[points[:, 0]]  # the place that image now has
    assert torch.equal(hmg_gpu.update(prediction[order], initial[order], moved, radius=RADIUS), hybrid[order])


@pytest.mark.parametrize("turn", ["vertical", "horizontal", "transpose"])
def test_flips_and_transposes_commute(batch: Batch, turn: str) -> None:
    prediction, initial, points = batch
    image, y, x = points.unbind(1)
    _, height, width = prediction.shape
    turned, (y, x) = {
        "vertical": (lambda mask: mask.flip(1), (height - 1 - y, x)),
        "horizontal": (lambda mask: mask.flip(2), (y, width - 1 - x)),
        "transpose": (lambda mask: mask.mT, (x, y)),
    }[turn]
    hybrid = hmg_gpu.update(turned(prediction), turned(initial), torch.stack((image, y, x), dim=1), radius=RADIUS)
    assert torch.equal(hybrid, turned(hmg_gpu.update(prediction, initial, points, radius=RADIUS)))


def test_one_at_a_time_equals_the_batch(batch: Batch) -> None:
    prediction, initial, points = batch
    hybrid = hmg_gpu.update(prediction, initial, points, radius=RADIUS)
    for index in range(len(prediction)):
        own = points[points[:, 0] == index].clone()
        own[:, 0] = 0
        alone = hmg_gpu.update(prediction[index : index + 1], initial[index : index + 1], own, radius=RADIUS)
        assert torch.equal(alone[0], hybrid[index])


def test_arguments_are_left_alone(batch: Batch) -> None:
    kept = [argument.clone() for argument in batch]
    sizes = torch.tensor([[31, 45]]).repeat(16, 1)
    hmg_gpu.update(*batch, sizes=sizes)
    assert all(torch.equal(before, after) for before, after in zip(kept, batch, strict=True))


@pytest.mark.parametrize("images", [0, 2])
def test_no_points(images: int) -> None:
    """Without a label nothing predicted is believed; the initial mask (of another run) stays."""
    prediction, none = torch.ones(images, 6, 7, dtype=torch.bool), torch.zeros((0, 3), dtype=torch.int64)
    filtered = hmg_gpu.false_alarm_filter(prediction, none)
    assert filtered.shape == prediction.shape and filtered.dtype == torch.bool and not filtered.any()
    initial = torch.rand(images, 6, 7) < 0.5
    assert torch.equal(hmg_gpu.update(prediction, initial, none), initial)


# ---- errors ---------------------------------------------------------------------------------------------------------

MASK, POINTS = torch.ones(2, 8, 9, dtype=torch.bool), torch.tensor([[0, 3, 4], [1, 2, 2]])

WRONG = [
    (MASK.double(), POINTS, {}, TypeError, r"prediction: expected bool, got torch.float64; .*logits > 0"),
    (MASK, POINTS, {"offsets": torch.zeros(2, dtype=torch.int64)}, ValueError, r"offsets: expected int64 \[3\]"),
    (MASK, POINTS, {"offsets": torch.zeros(3, dtype=torch.int64)}, ValueError, "offsets: expected points ordered"),
    (MASK[0], POINTS, {}, ValueError, r"prediction: expected \[B, H, W\], got \[8, 9\]"),
    (MASK[:, None], POINTS, {}, ValueError, r"prediction: expected \[B, H, W\], got \[2, 1, 8, 9\]; .*squeeze"),
    (MASK, POINTS.float(), {}, ValueError, r"points: expected int64 \[P, 3\].*got torch.float32 \[2, 3\]"),
    (MASK, POINTS[:, :2], {}, ValueError, r"points: expected int64 \[P, 3\].*got torch.int64 \[2, 2\]"),
    (MASK, torch.tensor([[0, 8, 0]]), {}, ValueError, r"points row 0: .*\(8, 0\) lies outside image 0 of 8 x 9"),
    (MASK, torch.tensor([[0, 1, 1], [2, 0, 0]]), {}, ValueError, r"points row 1: image 2 does not exist.* has 2"),
    (MASK, POINTS, {"radius": -1}, ValueError, r"radius: expected a whole number of pixels, 0 or more, got -1"),
    (MASK, POINTS, {"radius": 2.5}, ValueError, r"radius: expected a whole number of pixels, 0 or more, got 2.5"),
    (MASK, POINTS, {"sizes": torch.tensor([[8, 9]])}, ValueError, r"sizes: expected int64 \[2, 2\].* got .*\[1, 2\]"),
    (MASK, POINTS, {"sizes": torch.tensor([[8, 9], [2, 9]])}, ValueError, r"points row 1: .*outside image 1 of 2 x 9"),
]


@pytest.mark.parametrize(("prediction", "points", "settings", "error", "text"), WRONG)
def test_wrong_arguments_are_named(prediction: Tensor, points: Tensor, settings: dict, error, text: str) -> None:
    with pytest.raises(error, match=text):
        hmg_gpu.false_alarm_filter(prediction, points, **settings)
    with pytest.raises(error, match=text):
        hmg_gpu.update(prediction, MASK, points, **settings)


def test_wrong_initial_masks_are_named() -> None:
    with pytest.raises(
        ValueError, match=r"prediction and initial: expected one shape, got \[2, 8, 9\] and \[2, 8, 8\]"
    ):
        hmg_gpu.update(MASK, MASK[:, :, :8], POINTS)
    with pytest.raises(TypeError, match=r"initial: expected bool, got torch.uint8"):
        hmg_gpu.update(MASK, MASK.byte(), POINTS)
    with pytest.raises(ValueError, match=r"initial and filtered: expected one shape, got \[2, 8, 9\] and \[1, 8, 9\]"):
        hmg_gpu.retrieve_missed(MASK, MASK[:1])
    with pytest.raises(TypeError, match=r"filtered: expected bool, got torch.float32; .*logits > 0"):
        hmg_gpu.retrieve_missed(MASK, MASK.float())


# ---- soft fusion ----------------------------------------------------------------------------------------------------


def test_soft_update_equals_the_reference(rng: np.random.Generator) -> None:
    """Probabilities in steps of 1/64, exact in float32, so that both sides meet 0.5 at the same pixels."""
    shape, sizes = (3, 25, 31), [(25, 31), (20, 22), (25, 18)]
    probability = torch.from_numpy(rng.integers(0, 65, shape) / 64).float() ** 2
    initial = torch.from_numpy(rng.integers(0, 65, shape) / 64 * (rng.random(shape) < 0.3)).float()
    points = torch.tensor([[0, 3, 4], [0, 20, 22], [1, 10, 10], [2, 24, 17]])
    initial *= valid_area(torch.tensor(sizes), probability > 0)
    for radius, weight in ((6, 0.75), (3, 0.5), (30, 1.0), (30, 0.0)):
        found = hmg_gpu.soft_update(
            probability, initial, points, radius=radius, weight=weight, sizes=torch.tensor(sizes)
        )
        for index, (height, width) in enumerate(sizes):
            own = points[points[:, 0] == index, 1:].tolist()
            planes = (plane[index, :height, :width].numpy().astype(np.float64) for plane in (probability, initial))
            wanted = reference.soft_update(*planes, own, radius, weight)
            np.testing.assert_array_equal(found[index, :height, :width], wanted)
            assert not found[index, height:].any() and not found[index, :, width:].any()


def test_what_no_prediction_can_take_away() -> None:
    """At weight 0.7 a pixel of 0.72 stays whatever the network says, one of 0.6 goes; NaN counts as 0."""
    initial = torch.tensor([[[0.0, 0.72, 0.6, 0.4]]])
    points = torch.tensor([[0, 0, 1]])
    for nothing in (0.0, float("nan")):
        found = hmg_gpu.soft_update(torch.full((1, 1, 4), nothing), initial, points)
        assert found.tolist() == [[[False, True, False, False]]]
    assert hmg_gpu.soft_update(torch.ones(1, 1, 4), initial, points).all()


def test_soft_update_refuses_masks_and_odd_numbers() -> None:
    points = torch.zeros(0, 3, dtype=torch.int64)
    plane = torch.zeros(1, 2, 2)
    with pytest.raises(TypeError, match=r"probability: expected floating point, got torch.bool"):
        hmg_gpu.soft_update(plane > 0, plane, points)
    with pytest.raises(TypeError, match=r"initial: expected floating point"):
        hmg_gpu.soft_update(plane, plane > 0, points)
    with pytest.raises(ValueError, match=r"weight 1.5"):
        hmg_gpu.soft_update(plane, plane, points, weight=1.5)
    with pytest.raises(ValueError, match=r"initial"):
        hmg_gpu.soft_update(plane, torch.zeros(1, 2, 3), points)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_logits_and_offsets(dtype: torch.dtype) -> None:
    """As thresholding beforehand, and as points in any order."""
    logits = torch.randn(3, 20, 24).to(dtype)
    logits[0, 0, :2] = torch.tensor([torch.nan, torch.inf])
    initial = torch.rand(3, 20, 24) < 0.02
    points = torch.tensor([[0, 4, 5], [2, 10, 10], [2, 3, 20]])
    offsets = torch.tensor([0, 1, 1, 3])
    expected = hmg_gpu.update(logits > 1.2, initial, points[[2, 0, 1]], radius=4)
    assert hmg_gpu.update(logits, initial, points, radius=4, offsets=offsets, threshold=1.2).equal(expected)
    assert hmg_gpu.false_alarm_filter(logits, points, radius=4, offsets=offsets, threshold=1.2).any()
    assert not expected.equal(initial)
