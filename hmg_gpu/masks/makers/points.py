"""The points themselves as masks: one pixel each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hmg_gpu.data.sets import ImageSet
from hmg_gpu.masks.makers.maker import Maker


@dataclass(frozen=True)
class Points(Maker):
    """The point map: one pixel a point, where LESPS starts from.

    Example:
        >>> from hmg_gpu.data.synthetic import make_split
        >>> scenes = make_split("train", count=2, size=64)
        >>> int(Points().masks(scenes).sum()) == len(scenes.points)
        True
    """

    name: ClassVar[str] = "points"

    def masks(self, data: ImageSet) -> Tensor:
        found = torch.zeros(data.images.numel(), dtype=torch.bool, device=data.images.device)
        _, height, width = data.images.shape
        image, y, x = data.points.unbind(1)
        found[(image * height + y) * width + x] = True
        return found.view(data.images.shape)

    def knows_each(self, data: ImageSet) -> bool:
        return True

    def each(self, data: ImageSet, points: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        width = data.images.shape[2]
        position = points[:, 1] * width + points[:, 2]
        yield points, position[:, None, None], torch.ones(len(points), 1, 1, dtype=torch.bool, device=points.device)
