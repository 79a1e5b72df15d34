"""What a rule of correction is: settings, and how a prediction changes masks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from torch import Tensor

from hmg_gpu.common.options import Configured, check_settings, setting
from hmg_gpu.common.tensors import logit, valid_area
from hmg_gpu.masks.update import false_alarm_filter


@dataclass(frozen=True)
class Evidence:
    """All that a rule may look at, for some images of one padded batch.

    Attributes:
        prediction: bool [b, H, W], what the network takes for target; nothing in the padding.
        points: int64 [p, 3], rows (image, y, x).
        sizes: int64 [b, 2], valid (height, width).
        initial: bool [b, H, W], the masks of the points.
        current: bool [b, H, W], the masks before this correction.
        probability: float32 [b, H, W], the network's, for rules with ``soft``; else None.
        initial_probability: float32 [b, H, W], the maker's, for rules with ``soft``; else None.
        threshold: probability above which a pixel was taken for target.
    """

    prediction: Tensor
    points: Tensor
    sizes: Tensor
    initial: Tensor
    current: Tensor
    probability: Tensor | None = None
    initial_probability: Tensor | None = None
    threshold: float = 0.5

    @classmethod
    def from_logits(
        cls,
        logits: Tensor,
        points: Tensor,
        sizes: Tensor,
        initial: Tensor,
        initial_probability: Tensor | None = None,
        *,
        threshold: float = 0.5,
    ) -> Evidence:
        """From logits float [b, H, W]; the other arguments as the attributes."""
        prediction = (logits > logit(threshold)) & valid_area(sizes, logits)
        soft = initial_probability is not None
        probability = logits.sigmoid() if soft else None
        return cls(prediction, points, sizes, initial, initial, probability, initial_probability, threshold)


@dataclass(frozen=True)
class Rule(Configured, ABC):
    """Corrects masks by a network's predictions; a frozen dataclass of its settings.

    A rule of one's own is a subclass in a file of its own and a line in :data:`hmg_gpu.masks.RULES`.
    """

    soft: ClassVar[bool] = False  # whether it looks at probabilities

    radius: int = setting(30, "r of FAF, pixels", least=0)

    def __post_init__(self) -> None:
        check_settings(self)

    def filtered(self, evidence: Evidence) -> Tensor:
        """The prediction after the false alarm filter (HMG Sec. 3.2.1): bool [b, H, W]."""
        return false_alarm_filter(evidence.prediction, evidence.points, radius=self.radius, sizes=evidence.sizes)

    @abstractmethod
    def correct(self, evidence: Evidence) -> Tensor:
        """The corrected masks: bool [b, H, W]."""

    def about(self) -> dict[str, Any]:
        """What checkpoints and results say about it: JSON values."""
        return {"rule": self.name} | asdict(self)
