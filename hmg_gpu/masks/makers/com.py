"""COM as a maker: a level set that shrinks from the bright pixels of a crop to the target."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hmg_gpu.common.errors import HMGError
from hmg_gpu.common.options import check_settings, setting
from hmg_gpu.data.sets import ImageSet
from hmg_gpu.masks.makers.maker import Maker
from hmg_gpu.plain.contour import published_masks
from hmg_gpu.plain.crops import component_at, unite
from hmg_gpu.plain.level_set import Crops, cut_crops, evolve

GROUP_PIXELS = {"cpu": 1 << 16}  # of the crops held at a time: a CPU's cache
GROUP_PIXELS_ACCELERATOR = 1 << 22


@dataclass(frozen=True)
class Com(Maker):
    """COM (Li et al., "click on mask", IEEE SPL 2024): a level set evolves in a crop around each point.

    The crop is stretched to 0..255; what is brighter than 50 starts as inside. The inside shrinks as long as its mean
    grows, stops at edges and stays smooth (distance regularisation). The mask is the 8-connected component of the level
    set's inside at the point, or nearest to it; masks of points are united.

    Args:
        half: b, half the crop's side in pixels; b / 2 blocks of five iterations follow from it.
        faithful: the masks as the authors' script makes them instead. It takes the first line that matplotlib draws,
            wherever it lies, cuts its vertices off to whole pixels, and fills from the crop's corner; a later crop
            overwrites an earlier one. Its term for the difference of means, too small to matter where there is an
            inside, is in. Lines are drawn on the host, and the last bits of the level set matter: a line whose vertex
            is cut one pixel too far leaks.

    A crop without contrast gives no mask. A smooth peak has no edge at its top, so that a mask may have a hole there.

    Raises:
        InputError: a setting out of its range.

    Example:
        >>> import torch
        >>> from hmg_gpu.data import ImageSet
        >>> steps = torch.arange(40.0) - 20
        >>> image = 30 + 200 * torch.exp(-(steps[:, None] ** 2 + steps**2) / 8)[None]
        >>> data = ImageSet(["a"], image, torch.tensor([[40, 40]]), torch.tensor([[0, 20, 20]]))
        >>> mask = Com(half=10).masks(data)
        >>> bool(mask[0, 20, 20]), 10 < int(mask.sum()) < 40
        (True, True)
    """

    name: ClassVar[str] = "com"

    half: int = setting(20, "half the crop's side, pixels", least=2, most=128)
    faithful: bool = setting(False, "masks as the authors' script cuts them out of the level set")

    def __post_init__(self) -> None:
        check_settings(self)

    @property
    def paper_row(self) -> str | None:
        return "COM"

    def masks(self, data: ImageSet) -> Tensor:
        return self._overwritten(data) if self.faithful else unite(data.images, self.each(data, data.points))

    def knows_each(self, data: ImageSet) -> bool:
        return not self.faithful

    def each(self, data: ImageSet, points: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        if self.faithful:
            raise HMGError("com: with faithful=true crops overwrite one another; use masks(data)")
        for group, crops, phi in self._evolved(data, points):
            inside = (phi <= 0) & crops.valid
            yield group, crops.position, component_at(inside, _nearest(inside, group[:, 1:] - crops.corner))

    def _evolved(self, data: ImageSet, points: Tensor) -> Iterator[tuple[Tensor, Crops, Tensor]]:
        """Some of the points, their crops and level sets [p, S, S]; above 0 where a crop is flat."""
        pixels = GROUP_PIXELS.get(points.device.type, GROUP_PIXELS_ACCELERATOR)
        for group in points.split(max(1, pixels // (2 * self.half) ** 2)):
            if not len(group):
                continue
            crops = cut_crops(data.images, group, data.sizes, self.half)
            phi = evolve(crops, blocks=self.half // 2, difference=self.faithful)
            yield group, crops, torch.where(crops.is_flat, 1, phi)

    def _overwritten(self, data: ImageSet) -> Tensor:
        """The published masks, in the order of the points."""
        host = torch.zeros(data.images.shape, dtype=torch.bool)
        for group, crops, phi in self._evolved(data, data.points):
            sizes, corners = crops.size.cpu(), crops.corner.cpu()
            found = published_masks(phi.double().cpu().numpy(), sizes.numpy())
            rows = torch.cat((group[:, :1].cpu(), corners, sizes), dim=1).tolist()
            for (image, y, x, height, width), mask in zip(rows, torch.from_numpy(found), strict=True):
                host[image, y : y + height, x : x + width] = mask[:height, :width]
        return host.to(data.images.device)


def _nearest(inside: Tensor, points: Tensor) -> Tensor:
    """The inside's pixel nearest to each point, of equal ones the first, or any where it is empty: int64 [P, 2].

    Args:
        inside: bool [P, S, S].
        points: int64 [P, 2].
    """
    side = inside.shape[1]
    steps = torch.arange(side, device=inside.device)
    away = (steps - points[:, :, None]).square()  # [P, 2, S]
    distance = away[:, 0, :, None] + away[:, 1, None]  # [P, S, S]
    index = steps[:, None] * side + steps
    # Distance and place in one number, so that the smallest stands for one pixel alone.
    key = torch.where(inside, distance * side**2 + index, 2**62).amin((1, 2)) % side**2
    return torch.stack((key // side, key % side), dim=1)
