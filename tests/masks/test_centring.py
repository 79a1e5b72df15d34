"""Each target's threshold by its point: where the set's masks have their centroids, and who deviates."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from refusal import refused
from tiny import tiny_set

from hmg_gpu.masks import Pmg
from hmg_gpu.masks.student.centring import DEVIATION, find_centring, find_levels
from hmg_gpu.masks.student.crops import own_pixels
from hmg_gpu.masks.student.network import CropNet
from hmg_gpu.masks.student.placement import centroids
from hmg_gpu.masks.student.student import DOUBT, Student, StudentSettings
from hmg_gpu.masks.student.train import train_student
from hmg_gpu.models.checkpoints import read_description, read_tensors, save_checkpoint


def squares(places: torch.Tensor, side: int = 3) -> torch.Tensor:
    """Squares whose centroids lie ``places`` (int64 [P, 2]) beside the centre."""
    masks = torch.zeros(len(places), 31, 31, dtype=torch.bool)
    for mask, (down, across) in zip(masks, (places + 15 - side // 2).tolist(), strict=True):
        mask[down : down + side, across : across + side] = True
    return masks


def test_the_sets_place_and_variance() -> None:
    """Rounded normal deviations about (2, -1): the variance comes out, outliers and empty masks aside."""
    generator = torch.Generator().manual_seed(0)
    places = (torch.randn(3000, 2, generator=generator) * 2).round().long() + torch.tensor([2, -1])
    masks = squares(places.clamp(-12, 12))
    down, across, variance = find_centring(masks)
    assert (down, across) == (2, -1) and 3.3 < variance < 5.2
    spoilt = torch.cat((masks, squares(torch.full((300, 2), 12)), torch.zeros(500, 31, 31, dtype=torch.bool)))
    again = find_centring(spoilt)
    assert again[:2] == (2, -1) and abs(again[2] / variance - 1) < 0.3


def test_few_points_and_no_scatter() -> None:
    assert find_centring(squares(torch.zeros(29, 2, dtype=torch.int64))) is None
    assert find_centring(torch.zeros(99, 31, 31, dtype=torch.bool)) is None
    down, across, variance = find_centring(squares(torch.zeros(30, 2, dtype=torch.int64)))
    assert (down, across) == (0, 0) and variance > 0


def grown(core: float, clutter: float) -> torch.Tensor:
    """A target of 3 x 3 at the centre and a tail of 2 x 6 beside it, less probable: [1, 31, 31]."""
    probabilities = torch.full((1, 31, 31), 0.02)
    probabilities[0, 14:17, 14:17] = core
    probabilities[0, 14:16, 17:23] = clutter
    return probabilities


def test_a_mask_that_grew_into_clutter_takes_a_higher_threshold() -> None:
    probabilities = torch.cat((grown(0.9, 0.45), grown(0.9, 0.02), grown(0.9, 0.45).flip(2)))
    levels = find_levels(probabilities, 0.4, 0.2, (0.0, 0.0, 0.2))
    pixels = own_pixels(probabilities, levels, 0.2)[0]
    assert pixels.sum((1, 2)).tolist() == [9, 9, 9]
    assert own_pixels(probabilities, 0.4, 0.2)[0].sum((1, 2)).tolist() == [21, 9, 21]
    assert float(levels[1]) == pytest.approx(0.4) and 0.45 < float(levels[0]) < 0.55
    # The least that brings it back: nothing is gained by more.
    assert torch.logit(levels[0]).item() == pytest.approx(math.log(2 / 3) + 0.4, abs=1e-5)


def test_a_point_in_the_tail_keeps_it() -> None:
    """Here the set's masks have their centroids where the whole target has it."""
    whole = grown(0.9, 0.35)
    place = centroids(whole > 0.3)[0].tolist()
    levels = find_levels(whole, 0.4, 0.2, (*place, 0.2))
    assert float(levels) < 0.35 and own_pixels(whole, levels, 0.2)[0].sum() == 21


def test_a_click_beside_the_target_moves_nothing_for_nothing() -> None:
    """No threshold brings the centroid nearer: the usual one stays. Nor does one without a usable mask win."""
    probabilities = torch.full((1, 31, 31), 0.02)
    probabilities[0, 15:18, 15:18] = 0.9  # its corner at the point
    assert float(find_levels(probabilities, 0.4, 0.2, (0.0, 0.0, 0.01))) == pytest.approx(0.4)
    probabilities[0, 15, 15] = 0.5
    assert own_pixels(probabilities, find_levels(probabilities, 0.4, 0.2, (0.0, 0.0, 1e-3)), 0.2)[1].all()


def test_unknown_centring_is_one_threshold() -> None:
    probabilities = grown(0.9, 0.45)
    assert torch.equal(find_levels(probabilities, 0.4, 0.2, None), torch.full((1, 1, 1), 0.4))


def test_levels_are_the_most_likely_ones() -> None:
    """Against a search written out, for random probabilities."""
    generator = torch.Generator().manual_seed(1)
    noise = torch.rand(40, 1, 15, 15, generator=generator)
    smooth = torch.nn.functional.avg_pool2d(noise, 5, 1, 2)[:, 0]
    place = torch.arange(15) - 7
    far = (place[:, None].square() + place.square()).sqrt()
    probabilities = (2.5 - 0.7 * far + 10 * (smooth - 0.5)).sigmoid()
    place, variance = torch.tensor([0.3, -0.2]), 0.3
    levels = find_levels(probabilities, 0.4, 0.5, (0.3, -0.2, variance))
    moved = 0
    for row, level in zip(probabilities, levels, strict=True):
        costs = []
        for step in range(-9, 10):
            tried = 1 / (1 + math.exp(-(math.log(0.4 / 0.6) + 0.2 * step)))
            pixels, usable, _ = own_pixels(row[None], tried, 0.5)
            if usable or step == 0:
                distance = float((centroids(pixels)[0] - place).square().sum())
                costs.append((distance / variance + (0.2 * step / DEVIATION) ** 2, tried))
        lowest = min(costs)[0]
        assert min(abs(float(level) - tried) for cost, tried in costs if cost < lowest + 1e-4) < 1e-6
        moved += abs(float(level) - 0.4) > 1e-3
    assert 5 < moved < 40


def test_a_student_uses_keeps_and_checks_its_centring(tmp_path: Path) -> None:
    torch.manual_seed(0)
    data, settings, pmg = tiny_set(), StudentSettings(crop=24, members=2), Pmg(8)
    networks = {8: [CropNet().eval(), CropNet().eval()]}
    for network in networks[8]:
        torch.nn.init.normal_(network.state_dict(keep_vars=True)[[*network.state_dict()][-2]], std=0.5)
    plain = Student(networks, settings)
    centred = Student(networks, settings, centrings={8: (0.5, 0.5, 1e-3)})
    assert plain.centrings == {8: None} and plain.digest() != centred.digest()
    values = centred.probabilities(data.images, data.points, extent=8, sizes=data.sizes)
    assert torch.equal(values, plain.probabilities(data.images, data.points, extent=8, sizes=data.sizes))
    levels = find_levels(values, settings.threshold, settings.link, (0.5, 0.5, 1e-3))
    masks, _, used = centred.windows(data, pmg)
    pixels, usable, expected = own_pixels(values, levels, settings.link)
    assert torch.equal(used, expected) and torch.equal(masks[usable], pixels[usable])
    assert torch.equal(centred.soft_masks(data, pmg) >= 0.5, centred.masks(data, pmg))
    # Confidence: that of the same masks without a centring, less for centroids that lie elsewhere.
    wide = Student(networks, settings, centrings={8: (0.5, 0.5, 30.0)})
    assert torch.equal(wide.each(data, pmg), plain.each(data, pmg))
    away = (centroids(plain.each(data, pmg)) - 0.5).square().sum(1) / 30.0**2
    torch.testing.assert_close(wide.confidence(data, pmg), plain.confidence(data, pmg) * (-DOUBT * away).exp())
    assert (away > 0).any() and (wide.confidence(data, pmg) <= plain.confidence(data, pmg)).all()
    assert centred.member(0).centrings == centred.centrings
    path = tmp_path / "student.safetensors"
    centred.save(path)
    again = Student.load(path)
    assert again.centrings == centred.centrings and again.digest() == centred.digest()
    plain.save(path)
    assert Student.load(path).centrings == {8: None}
    tensors, description = read_tensors(path), read_description(path)
    save_checkpoint(path, tensors, {name: value for name, value in description.items() if name != "centrings"})
    assert Student.load(path).centrings == {8: None}  # a file from before there were any
    nan = float("nan")
    wrong = (None, [], [[0.5, 0.5]], [[0.5, 0.5, 0.0]], [[0, 0.5, 1.0]], [[nan, 0.5, 1.0]], [[0.5, 0.5, nan]])
    for value in (*wrong, [[0.5, 0.5, 1.0]] * 2, [[0.5, 1e9, 1.0]], {"8": None}, [3.0]):
        save_checkpoint(path, tensors, description | {"centrings": value})
        refused(lambda: Student.load(path), str(path), "its centrings are")


def test_training_finds_it_without_ground_truth() -> None:
    """From masks with one threshold for all, placed; None for a set of few points."""
    data = tiny_set(((32, 32),) * 32)
    settings = StudentSettings(crop=24, steps=4, members=2, batch_size=8)
    student = train_student(data, Pmg(8), settings=settings)
    plain = Student(student.networks, settings, student.threshold, placements=student.placements)
    assert student.centrings == {8: find_centring(plain.each(data, Pmg(8)))} != {8: None}
    few = train_student(tiny_set(), Pmg(8), settings=settings)
    assert few.centrings == {8: None}
