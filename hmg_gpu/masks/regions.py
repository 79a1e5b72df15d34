"""Regions of a mask, squares around them, and components that are chosen by pixels: what rules of evolution share.

On the CPU and on CUDA nothing is read from the device and no loop depends on values: components are labelled by
``hmg_gpu/plain/components.py`` or, with Triton, by ``kernels/components.py``, whose tables have a fixed size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hmg_gpu.common.backend import backend_for
from hmg_gpu.masks.components import connected_components

ROOM = 256  # regions an image, at least, that the table of an accelerator holds


@dataclass(frozen=True)
class Regions:
    """R rows, in the order of the images and then of the regions' first pixels; rows of area 0 are empty.

    Attributes:
        image: int64 [R]. area: int64 [R], pixels.
        centre: int64 [R, 2], (y, x) of the centroid, truncated to whole pixels; 0 in empty rows.
        box: int64 [R, 4], (y0, x0, y1, x1), half open.
    """

    image: Tensor
    area: Tensor
    centre: Tensor
    box: Tensor

    def __len__(self) -> int:
        return len(self.area)

    def rows(self, index: Tensor | slice) -> Regions:
        """Some of them."""
        return Regions(self.image[index], self.area[index], self.centre[index], self.box[index])


def find_regions(mask: Tensor, sizes: Tensor, points: int) -> Regions:
    """The 8-connected components of every mask of a batch.

    Args:
        mask: bool [B, H, W]; what lies beyond ``sizes`` is ignored.
        sizes: int64 [B, 2].
        points: of the batch. With Triton the table has room for four times as many regions in each image, and for at
            least :data:`ROOM`; regions beyond that are left out, and rows that no region needs are empty.

    Example:
        >>> mask = torch.tensor([[[1, 1, 0, 0, 1]]]).bool()
        >>> found = find_regions(mask, torch.tensor([[1, 5]]), 2)
        >>> found.area.tolist(), found.centre.tolist()
        ([2, 1], [[0, 0], [0, 4]])
    """
    if backend_for(mask) == "triton":
        from hmg_gpu.kernels.components import components

        room = max(ROOM, 4 * points)
        table = components(mask, sizes=sizes, capacity=room)[2].flatten(0, 1)  # [B * room, 7]
        image = torch.arange(len(mask), device=mask.device)[:, None].expand(-1, room).reshape(-1)
        area = table[:, 0]
        return Regions(image, area, table[:, 1:3] // area.clamp(min=1)[:, None], table[:, 3:])
    found = connected_components(mask, sizes)
    _, height, width = mask.shape
    x = found.pixels % width
    y = torch.div(found.pixels, width, rounding_mode="floor") % height
    box = torch.empty(len(found), 4, dtype=torch.int64, device=mask.device)
    for column, (values, how) in enumerate(((y, "amin"), (x, "amin"), (y + 1, "amax"), (x + 1, "amax"))):
        box[:, column].scatter_reduce_(0, found.component, values, how, include_self=False)
    centre = torch.stack((found.sum_y, found.sum_x), dim=1) // found.area[:, None]
    return Regions(found.image, found.area, centre, box)


def number_components(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Labels int64 [B, H, W] (0 background; 1, 2, ... in each image for itself) and counts int64 [B].

    Example:
        >>> number_components(torch.tensor([[[1, 0, 1]], [[0, 1, 1]]]).bool())
        (tensor([[[1, 0, 2]],
        <BLANKLINE>
                [[0, 1, 1]]]), tensor([2, 1]))
    """
    if backend_for(mask) == "triton":
        from hmg_gpu.kernels.components import components

        labels, counts, _ = components(mask, capacity=1)
        return labels.long(), counts.long()
    found = connected_components(mask)
    counts = torch.bincount(found.image, minlength=len(mask))
    first = counts.cumsum(0) - counts
    labels = found.pixels.new_zeros(mask.shape)
    labels.view(-1)[found.pixels] = found.component - first[found.image[found.component]] + 1
    return labels, counts


def touched(mask: Tensor, seeds: Tensor, *, single: bool = False) -> Tensor:
    """The components of each mask that have a pixel in ``seeds``.

    Args:
        mask, seeds: bool [B, H, W].
        single: keep a component that is the only one of its mask, wherever it lies.

    Returns:
        bool [B, H, W].

    Example:
        >>> mask = torch.tensor([[[1, 1, 0, 1]]]).bool()
        >>> touched(mask, torch.tensor([[[0, 1, 1, 0]]]).bool())
        tensor([[[ True,  True, False, False]]])
    """
    if backend_for(mask) != "triton":
        found = connected_components(mask)
        kept = torch.zeros(len(found), dtype=torch.bool, device=mask.device)
        kept[found.component[seeds.reshape(-1)[found.pixels]]] = True
        if single:
            kept |= (torch.bincount(found.image, minlength=len(mask)) == 1)[found.image]
        return found.mask(kept)
    labels, counts = number_components(mask)
    flat = labels.flatten(1)  # [B, H W]
    most = ((mask.shape[1] + 1) // 2) * ((mask.shape[2] + 1) // 2)  # components
    chosen = torch.zeros(len(mask), most + 1, dtype=torch.bool, device=mask.device)
    chosen.scatter_(1, flat * seeds.flatten(1), torch.ones_like(mask).flatten(1))
    if single:
        chosen |= (counts == 1)[:, None]
    return chosen.gather(1, flat).view(mask.shape) & mask


def fill_holes(mask: Tensor) -> Tensor:
    """Each mask with its holes: the background that no 4-connected path leads from to the border.

    So are the outer contours of 8-connected components filled.

    Args:
        mask: bool [B, H, W].

    Returns:
        bool [B, H, W].

    Example:
        >>> fill_holes(torch.tensor([[[0, 1, 0], [1, 0, 1], [0, 1, 0]]]).bool())[0].int()
        tensor([[0, 1, 0],
                [1, 1, 1],
                [0, 1, 0]], dtype=torch.int32)
    """
    count, height, width = mask.shape
    free = torch.ones(count, height + 2, width + 2, dtype=torch.bool, device=mask.device)  # with a frame
    free[:, 1:-1, 1:-1] = ~mask
    # Neighbours of a pixel are two steps apart here, and the step between them is set where both are: what is
    # 8-connected in this plane is 4-connected in the other.
    plane = torch.zeros(count, 2 * height + 3, 2 * width + 3, dtype=torch.bool, device=mask.device)
    plane[:, ::2, ::2] = free
    plane[:, 1::2, ::2] = free[:, 1:] & free[:, :-1]
    plane[:, ::2, 1::2] = free[:, :, 1:] & free[:, :, :-1]
    labels, _ = number_components(plane)
    return labels[:, 2:-1:2, 2:-1:2] != 1  # the frame's comes first


@dataclass(frozen=True)
class Squares:
    """The pixels of squares of one side, each around the centre of a region.

    Attributes:
        index: int64 [R, S, S], the pixel's place in the flat batch; held to the batch where it lies outside.
        inside: bool [R, S, S], whether it lies in the region's image and the region is one.
        offset: int64 [S], steps from the centre.
    """

    index: Tensor
    inside: Tensor
    offset: Tensor

    @classmethod
    def around(cls, regions: Regions, reach: int, shape: torch.Size, sizes: Tensor) -> Squares:
        """Squares of side 2 ``reach`` + 1 in a batch of ``shape`` [B, H, W]."""
        _, height, width = shape
        offset = torch.arange(-reach, reach + 1, device=sizes.device)
        rows, columns = (regions.centre[:, axis, None] + offset for axis in (0, 1))  # [R, S]
        size = sizes[regions.image]  # [R, 2]
        good_rows = (rows >= 0) & (rows < size[:, :1]) & (regions.area > 0)[:, None]
        good_columns = (columns >= 0) & (columns < size[:, 1:])
        rows, columns = rows.clamp(0, height - 1), columns.clamp(0, width - 1)
        index = (regions.image[:, None, None] * height + rows[:, :, None]) * width + columns[:, None]
        return cls(index, good_rows[:, :, None] & good_columns[:, None], offset)

    def take(self, plane: Tensor) -> Tensor:
        """The values of a batch [B, H, W] in the squares, 0 outside: [R, S, S]."""
        return plane.reshape(-1)[self.index].masked_fill(~self.inside, 0)
