"""Rules whose labels evolve: each update starts from what the one before left, as soft labels of 8 bits."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from hmg_gpu.masks.regions import Regions, Squares
from hmg_gpu.masks.rules.rule import Evidence, Rule, State

FULL = 255  # a label of 1
HALF = 127  # a label above it is more than 0.5
PIXELS = 1 << 21  # of the squares that are looked at together
MOST_TIMES = 40  # halvings after which a label is the prediction


@dataclass(frozen=True)
class Evolving(Rule):
    """A rule with a soft label for every image: uint8 [N, H, W], 255 is 1. The masks are where it is above 0.5.

    A single update from initial masks hardly changes the masks, since a pixel that was 0 gets half of its prediction:
    such a rule is made for many updates.
    """

    evolves: ClassVar[bool] = True

    def start(self, initial: Tensor, settled: Tensor) -> State:
        """The state before the first update: labels of 1 on the initial masks; every image is trained on.

        Args:
            initial: bool [b, H, W].
            settled: bool [b], the images whose masks their maker trusts.
        """
        return State(initial.to(torch.uint8) * FULL, torch.ones_like(settled))

    @abstractmethod
    def evolve(self, evidence: Evidence) -> State:
        """The state after one more update; ``evidence.state`` is the one before."""

    def correct(self, evidence: Evidence) -> Tensor:
        """The masks after one update: of ``evidence.state``, or where it is None of the initial masks."""
        if evidence.state is None:
            everyone = torch.ones(len(evidence.initial), dtype=torch.bool, device=evidence.initial.device)
            evidence = replace(evidence, state=self.start(evidence.initial, everyone))
        return to_masks(self.evolve(evidence).labels)


def to_masks(labels: Tensor) -> Tensor:
    """Labels above 0.5: bool, of uint8 of any shape.

    Example:
        >>> to_masks(torch.tensor([0, 127, 128, 255], dtype=torch.uint8))
        tensor([False, False,  True,  True])
    """
    return labels > HALF


def in_parts(regions: Regions, reach: int, evidence: Evidence) -> Iterator[tuple[slice, Squares]]:
    """Squares around all regions, so many at a time as memory is meant for."""
    rows = max(1, PIXELS // (2 * reach + 1) ** 2)
    for first in range(0, len(regions), rows):
        part = slice(first, first + rows)
        yield part, Squares.around(regions.rows(part), reach, evidence.initial.shape, evidence.sizes)


def clean(probability: Tensor) -> Tensor:
    """Probabilities as float64 (float32 where a device has none) within 0 and 1; NaN is 0."""
    wide = torch.float32 if probability.device.type == "mps" else torch.float64
    return probability.to(wide).nan_to_num(nan=0.0).clamp(0, 1)


def count_into(times: Tensor, squares: Squares, candidates: Tensor) -> None:
    """Add one to ``times`` (int16 [B, H, W]) at every candidate (bool [R, S, S])."""
    times.view(-1).index_add_(0, squares.index.flatten(), candidates.flatten().to(times.dtype))


def put_averages(
    evolved: Tensor,
    labels: Tensor,
    probability: Tensor,
    times: Tensor,
    squares: Squares,
    store: Callable[[Tensor], Tensor],
    locked: int = FULL - 1,
) -> None:
    """Write into ``evolved`` what the squares' pixels are after M <- (M + P) / 2, ``times`` times over.

        M_k = M / 2^k + P (1 - 1 / 2^k)

    Regions that share a pixel average it one after another; their order does not matter, as
    what they choose depends on the old label alone.

    Args:
        evolved: uint8 [B, H, W]; kept where k is 0.
        labels: uint8 [B, H, W], the old ones. probability: float32 [B, H, W]. times: int16 [B, H, W], k.
        store: makes whole numbers of float labels in 1 / 255.
        locked: old labels above it are 1 whatever is predicted.
    """
    old = labels.view(-1)[squares.index]
    count = times.view(-1)[squares.index].clamp(max=MOST_TIMES).long()
    predicted = FULL * clean(probability.reshape(-1)[squares.index])
    share = (torch.ones_like(count) << count).to(predicted.dtype).reciprocal()  # 1 / 2^k, exact
    values = store(old * share + predicted * (1 - share)).to(labels.dtype)
    values = torch.where(count > 0, values, evolved.view(-1)[squares.index]).masked_fill(old > locked, FULL)
    evolved.view(-1).scatter_(0, squares.index.flatten(), values.flatten())  # where squares overlap, they agree
