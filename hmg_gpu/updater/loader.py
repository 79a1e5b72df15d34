"""Training batches of an updater's images and masks, made on the device."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from hmg_gpu.common.checks import at_least
from hmg_gpu.common.errors import InputError
from hmg_gpu.common.parallel import position
from hmg_gpu.common.tensors import to_device
from hmg_gpu.data.batches import are_places, count_steps, cut_crops, draw_epoch, to_targets
from hmg_gpu.data.sets import ImageSet


class Labelled(Protocol):
    """A set with its current masks, such as a ``MaskUpdater``."""

    data: ImageSet
    targets: Tensor
    pool: Tensor | None
    device: torch.device

    def __len__(self) -> int: ...


@dataclass(eq=False)
class MaskLoader:
    """Batches of a MaskUpdater's images and current masks; each pass over it is one epoch.

    Crops, flips and transposes are a pure function of (seed, epoch, step): they neither use nor change torch's random
    state. ``epoch`` counts the passes of which a batch was taken; set it to resume. Under torch.distributed every rank
    gets its own ``batch_size`` images of each step.

    Args:
        positive: share of the crops that are placed around a point, the others anywhere; BasicIRSTD has 0.5.
        jitter: how much the intensities of each crop are changed at random; 0: not at all. See
            :func:`hmg_gpu.data.batches.draw_epoch`.
        margin: pixels by which crops may reach beyond the bottom and right border, where networks see padding in whole
            images, too; the same as there.
        hard_examples: so many crops more an epoch, as a share of the images, where there are ``corrected``; each
            holds one of those places.
        corrected: int64 [A, 3], rows (image, y, x): places that an epoch shows again, such as what an update
            ``corrected``, false alarms and missed targets; None: none. Set them between two epochs, and save them
            beside ``epoch``; the loader's length changes.

    Raises:
        InputError: a number out of its range, or ``corrected`` are no places of the set.

    Yields:
        float32 images [B, 1, S, S], normalised, and float32 masks [B, 1, S, S], on the updater's device: 0 and 1, or
        between them where the updater's rule trains on soft labels.
    """

    updater: Labelled
    batch_size: int
    patch_size: int
    seed: int = 0
    epoch: int = 0
    positive: float = 0.0
    jitter: float = 0.0
    margin: int = 0
    hard_examples: float = 0.25
    corrected: Tensor | None = None

    def __post_init__(self) -> None:
        for name, most in (("positive", 1), ("jitter", 2), ("hard_examples", 1)):
            if not 0 <= getattr(self, name) <= most:
                raise InputError(f"loader: {name} = {getattr(self, name)}; expected a number from 0 to {most}")
        at_least(0, **{"loader: margin": self.margin})
        self._points = self.updater.data.points.cpu()
        if self.batch_size < 1 or self.patch_size < 1:
            raise InputError(
                f"loader: batch_size {self.batch_size} and patch_size {self.patch_size}; expected at least 1"
            )
        len(self)  # refuses a pool of nothing

    def __len__(self) -> int:
        batch = self.batch_size * position()[1]
        return count_steps(len(self.updater), batch, self.updater.pool, self._places(), self.hard_examples)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.epoch += 1  # when the first batch is taken: some trainers ask for an iterator that they never use
        yield from self.steps(self.epoch - 1)

    def steps(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of one epoch from step ``start`` on; masks are those of the moment each batch is taken."""
        updater, (rank, ranks) = self.updater, position()
        batch = self.batch_size * ranks
        crops = {name: getattr(self, name) for name in ("positive", "jitter", "margin")}
        crops |= {"points": self._points, "images": updater.pool}
        crops |= {"places": self._places(), "hard_examples": self.hard_examples}
        plan = draw_epoch(updater.data.host_sizes, batch, self.patch_size, seed=self.seed, epoch=epoch, **crops)
        plan = to_device(plan[start:, rank * self.batch_size : (rank + 1) * self.batch_size], updater.device)
        for rows in plan:
            images, masks = cut_crops(updater.data, updater.targets, rows, self.patch_size)
            yield images, to_targets(masks)

    def _places(self) -> Tensor | None:
        """What was corrected, on the CPU."""
        if self.corrected is None or not self.hard_examples:
            return None
        places = self.corrected.cpu() if isinstance(self.corrected, Tensor) else None
        if not are_places(places, self.updater.data.host_sizes):
            raise InputError(
                "loader: corrected are not int64 [A, 3], rows (image, y, x) of places in the set's images; take what "
                "an update of the whole set corrected"
            )
        return places
