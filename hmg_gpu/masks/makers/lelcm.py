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
        return unite(data.images, self.each(data, data.points))

    def knows_each(self, data: ImageSet) -> bool:
        return True

    def each(self, data: ImageSet, points: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        _, height, width = data.images.shape
        radius = (self.side + 1) // 2  # of the largest window
        steps = torch.arange(-radius, radius + 1, device=points.device)  # [S]
        # Pixels ring by ring: every window is the first of them, and every ring some in a row.
        order = torch.maximum(steps.abs()[:, None], steps.abs()).flatten().argsort(stable=True)  # [S * S]
        offsets = torch.stack((order // len(steps), order % len(steps)), dim=1) - radius  # [S * S, 2]
        back = order.argsort()
        pixels = GROUP_PIXELS.get(points.device.type, GROUP_PIXELS_ACCELERATOR)
        for group in points.split(max(1, pixels // len(order))):
            if not len(group):
                continue
            image, places = group[:, 0], group[:, None, 1:] + offsets  # [p, S * S, 2]
            last = (data.sizes[image] - 1)[:, None]  # [p, 1, 2]
            inside = ((places >= 0) & (places <= last)).all(2)
            at_border = ((places == 0) | (places == last)).any(2)
            rows, columns = places.unbind(2)
            position = rows.clamp(0, height - 1) * width + columns.clamp(0, width - 1)  # [p, S * S]
            values = data.images.flatten(1)[image[:, None], position]
            over = self._threshold(values.to(wide(values)), inside, at_border)
            square = (len(group), len(steps), len(steps))
            seeds = torch.full_like(group[:, 1:], radius)
            yield group, position[:, back].view(square), component_at(over[:, back].view(square), seeds)

    def _threshold(self, values: Tensor, inside: Tensor, at_border: Tensor) -> Tensor:
        """The pixels of the last window over its threshold, and the point: bool [p, S * S], ring by ring as the values.

        Args:
            values: [p, S * S], the point's own first.
            inside, at_border: bool [p, S * S], of the image.
        """
        at_point = values[:, :1]
        number = torch.arange(values.shape[1], device=values.device)
        ends = [(2 * reach + 1) ** 2 for reach in range((self.side + 1) // 2)]  # pixels of each window but the largest
        bright = inside & (values > self.ratio * at_point)
        # Where the image cuts a window off, its border is the image's.
        counts = torch.stack([bright[:, :end].sum(1) for end in ends], dim=1)  # [p, windows]
        cut_off = torch.stack([(bright & at_border)[:, :end].any(1) for end in ends[1:]], dim=1)
        grows = (counts.diff(dim=1) > 0) | cut_off
        reach = 1 + grows.cumprod(1).sum(1, keepdim=True)  # [p, 1], of the first window that does not grow
        window = inside & (number < (2 * reach + 1) ** 2)

        # c - v < std, squared and times the count squared: whole numbers for whole intensities.
        below = at_point - values
        held = torch.where(window, below, 0)
        count, total, squares = (part.sum(1, keepdim=True) for part in (window, held, held.square()))
        spread = count * squares - total.square()  # the variance times the count squared
        return (window & ((below < 0) | ((count * below).square() < spread))) | (number == 0)
