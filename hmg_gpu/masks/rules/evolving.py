"""Rules whose labels evolve: each update starts from what the one before left, as soft labels of 8 bits."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from hmg_gpu.common.checks import can_read
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


def in_parts(regions: Regions, reach: int) -> list[tuple[Regions, int]]:
    """So many regions at a time as memory is meant for, and the reach of their squares."""
    rows = max(1, PIXELS // (2 * reach + 1) ** 2)
    return [(regions.rows(slice(first, first + rows)), reach) for first in range(0, len(regions), rows)]


def clean(probability: Tensor) -> Tensor:
    """Probabilities as float64 (float32 where a device has none) within 0 and 1; NaN is 0."""
    wide = torch.float32 if probability.device.type == "mps" else torch.float64
    return probability.float().nan_to_num(nan=0.0).clamp(0, 1).to(wide)


def average(
    evolved: Tensor,
    evidence: Evidence,
    parts: Sequence[tuple[Regions, int]],
    choose: Callable[[Regions, Squares], Tensor],
    store: Callable[[Tensor], Tensor],
    *,
    most: int = MOST_TIMES,
    locked: int = FULL - 1,
) -> None:
    """Write M <- (M + P) / 2 into ``evolved`` at the candidates of every region, as often as regions share a pixel.

        M_k = M / 2^k + P (1 - 1 / 2^k)

    One region after another would do the same in any order, as what they choose depends on the old label alone.

    Args:
        evolved: uint8 [B, H, W], what stays where there is no candidate.
        evidence: with the old labels.
        parts: regions, and the reach of the squares around them.
        choose: gives the candidates in squares, bool [R, S, S].
        store: makes whole numbers of float labels in 1 / 255.
        most: times that a pixel is averaged.
        locked: old labels above it are 1 whatever is predicted.
    """
    labels, probability = evidence.state.labels.reshape(-1), evidence.probability.reshape(-1)

    def squares_of(part: tuple[Regions, int]) -> Squares:
        return Squares.around(*part, evolved.shape, evidence.sizes)

    def averaged(index: Tensor, times: Tensor) -> Tensor:
        old, predicted = labels[index], FULL * clean(probability[index])
        times = times.clamp(max=most).long()
        share = (torch.ones_like(times) << times).to(predicted.dtype).reciprocal()  # 1 / 2^k, exact
        values = store(old * share + predicted * (1 - share))
        return values.masked_fill(old > locked, FULL).to(labels.dtype)

    flat = evolved.view(-1)
    if can_read(labels):  # the few pixels that are candidates
        chosen = [labels.new_empty(0, dtype=torch.int64)]
        for part in parts:
            squares = squares_of(part)
            chosen.append(squares.index[choose(part[0], squares)])
        index, times = torch.cat(chosen).unique(return_counts=True)
        flat[index] = averaged(index, times)
        return
    times = torch.zeros(evolved.numel(), dtype=torch.int16, device=evolved.device)
    for part in parts:
        squares = squares_of(part)
        times.index_add_(0, squares.index.flatten(), choose(part[0], squares).flatten().to(times.dtype))
    for part in parts:
        index = squares_of(part).index.flatten()
        count = times[index]
        # Where squares overlap, the same is written.
        flat.scatter_(0, index, torch.where(count > 0, averaged(index, count), flat[index]))
