"""LELCM's update, against the loop of tests/reference_rules.py bit for bit, and each of its items by eye."""

from __future__ import annotations

import cases
import numpy as np
import pytest
import reference_rules
import torch
from test_rules import assert_equals, evidence_of, evolve, point_label, random_label, random_probability

from hmg_gpu.masks import Lelcm


@pytest.fixture(params=["scipy", "torch"], autouse=True)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("HMG_BACKEND", request.param)
    return request.param


@pytest.mark.parametrize("seed", cases.sweep(range(80), fast=16))
def test_lelcm_equals_the_loop(seed: int) -> None:
    rng = np.random.default_rng(200 + seed)
    assert_equals(Lelcm(), reference_rules.lelcm, rng)
    contrast = float(rng.choice([0, 0.1, 1, 3]))
    assert_equals(Lelcm(contrast=contrast), lambda label, p: reference_rules.lelcm(label, p, contrast), rng)


def test_regions_as_large_as_the_image(monkeypatch: pytest.MonkeyPatch) -> None:
    """And every group of sizes between: squares are as large as their group asks for."""
    rng = np.random.default_rng(3)
    label, probability = random_label(rng, (70, 90)), random_probability(rng, (70, 90))
    label[10:60, 80] = label[2, 5:85] = label[30, 10:30] = 255
    wanted = reference_rules.lelcm(label, probability)
    assert np.array_equal(evolve(Lelcm(), label, probability), wanted)
    monkeypatch.setattr("hmg_gpu.masks.rules.evolving.PIXELS", 3000)
    assert np.array_equal(evolve(Lelcm(), label, probability), wanted)


def test_the_threshold_by_eye() -> None:
    """One pixel, so the square is 3 x 3: I_core is its own 0.8, I_surr the mean of the two largest around it."""
    label = point_label((9, 9), (4, 4))
    probability = np.zeros((9, 9), np.float32)
    probability[4, 4], probability[4, 5], probability[4, 3], probability[3, 4], probability[5, 4] = (
        0.8,
        0.6,
        0.4,
        0.26,
        0.25,
    )
    probability[4, 6] = 0.9  # outside the square
    found = evolve(Lelcm(), label, probability)  # T = 0.8 * 0.5 * 0.5 / 0.8 = 0.25
    assert found[4, 3:7].tolist() == [51, 255, 76, 0] and found[3, 4] == 33 and found[5, 4] == 0


def test_candidates_must_touch_the_label_where_they_are_several() -> None:
    label = np.zeros((20, 20), np.uint8)
    label[9:12, 9:12] = 255  # the square reaches 3 pixels from (10, 10)
    probability = np.zeros((20, 20), np.float32)
    probability[9:12, 9:12] = 0.9
    probability[8, 8] = 0.9  # at a corner of the label: with it
    probability[13, 13] = 0.9  # one pixel apart from it
    found = evolve(Lelcm(), label, probability)
    assert found[8, 8] == 114 and found[13, 13] == 0 and (found[9:12, 9:12] == 255).all()
    # A single component is kept wherever it lies: here all that is above the threshold lies apart.
    label = point_label((20, 20), (8, 10), (12, 10), (10, 8), (10, 12), (9, 9), (9, 11), (11, 9), (11, 11))
    ring = np.zeros((20, 20), np.float32)
    ring[label > 0] = 0.1
    ring[10, 10] = 0.4  # the centroid, of a ring's one region, which it touches
    ring[10, 15] = 0.9
    found = evolve(Lelcm(contrast=0.5), label, ring)
    assert np.array_equal(found, reference_rules.lelcm(label, ring))
    label = np.zeros((20, 30), np.uint8)
    label[10, 8:13] = 200
    far = np.zeros((20, 30), np.float32)
    far[10, 8:13], far[7, 10] = 0.001, 0.9
    found = evolve(Lelcm(contrast=5.0), label, far)
    assert found[7, 10] == 114 and np.array_equal(found, reference_rules.lelcm(label, far, 5.0))


def test_labels_above_a_half_lock_at_one_and_the_others_average_in_turn() -> None:
    label = np.zeros((12, 12), np.uint8)
    label[5, 4], label[5, 6], label[5, 5] = 128, 200, 127
    probability = np.zeros((12, 12), np.float32)
    probability[5, 4:7] = 1
    found = evolve(Lelcm(), label, probability)
    assert found[5, 4] == found[5, 6] == 255
    assert found[5, 5] == 223  # both regions see it: (127 + 255) / 2 = 191, then 223
    assert evolve(Lelcm(), found, probability * 0)[5, 4:7].tolist() == [255, 255, 255]


def test_a_certain_pixel_is_no_mask_after_one_update_but_after_two() -> None:
    label, probability = point_label((9, 9), (4, 4)), np.zeros((9, 9), np.float32)
    probability[4, 4] = probability[4, 5] = 1
    once = evolve(Lelcm(), label, probability)
    assert once[4, 5] == 127 and evolve(Lelcm(), once, probability)[4, 5] == 191


def test_a_core_that_the_network_does_not_see_changes_nothing() -> None:
    label, probability = point_label((9, 9), (4, 4)), np.zeros((9, 9), np.float32)
    probability[4, 5] = 1
    assert np.array_equal(evolve(Lelcm(), label, probability), label)  # I_core is 0
    label[4, 4] = 180
    assert evolve(Lelcm(), label, probability)[4, 4] == 255


def test_what_grows_stops_when_the_surroundings_are_as_sure() -> None:
    """T rises to half of the centre's probability; what lies below it is left alone."""
    label = point_label((11, 11), (5, 5))
    for level, grows in ((0.39, False), (0.41, True)):
        probability = np.full((11, 11), 0.8, np.float32)
        probability[4, 4] = level
        assert bool(evolve(Lelcm(), label, probability)[4, 4] > 0) is grows
        assert evolve(Lelcm(), label, probability)[4, 5] == 102


def test_the_device_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[int] = []
    plain = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda values: reads.append(1) or plain(values))
    labels = torch.from_numpy(np.stack([random_label(np.random.default_rng(i), (30, 30)) for i in range(4)]))
    given = evidence_of(labels, torch.rand(4, 30, 30))
    Lelcm().evolve(given)
    assert len(reads) == 1
