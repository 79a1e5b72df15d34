"""The masks that PAL starts from (Yu et al., ICCV 2025): closed edges around each point, where they are small."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hmg_gpu.common.options import check_settings, setting
from hmg_gpu.data.sets import ImageSet
from hmg_gpu.masks.edges import canny, close, high_pass, to_bytes
from hmg_gpu.masks.makers.maker import Maker
from hmg_gpu.masks.regions import fill_holes, touched

GROUP = 4096  # points that are looked at together


@dataclass(frozen=True)
class Pal(Maker):
    """Edges of each point's crop, closed and filled (PAL's edge-enhanced pool).

    A crop of 20 x 20 pixels, cut at the border, loses its blur; the Canny edges of what is left are closed and their
    outer contours filled. The contour that holds the point is its mask, if the polygon through the centres of its
    outermost pixels has an area of 50 pixels at most. Where there is none the point itself is the mask. An image is
    settled where at least 80 % of its points have a contour, and where it has no points; rule pal trains on those
    first. Images of more than 8 bits are stretched to 8, each by its own range.

    Args:
        reach: the crop has 2 reach pixels to a side, the point is the ``reach``-th (from 0).
        low, high: thresholds of Canny, in 8-bit steps of the L1 gradient.
        largest: area of a contour, square pixels.
        easy: share of an image's points that must have a contour.

    Example:
        >>> from hmg_gpu.data.synthetic import make_split
        >>> scenes = make_split("train", count=4, size=64)
        >>> Pal().settled(scenes).shape, bool(Pal().masks(scenes).any())
        (torch.Size([4]), True)
    """

    name: ClassVar[str] = "pal"

    reach: int = setting(10, "of PAL's crop, pixels to each side of the point", least=1)
    low: int = setting(20, "lower threshold of PAL's Canny edges", least=0)
    high: int = setting(40, "upper threshold of PAL's Canny edges", least=0)
    largest: float = setting(50.0, "area of a contour up to which PAL takes it for a target, square pixels", least=0)
    easy: float = setting(
        0.8, "share of its points that PAL must find in an image to train on it at once", least=0, most=1
    )

    def __post_init__(self) -> None:
        check_settings(self)

    def masks(self, data: ImageSet) -> Tensor:
        canvas = torch.zeros(data.images.numel(), dtype=torch.int32, device=data.images.device)
        plane = data.images.shape[1] * data.images.shape[2]
        for points, position, masks in self.each(data, data.points):
            index = points[:, 0, None, None] * plane + position
            canvas.index_add_(0, index.flatten(), masks.flatten().int())
        return (canvas > 0).view(data.images.shape)

    def settled(self, data: ImageSet) -> Tensor:
        image = data.points[:, 0]
        found = [self._contour(data, images, group)[2] for images, group in self._groups(data, data.points)]
        zero = torch.zeros(len(data), dtype=torch.int64, device=image.device)
        count = zero.index_add(0, image, torch.ones_like(image))
        hit = zero.index_add(0, image, torch.cat([image[:0], *found]).long()) if found else zero
        return (count == 0) | (hit / count.clamp(min=1) >= self.easy)

    def knows_each(self, data: ImageSet) -> bool:
        return True

    def each(self, data: ImageSet, points: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for images, group in self._groups(data, points):
            position, contour, _ = self._contour(data, images, group)
            yield group, position, contour

    def _groups(self, data: ImageSet, points: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        images = to_bytes(data.images, data.sizes)
        return ((images, group) for group in points.split(GROUP) if len(group))

    def _contour(self, data: ImageSet, images: Tensor, points: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of each point: places int64 [p, S, S] in its image, its mask bool [p, S, S], and whether it is a contour."""
        _, height, width = images.shape
        image, target = points[:, 0], points[:, 1:]
        first = (target - self.reach).clamp(min=0)  # [p, 2]
        size = torch.minimum(target + self.reach, data.sizes[image]) - first
        steps = torch.arange(2 * self.reach, device=points.device)
        rows = (first[:, :1] + steps).clamp(max=height - 1)[:, :, None]
        columns = (first[:, 1:] + steps).clamp(max=width - 1)[:, None]
        crops = images[image[:, None, None], rows, columns].int()  # [p, S, S]
        edges = close(canny(high_pass(crops, size), size, self.low, self.high), size)
        local = target - first
        at_point = (steps == local[:, :1])[:, :, None] & (steps == local[:, 1:])[:, None]
        contour = touched(fill_holes(edges), at_point)
        good = contour.any(2).any(1) & (_polygon(contour) <= 2 * self.largest)
        return rows * width + columns, torch.where(good[:, None, None], contour, at_point), good


def _polygon(masks: Tensor) -> Tensor:
    """Twice the area of the polygon through the centres of each mask's outermost pixels; it has no holes: int64 [p].

    Four pixels in a square hold an area of 1, three of them 1/2.
    """
    set_ = masks.long()
    corners = set_[:, 1:, 1:] + set_[:, 1:, :-1] + set_[:, :-1, 1:] + set_[:, :-1, :-1]
    return (corners - 2).clamp(min=0).sum((1, 2))
