"""LESPS: label evolution with single point supervision (Ying et al., CVPR 2023)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from hmg_gpu.common.options import setting
from hmg_gpu.masks.regions import Regions, Squares, find_regions, touched
from hmg_gpu.masks.rules.evolving import Evolving, average, clean, in_parts, to_masks
from hmg_gpu.masks.rules.rule import Evidence, State

CORE = 1  # reach of the core, the square of 3 x 3 around the centre


@dataclass(frozen=True)
class Lesps(Evolving):
    """Labels that grow by the network's own confidence in a neighbourhood of each region (LESPS, eq. 3 to 5).

    For every 8-connected region of M > 0.5 with N pixels, in a square around its centroid cut at the border:

        T = max P (Tb + k (1 - Tb) N / (h w r))        h x w is the image's size
        M <- (M + P) / 2    where P > T

    Where the candidates P > T have several components, those without a pixel in the 3 x 3 core are dropped; a single
    one is kept wherever it lies. Squares that overlap average twice. A label of exactly 1 stays. Labels are truncated
    to 8 bits. Training takes the soft labels as they are.

    Args:
        radius: r of FAF in pixels; for reports alone.
        base: Tb. slope: k. share: r, the share of the image at which N counts in full.
        reach: of the square, 2 reach + 1 pixels wide.

    Example:
        >>> Lesps(base=0.4).about()
        {'rule': 'lesps', 'radius': 30, 'base': 0.4, 'slope': 0.5, 'share': 0.0015, 'reach': 16}
    """

    name: ClassVar[str] = "lesps"
    soft_targets: ClassVar[bool] = True

    base: float = setting(
        0.5, "Tb of LESPS: threshold of the smallest regions, of the neighbourhood's maximum", least=0
    )
    slope: float = setting(0.5, "k of LESPS: how the threshold rises with a region's size", least=0)
    share: float = setting(0.0015, "r of LESPS: share of the image that a large target covers", above=0)
    reach: int = setting(16, "of the neighbourhood of LESPS, pixels to each side of the centroid", least=1)

    def evolve(self, evidence: Evidence) -> State:
        labels = evidence.state.labels
        regions = find_regions(to_masks(labels), evidence.sizes, len(evidence.points))
        evolved = labels.clone()
        choose = partial(self.candidates, evidence, single=True)
        average(evolved, evidence, in_parts(regions, self.reach), choose, torch.floor)
        return State(evolved, evidence.state.active)

    def candidates(self, evidence: Evidence, regions: Regions, squares: Squares, *, single: bool) -> Tensor:
        """The pixels of each square that are averaged: bool [R, S, S].

        Args:
            single: keep a component that is the only one wherever it lies.
        """
        probability = clean(squares.take(evidence.probability))
        area = regions.area.to(probability.dtype)
        pixels = evidence.sizes.prod(1)[regions.image].to(probability.dtype)
        level = self.base + self.slope * (1 - self.base) * area / (pixels * self.share)
        level = probability.amax((1, 2)) * level  # [R]
        found = squares.inside & (probability > level[:, None, None])
        core = squares.offset.abs() <= CORE
        return touched(found, (core[:, None] & core).expand(found.shape), single=single)
