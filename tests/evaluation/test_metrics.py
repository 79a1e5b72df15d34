"""Detection metrics against the loop in tests/reference.py, count for count, and LESPS's rules at their edges."""

from __future__ import annotations

import math
from collections.abc import Sequence

import cases
import numpy as np
import pytest
import reference
import torch
from numpy.typing import NDArray
from torch import Tensor

from hmg_gpu.evaluation.metrics import DetectionMetrics

COUNTS = ("intersection", "union", "matched", "targets", "false_alarm_pixels", "pixels")
RATIOS = ("iou", "niou", "pd", "fa", "pixel_fa")

Pair = tuple[NDArray, NDArray]


@pytest.fixture(params=["scipy", "torch"], autouse=True)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("HMG_BACKEND", request.param)
    return request.param


def measure(pairs: Sequence[Pair], distance: float = 3.0) -> dict[str, float]:
    """All pairs in one call, the padding predicted as target and absent from the truth."""
    metrics = DetectionMetrics(distance)
    prediction, sizes = cases.pad([pair[0] for pair in pairs], fill=True)
    target, _ = cases.pad([pair[1] for pair in pairs])
    metrics.update(prediction, target, sizes)
    return metrics.compute()


def assert_same(ours: dict[str, float], theirs: dict[str, float], where: str = "") -> None:
    assert {name: ours[name] for name in COUNTS} == {name: theirs[name] for name in COUNTS}, where
    assert all(isinstance(ours[name], int) for name in COUNTS)
    for name in RATIOS:
        assert ours[name] == pytest.approx(theirs[name], rel=1e-12, nan_ok=True), (name, where)


def drawn(picture: str) -> NDArray:
    return np.array([[mark == "#" for mark in line.split()] for line in picture.strip().splitlines()])


def dots(shape: tuple[int, int], *pixels: tuple[int, int]) -> NDArray:
    mask = np.zeros(shape, dtype=bool)
    for pixel in pixels:
        mask[pixel] = True
    return mask


def random_pair(rng: np.random.Generator) -> Pair:
    """A target mask and a prediction made from it: moved, eroded, with blobs added, unrelated, or nothing at all."""
    shape = cases.random_shape(rng, 32)
    target = cases.blobs(rng, shape, int(rng.integers(0, 12)), 4)
    match rng.integers(6):
        case 0:
            prediction = cases.blobs(rng, shape, int(rng.integers(0, 12)), 4)
        case 1:  # by up to four pixels: about the distance that still matches, often exactly 3
            prediction = np.roll(target, rng.integers(-4, 5, 2).tolist(), axis=(0, 1))
        case 2:
            prediction = target & (rng.random(shape) < 0.6)
        case 3:
            prediction = target | cases.blobs(rng, shape, 6, 3)
        case 4:
            prediction = np.zeros(shape, dtype=bool)
        case _:
            prediction, target = cases.random_mask(rng, shape), np.zeros(shape, dtype=bool)
    return prediction, target


@pytest.fixture(scope="module")
def pairs() -> list[Pair]:
    rng = np.random.default_rng(3)
    return [random_pair(rng) for _ in range(500)]


# ---- equal to the reference -----------------------------------------------------------------------------------------


def test_pairs_reach_every_rule(pairs: list[Pair]) -> None:
    """The comparison below would be worth little if these pairs had no ties and no empty masks."""
    empty = ties = rivals = 0
    for prediction, target in pairs:
        found, truth = reference.components(prediction), reference.components(target)
        squared = [[(y - v) ** 2 + (x - u) ** 2 for _, y, x in found] for _, v, u in truth]
        empty += not found and not truth
        ties += sum(row.count(9) for row in squared)
        rivals += sum(sum(value < 9 for value in row) > 1 for row in squared)
    assert empty >= 10 and ties >= 20 and rivals >= 50, (empty, ties, rivals)


def test_pairs_equal_reference(pairs: list[Pair]) -> None:
    """One at a time: each count of each pair."""
    metrics = DetectionMetrics()
    for index, (prediction, target) in enumerate(pairs):
        metrics.reset()
        metrics.update(torch.from_numpy(prediction)[None], torch.from_numpy(target)[None])
        assert_same(metrics.compute(), reference.detection_metrics([(prediction, target)]), f"pair {index}")


@pytest.mark.parametrize("distance", [3.0, 0.5, 1.5, 8.0])
def test_one_call_equals_one_at_a_time(pairs: list[Pair], distance: float) -> None:
    """All 500 in one padded batch, in several batches, and the reference's loop over them."""
    expected = reference.detection_metrics(pairs, distance)
    assert expected["matched"] > 100 and expected["false_alarm_pixels"] > 300
    assert_same(measure(pairs, distance), expected)

    metrics = DetectionMetrics(distance)
    for start in range(0, len(pairs), 64):
        part = pairs[start : start + 64]
        prediction, sizes = cases.pad([pair[0] for pair in part], fill=True)
        target, _ = cases.pad([pair[1] for pair in part], fill=True)
        metrics.update(prediction, target, sizes)
    assert_same(metrics.compute(), expected)


def test_order_of_images_does_not_matter(pairs: list[Pair], rng: np.random.Generator) -> None:
    shuffled = [pairs[index] for index in rng.permutation(len(pairs))]
    assert_same(measure(shuffled), measure(pairs))


# ---- by eye ---------------------------------------------------------------------------------------------------------


def test_one_case_by_eye() -> None:
    target = drawn("""
        # # . . . . . .
        # # . . . . . .
        . . . . . . . .
        . . . . . . # .
        . . . . . . # .
    """)
    prediction = drawn("""
        . # # . . . . .
        . # # . . . . .
        . . . . . . . .
        # . . . . . . .
        # # . . . . . .
    """)
    result = measure([(prediction, target)])
    assert (result["intersection"], result["union"]) == (2, 11)
    assert (result["matched"], result["targets"]) == (1, 2)  # the square moved by one pixel; the bar was missed
    assert (result["false_alarm_pixels"], result["pixels"]) == (3, 40)  # the corner at the lower left
    assert result["iou"] == result["niou"] == 2 / 11
    assert result["pd"] == 1 / 2
    assert result["fa"] == 3 / 40
    assert result["pixel_fa"] == 5 / 40  # that corner and the square's overhang


def test_iou_of_the_set_and_mean_of_the_images() -> None:
    half = (dots((1, 4), (0, 0)), dots((1, 4), (0, 0), (0, 1)))
    none = (dots((1, 4), (0, 3)), dots((1, 4), (0, 0), (0, 1), (0, 2)))
    nothing = (dots((1, 4)), dots((1, 4)))
    result = measure([half, none, nothing])
    assert result["iou"] == 1 / 6
    assert result["niou"] == (1 / 2 + 0) / 2  # the empty pair is left out
    assert result["pixels"] == 12


# ---- matching -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("offset", "matches"),
    [((0, 2), True), ((2, 2), True), ((0, 3), False), ((3, 0), False), ((-3, 0), False), ((2, 3), False)],
)
def test_strictly_closer_than_three_pixels(offset: tuple[int, int], matches: bool) -> None:
    centre = (8, 8)
    moved = (centre[0] + offset[0], centre[1] + offset[1])
    result = measure([(dots((20, 20), moved), dots((20, 20), centre))])
    assert result["matched"] == matches
    assert result["false_alarm_pixels"] == (not matches)


@pytest.mark.parametrize("shift", range(12))
@pytest.mark.parametrize("length", [3, 6, 7])
def test_exactly_three_pixels_with_fractions(shift: int, length: int) -> None:
    """Centroids that no binary fraction holds: L-shapes whose third moves by three pixels, anywhere in the image."""
    blob = np.zeros((length, 2), dtype=bool)
    blob[:, 0] = True
    blob[0, 1] = True
    target, prediction = np.zeros((40, 40), dtype=bool), np.zeros((40, 40), dtype=bool)
    target[shift : shift + length, shift : shift + 2] = blob
    prediction[shift : shift + length, shift + 3 : shift + 5] = blob
    assert measure([(prediction, target)])["matched"] == 0
    assert measure([(prediction, target)], distance=3.0001)["matched"] == 1


def test_the_first_in_raster_order_wins_not_the_nearest() -> None:
    """The target at (8, 8) takes the prediction two rows up, though another lies on it, which is then a false alarm."""
    shape = (20, 20)
    on_it, above = (8, 8), (6, 8)
    result = measure([(dots(shape, on_it, above), dots(shape, on_it))])
    assert (result["matched"], result["false_alarm_pixels"], result["intersection"]) == (1, 1, 1)


def test_a_taken_prediction_is_gone() -> None:
    """Two targets, one prediction between them; then a second one that only the second target can reach."""
    shape = (20, 20)
    targets = dots(shape, (8, 6), (8, 10))
    result = measure([(dots(shape, (8, 8)), targets)])
    assert (result["matched"], result["targets"], result["false_alarm_pixels"]) == (1, 2, 0)
    result = measure([(dots(shape, (8, 8), (9, 12)), targets)])
    assert (result["matched"], result["false_alarm_pixels"]) == (2, 0)


def test_an_earlier_target_may_take_what_a_later_one_needs() -> None:
    """Greedy, not optimal: the first target takes the first prediction, the only one in reach of the second target."""
    shape = (20, 20)
    targets = dots(shape, (8, 6), (8, 10))
    predictions = dots(shape, (7, 8), (9, 4))  # the first reaches both targets, the second only the first
    result = measure([(predictions, targets)])
    assert (result["matched"], result["false_alarm_pixels"]) == (1, 1)


def test_touching_targets_are_one() -> None:
    """Two targets that meet at a corner count as one component, in the truth and in the prediction (Sec. 4.5.3)."""
    joined = dots((12, 12), (4, 4), (5, 5))
    apart = dots((12, 12), (4, 4), (6, 6))
    assert measure([(joined, joined)])["targets"] == 1
    assert measure([(joined, apart)])["matched"] == 1
    assert measure([(apart, joined)])["false_alarm_pixels"] == 1


def test_images_do_not_share_components() -> None:
    shape = (1, 6)
    here, nowhere = dots(shape, (0, 3)), dots(shape)
    result = measure([(here, nowhere), (nowhere, here)])
    assert (result["matched"], result["targets"], result["false_alarm_pixels"]) == (0, 1, 1)


# ---- edges ----------------------------------------------------------------------------------------------------------


def test_empty_on_empty_is_no_error() -> None:
    result = measure([(dots((5, 6)), dots((5, 6)))])
    assert [result[name] for name in COUNTS] == [0, 0, 0, 0, 0, 30]
    assert math.isnan(result["pd"]) and math.isnan(result["iou"]) and math.isnan(result["niou"])
    assert result["fa"] == 0 and result["pixel_fa"] == 0


def test_no_targets_makes_pd_undefined_but_not_fa() -> None:
    result = measure([(dots((5, 6), (1, 1), (1, 2)), dots((5, 6)))])
    assert math.isnan(result["pd"]) and result["targets"] == 0
    assert result["fa"] == 2 / 30 and result["iou"] == 0 and result["niou"] == 0


def test_empty_prediction_misses_all() -> None:
    result = measure([(dots((5, 6)), dots((5, 6), (1, 1), (4, 4)))])
    assert (result["pd"], result["fa"], result["iou"], result["niou"]) == (0, 0, 0, 0)
    assert result["targets"] == 2


@pytest.mark.parametrize("batch", [None, 0])
def test_nothing_seen(batch: int | None) -> None:
    metrics = DetectionMetrics()
    if batch is not None:
        metrics.update(torch.zeros(batch, 4, 5).bool(), torch.zeros(batch, 4, 5).bool())
    result = metrics.compute()
    assert [result[name] for name in COUNTS] == [0] * len(COUNTS)
    assert all(math.isnan(result[name]) for name in RATIOS)


def test_padding_counts_nowhere() -> None:
    """Both masks full to the edge of the batch; only 3 x 4 pixels of them are image."""
    full = torch.ones(1, 8, 8, dtype=torch.bool)
    metrics = DetectionMetrics()
    metrics.update(full, full, torch.tensor([[3, 4]]))
    result = metrics.compute()
    assert [result[name] for name in COUNTS] == [12, 12, 1, 1, 0, 12]


def test_compute_changes_nothing_and_reset_forgets(pairs: list[Pair]) -> None:
    metrics = DetectionMetrics()
    prediction, target = (torch.from_numpy(mask)[None] for mask in pairs[0])
    metrics.update(prediction, target)
    first = metrics.compute()
    assert_same(metrics.compute(), first)
    metrics.update(prediction, target)
    assert metrics.compute()["pixels"] == 2 * first["pixels"]
    metrics.reset()
    assert metrics.compute()["pixels"] == 0
    metrics.update(prediction, target)
    assert_same(metrics.compute(), first)


def test_masks_are_left_alone(pairs: list[Pair]) -> None:
    prediction, sizes = cases.pad([pair[0] for pair in pairs[:20]], fill=True)
    target, _ = cases.pad([pair[1] for pair in pairs[:20]])
    kept = prediction.clone(), target.clone()
    DetectionMetrics().update(prediction, target, sizes)
    assert torch.equal(prediction, kept[0]) and torch.equal(target, kept[1])


# ---- errors ---------------------------------------------------------------------------------------------------------

MASK = torch.ones(2, 8, 9, dtype=torch.bool)


@pytest.mark.parametrize(
    ("prediction", "target", "sizes", "error", "text"),
    [
        (MASK.float(), MASK, None, TypeError, r"prediction: expected bool, got torch.float32; .*logits > 0"),
        (MASK, MASK.byte(), None, TypeError, r"target: expected bool, got torch.uint8"),
        (MASK[0], MASK[0], None, ValueError, r"prediction: expected \[B, H, W\], got \[8, 9\]"),
        (MASK, MASK[:, None], None, ValueError, r"target: expected \[B, H, W\], got \[2, 1, 8, 9\]; .*squeeze"),
        (MASK, MASK[:, :, :8], None, ValueError, r"prediction and target: .*got \[2, 8, 9\] and \[2, 8, 8\]"),
        (MASK, MASK, torch.tensor([[8, 9]]), ValueError, r"sizes: expected int64 \[2, 2\].* got .*\[1, 2\]"),
        (MASK, MASK, torch.tensor([[8, 9], [8, 10]]), ValueError, r"sizes row 1: \[8, 10\] does not fit .*8 x 9"),
    ],
)
def test_wrong_arguments_are_named(prediction: Tensor, target: Tensor, sizes: Tensor | None, error, text: str) -> None:
    metrics = DetectionMetrics()
    with pytest.raises(error, match=text):
        metrics.update(prediction, target, sizes)
    assert metrics.compute()["pixels"] == 0  # a refused batch leaves no trace


def test_sums_are_kept_in_place() -> None:
    """As a CUDA graph needs it: a replay adds to the tensors that were there at its capture."""
    metrics = DetectionMetrics()
    pair = torch.ones(1, 2, 3, dtype=torch.bool), torch.ones(1, 2, 3, dtype=torch.bool)
    with torch.inference_mode():
        metrics.update(*pair)
    held = metrics._counts, metrics._iou
    metrics.update(*pair)
    assert metrics.compute()["intersection"] == 12 and metrics.compute()["niou"] == 1
    metrics.reset()
    assert math.isnan(metrics.compute()["niou"]) and metrics.compute()["pixels"] == 0
    metrics.update(*pair)
    assert metrics.compute()["targets"] == 1
    assert held[0] is metrics._counts and held[1] is metrics._iou
