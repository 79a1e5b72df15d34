"""What a maker of initial masks is: settings, and a mask for every point."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from hmg_gpu.common.errors import HMGError, InputError
from hmg_gpu.common.options import META, Configured, parse_value
from hmg_gpu.data.sets import ImageSet

Steps = Callable[[int, int], None]  # called with (steps done, steps in all)


class Sampled(Protocol):
    """A set that a maker may look at before it makes masks: an :class:`ImageSet`, or one too large for memory."""

    dataset: str

    def sample(self, points: int, pixels: int) -> ImageSet:
        """Images with points, evenly spread, of about so many points and no more pixels in one padded batch."""
        ...


@dataclass(frozen=True)
class Maker(Configured, ABC):
    """Makes the initial masks of a set from its points; a frozen dataclass of its settings.

    A maker of one's own is a subclass in a file of its own and a line in :data:`hmg_gpu.masks.MAKERS`. It needs
    ``name`` and :meth:`masks`; the rest has defaults.
    """

    needs_points: ClassVar[bool] = True
    rule: ClassVar[str] = "union"  # that corrects its masks best, as far as anybody measured

    @property
    def label(self) -> str:
        """Its row in tables."""
        return self.name

    @property
    def paper_row(self) -> str | None:
        """Its row in Tables 2 and 3 of HMG, if it has one."""
        return None

    def fit(self, data: Sampled, *, folder: Path | None = None, progress: Steps | None = None) -> Maker:
        """The maker with all that depends on the data settled: lengths chosen, networks trained or read.

        Args:
            data: images and points; never its ground truth.
            folder: where files may be kept, such as a trained network; None: nowhere.
            progress: called with (steps done, steps in all) where it takes long.
        """
        return self

    @abstractmethod
    def masks(self, data: ImageSet) -> Tensor:
        """The masks of the points of each image, united: bool [N, H, W], False in the padding."""

    def probabilities(self, data: ImageSet) -> Tensor:
        """What lies behind the masks: float32 [N, H, W], at least 0.5 where they are True; here 0 and 1."""
        return self.masks(data).float()

    def masks_and(self, data: ImageSet, *, soft: bool) -> tuple[Tensor, Tensor | None]:
        """:meth:`masks`, and with ``soft`` :meth:`probabilities`, else None; in one go where that saves work."""
        return self.masks(data), self.probabilities(data) if soft else None

    def confidence(self, data: ImageSet) -> tuple[Tensor, Tensor] | None:
        """How sure each mask is, told without ground truth: points int64 [P, 3] in any order and float32 [P] in [0, 1].

        None: the maker does not know, as here.
        """
        return None

    def settled(self, data: ImageSet) -> Tensor:
        """The images whose masks are good enough to start training on: bool [N]; here all. Only rule pal asks."""
        return torch.ones(len(data), dtype=torch.bool, device=data.images.device)

    def knows_each(self, data: ImageSet) -> bool:
        """Whether :meth:`each` works for these images."""
        return False

    def each(self, data: ImageSet, points: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """The mask of each point by itself, for makers that know it.

        Args:
            points: int64 [P, 3], rows (image, y, x).

        Yields:
            Some of the points [p, 3]; int64 [p, S, S] the positions y * W + x of their windows' pixels in the image;
            bool [p, S, S] their masks. Positions outside the image are held to it and never in a mask.

        Raises:
            HMGError: it does not know them.
        """
        raise HMGError(f"{self.name}: masks of single points are not known")

    def ablations(self) -> Mapping[str, Maker]:
        """The same maker without a part of its method, by the names of tables."""
        return {}

    def about(self) -> dict[str, Any]:
        """What checkpoints and results say about it: JSON values that are equal where the masks are."""
        return {"maker": self.name} | asdict(self)

    @classmethod
    def from_text(cls, text: str, **given: Any) -> Maker:
        """A maker from what stands behind its name on the command line: NAME=VALUE,NAME=VALUE.

        Args:
            text: may be empty.
            given: values for fields, as far as the class has them.

        Raises:
            InputError: an unknown name, or a value that cannot be.
        """
        known = {entry.name: entry for entry in fields(cls)}
        values = {name: value for name, value in given.items() if name in known}
        for pair in filter(None, text.split(",")):
            name, is_pair, value = pair.partition("=")
            entry = known.get(name.strip().replace("-", "_"))
            if not is_pair or entry is None or META not in entry.metadata:
                settings = ", ".join(name for name, entry in known.items() if entry.metadata.get(META))
                raise InputError(f"masks {f'{cls.name}:{text}'!r}: expected NAME=VALUE of {settings or 'no setting'}")
            values[entry.name] = parse_value(entry, value.strip())
        return cls(**values)
