"""What MCLC does whatever its crops are: crops of one shape go together, their masks unite on the images."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hmg_gpu.common.checks import check_points
from hmg_gpu.common.options import check_settings, setting
from hmg_gpu.common.tensors import byte_range, to_device
from hmg_gpu.data.sets import ImageSet
from hmg_gpu.masks.makers.maker import Maker
from hmg_gpu.plain.crf import mean_field
from hmg_gpu.plain.mclc import target_probability
from hmg_gpu.plain.noise import name_words, stream
from hmg_gpu.plain.slic import Grid, grid_of

FULL_SCALE = 255.0  # of the crops that a CRF sees
PADDED = 4  # crops of any size are padded to a multiple of so many pixels, so that many have one shape


@dataclass(frozen=True)
class Crops:
    """Where MCLC looks, on the host.

    Attributes:
        boxes: int64 [P, 4], rows (y0, x0, y1, x1), half open, inside the images.
        points: int64 [P, 2], rows (y, x), inside the boxes.
        side: that most have, and so needs no padding; 0: they have any size.
        kept: int64 [P, 4], boxes that masks are cut to; None: the crops.
    """

    boxes: NDArray
    points: NDArray
    side: int = 0
    kept: NDArray | None = None

    def alike(self) -> Iterator[tuple[NDArray, Grid, int, int]]:
        """Crops of one padded shape and one grid: their rows, the grid, the shape."""
        groups: dict[tuple[Grid, int, int], list[int]] = {}
        for row, extent in enumerate((self.boxes[:, 2:] - self.boxes[:, :2]).tolist()):
            height, width = (side if side == self.side else -(-side // PADDED) * PADDED for side in extent)
            groups.setdefault((grid_of(*extent), height, width), []).append(row)
        for (grid, height, width), rows in groups.items():
            yield np.array(rows), grid, height, width


@dataclass(frozen=True)
class Clustering(Maker):
    """MCLC in crops that a subclass chooses.

    A crop is salted ``repeats`` times. Each time SLIC makes about nine superpixels of it. How often a pixel falls into
    the superpixel of the point is its probability. A CRF of all pairs of pixels makes that a mask. The salt of a crop
    hangs on the seed, the image's name and the point alone.
    """

    repeats: int = setting(50, "salted copies of each crop", least=1)
    salt: float = setting(0.05, "share of values, of each channel by itself, that become white", least=0, below=1)
    rescale: bool = setting(True, "map each copy to 0..1 by its own range, as scikit-image does from 0.19 on")
    final: str = setting("crf", "from probabilities to a mask", choices=("crf", "threshold"))
    threshold: float = setting(0.7, "of final=threshold: the target is above it", least=0, below=1)
    overlap: str = setting(
        "union",
        "of crops that overlap; overwrite: a later one erases (the source)",
        choices=("union", "overwrite"),
    )
    seed: int = setting(0, "of the salt", least=0)

    def __post_init__(self) -> None:
        check_settings(self)

    @abstractmethod
    def crops(self, data: ImageSet) -> Crops:
        """The crop of each point."""

    def masks(self, data: ImageSet) -> Tensor:
        check_points(data.points, data.images, data.sizes)
        canvas = Canvas(data.images, erase=self.overlap == "overwrite")
        if len(data.points):
            crops, ends, streams = self.crops(data), byte_range(data.images, data.sizes), point_streams(data, self.seed)
            for rows, grid, height, width in crops.alike():
                windows = Windows.cut(data, ends, crops, rows, height, width)
                canvas.add(windows, self._found(windows, grid, streams[windows.rows]))
        return canvas.masks()

    def _found(self, windows: Windows, grid: Grid, streams: Tensor) -> Tensor:
        """bool [n, M]: the mask of each window."""
        share = target_probability(
            windows.grey,
            windows.valid,
            windows.width,
            windows.points,
            grid,
            streams,
            repeats=self.repeats,
            salt=self.salt,
            rescale=self.rescale,
        )
        if self.final == "threshold":
            return share > self.threshold
        return mean_field(share, windows.grey * FULL_SCALE, windows.valid, windows.width)


@dataclass(frozen=True)
class Windows:
    """Crops of one padded shape, on the device; M = height * width pixels of each, row by row.

    Attributes:
        rows: int64 [n], of the points in their set.
        grey: float32 [n, M], 0 to 1.
        valid, kept: bool [n, M], pixels of the crop, and those that a mask may have.
        position: int64 [n, M], of each pixel in the batch of images.
        points: int64 [n], positions in the crop.
        width: of the crops in pixels.
    """

    rows: Tensor
    grey: Tensor
    valid: Tensor
    kept: Tensor
    position: Tensor
    points: Tensor
    width: int

    @classmethod
    def cut(
        cls, data: ImageSet, ends: tuple[Tensor, Tensor], crops: Crops, rows: NDArray, height: int, width: int
    ) -> Windows:
        """The crops ``rows`` of one padded shape; ``ends``: what counts as 0 and as 1 in each image."""
        device = data.images.device
        index, boxes, points = (
            to_device(torch.from_numpy(part), device) for part in (rows, crops.boxes[rows], crops.points[rows])
        )
        lines = boxes[:, :1] + torch.arange(height, device=device)  # [n, height]
        columns = boxes[:, 1:2] + torch.arange(width, device=device)  # [n, width]

        def inside(boxes: Tensor) -> Tensor:
            y0, x0, y1, x1 = (side[:, None] for side in boxes.unbind(1))
            in_lines, in_columns = (lines >= y0) & (lines < y1), (columns >= x0) & (columns < x1)
            return (in_lines[:, :, None] & in_columns[:, None]).flatten(1)

        valid = inside(boxes)
        kept = valid if crops.kept is None else inside(to_device(torch.from_numpy(crops.kept[rows]), device))
        _, tall, wide = data.images.shape
        image = data.points[index, 0]
        held = lines.clamp(max=tall - 1)[:, :, None] * wide + columns.clamp(max=wide - 1)[:, None]
        position = image[:, None] * (tall * wide) + held.flatten(1)
        low, high = (end[image, None] for end in ends)
        grey = ((data.images.reshape(-1)[position].float() - low) / (high - low)).nan_to_num(0, 1, 0).clamp(0, 1)
        local = points - boxes[:, :2]
        return cls(index, grey, valid, kept, position, local[:, 0] * width + local[:, 1], width)


class Canvas:
    """Masks of crops, put onto the images in any order.

    Args:
        images: [B, H, W], of which the shape and the device are taken.
        erase: a crop erases what crops of earlier rows have inside it.
    """

    def __init__(self, images: Tensor, *, erase: bool):
        self._shape, self._erase = images.shape, erase
        # One slot past the end takes the writes of pixels outside the crops.
        self._last = torch.zeros(images.numel() + 1, dtype=torch.int32 if erase else torch.bool, device=images.device)

    def add(self, windows: Windows, found: Tensor) -> None:
        """The masks of windows: bool [n, M]."""
        found = found & windows.kept
        outside = self._last.numel() - 1
        if self._erase:
            last = ((windows.rows[:, None] + 1) * 2 + found).int()  # the row above all, its mask in the lowest bit
            at = torch.where(windows.valid, windows.position, outside)
            self._last.scatter_reduce_(0, at.flatten(), last.flatten(), "amax")
        else:
            self._last.scatter_(0, torch.where(found, windows.position, outside).flatten(), True)

    def masks(self) -> Tensor:
        """bool [B, H, W]."""
        last = self._last[:-1].view(self._shape)
        return (last & 1).bool() if self._erase else last


def point_streams(data: ImageSet, seed: int) -> Tensor:
    """A stream of random numbers for each point, by seed, name of the image, y and x: int32 [P]."""
    image, y, x = data.points.unbind(1)
    names = to_device(name_words(data.names), data.points.device)
    parts = torch.full_like(image, seed % 2**32), torch.full_like(image, seed // 2**32)
    return stream(*parts, names[image], y, x)
