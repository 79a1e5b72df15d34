"""Lessons: PMG's masks of each target with a search that is as long as the target is wide."""

from __future__ import annotations

import torch
from tiny import tiny_set

from hmg_gpu.data import ImageSet
from hmg_gpu.masks import Pmg
from hmg_gpu.masks.student import lessons
from hmg_gpu.masks.student.lessons import lesson_masks
from hmg_gpu.masks.windows import masks_around


def test_each_target_by_its_own_length(monkeypatch) -> None:
    """A point of 2 x 2 and a square of 11 x 11 in one set: the last lengths asked for are those of their widths."""
    image = torch.zeros(1, 64, 96)
    image[0, 30:32, 20:22] = 200.0
    image[0, 25:36, 60:71] = 200.0
    data = ImageSet(["a"], image, torch.tensor([[64, 96]]), torch.tensor([[0, 30, 20], [0, 30, 65]]))
    asked: dict[tuple[int, int], tuple[int, int, float]] = {}

    def watched(data: ImageSet, radius: int, pmg: Pmg, **more: torch.Tensor) -> torch.Tensor:
        for row in data.points[:, 1:].tolist():
            asked[tuple(row)] = (pmg.extent, pmg.half_width, pmg.alpha)
        return masks_around(data, radius, pmg, **more)

    monkeypatch.setattr(lessons, "masks_around", watched)
    found = lesson_masks(data, 12, Pmg(25))
    assert found.sum((1, 2)).tolist() == [4, 121]
    # 25, 20, 16, 13, 10, 8, 7, 5, 4: two widths are 4 and 22
    assert asked == {(30, 20): (4, 2, 0.15 * lessons.ALPHA), (30, 65): (25, 2, 0.15 * lessons.ALPHA)}
    asked.clear()
    assert torch.equal(lesson_masks(data, 12, Pmg(3, half_width=2))[0], found[0])  # shorter than the shortest
    assert {extent for extent, *_ in asked.values()} == {3}


def test_windows_lie_where_they_are_asked_for() -> None:
    data = tiny_set()
    here = lesson_masks(data, 20, Pmg(8))
    there = lesson_masks(data, 9, Pmg(8), centres=data.points[:, 1:] + torch.tensor([2, -3]))
    assert torch.equal(there, here[:, 13:32, 8:27]) and bool(here.any())
    assert lesson_masks(data, 20, Pmg(8)).dtype == torch.bool
