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
from hmg_gpu.masks.student.neighbours import NEAREST, take_apart
from hmg_gpu.masks.student.network import CropNet
from hmg_gpu.masks.student.student import Student, StudentSettings

SIDE, IMAGE = 15, 24
EVERYWHERE = np.ones((3, 3))


def scene(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Masks, probabilities and points of two images; up to five points each, some in the same place."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, NEAREST + 2, size=2)
    rows = [(image, *rng.integers(4, IMAGE - 4, size=2)) for image, count in enumerate(counts) for _ in range(count)]
    offset = np.arange(SIDE) - SIDE // 2
    away = np.hypot(offset[:, None], offset)
    masks = away < rng.uniform(1, 7, size=(len(rows), 1, 1))
    masks &= rng.random(masks.shape) < 0.9
    steps = rng.choice([4, 1000])  # few different values: many are equal
    values = np.floor(rng.random(masks.shape) * steps) / steps
    points = torch.tensor(rows, dtype=torch.int64).view(-1, 3)
    return torch.from_numpy(masks), torch.from_numpy(values).float(), points


def slowly(masks: np.ndarray, values: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Pixel after pixel."""
    claims: dict[tuple[int, int, int], list[int]] = {}
    half, value = SIDE // 2, {}
    for number, (image, y, x) in enumerate(points):
        for row, column in zip(*np.nonzero(masks[number]), strict=True):
            place = (image, y + row - half, x + column - half)
            claims.setdefault(place, []).append(number)
            value[place, number] = values[number, row, column]

    def different(one: int, other: int) -> bool:
        return max(abs(points[one, 1:] - points[other, 1:])) > 1

    def rank(number: int) -> tuple[int, int]:
        return tuple(points[number, 1:])

    owners = {
        place: [
            one
            for one in numbers
            if not any(
                different(one, other) and (-value[place, other], rank(other)) < (-value[place, one], rank(one))
                for other in numbers
            )
        ]
        for place, numbers in claims.items()
    }
    around = [(down, across) for down in (-1, 0, 1) for across in (-1, 0, 1)]
    result = np.zeros_like(masks)
    for (image, row, column), numbers in owners.items():
        near = [other for down, across in around for other in owners.get((image, row + down, column + across), [])]
        for number in numbers:
            if not any(rank(other) < rank(number) and different(number, other) for other in near):
                y, x = points[number, 1:]
                result[number, row - y + half, column - x + half] = True
    return result


@pytest.mark.parametrize("seed", sweep(range(60)))
def test_equals_the_loop(seed: int) -> None:
    masks, values, points = scene(seed)
    found = take_apart(masks, values, points)
    assert np.array_equal(found.numpy(), slowly(masks.numpy(), values.numpy(), points.numpy()))
    order = torch.randperm(len(points), generator=torch.Generator().manual_seed(seed))
    assert torch.equal(take_apart(masks[order], values[order], points[order]), found[order])


def test_rows_at_a_time_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    masks, values, points = (torch.cat(parts) for parts in zip(*map(scene, range(20)), strict=True))
    points[:, 0] += torch.arange(len(points)) // 5  # at most few in an image
    whole = take_apart(masks, values, points)
    assert not torch.equal(whole, masks)
    monkeypatch.setattr(neighbours, "ROWS", 7)
    assert torch.equal(take_apart(masks, values, points), whole)


@pytest.mark.parametrize("count", [0, 1])
def test_masks_that_stand_alone_stay(count: int) -> None:
    masks = torch.ones(count, 5, 5, dtype=torch.bool)
    assert torch.equal(take_apart(masks, torch.rand(count, 5, 5), torch.zeros(count, 3, dtype=torch.int64)), masks)


def test_one_target_clicked_twice_stays_whole() -> None:
    masks = torch.ones(2, 5, 5, dtype=torch.bool)
    points = torch.tensor([[0, 9, 9], [0, 10, 10]])
    assert torch.equal(take_apart(masks, torch.rand(2, 5, 5), points), masks)


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
