"""Masks of a set as files and arrays, for other people's data loaders."""

from __future__ import annotations

import os

import numpy as np
from torch import Tensor

from hmg_gpu.data.images import map_files, write_mask
from hmg_gpu.data.sets import ImageSet


def write_masks(folder: str | os.PathLike, data: ImageSet, masks: Tensor) -> None:
    """Write ``folder/NAME.png`` (0 and 255) for every image, each beside the old file and renamed.

    Args:
        masks: bool [N, H, W].
    """
    planes = masks.cpu().numpy()
    sizes = data.host_sizes.tolist()

    def write(row: int) -> None:
        height, width = sizes[row]
        write_mask(os.path.join(folder, f"{data.names[row]}.png"), planes[row, :height, :width])

    for _ in map_files(write, range(len(data))):
        pass


def list_masks(data: ImageSet, masks: Tensor) -> list[np.ndarray]:
    """Masks as float32 [h, w] of 0 and 1, one array an image."""
    planes = masks.cpu().numpy()
    sizes = data.host_sizes.tolist()
    return [planes[row, :height, :width].astype(np.float32) for row, (height, width) in enumerate(sizes)]
