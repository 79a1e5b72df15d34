"""What an update of masks did, counted only when somebody asks."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

from hmg_gpu.common.errors import InputError
from hmg_gpu.common.tensors import valid_area
from hmg_gpu.masks import Evidence, Rule
from hmg_gpu.masks.update import corrections
from hmg_gpu.models.foreign import Output

HYBRID, PREDICTION = 1, 2  # bits of a plane
NON_FINITE, OUTSIDE, POSITIVE, IGNORED, ACTIVE, ENTERED = range(6)  # columns of the counts
COLUMNS = 6
SLACK = 0.01  # by which probabilities may leave 0 to 1: rounding, as of a resize in bfloat16


def judge(
    values: Tensor, sizes: Tensor, level: float, output: Output, guard: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """What the network takes for target, and what is to be said about its values.

    Args:
        values: bool or float [b, H, W]. sizes: int64 [b, 2]. level: above it is target; NaN never is.
        guard: a prediction that covers a larger share of its image is ignored.

    Returns:
        bool [b, H, W], the prediction; bool [b], the images where it is ignored, and empty; int64 [b, COLUMNS].
    """
    inside = valid_area(sizes, values)
    counts = sizes.new_zeros(len(values), COLUMNS)
    if values.dtype == torch.bool:
        prediction = values & inside
    else:
        prediction = (values > level) & inside
        slack = 0.0 if output == "logits" else SLACK
        counts[:, NON_FINITE] = (~values.isfinite() & inside).sum((1, 2))
        counts[:, OUTSIDE] = (((values < -slack) | (values > 1 + slack)) & inside).sum((1, 2))
        counts[:, POSITIVE] = ((values > 0) & inside).sum((1, 2))
    ignored = torch.zeros(len(values), dtype=torch.bool, device=values.device)
    if guard is not None:
        ignored = prediction.sum((1, 2)) > guard * sizes.prod(1)
        prediction = prediction & ~ignored[:, None, None]
    counts[:, IGNORED] = ignored
    return prediction, ignored, counts


def is_fault(counts: Tensor, output: Output) -> Tensor:
    """Whether values contradict what the caller said they are: bool scalar on the device.

    Probabilities must lie within 0 and 1. Logits that all do, one of them positive, are probabilities.
    """
    outside = counts[:, OUTSIDE].sum()
    return (outside == 0) & (counts[:, POSITIVE].sum() > 0) if output == "logits" else outside > 0


def fault_of(output: Output) -> InputError:
    """The same in words, with the cure."""
    if output == "logits":
        return InputError(
            "update: logits were promised but all values lie within 0 and 1, as after a sigmoid, so no mask was "
            'changed; pass output="probabilities", or train the network first if it does give logits'
        )
    return InputError(
        "update: probabilities were promised but some values lie outside 0 to 1, so no mask was changed; "
        'pass output="logits", or a function that ends in a sigmoid'
    )


class MaskChanges:
    """What one update did. Nothing is read from the device before an attribute is.

    Attributes:
        pixels: pixels of the masks that differ from before.
        erased: predicted components that FAF erased.
        retrieved: targets (components of the initial masks) that no kept prediction touches, brought back by MDR.
        ignored: images whose prediction the guard refused.
        entered: images that waited and are trained on from now on (PAL).
        non_finite: predicted pixels that are NaN or infinite (NaN counts as background).
        masks: float32 0 and 1 in the shape of the prediction (``update_one`` only); on the device, never read.

    Raises:
        InputError: reading any of the counts or ``corrected``, where values contradict what ``output`` promised.
    """

    def __init__(
        self,
        refuse: Callable[[], None],
        fault: Tensor,
        points: Tensor,
        sizes: Tensor,
        rule: Rule,
        initial: Tensor,
        planes: Tensor,
        counts: Tensor,
        changed: Tensor,
    ):
        self.masks: Tensor | None = None
        self._refuse, self._fault, self._points, self._sizes, self._rule = refuse, fault, points, sizes, rule
        self._initial, self._planes, self._counts, self._changed = initial, planes, counts, changed
        self._values: dict[str, int] = {}

    @property
    def prediction(self) -> Tensor:
        """The prediction as it was used, after threshold and guard: bool [b, H, W], on the device."""
        return (self._planes & PREDICTION) > 0

    @property
    def filtered(self) -> Tensor:
        """The prediction after the false alarm filter: bool [b, H, W], on the device."""
        return self._rule.filtered(Evidence(self.prediction, self._points, self._sizes, self._initial, self._initial))

    @property
    def corrected(self) -> Tensor:
        """What FAF erased and what MDR brought back, for ``MaskLoader.corrected``: int64 [A, 3], on the device.

        Rows (image, y, x): the centroids of ``erased``, then those of ``retrieved``, rounded to pixels; ``image``
        counts the images of the update.
        """
        self._read("ignored")  # refuses values that contradict what was promised
        return torch.cat(self._corrections)

    @cached_property
    def _corrections(self) -> tuple[Tensor, Tensor]:
        settings = {"radius": self._rule.radius, "sizes": self._sizes}
        erased, retrieved = corrections(self.prediction, self._initial, self._points, **settings)
        return erased, retrieved[self._counts[retrieved[:, 0], IGNORED] == 0]

    def _read(self, name: str) -> int:
        if not self._values:
            fault, *counts = torch.cat((self._fault[None].long(), self._counts.sum(0))).tolist()
            if fault:
                self._refuse()
            self._values = {
                "ignored": counts[IGNORED],
                "entered": counts[ENTERED],
                "non_finite": counts[NON_FINITE],
            }
        if name not in self._values:  # components are looked for only when somebody asks about them
            self._values["pixels"] = int(self._changed)
            self._values["erased"], self._values["retrieved"] = map(len, self._corrections)
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
    def entered(self) -> int:
        return self._read("entered")

    @property
    def non_finite(self) -> int:
        return self._read("non_finite")

    def __str__(self) -> str:
        text = f"{self.pixels} pixels changed, {self.erased} components erased, {self.retrieved} targets brought back"
        text += f", {self.ignored} predictions ignored" if self.ignored else ""
        text += f", {self.entered} images entered the pool" if self.entered else ""
        return text + (f", {self.non_finite} predicted pixels not finite" if self.non_finite else "")
