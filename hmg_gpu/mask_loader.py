"""Training batches of an updater's images and masks, made on the device."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from .data.batches import cut_crops, draw_epoch
from .errors import InputError
from .inference import to_device
from .parallel import position

if TYPE_CHECKING:
    from .updater import MaskUpdater


@dataclass(eq=False)
class MaskLoader:
    """Batches of a MaskUpdater's images and current masks; each pass over it is one epoch.

    Crops, flips and transposes are a pure function of (seed, epoch, step): they neither use nor change torch's random
    state. ``epoch`` counts the passes that were begun; set it to resume. Under torch.distributed every rank gets its
    own ``batch_size`` images of each step.

    Yields:
        float32 images [B, 1, S, S], normalised, and float32 masks [B, 1, S, S] of 0 and 1, on the updater's device.
    """

    updater: MaskUpdater
    batch_size: int
    patch_size: int
    seed: int = 0
    epoch: int = 0

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.patch_size < 1:
            raise InputError(
                f"loader: batch_size {self.batch_size} and patch_size {self.patch_size}; expected at least 1"
            )

    def __len__(self) -> int:
        return -(-len(self.updater) // (self.batch_size * position()[1]))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.epoch += 1
        return self.steps(self.epoch - 1)

    def steps(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of one epoch from step ``start`` on; masks are those of the moment each batch is taken."""
        updater, (rank, ranks) = self.updater, position()
        batch = self.batch_size * ranks
        plan = draw_epoch(updater.data.host_sizes, batch, self.patch_size, seed=self.seed, epoch=epoch)
        plan = to_device(plan[start:, rank * self.batch_size : (rank + 1) * self.batch_size], updater.device)
        for rows in plan:
            images, masks = cut_crops(updater.data, updater.masks, rows, self.patch_size)
            yield images, masks.float()
