"""What a run remembers of its data: every change is named, and nothing that is the same."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny import SIZES, tiny_set

from hmg_gpu.data import ImageSet
from hmg_gpu.data.record import differences, record_of


def changed(kind: str, data: ImageSet) -> ImageSet:
    if kind == "pixel":
        images = data.images.clone()
        images[3, 5, 7] += 1
        return replace(data, images=images)
    if kind == "padding":
        images = data.images.clone()
        height, _width = SIZES[2]
        images[2, height:, :] += 1
        return replace(data, images=images)
    if kind == "depth":
        return replace(data, images=data.images.float())
    points = data.points.clone()
    if kind == "moved":
        points[1:3, 1] += 1
        return replace(data, points=points)
    if kind == "missing":
        return replace(data, points=points[:-1])
    if kind == "renamed":
        return replace(data, names=[*data.names[:-1], "new"])
    if kind == "order":
        return replace(data, names=data.names[::-1])
    return data


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("same", []),
        ("padding", []),
        ("pixel", ["1 images of 6 differ, first train3"]),
        ("depth", ["6 images of 6 differ, first train0"]),
        ("moved", ["2 points of 6 differ, first in train1"]),
        ("missing", ["1 points of 6 differ, first in train5"]),
        ("renamed", ["the list of images is another: 1 more (new ...) and 1 fewer (train5 ...)"]),
        ("order", ["the 6 images come in another order"]),
    ],
)
def test_differences(kind: str, words: list[str]) -> None:
    data = tiny_set()
    assert differences(record_of(data), record_of(changed(kind, data))) == words


def test_initial_masks() -> None:
    data = tiny_set()
    other = data.masks.clone()
    other[4, 3, 3] ^= True
    assert differences(record_of(data, data.masks), record_of(data, other)) == [
        "1 initial masks of 6 differ, first train4"
    ]
    assert differences(record_of(data), record_of(data, other)) == []
    wider = replace(
        data, images=torch.nn.functional.pad(data.images, (0, 32)), masks=torch.nn.functional.pad(data.masks, (0, 32))
    )
    assert differences(record_of(data, data.masks), record_of(wider, wider.masks)) == []
