"""PAL: progressive active learning from single points (Yu et al., ICCV 2025)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from hmg_gpu.common.checks import can_read
from hmg_gpu.common.options import setting
from hmg_gpu.masks.regions import fill_holes, find_regions, number_components, touched
from hmg_gpu.masks.rules.evolving import FULL, average, in_parts, to_masks
from hmg_gpu.masks.rules.lesps import Lesps
from hmg_gpu.masks.rules.rule import Evidence, State


@dataclass(frozen=True)
class Pal(Lesps):
    """Images whose masks are trusted train first, others enter when the network finds their points (PAL).

    Labels of the images that train are updated as LESPS does, with the same constants, but:

        M <- (M + P) / 2    on the candidates of all regions, once
        M <- 0.97 M         elsewhere; a label of exactly 1 stays

    and components without a pixel in the core are dropped even where there is only one. Labels are rounded to 8 bits,
    a half to the even number. The masks are trained on, not the soft labels.

    In the first ``enhance`` of stage 2 (240 of 319 epochs there), each update also lets waiting images enter. Of the
    prediction, holes filled, an image with n points may miss a share rho of them, and may show 5 n other targets:

        rho = 0.2 + 0.8 (epochs of stage 2 behind + 2) / (epochs of that phase)

    Points that touch count as one. An image that enters keeps the components with a point, and its points. What the
    maker is sure of starts: all but the masks of maker ``pal`` are taken to be good. An image that never enters is
    never trained on.

    Args:
        radius, base, slope, share, reach: as :class:`Lesps`.
        decay: of labels that are no candidates, at each update.
        entry: rho when the phase begins; it ends at 1.
        spurious: predicted targets without a point that an image may have for each of its points.
        enhance: the share of stage 2 in which images may enter.

    Example:
        >>> round(Pal().allowance((100, 319)), 2), Pal().allowance((240, 319))
        (0.54, None)
    """

    name: ClassVar[str] = "pal"
    soft_targets: ClassVar[bool] = False
    pools: ClassVar[bool] = True

    decay: float = setting(0.97, "of PAL: what is left of a label that is no candidate", least=0, most=1)
    entry: float = setting(0.2, "rho of PAL when images begin to enter, a share of points missed", least=0, most=1)
    spurious: float = setting(5.0, "of PAL: predicted targets beside its points that an image may enter with", least=0)
    enhance: float = setting(240 / 319, "share of stage 2 in which images may enter", least=0, most=1)

    def start(self, initial: Tensor, settled: Tensor) -> State:
        return State(initial.to(torch.uint8) * FULL, settled.clone())

    def allowance(self, at: tuple[int, int]) -> float | None:
        """rho: the share of its points that an image may miss; None: none may enter any more.

        Args:
            at: epochs of stage 2 that lie behind, and all of them.
        """
        behind, epochs = at
        phase = round(self.enhance * epochs)
        return self.entry + (1 - self.entry) * (behind + 2) / phase if behind < phase else None

    def evolve(self, evidence: Evidence) -> State:
        labels, active = evidence.state
        # On the CPU only images that wait are looked at; elsewhere their number is not known.
        rows = (~active).nonzero()[:, 0] if can_read(active) else torch.arange(len(active), device=active.device)
        evolved = self._updated(evidence)
        if len(rows) == 0:
            return State(evolved, active)
        evolved = torch.where(active[:, None, None], evolved, labels)
        allowance = self.allowance(evidence.at)
        if allowance is None:
            return State(evolved, active)
        enters, entry_labels = self._entries(evidence, rows, allowance)
        enters &= ~active[rows]
        evolved[rows] = torch.where(enters[:, None, None], entry_labels, evolved[rows])
        active = active.clone()
        active[rows] |= enters
        return State(evolved, active)

    def _updated(self, evidence: Evidence) -> Tensor:
        labels = evidence.state.labels
        regions = find_regions(to_masks(labels), evidence.sizes, len(evidence.points))
        evolved = self._decayed(labels)
        choose = partial(self.candidates, evidence, single=False)
        average(evolved, evidence, in_parts(regions, self.reach), choose, torch.round, most=1)
        return evolved

    def _decayed(self, labels: Tensor) -> Tensor:
        left = (torch.arange(FULL + 1, device=labels.device) * self.decay).round().to(labels.dtype)
        left[FULL] = FULL
        if not can_read(labels):
            return left[labels.int()]
        evolved = labels.clone()  # labels are sparse: on the CPU only what is set is looked at
        flat = evolved.view(-1)
        places = torch.from_numpy(np.flatnonzero((flat != 0).numpy()))
        flat[places] = left[flat[places].int()]
        return evolved

    def _entries(self, evidence: Evidence, rows: Tensor, allowance: float) -> tuple[Tensor, Tensor]:
        """Which of some images may enter, bool [r], and the labels they would enter with, uint8 [r, H, W]."""
        _, height, width = evidence.prediction.shape
        points = torch.zeros(evidence.prediction.numel(), dtype=torch.bool, device=rows.device)
        image, y, x = evidence.points.unbind(1)
        points = points.index_fill_(0, (image * height + y) * width + x, True).view(evidence.prediction.shape)[rows]
        found = fill_holes(evidence.prediction[rows])
        targets = number_components(points)[1]  # [r]
        hit = number_components(touched(points, found))[1]
        spurious = number_components(found)[1] - hit
        count = targets.clamp(min=1)
        good = ((targets - hit) / count <= allowance) & (spurious / count <= self.spurious)
        labels = (touched(found, points) | points).to(torch.uint8) * FULL
        return good | (targets == 0), labels
