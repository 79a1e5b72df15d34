"""What a rule of correction is: settings, and how a prediction changes masks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from hmg_gpu.common.options import Configured, check_settings, setting
from hmg_gpu.common.tensors import logit, valid_area
from hmg_gpu.masks.update import false_alarm_filter


class State(NamedTuple):
    """What an evolving rule carries from one update to the next.

    Attributes:
        labels: uint8 [b, H, W], soft labels, 255 is 1; 0 in the padding.
        active: bool [b], the images that are trained on; the others wait.
    """

    labels: Tensor
    active: Tensor


@dataclass(frozen=True)
class Evidence:
    """All that a rule may look at, for some images of one padded batch.

    Attributes:
        prediction: bool [b, H, W], what the network takes for target; nothing in the padding.
        points: int64 [p, 3], rows (image, y, x).
        sizes: int64 [b, 2], valid (height, width).
        initial: bool [b, H, W], the masks of the points.
        current: bool [b, H, W], the masks before this correction.
        probability: float32 [b, H, W], the network's, for rules with ``soft`` or ``evolves``; else None.
        initial_probability: float32 [b, H, W], the maker's, for rules with ``soft``; else None.
        threshold: probability above which a pixel was taken for target.
        state: of the images before this update, for rules with ``evolves``; None: there was no update yet.
        at: how many epochs after the first update lie behind, and how many there are in all.
    """

    prediction: Tensor
    points: Tensor
    sizes: Tensor
    initial: Tensor
    current: Tensor
    probability: Tensor | None = None
    initial_probability: Tensor | None = None
    threshold: float = 0.5
    state: State | None = None
    at: tuple[int, int] = (0, 1)

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
        soft: bool = False,
    ) -> Evidence:
        """From logits float [b, H, W]; the other arguments as the attributes.

        Args:
            soft: whether the rule looks at the network's probabilities.
        """
        prediction = (logits > logit(threshold)) & valid_area(sizes, logits)
        probability = logits.sigmoid() if soft else None
        return cls(prediction, points, sizes, initial, initial, probability, initial_probability, threshold)


@dataclass(frozen=True)
class Rule(Configured, ABC):
    """Corrects masks by a network's predictions; a frozen dataclass of its settings.

    A rule of one's own is a subclass in a file of its own and a line in :data:`hmg_gpu.masks.RULES`.
    """

    soft: ClassVar[bool] = False  # whether it looks at probabilities, the maker's and the network's
    evolves: ClassVar[bool] = False  # whether it keeps a State: see hmg_gpu/masks/rules/evolving.py
    pools: ClassVar[bool] = False  # whether images may wait before they are trained on
    soft_targets: ClassVar[bool] = False  # whether its soft labels are trained on, and not the masks

    radius: int = setting(30, "r of FAF, pixels", least=0)

    def __post_init__(self) -> None:
        check_settings(self)

    @property
    def by_probability(self) -> bool:
        """Whether it looks at the network's probabilities."""
        return self.soft or self.evolves

    def filtered(self, evidence: Evidence) -> Tensor:
        """The prediction after the false alarm filter (HMG Sec. 3.2.1): bool [b, H, W]."""
        return false_alarm_filter(evidence.prediction, evidence.points, radius=self.radius, sizes=evidence.sizes)

    @abstractmethod
    def correct(self, evidence: Evidence) -> Tensor:
        """The corrected masks: bool [b, H, W]."""

    def about(self) -> dict[str, Any]:
        """What checkpoints and results say about it: JSON values."""
        return {"rule": self.name} | asdict(self)
