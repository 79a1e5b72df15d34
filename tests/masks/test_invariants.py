"""What must hold for any input, searched by hypothesis: supersets, idempotence, order, symmetry, gain, batch size.

Examples are the same in every run. Images hold few grey levels, or many: ties are the rule, not the exception.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from test_pmg import TURNS, flipped_rows
from tiny import small_network, tiny_set
from torch import Tensor

import hmg_gpu
from hmg_gpu import MaskUpdater
from hmg_gpu.masks import Pmg, Union

fixed = settings(derandomize=True, database=None, deadline=None, max_examples=60)

Shape = tuple[int, int, int]
SHAPES = st.tuples(st.integers(1, 4), st.integers(1, 19), st.integers(1, 23))
EXTENT = st.integers(1, 12)
HALF_WIDTH = st.integers(0, 4)
RADIUS = st.integers(0, 20)
SEEDS = st.integers(0, 2**32 - 1)


@st.composite
def point_sets(draw: st.DrawFn, shape: Shape) -> Tensor:
    """None to ten points anywhere in the batch, in any order, some of them twice."""
    row = st.tuples(*(st.integers(0, side - 1) for side in shape))
    return torch.tensor(draw(st.lists(row, max_size=10)), dtype=torch.int64).reshape(-1, 3)


@st.composite
def scenes(draw: st.DrawFn) -> tuple[Tensor, Tensor, dict[str, int]]:
    """Whole-number intensities 0..255 as float32 [B, H, W], points, and settings of the search."""
    shape = draw(SHAPES)
    levels = draw(st.sampled_from([1, 3, 20, 255]))
    if draw(st.booleans()):
        images = draw(arrays(np.uint8, shape, elements=st.integers(0, levels)))
    else:  # noise, which hypothesis would need a thousand draws for
        images = np.random.default_rng(draw(SEEDS)).integers(0, levels + 1, shape)
    search = {"extent": draw(EXTENT), "half_width": draw(HALF_WIDTH)}
    return torch.from_numpy(images.astype(np.float32)), draw(point_sets(shape)), search


@st.composite
def updates(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, int]:
    """Prediction and initial masks bool [B, H, W], points, radius."""
    shape = draw(SHAPES)
    rng = np.random.default_rng(draw(SEEDS))
    prediction = draw(arrays(np.bool_, shape)) if draw(st.booleans()) else rng.random(shape) < draw(st.floats(0, 1))
    initial = rng.random(shape) < 0.1
    return torch.from_numpy(prediction), torch.from_numpy(initial), draw(point_sets(shape)), draw(RADIUS)


def doubtful(soft: Tensor, tolerance: float) -> Tensor:
    """Pixels that rounding may move across P = 0.5."""
    return (soft - 0.5).abs() <= tolerance


# ---- updating -------------------------------------------------------------------------------------------------------


@fixed
@given(updates())
def test_hybrid_contains_initial_and_filtered_lies_in_the_prediction(case: tuple[Tensor, Tensor, Tensor, int]) -> None:
    prediction, initial, points, radius = case
    filtered = hmg_gpu.false_alarm_filter(prediction, points, radius=radius)
    hybrid = hmg_gpu.update(prediction, initial, points, radius=radius)
    assert not (filtered & ~prediction).any()
    assert not (initial & ~hybrid).any()
    assert torch.equal(hybrid, initial | filtered)


@fixed
@given(updates())
def test_updating_again_by_the_same_prediction_changes_nothing(case: tuple[Tensor, Tensor, Tensor, int]) -> None:
    prediction, initial, points, radius = case
    hybrid = hmg_gpu.update(prediction, initial, points, radius=radius)
    assert torch.equal(hmg_gpu.update(prediction, hybrid, points, radius=radius), hybrid)
    filtered = hmg_gpu.false_alarm_filter(prediction, points, radius=radius)
    assert torch.equal(hmg_gpu.false_alarm_filter(filtered, points, radius=radius), filtered)

    if len(points) == 0:
        return  # refused by MaskUpdater
    updater = MaskUpdater.from_tensors(
        torch.zeros(prediction.shape), points, masks=Pmg(extent=1), rule=Union(radius=radius), guard=None
    )
    updater.initial = initial
    every = list(range(len(prediction)))
    updater.update_one(every, prediction[:, None], "logits")
    once = updater.masks.clone()
    again = updater.update_one(every, prediction[:, None], "logits")
    assert torch.equal(updater.masks, once) and torch.equal(once, hybrid) and again.pixels == 0


@fixed
@given(updates(), SEEDS)
def test_order_does_not_matter_to_updating(case: tuple[Tensor, Tensor, Tensor, int], seed: int) -> None:
    prediction, initial, points, radius = case
    hybrid = hmg_gpu.update(prediction, initial, points, radius=radius)
    images, moved = shuffled(len(prediction), points, seed)
    found = hmg_gpu.update(prediction[images], initial[images], moved, radius=radius)
    assert torch.equal(found, hybrid[images])


@fixed
@given(updates(), st.sampled_from(list(TURNS)))
def test_turns_commute_with_updating(case: tuple[Tensor, Tensor, Tensor, int], turn: str) -> None:
    """Without exception: distances are whole numbers, also for a centroid between two pixels."""
    prediction, initial, points, radius = case
    turned_points = flipped_rows(points, tuple(prediction.shape[1:]), turn)
    turned = TURNS[turn]
    filtered = hmg_gpu.false_alarm_filter(turned(prediction), turned_points, radius=radius)
    assert torch.equal(filtered, turned(hmg_gpu.false_alarm_filter(prediction, points, radius=radius)))
    hybrid = hmg_gpu.update(turned(prediction), turned(initial), turned_points, radius=radius)
    assert torch.equal(hybrid, turned(hmg_gpu.update(prediction, initial, points, radius=radius)))


def shuffled(count: int, points: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """A new order of the images, and the points of the batch in that order, in an order of their own."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randperm(count, generator=generator)
    moved = points[torch.randperm(len(points), generator=generator)]
    return images, torch.cat((images.argsort()[moved[:, :1]], moved[:, 1:]), dim=1)


# ---- PMG ------------------------------------------------------------------------------------------------------------

Scene = tuple[Tensor, Tensor, dict[str, int]]


@fixed
@given(scenes(), SEEDS)
def test_order_does_not_matter_to_pmg(case: Scene, seed: int) -> None:
    images, points, search = case
    order, moved = shuffled(len(images), points, seed)
    soft = hmg_gpu.point_to_probability(images, points, **search)
    assert torch.equal(hmg_gpu.point_to_probability(images[order], moved, **search), soft[order])
    mask = hmg_gpu.point_to_mask(images, points, **search)
    assert torch.equal(hmg_gpu.point_to_mask(images[order], moved, **search), mask[order])
    assert torch.equal(mask, soft >= 0.5)


@fixed
@given(scenes(), st.sampled_from(list(TURNS)))
def test_turns_commute_with_pmg(case: Scene, turn: str) -> None:
    """Boxes and flips without exception: the search starts at the point, so its first of equal peaks turns with it.

    Transposing exchanges the last two summands of P_f = (P_g + P_v + P_h) / 3, which float addition rounds: only a
    pixel within 2e-7 of 0.5 may change sides.
    """
    images, points, search = case
    turned, height, width = TURNS[turn](images), *images.shape[1:]
    turned_points = flipped_rows(points, (height, width), turn)
    y0, x0, y1, x1 = hmg_gpu.point_to_box(images, points, **search).unbind(1)
    boxes = {
        "vertical": (height - y1, x0, height - y0, x1),
        "horizontal": (y0, width - x1, y1, width - x0),
        "transpose": (x0, y0, x1, y1),
    }[turn]
    assert torch.equal(hmg_gpu.point_to_box(turned, turned_points, **search), torch.stack(boxes, dim=1))

    soft = TURNS[turn](hmg_gpu.point_to_probability(images, points, **search))
    mask = TURNS[turn](hmg_gpu.point_to_mask(images, points, **search))
    excluded = doubtful(soft, 2e-7) if turn == "transpose" else torch.zeros_like(mask)
    found = hmg_gpu.point_to_mask(turned, turned_points, **search)
    assert torch.equal(found[~excluded], mask[~excluded])


@fixed
@given(scenes(), st.integers(-30, 30))
def test_a_power_of_two_as_gain_changes_no_bit(case: Scene, exponent: int) -> None:
    images, points, search = case
    scaled = images * 2.0**exponent
    assert torch.equal(hmg_gpu.point_to_box(scaled, points, **search), hmg_gpu.point_to_box(images, points, **search))
    soft = hmg_gpu.point_to_probability(images, points, **search)
    assert torch.equal(hmg_gpu.point_to_probability(scaled, points, **search), soft)


@fixed
@given(scenes(), st.integers(1, 9999), st.integers(-9999, 9999), st.integers(-20, 20))
def test_gain_and_offset_in_whole_numbers(case: Scene, gain: int, offset: int, exponent: int) -> None:
    """What float32 holds exactly: every box stays, ties and all; masks except where rounding decides about P = 0.5."""
    images, points, search = case
    moved = (images * gain + offset) * 2.0**exponent
    assert torch.equal(moved.double(), (images.double() * gain + offset) * 2.0**exponent)
    boxes = hmg_gpu.point_to_box(images, points, **search)
    assert torch.equal(hmg_gpu.point_to_box(moved, points, **search), boxes)
    assert_masks_follow(images, moved, points, boxes, gain * 2.0**exponent)


@fixed
@given(scenes(), st.floats(0.01, 100), st.floats(-300, 300), SEEDS)
def test_any_gain_and_offset(case: Scene, gain: float, offset: float, seed: int) -> None:
    """Intensities that float32 rounds: boxes stay unless a comparison was a tie, masks unless P was at 0.5."""
    images, points, search = case
    images = images + torch.rand(images.shape, generator=torch.Generator().manual_seed(seed))  # or most would be ties
    moved = (images + offset) * gain
    before, after = (hmg_gpu.point_to_box(batch, points, **search) for batch in (images, moved))
    same = (before == after).all(1)
    for (index, y, x), stayed in zip(points.tolist(), same.tolist(), strict=True):
        assert stayed or not all(
            decided(strip) for strip, *_ in calls("boundary_index", images[index], (y, x), **search)
        )
    assert_masks_follow(images, moved, points[same], before[same], gain)


def decided(strip: NDArray) -> bool:
    """Whether no comparison of P2B lies within 1e-4 of a tie along this direction, so that rounding cannot turn it."""
    if strip.shape[1] < 3:
        return True
    change, sums = np.abs(np.diff(strip.max(axis=0))), strip.sum(axis=0)
    gap = 1e-4 * max(float(np.abs(strip).max()), 1.0)
    excess = change * change.size - change.sum()
    if (np.abs(excess) <= gap * change.size).any():
        return False
    edge = int(change.argmax())
    if excess[edge] <= 0:
        return True
    if (np.delete(change, edge) >= change[edge] - gap).any():
        return False
    while edge + 1 < change.size and excess[edge + 1] > 0:
        edge += 1
    return not (np.abs(np.delete(sums, edge + 1) - sums[edge + 1]) <= gap * strip.shape[0]).any()


def calls(name: str, image: Tensor, point: tuple[int, int], box: reference.Box | None = None, **search: int) -> list:
    """The arguments with which the reference calls one of its own functions for a point."""
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        plain = getattr(reference, name)
        patch.setattr(reference, name, lambda *arguments: (seen.append(arguments), plain(*arguments))[1])
        if box is None:
            reference.point_to_box(image.numpy(), point, **search)
        else:
            reference.box_to_probability(image.numpy(), point, box)
    return seen


def assert_masks_follow(images: Tensor, moved: Tensor, points: Tensor, boxes: Tensor, gain: float) -> None:
    """Point by point: the mask in a given box stays, except where P lies as near to 0.5 as float32 rounds it.

    Rounding the intensities and sigma moves them by a few units of the largest one; divided by the least contrast of
    a part, this is how far P may go.
    """
    for row, box in zip(points, boxes, strict=True):
        index, y, x = row.tolist()
        spans = []
        for part, centre, alpha in calls("part_probability", images[index], (y, x), box.tolist()):
            sigma = alpha * centre + (1 - alpha) * part.mean()
            spans += [span for span in (sigma - part.min(), part.max() - sigma) if span > 1e-6]
        error = 4 * float(moved[index].abs().max()) * torch.finfo(torch.float32).eps / gain
        tolerance = 2e-6 + error / min(spans, default=1.0)

        own, place = row[None] * row.new_tensor([0, 1, 1]), slice(index, index + 1)
        before, after = (hmg_gpu.box_to_mask(batch[place], own, box[None], extent=25) for batch in (images, moved))
        y0, x0, y1, x1 = box.tolist()
        probability = reference.box_to_probability(images[index].numpy(), (y, x), (y0, x0, y1, x1))
        excluded = (np.abs(probability - 0.5) <= tolerance) & (probability != 0.5)
        differs = (before ^ after)[0, y0:y1, x0:x1].numpy()
        assert not (differs & ~excluded).any()


# ---- batches --------------------------------------------------------------------------------------------------------


@fixed
@given(scenes(), updates(), st.integers(1, 3))
def test_batch_size_does_not_matter(case: Scene, step: tuple[Tensor, Tensor, Tensor, int], size: int) -> None:
    images, points, search = case
    assert torch.equal(
        in_batches(lambda part, own: hmg_gpu.point_to_probability(part, own, **search), points, size, images),
        hmg_gpu.point_to_probability(images, points, **search),
    )
    prediction, initial, points, radius = step
    assert torch.equal(
        in_batches(lambda *parts: hmg_gpu.update(*parts, radius=radius), points, size, prediction, initial),
        hmg_gpu.update(prediction, initial, points, radius=radius),
    )


def in_batches(function: Any, points: Tensor, size: int, *batch: Tensor) -> Tensor:
    results = []
    for start in range(0, len(batch[0]), size):
        own = points[(points[:, 0] >= start) & (points[:, 0] < start + size)]
        results.append(function(*(part[start : start + size] for part in batch), own - own.new_tensor([start, 0, 0])))
    return torch.cat(results)


def test_batch_size_of_a_network_does_not_matter() -> None:
    """Predicting and updating a set of images of different size, one to all at a time."""
    net = small_network("acm", output_bias=0.0)
    masks = []
    for size in (1, 2, 3, 8):
        updater = MaskUpdater(tiny_set(), "pmg:extent=8", guard=None)
        updater.update(net, "logits", batch_size=size)
        masks.append(updater.masks)
    assert not torch.equal(masks[0], updater.initial)
    assert all(torch.equal(masks[0], other) for other in masks[1:])
