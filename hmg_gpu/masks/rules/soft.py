"""Soft fusion: probabilities in the place of MDR's union (beyond the paper)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from hmg_gpu.common.options import setting
from hmg_gpu.masks.rules.rule import Evidence, Rule
from hmg_gpu.masks.update import soft_update


@dataclass(frozen=True)
class Soft(Rule):
    """Inside the boxes the maker's and the network's probabilities decide together; see :func:`hmg_gpu.soft_update`.

    Args:
        radius: r of FAF in pixels.
        weight: of the maker's probabilities.

    Example:
        >>> Soft(weight=0.6)
        Soft(radius=30, weight=0.6)
    """

    name: ClassVar[str] = "soft"
    soft: ClassVar[bool] = True

    weight: float = setting(0.7, "of the initial masks' probabilities beside the network's", least=0, most=1)

    def correct(self, evidence: Evidence) -> Tensor:
        return soft_update(
            evidence.probability,
            evidence.initial_probability,
            evidence.points,
            radius=self.radius,
            weight=self.weight,
            threshold=evidence.threshold,
            sizes=evidence.sizes,
        )
