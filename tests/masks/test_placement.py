"""Displaced annotations: found from masks and points alone, and followed by half pixels."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from refusal import refused
from tiny import tiny_set

from hmg_gpu.masks import Pmg
from hmg_gpu.masks.student.network import CropNet
from hmg_gpu.masks.student.placement import centroids, find_placement, place
from hmg_gpu.masks.student.student import Student, StudentSettings, _views
from hmg_gpu.models.checkpoints import read_description, read_tensors, save_checkpoint


def blobs(count: int, size: int, displaced: float, rounded: float, scatter: float, seed: int = 0) -> torch.Tensor:
    """Squares around points of whole pixels; their annotated centroids lie ``displaced`` from them on both axes."""
    generator = torch.Generator().manual_seed(seed)
    masks = torch.zeros(count, 31, 31, dtype=torch.bool)
    for mask in masks:
        middle = torch.randint(0, 2, (2,), generator=generator) * (size % 2 == 0) / 2 + 40  # even squares: between
        if size % 2 == 0:
            middle = middle.floor() + 0.5
        annotated = middle + displaced + scatter * torch.randn(2, generator=generator)
        point = (annotated + 0.5 - rounded).floor()
        first = (middle - (size - 1) / 2 - point).long() + 15
        mask[first[0] : first[0] + size, first[1] : first[1] + size] = True
    return masks


@pytest.mark.parametrize("rounded", [0.5, 0.0])
@pytest.mark.parametrize("scatter", [0.0, 0.7])
def test_what_lies_where_its_points_say_stays(rounded: float, scatter: float) -> None:
    """Points rounded down or to the nearest pixel, exact or scattered, of targets of odd and even width."""
    masks = torch.cat([blobs(200, size, 0.0, rounded, scatter, size) for size in (3, 5, 8)])
    assert find_placement(masks) == ()


@pytest.mark.parametrize("scatter", [0.2, 0.7])
@pytest.mark.parametrize("displaced", [-0.5, 0.5])
def test_targets_of_one_size_displaced_by_half_a_pixel(displaced: float, scatter: float) -> None:
    masks = torch.cat([blobs(300, size, displaced * (size == 6), 0.5, scatter, size) for size in (3, 5, 6, 9)])
    still, moved = (0.0, 0.0), (displaced, displaced)
    found = [(area, (down, across)) for area, down, across in find_placement(masks)]
    assert found == [
        (9, still),
        (9, still),
        (25, still),
        (25, still),
        (36, moved),
        (36, moved),
        (81, still),
        (81, still),
    ]


def test_clicks_far_from_the_middle_move_nothing() -> None:
    """People who click on one end of large targets: their masks stay."""
    masks = torch.cat([blobs(300, size, -2.0 * (size == 9), 0.5, 0.7, size) for size in (3, 5, 6, 9)])
    assert find_placement(masks) == ()


def test_too_few_points_tell_nothing() -> None:
    assert find_placement(torch.zeros(0, 9, 9, dtype=torch.bool)) == ()
    assert find_placement(blobs(29, 5, -0.5, 0.5, 0.0)) == ()


def test_half_a_pixel_by_hand() -> None:
    """A square of 4 x 4 moves up and left by half a pixel on both axes: its corner pixels are between four logits."""
    probabilities = torch.full((3, 11, 11), 0.1)
    probabilities[:, 4:8, 4:8] = 0.9
    placement = ((9.0, 1.0, 0.0), (16.0, -0.5, -0.5), (20.0, 0.0, 0.0))
    moved = place(probabilities, torch.tensor([16, 17, 9]), placement)
    assert torch.equal(moved[1], probabilities[1])  # of a class that stays
    high = 0.9 - 1e-6
    assert bool((moved[0, 4:7, 4:7] > high).all()) and int((moved[0] > high).sum()) == 9
    torch.testing.assert_close(moved[0, 3, 4:7], torch.full((3,), 0.5))  # an edge: the mean of two logits
    assert float(moved[0, 3, 3]) == pytest.approx(0.25, abs=1e-6)  # a corner: one logit of 2.2 and three of -2.2
    torch.testing.assert_close(moved[2, 5:9, 4:8], probabilities[2, 4:8, 4:8])
    assert torch.equal(place(probabilities, torch.tensor([16, 16, 16]), ()), probabilities)
    low = place(probabilities, torch.tensor([16, 17, 9]), placement, threshold=0.2)
    assert torch.equal(low[1:], moved[1:])  # only between pixels does a target look too wide
    torch.testing.assert_close(low[0, 3, 4:7], torch.full((3,), 0.2))  # the threshold where 0.5 was
    assert float(low[0, 3, 3]) == pytest.approx(1 / 13, abs=1e-6)  # odds of 1 : 3, by a fourth of them
    beyond = place(probabilities, torch.tensor([99, 99, 99]), placement[:2])  # larger than any that was learned from
    torch.testing.assert_close(beyond[0], moved[0])


def test_centroids_by_hand() -> None:
    masks = torch.zeros(2, 9, 9, dtype=torch.bool)
    masks[0, 5, 1:3] = True
    assert centroids(masks).tolist() == [[1.0, -2.5], [0.0, 0.0]]


def test_a_student_follows_keeps_and_checks_its_placement(tmp_path: Path) -> None:
    torch.manual_seed(0)
    data, settings = tiny_set(), StudentSettings(crop=16, members=2, threshold=0.05)
    networks = {8: [CropNet().eval(), CropNet().eval()]}
    plain = Student(networks, settings)
    placed = Student(networks, settings, placements={8: ((400.0, 1.0, -2.0),)})
    here, there = (one.probabilities(data.images, data.points, extent=8, sizes=data.sizes) for one in (plain, placed))
    torch.testing.assert_close(there[:, 1:, :-2], here[:, :-1, 2:])
    assert placed.member(0).placements == placed.placements and placed.digest() != plain.digest()
    path = tmp_path / "student.safetensors"
    placed.save(path)
    again = Student.load(path)
    assert again.placements == placed.placements and again.digest() == placed.digest()
    description = read_description(path)
    tensors = read_tensors(path)
    save_checkpoint(path, tensors, {name: value for name, value in description.items() if name != "placements"})
    assert Student.load(path).placements == {8: ()}  # a file from before there were any
    row = [9.0, 0.5, 0.5]
    wrong = (
        None,
        [],
        [[row], []],
        [row],
        [[[9.0, 0.5]]],
        [[[9, 0.5, 0.5]]],
        [[[9.0, 9.5, 0.5]]],
        [[row, [8.0, 0.0, 0.0]]],
    )
    for value in (*wrong, [[[-1.0, 0.5, 0.5]]], [[row] * 9], {"8": []}, [[[float("nan"), 0.5, 0.5]]]):
        save_checkpoint(path, tensors, description | {"placements": value})
        refused(lambda: Student.load(path), str(path), "its placements are")


def test_confidence_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two networks: one sure of 3 x 3 pixels, one half sure and with doubts beside them; far pixels do not matter."""
    data = replace(tiny_set(), masks=None)
    first, second = torch.zeros(2, len(data.points), 15, 15)
    first[:, 6:9, 6:9] = 1.0
    second[:, 6:9, 6:9] = 0.5
    second[:, 5, 5] = 0.2
    second[:, 0, 0] = 0.9
    student = Student({8: [CropNet()] * 2}, StudentSettings(crop=16, members=2))
    monkeypatch.setattr(Student, "by_member", lambda *place: iter((torch.stack((first, second)),)))
    found = student.confidence(data, Pmg(8))
    assert found.tolist() == pytest.approx([(1 + 4.5 / (9 + 0.2)) / 2] * len(data.points))


@pytest.mark.parametrize("members", [1, 2, 3, 4, 8, 11])
def test_networks_share_the_views(members: int) -> None:
    views = [_views(number, members) for number in range(members)]
    assert set().union(*views) == set(range(8)) and all(views)
    assert max(map(len, views)) - min(map(len, views)) <= 1
