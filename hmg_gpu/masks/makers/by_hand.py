"""Masks of any maker, but PMG's at the points for which somebody chose a search length."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from hmg_gpu.data.sets import ImageSet
from hmg_gpu.masks.makers.maker import Maker, Sampled, Steps
from hmg_gpu.masks.makers.pmg import Pmg

Extents = Mapping[str, Mapping[tuple[int, int], int]]


@dataclass(frozen=True)
class ByHand(Maker):
    """A point with an extent of its own gets PMG's mask of that extent; every other point what ``base`` makes.

    Args:
        base: the maker of the other points.
        pmg: gives half width and alpha for the points by hand.
        extents: L_ep in pixels by pixel (y, x), by image name; see :func:`hmg_gpu.data.read_extents`.

    Example:
        >>> import torch
        >>> from hmg_gpu.data import ImageSet
        >>> image = torch.zeros(1, 40, 40)
        >>> image[0, 12:27, 12:27] = 100  # 15 x 15 pixels: its border is 8 pixels from the point
        >>> data = ImageSet(["a"], image, torch.tensor([[40, 40]]), torch.tensor([[0, 19, 19]]))
        >>> maker = ByHand(Pmg(extent=5), Pmg(), {"a": {(19, 19): 10}})
        >>> int(maker.base.masks(data).sum()), int(maker.masks(data).sum())
        (1, 225)
    """

    name: ClassVar[str] = "by_hand"

    base: Maker
    pmg: Pmg
    extents: Extents = field(hash=False, repr=False)

    @property
    def rule(self) -> str:
        return self.base.rule

    @property
    def label(self) -> str:
        return f"{self.base.label}, some by hand"

    def fit(self, data: Sampled, *, folder: Path | None = None, progress: Steps | None = None) -> ByHand:
        return replace(self, base=self.base.fit(data, folder=folder, progress=progress))

    def _split(self, data: ImageSet) -> Iterator[tuple[Maker, ImageSet]]:
        """Every maker with the set that holds its points alone."""
        rows = data.points.tolist()
        chosen = torch.tensor(
            [self.extents.get(data.names[image], {}).get((y, x), 0) for image, y, x in rows],
            dtype=torch.int64,
            device=data.points.device,
        )
        for extent in sorted(set(chosen.tolist()) or {0}):
            maker = replace(self.pmg, extent=extent, by_size=(), why="by hand") if extent else self.base
            yield maker, replace(data, points=data.points[chosen == extent])

    def masks(self, data: ImageSet) -> Tensor:
        return functools.reduce(torch.logical_or, (maker.masks(part) for maker, part in self._split(data)))

    def probabilities(self, data: ImageSet) -> Tensor:
        return functools.reduce(torch.maximum, (maker.probabilities(part) for maker, part in self._split(data)))

    def confidence(self, data: ImageSet) -> tuple[Tensor, Tensor] | None:
        """Of the points that are not by hand."""
        return next((self.base.confidence(part) for maker, part in self._split(data) if maker is self.base), None)

    def about(self) -> dict[str, Any]:
        rows = sorted((name, *point, extent) for name, row in self.extents.items() for point, extent in row.items())
        digest = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
        settings = {"points": len(rows), "extents": digest, "half_width": self.pmg.half_width, "alpha": self.pmg.alpha}
        return self.base.about() | {"by_hand": settings}

    def __str__(self) -> str:
        return f"{self.base}; PMG of an extent by hand for {sum(map(len, self.extents.values()))} points"
