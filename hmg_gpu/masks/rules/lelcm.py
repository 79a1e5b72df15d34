"""LELCM: label evolution by local contrast (TGRS 2024)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from hmg_gpu.common.options import setting
from hmg_gpu.common.tensors import to_device
from hmg_gpu.masks.regions import Regions, Squares, find_regions, touched
from hmg_gpu.masks.rules import evolving
from hmg_gpu.masks.rules.evolving import FULL, HALF, Evolving, average, clean, to_masks
from hmg_gpu.masks.rules.rule import Evidence, State

FINE = 2**32  # parts of a probability that sums count in whole numbers, so that they are the same on every device


@dataclass(frozen=True)
class Lelcm(Evolving):
    """Labels that grow while the surroundings are less sure than the core (LELCM).

    For every 8-connected region of M > 0.5 of a pixels, in the square around its centroid whose side is twice the
    longer side of its box and one more:

        I_core = mean of the a / 2 largest P where M > 0.5         I_surr = mean of the 2 a largest P where M < 0.5
        M <- (M + P) / 2    where P > P(centroid) lambda I_surr / I_core

    Where these pixels have several components, those that touch no pixel of M > 0.5, not even at a corner, are dropped.
    Every pixel of M > 0.5 becomes 1 and stays. Where there are fewer pixels than a mean asks for, it counts zeros.
    Labels are truncated to 8 bits (ours: LELCM's are floating point), so that half of a certain pixel is no mask yet.

    The size of the largest region decides the shapes, so on an accelerator each update of a batch waits for the device
    once, to read them.

    Args:
        radius: r of FAF in pixels; for reports alone.
        contrast: lambda.

    Example:
        >>> Lelcm().about()
        {'rule': 'lelcm', 'radius': 30, 'contrast': 0.5}
    """

    name: ClassVar[str] = "lelcm"
    soft_targets: ClassVar[bool] = True

    contrast: float = setting(0.5, "lambda of LELCM: the threshold where surroundings and core are alike", least=0)

    def evolve(self, evidence: Evidence) -> State:
        labels = evidence.state.labels
        masks = to_masks(labels)
        regions = find_regions(masks, evidence.sizes, len(evidence.points))
        parts = list(_in_groups(regions))
        evolved = labels.masked_fill(masks, FULL)
        choose = partial(self._candidates, evidence.probability, masks)
        average(evolved, evidence, parts, choose, torch.floor, locked=HALF)
        return State(evolved, evidence.state.active)

    def _candidates(self, probability: Tensor, masks: Tensor, regions: Regions, squares: Squares) -> Tensor:
        """The pixels that are averaged: bool [R, S, S]; the squares reach a pixel beyond the largest region's."""
        middle = len(squares.offset) // 2
        near = squares.offset.abs() <= _reach(regions)[:, None]  # [R, S]
        square = squares.inside & near[:, :, None] & near[:, None]
        values = clean(squares.take(probability))
        inside = squares.take(masks)
        core = _mean_of_largest(values, square & inside, (regions.area // 2).clamp(min=1))
        around = _mean_of_largest(values, square & ~inside, 2 * regions.area)
        level = values[:, middle, middle] * (self.contrast * around / torch.where(core > 0, core, 1))
        level = torch.where(core > 0, level, torch.inf)
        found = square & (values > level[:, None, None])
        wide = torch.nn.functional.pad(inside, (1, 1, 1, 1))
        rows = wide[:, :-2] | wide[:, 1:-1] | wide[:, 2:]
        return touched(found, rows[:, :, :-2] | rows[:, :, 1:-1] | rows[:, :, 2:], single=True)


def _reach(regions: Regions) -> Tensor:
    """The longer side of each box: int64 [R]."""
    return (regions.box[:, 2:] - regions.box[:, :2]).amax(1)


def _in_groups(regions: Regions) -> Iterator[tuple[Regions, int]]:
    """Regions of like size, as many as memory is meant for, and the reach of a square that holds each and its rim."""
    reaches = torch.where(regions.area > 0, _reach(regions), 0).tolist()
    order = sorted((row for row, reach in enumerate(reaches) if reach), key=reaches.__getitem__, reverse=True)
    while order:
        reach = reaches[order[0]] + 1
        count = max(1, evolving.PIXELS // (2 * reach + 1) ** 2)
        alike = sum(2 * (reaches[row] + 1) >= reach for row in order[:count])  # the others have squares of their own
        yield regions.rows(to_device(torch.tensor(order[:alike]), regions.area.device)), reach
        order = order[alike:]


def _mean_of_largest(values: Tensor, where: Tensor, count: Tensor) -> Tensor:
    """Mean of the ``count`` [R] largest values [R, S, S] in a mask; zeros where there are fewer: [R]."""
    parts = torch.where(where, (values * FINE).long(), 0).flatten(1).sort(dim=1, descending=True).values
    total = parts.cumsum(1).gather(1, (count - 1).clamp(0, parts.shape[1] - 1)[:, None])[:, 0]
    return total.to(values.dtype) / FINE / count
