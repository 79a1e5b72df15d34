"""Blur, Canny edges and closing of small 8-bit crops, in whole numbers as OpenCV computes them, many crops at a time.

Crops are int32 [P, S, S]; each is valid in its first (height, width) pixels, rows of ``size`` int64 [P, 2]. Nothing is
read from the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hmg_gpu.common.tensors import byte_range, valid_area
from hmg_gpu.masks.regions import touched

TANGENT = 13573  # of 22.5 degrees, times 2^15


def to_bytes(images: Tensor, sizes: Tensor) -> Tensor:
    """Images of 8 bits: as they are where all values are whole numbers of 0 to 255, else stretched to that range.

    Args:
        images: uint8 or float32 [N, H, W]; values that are not finite count as 0. sizes: int64 [N, 2].

    Returns:
        uint8 [N, H, W].
    """
    if images.dtype == torch.uint8:
        return images
    low, high = (bound[:, None, None] for bound in byte_range(images, sizes))
    values = torch.where(images.isfinite(), images, 0)
    return ((values - low) / (high - low) * 255).clamp(0, 255).round().to(torch.uint8)


def high_pass(crops: Tensor, size: Tensor) -> Tensor:
    """Crop minus its Gaussian blur of 3 x 3 (1 2 1 in both directions, rounded to 8 bits), at least 0.

    The blur reflects at the crop's border, without repeating the outermost pixel.
    """
    wide = _with_border(crops, size, reflect=True)
    rows = wide[:, :-2] + 2 * wide[:, 1:-1] + wide[:, 2:]
    total = rows[:, :, :-2] + 2 * rows[:, :, 1:-1] + rows[:, :, 2:]
    return (crops - ((total + 8) >> 4)).clamp(min=0)


def canny(crops: Tensor, size: Tensor, low: int, high: int) -> Tensor:
    """Canny edges of crops of 0 to 255: Sobel of 3 x 3, L1 gradient, non-maximum suppression, hysteresis.

    Args:
        low, high: a ridge pixel above ``low`` is an edge where ridge pixels lead (8-connected) to one above ``high``.

    Returns:
        bool [P, S, S].
    """
    wide = _with_border(crops, size, reflect=False)
    down, across = wide[:, 2:] - wide[:, :-2], wide[:, :, 2:] - wide[:, :, :-2]
    slope_y = down[:, :, :-2] + 2 * down[:, :, 1:-1] + down[:, :, 2:]
    slope_x = across[:, :-2] + 2 * across[:, 1:-1] + across[:, 2:]
    inside = valid_area(size, crops)
    steep = torch.where(inside, slope_x.abs() + slope_y.abs(), 0)
    around = torch.nn.functional.pad(steep, (1, 1, 1, 1))  # nothing is steep outside

    def neighbour(y: int, x: int) -> Tensor:
        side = steep.shape[1]
        return around[:, 1 + y : 1 + y + side, 1 + x : 1 + x + side]

    run, rise = slope_x.abs().long(), slope_y.abs().long() << 15
    flat = rise < run * TANGENT
    upright = rise > run * TANGENT + (run << 16)  # tan 67.5 = tan 22.5 + 2
    along_x = (steep > neighbour(0, -1)) & (steep >= neighbour(0, 1))
    along_y = (steep > neighbour(-1, 0)) & (steep >= neighbour(1, 0))
    falling = (steep > neighbour(-1, -1)) & (steep > neighbour(1, 1))
    rising = (steep > neighbour(-1, 1)) & (steep > neighbour(1, -1))
    slanted = torch.where((slope_x ^ slope_y) < 0, rising, falling)
    ridge = torch.where(flat, along_x, torch.where(upright, along_y, slanted))
    weak = ridge & (steep > low) & inside
    return touched(weak, weak & (steep > high))


def close(masks: Tensor, size: Tensor) -> Tensor:
    """Dilation by 3 x 3, then erosion; what lies outside a crop counts for neither."""
    inside = valid_area(size, masks)
    grown = _any_of_nine(masks & inside) & inside
    return ~_any_of_nine(~grown & inside) & inside


def _any_of_nine(masks: Tensor) -> Tensor:
    wide = torch.nn.functional.pad(masks, (1, 1, 1, 1))
    rows = wide[:, :-2] | wide[:, 1:-1] | wide[:, 2:]
    return rows[:, :, :-2] | rows[:, :, 1:-1] | rows[:, :, 2:]


def _with_border(crops: Tensor, size: Tensor, *, reflect: bool) -> Tensor:
    """The crops with one more pixel on each side of their valid area, mirrored or repeated: int32 [P, S + 2, S + 2]."""
    side = crops.shape[1]
    steps = torch.arange(-1, side + 1, device=crops.device)
    last = (size - 1)[:, :, None]  # [P, 2, 1]
    index = steps.expand(len(crops), 2, -1)
    if reflect:
        index = index.abs()
        index = torch.where(index > last, 2 * last - index, index)
    index = torch.minimum(index.clamp(min=0), last)  # [P, 2, S + 2]
    rows = crops.gather(1, index[:, 0, :, None].expand(-1, -1, side))
    return rows.gather(2, index[:, 1, None].expand(-1, side + 2, -1))
