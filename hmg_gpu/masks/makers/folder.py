"""Masks that lie in a folder, whoever made them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from hmg_gpu.common.errors import InputError
from hmg_gpu.data.images import map_files, read_mask
from hmg_gpu.data.sets import ImageSet
from hmg_gpu.masks.makers.maker import Maker, Sampled, Steps


@dataclass(frozen=True)
class Folder(Maker):
    """Masks of any system, read from ``path/NAME.png``, one for each image.

    Args:
        path: the folder.

    Raises:
        InputError: no path (on construction), no such folder, a missing or unreadable file, or one whose size is not
            its image's.

    Example:
        >>> Folder("masks_of_another_system").about()
        {'maker': 'folder', 'path': 'masks_of_another_system'}
    """

    name: ClassVar[str] = "folder"
    needs_points: ClassVar[bool] = False

    path: str = ""

    def __post_init__(self) -> None:
        if not self.path:
            raise InputError("folder: expected folder:PATH, a folder of masks NAME.png")

    @property
    def label(self) -> str:
        return Path(self.path).name

    def fit(self, data: Sampled, *, folder: Path | None = None, progress: Steps | None = None) -> Folder:
        if not Path(self.path).is_dir():
            raise InputError(f"{self.path}: no such folder of masks; check the path behind folder:")
        return self

    def masks(self, data: ImageSet) -> Tensor:
        sizes = data.host_sizes.tolist()
        jobs = [(Path(self.path) / f"{name}.png", size) for name, size in zip(data.names, sizes, strict=True)]
        masks = torch.zeros(data.images.shape, dtype=torch.bool)
        for index, mask in enumerate(map_files(lambda job: read_mask(*job), jobs)):
            masks[index, : mask.shape[0], : mask.shape[1]] = torch.from_numpy(mask)
        return masks.to(data.images.device)

    def about(self) -> dict[str, Any]:
        return {"maker": self.name, "path": self.path}

    def __str__(self) -> str:
        return f"masks in {self.path}"

    @classmethod
    def from_text(cls, text: str, **given: Any) -> Folder:
        return cls(text)
