"""What an update of masks did, counted only when somebody asks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .components import connected_components
from .update import near_a_point

HYBRID, PREDICTION = 1, 2  # bits of a plane
NON_FINITE, OUTSIDE, IGNORED = range(3)  # columns of the counts


class MaskChanges:
    """What one update did. Nothing is read from the device before an attribute is.

    Attributes:
        pixels: pixels of the masks that differ from before.
        erased: predicted components that FAF erased.
        retrieved: targets (components of the initial masks) that no kept prediction touches, brought back by MDR.
        ignored: images whose prediction the guard refused.
        non_finite: predicted pixels that are NaN or infinite (NaN counts as background).
        masks: float32 0 and 1 in the shape of the prediction (``update_one`` only); on the device, never read.

    Raises:
        InputError: reading any of the counts, where probabilities were promised and a value lay outside [0, 1].
    """

    def __init__(
        self,
        refuse: Callable[[], None],
        points: Tensor,
        sizes: Tensor,
        radius: int,
        initial: Tensor,
        planes: Tensor,
        counts: Tensor,
        changed: Tensor,
    ):
        self.masks: Tensor | None = None
        self._refuse, self._points, self._sizes, self._radius = refuse, points, sizes, radius
        self._initial, self._planes, self._counts, self._changed = initial, planes, counts, changed
        self._values: dict[str, int] = {}

    def _read(self, name: str) -> int:
        if not self._values:
            non_finite, outside, ignored = self._counts.sum(0).tolist()
            if outside:
                self._refuse()
            found = connected_components((self._planes & PREDICTION) > 0)
            kept = near_a_point(found, self._points, self._radius, self._sizes)
            filtered = found.mask(kept)
            targets = connected_components(self._initial)
            touched = torch.zeros(len(targets), dtype=torch.bool, device=filtered.device)
            touched[targets.component[filtered.view(-1)[targets.pixels]]] = True
            touched |= self._counts[targets.image, IGNORED] > 0
            self._values = {
                "pixels": int(self._changed),
                "erased": int((~kept).sum()),
                "retrieved": int((~touched).sum()),
                "ignored": ignored,
                "non_finite": non_finite,
            }
        return self._values[name]

    @property
    def pixels(self) -> int:
        return self._read("pixels")

    @property
    def erased(self) -> int:
        return self._read("erased")

    @property
    def retrieved(self) -> int:
        return self._read("retrieved")

    @property
    def ignored(self) -> int:
        return self._read("ignored")

    @property
    def non_finite(self) -> int:
        return self._read("non_finite")

    def __str__(self) -> str:
        text = f"{self.pixels} pixels changed, {self.erased} components erased, {self.retrieved} targets brought back"
        text += f", {self.ignored} predictions ignored" if self.ignored else ""
        return text + (f", {self.non_finite} predicted pixels not finite" if self.non_finite else "")
