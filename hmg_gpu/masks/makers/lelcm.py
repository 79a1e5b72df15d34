"""The first masks of LELCM as a maker: a window that grows around the point, and a threshold from its spread."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hmg_gpu.common.errors import InputError
from hmg_gpu.common.options import check_settings, setting
from hmg_gpu.data.sets import ImageSet
from hmg_gpu.masks.makers.maker import Maker
from hmg_gpu.plain.crops import component_at, unite, wide

GROUP_PIXELS = {"cpu": 1 << 17}  # of the windows held at a time: a CPU's cache
GROUP_PIXELS_ACCELERATOR = 1 << 22


@dataclass(frozen=True)
class Lelcm(Maker):
    """The initial labels of LELCM (Zhang et al., "label evolution based on local contrast measure", TGRS 2024).

    A square window of 3, 5, 7 ... pixels around the point grows until no pixel of its border exceeds ``ratio`` times
    the point's intensity c. The mask is the 8-connected component, at the point, of the window's pixels over
    c - std(window).

    Args:
        ratio: of the point's intensity that a pixel of the border must exceed for the window to grow.
        side: the largest window that is looked at, in pixels; where it must grow, too, the window is ``side + 2`` wide.

    Where the window is flat the point alone is the mask. Windows end at the image's border, and so does their own.
    Thresholds are compared exactly for 8- and 16-bit images.

    Raises:
        InputError: a setting out of its range, or an even side.

    Example:
        >>> import torch
        >>> from hmg_gpu.data import ImageSet
        >>> image = torch.full((1, 9, 9), 20.0)
        >>> image[0, 4, 4:6] = 200
        >>> data = ImageSet(["a"], image, torch.tensor([[9, 9]]), torch.tensor([[0, 4, 4]]))
        >>> Lelcm().masks(data).nonzero().tolist()
        [[0, 4, 4], [0, 4, 5]]
    """

    name: ClassVar[str] = "lelcm"

    ratio: float = setting(0.8, "of the point's intensity that a window's border must exceed to grow", least=0, most=1)
    side: int = setting(15, "largest window that is looked at, odd, pixels", least=3, most=99)

    def __post_init__(self) -> None:
        check_settings(self)
        if self.side % 2 == 0:
            raise InputError(f"side = {self.side}: expected an odd number, as the point is the window's centre")

    def masks(self, data: ImageSet) -> Tensor:
        canvas = torch.zeros(data.images.shape, dtype=torch.bool, device=data.images.device)
        for points, position, masks in self.each(data, data.points):
            canvas |= unite(data.images.shape, points[:, 0], position, masks)
        return canvas

    def knows_each(self, data: ImageSet) -> bool:
        return True

    def each(self, data: ImageSet, points: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        _, height, width = data.images.shape
        radius = (self.side + 1) // 2  # of the largest window
        steps = torch.arange(-radius, radius + 1, device=points.device)  # [S]
        pixels = GROUP_PIXELS.get(points.device.type, GROUP_PIXELS_ACCELERATOR)
        for group in points.split(max(1, pixels // len(steps) ** 2)):
            if not len(group):
                continue
            image, centre = group[:, 0], group[:, 1:]
            last = data.sizes[image] - 1  # [p, 2]
            rows, columns = (centre[:, axis, None] + steps for axis in (0, 1))  # [p, S]
            position = rows.clamp(0, height - 1)[:, :, None] * width + columns.clamp(0, width - 1)[:, None]
            values = data.images.flatten(1)[image[:, None, None], position]  # [p, S, S]
            yield group, position, self._expand(values, centre, last, steps)

    def _expand(self, values: Tensor, centre: Tensor, last: Tensor, steps: Tensor) -> Tensor:
        """The masks of windows [p, S, S] around points (y, x) [p, 2] of images whose last pixel is ``last`` [p, 2]."""
        values = values.to(wide(values))
        radius = len(steps) // 2
        at_point = values[:, radius, radius, None, None]
        low, high = -centre[:, :, None], (last - centre)[:, :, None]  # [p, 2, 1], the image's border from the point
        bright = values > self.ratio * at_point  # [p, S, S]

        def inside(reach: int | Tensor) -> tuple[Tensor, Tensor]:
            """Rows and columns of a window that reaches so far: bool [p, S] each."""
            within = (steps >= low) & (steps <= high) & (steps.abs() <= reach)  # [p, 2, S]
            return within[:, 0], within[:, 1]

        grows = []
        for reach in range(1, radius):
            rows, columns = inside(reach)
            ends = (steps == low.clamp(min=-reach)) | (steps == high.clamp(max=reach))  # [p, 2, S]
            border = (ends[:, 0, :, None] & columns[:, None]) | (rows[:, :, None] & ends[:, 1, None])
            grows.append((bright & border).flatten(1).any(1))
        more = torch.stack(grows, dim=1).cumprod(1).sum(1)  # [p], windows that grew before the first that did not
        rows, columns = inside((1 + more)[:, None, None])
        window = rows[:, :, None] & columns[:, None]  # [p, S, S]

        # c - v < std, squared and times the count squared: whole numbers for whole intensities.
        below = at_point - values
        held = torch.where(window, below, 0)
        count, total, squares = window.sum((1, 2)), held.sum((1, 2)), held.square().sum((1, 2))
        spread = (count * squares - total.square())[:, None, None]  # the variance times the count squared
        over = window & ((below < 0) | ((count[:, None, None] * below).square() < spread))
        at_centre = (steps == 0)[:, None] & (steps == 0)  # [S, S]
        return component_at(over, torch.full_like(centre, radius)) | at_centre
