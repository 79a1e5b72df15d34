"""The paper's rule (HMG Sec. 3.2): FAF, then MDR."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from hmg_gpu.masks.rules.rule import Evidence, Rule
from hmg_gpu.masks.update import update


@dataclass(frozen=True)
class Union(Rule):
    """Initial mask OR filtered prediction, always from the initial masks (HMG Sec. 3.2).

    Args:
        radius: r of FAF in pixels.

    Example:
        >>> Union().about()
        {'rule': 'union', 'radius': 30}
    """

    name: ClassVar[str] = "union"

    def correct(self, evidence: Evidence) -> Tensor:
        sizes = evidence.sizes
        return update(evidence.prediction, evidence.initial, evidence.points, radius=self.radius, sizes=sizes)
