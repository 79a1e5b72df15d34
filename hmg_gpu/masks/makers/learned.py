"""Learned masks as a maker: a student that learns from PMG's masks of the same points (beyond the paper)."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from hmg_gpu.common.errors import HMGError
from hmg_gpu.data.record import in_words
from hmg_gpu.data.sets import ImageSet
from hmg_gpu.masks.makers.maker import Maker, Sampled, Steps
from hmg_gpu.masks.makers.pmg import Pmg
from hmg_gpu.masks.student.student import Student, StudentSettings
from hmg_gpu.masks.student.train import learned_student, train_student

STUDENT = "student.safetensors"  # in the folder that keeps it
LESSONS, LESSON_PIXELS = 20_000, 2**31  # points that a student learns from, and pixels held for that


@dataclass(frozen=True)
class Learned(Maker):
    """Masks by small networks that learn from PMG's masks of the points; no ground truth is opened.

    PMG's errors vary between targets while its correct pixels are consistent; a network learns the consistent part.

    Args:
        file: a student trained before (.safetensors); None: :meth:`fit` trains one, minutes on a CPU.
        pmg: teaches it, and keeps the masks that do not fit into its crops.
        seed: of the training.
        student: the networks themselves; None: from ``file`` or from :meth:`fit`.

    Raises:
        InputError: the file is missing, damaged, or no student.

    Example:
        >>> Learned("student.safetensors", pmg=Pmg(extent=10)).pmg.extent
        10
    """

    name: ClassVar[str] = "learned"
    rule: ClassVar[str] = "soft"  # its masks are not too small: union costs 4 IoU on NUDT-SIRST

    file: str | None = None
    pmg: Pmg = field(default_factory=Pmg)
    seed: int = 0
    student: Student | None = field(default=None, compare=False, repr=False)

    def fit(self, data: Sampled, *, folder: Path | None = None, progress: Steps | None = None) -> Learned:
        pmg = self.pmg.fit(data)
        if self.student is not None:
            return replace(self, pmg=pmg)
        if self.file is not None:
            return replace(self, pmg=pmg, student=Student.load(self.file))
        part, settings = data.sample(LESSONS, LESSON_PIXELS), StudentSettings(seed=self.seed)
        if folder is None:
            makers, sets = zip(*pmg.split(part), strict=True)
            student = train_student(sets, makers, settings=settings, progress=progress)
            return replace(self, pmg=pmg, student=student)
        path = learned_student(part, folder / STUDENT, pmg, settings=settings, progress=progress)
        return replace(self, pmg=pmg, file=str(path), student=Student.load(path))

    def _ready(self, data: ImageSet) -> Student:
        if self.student is None:
            raise HMGError("learned: there is no student yet; call fit(data) first, or give a student's file")
        return self.student.to(data.images.device)

    def masks(self, data: ImageSet) -> Tensor:
        student = self._ready(data)
        parts = (student.masks(part, pmg) for pmg, part in self.pmg.split(data))
        return functools.reduce(torch.logical_or, parts)

    def probabilities(self, data: ImageSet) -> Tensor:
        student = self._ready(data)
        parts = (student.soft_masks(part, pmg) for pmg, part in self.pmg.split(data))
        return functools.reduce(torch.maximum, parts)

    def masks_and(self, data: ImageSet, *, soft: bool) -> tuple[Tensor, Tensor | None]:
        if not soft:
            return self.masks(data), None
        probabilities = self.probabilities(data)  # the masks are where these pass a half
        return probabilities >= 0.5, probabilities

    def confidence(self, data: ImageSet) -> tuple[Tensor, Tensor]:
        student = self._ready(data)
        parts = self.pmg.split(data)
        points = torch.cat([part.points for _, part in parts])
        return points, torch.cat([student.confidence(part, pmg) for pmg, part in parts])

    def settings(self) -> dict[str, Any]:
        return self.pmg.settings()

    def change(self, name: str, value: Any) -> Learned:
        return replace(self, pmg=self.pmg.change(name, value))

    def about(self) -> dict[str, Any]:
        digest = None if self.student is None else self.student.digest()
        return {"maker": self.name, "pmg": self.pmg.about(), "student": digest}

    def __str__(self) -> str:
        source = "a student trained on these points" if self.file is None else self.file
        lessons = () if self.student is None or self.file is None else map(in_words, self.student.learned_from)
        return f"learned by {source}{''.join(f', which learned from {words}' for words in lessons)}; {self.pmg}"

    @classmethod
    def from_text(cls, text: str, **given: Any) -> Learned:
        values = {name: value for name, value in given.items() if name in ("pmg", "seed")}
        return cls(text or None, **values)
