"""Masks of neighbouring points do not touch; against a loop over pixels in NumPy."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from cases import sweep
from scipy import ndimage

from hmg_gpu.data.synthetic import make_split
from hmg_gpu.masks import Pmg
from hmg_gpu.masks.student import neighbours, student
from hmg_gpu.masks.student.crops import paste
from hmg_gpu.masks.student.neighbours import NEAREST, SAME, take_apart
from hmg_gpu.masks.student.network import CropNet
from hmg_gpu.masks.student.student import Student, StudentSettings

SIDE, IMAGE = 15, 24
EVERYWHERE = np.ones((3, 3))


def scene(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Masks and points of two images; up to nine points each, some in the same place."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, NEAREST + 2, size=2) if seed % 3 else rng.integers(0, 4, size=2)
    rows = [(image, *rng.integers(4, IMAGE - 4, size=2)) for image, count in enumerate(counts) for _ in range(count)]
    offset = np.arange(SIDE) - SIDE // 2
    away = np.hypot(offset[:, None], offset)
    masks = away < rng.uniform(0.5, 11, size=(len(rows), 1, 1))  # the largest reach their windows' edges
    masks &= rng.random(masks.shape) < rng.choice([0.6, 0.9, 1.0])
    return torch.from_numpy(masks), torch.tensor(rows, dtype=torch.int64).view(-1, 3)


def slowly(masks: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Pixel after pixel."""
    claims: dict[tuple[int, int, int], list[int]] = {}
    half = SIDE // 2
    for number, (image, y, x) in enumerate(points):
        for row, column in zip(*np.nonzero(masks[number]), strict=True):
            claims.setdefault((image, y + row - half, x + column - half), []).append(number)

    def different(one: int, other: int) -> bool:
        return max(abs(points[one, 1:] - points[other, 1:])) > SAME

    def distance(number: int, place: tuple[int, int, int]) -> int:
        y, x = points[number, 1:]
        return (y - place[1]) ** 2 + (x - place[2]) ** 2

    owners = {
        place: [
            one
            for one in numbers
            if not any(different(one, other) and distance(other, place) <= distance(one, place) for other in numbers)
        ]
        for place, numbers in claims.items()
    }
    around = [(down, across) for down in (-1, 0, 1) for across in (-1, 0, 1)]
    result = np.zeros_like(masks)
    for (image, row, column), numbers in owners.items():
        near = [other for down, across in around for other in owners.get((image, row + down, column + across), [])]
        for number in numbers:
            y, x = points[number, 1:]
            if not any(different(number, other) and tuple(points[other, 1:]) < (y, x) for other in near):
                result[number, row - y + half, column - x + half] = True
    for number, before in enumerate(masks):
        centre = np.zeros_like(before)
        centre[half - 1 : half + 2, half - 1 : half + 2] = True
        if not np.array_equal(result[number], before):
            labels = ndimage.label(result[number], EVERYWHERE)[0]
            result[number] &= np.isin(labels, labels[centre & result[number]])
        if not result[number].any():
            result[number] = before & centre
    return result


@pytest.mark.parametrize("seed", sweep(range(60)))
def test_equals_the_loop(seed: int) -> None:
    masks, points = scene(seed)
    found = take_apart(masks, points)
    assert np.array_equal(found.numpy(), slowly(masks.numpy(), points.numpy()))
    order = torch.randperm(len(points), generator=torch.Generator().manual_seed(seed))
    assert torch.equal(take_apart(masks[order], points[order]), found[order])


def test_rows_at_a_time_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    masks, points = (torch.cat(parts) for parts in zip(*map(scene, range(20)), strict=True))
    points[:, 0] += torch.arange(len(points)) // 5  # at most few in an image
    whole = take_apart(masks, points)
    assert not torch.equal(whole, masks)
    monkeypatch.setattr(neighbours, "ROWS", 7)
    assert torch.equal(take_apart(masks, points), whole)


@pytest.mark.parametrize("count", [0, 1])
def test_masks_that_stand_alone_stay(count: int) -> None:
    masks = torch.ones(count, 5, 5, dtype=torch.bool)
    assert torch.equal(take_apart(masks, torch.zeros(count, 3, dtype=torch.int64)), masks)


def test_one_target_clicked_twice_stays_whole() -> None:
    masks = torch.ones(2, 5, 5, dtype=torch.bool)
    points = torch.tensor([[0, 9, 9], [0, 10, 11]])
    assert torch.equal(take_apart(masks, points), masks)


def test_two_small_targets_keep_their_masks() -> None:
    """Both networks are sure of both targets: 3 x 3 pixels each, a column between them."""
    masks = torch.zeros(2, 15, 15, dtype=torch.bool)
    masks[0, 6:9, 6:13] = masks[1, 6:9, 2:9] = True
    apart = take_apart(masks, torch.tensor([[0, 30, 30], [0, 30, 34]]))
    assert apart.sum((1, 2)).tolist() == [9, 9] and apart[:, 7, 7].all()


def test_contact_beyond_a_window_counts() -> None:
    masks = torch.zeros(2, 9, 9, dtype=torch.bool)
    masks[0, 4, 4:8], masks[1, 4, 0:5] = True, True
    masks[0, 4, 8] = True
    apart = take_apart(masks, torch.tensor([[0, 50, 50], [0, 50, 59]]))
    assert torch.equal(apart[0], masks[0]) and apart[1, 4].tolist() == [False] + 4 * [True] + 4 * [False]


def test_student_keeps_neighbours_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    data, pmg = make_split("train", count=6, size=64), Pmg(8)
    places = [[(number, 20 + number, 24), (number, 20 + number, 29)] for number in range(6)]
    data = replace(data, points=torch.tensor(places).flatten(0, 1), masks=None)
    settings = StudentSettings(members=1, crop=32)
    learned = Student({8: [CropNet()]}, settings)
    offset = torch.arange(-settings.radius, settings.radius + 1)
    disc = (1 - torch.hypot(offset[:, None].float(), offset.float()) / 12).clamp(min=0)

    def discs(self: Student, images: torch.Tensor, points: torch.Tensor, **_: object) -> torch.Tensor:
        return disc.expand(len(points), -1, -1)

    monkeypatch.setattr(Student, "probabilities", discs)
    joined = paste(learned.each(data, pmg), data.points, data.images.shape, data.sizes)
    masks = learned.masks(data, pmg)
    for image, (one, other) in zip(masks.numpy(), data.points.view(-1, 2, 3)[:, :, 1:].tolist(), strict=True):
        labels = ndimage.label(image, EVERYWHERE)[0]
        assert labels[tuple(one)] and labels[tuple(other)] and labels[tuple(one)] != labels[tuple(other)]
    assert all(ndimage.label(image, EVERYWHERE)[1] == 1 for image in joined.numpy())
    assert torch.equal(learned.soft_masks(data, pmg) >= 0.5, masks)
    monkeypatch.setattr(student, "GROUP", 3)  # ends between two neighbours
    assert torch.equal(learned.masks(data, pmg), masks)
    assert torch.equal(learned.soft_masks(data, pmg) >= 0.5, masks)
