"""Square crops around points, what a network sees of them, and the masks that its probabilities mean.

All points of a batch at once, on the device. With the kernels nothing is read back.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hmg_gpu.masks.regions import touched
from hmg_gpu.masks.student.network import distance_maps

LARGE = 40  # pixels of a target from which on its threshold falls


def full_sizes(images: Tensor) -> Tensor:
    """int64 [B, 2] of images without padding."""
    return torch.tensor(images.shape[1:], device=images.device).expand(len(images), 2)


def gather(images: Tensor, points: Tensor, sizes: Tensor, side: int, turn: Tensor) -> Tensor:
    """Square crops around points, turned: float32 [P, S, S], the point at [S // 2, S // 2].

    Beyond the image its border pixels repeat.

    Args:
        side: S in pixels.
        turn: int64 or bool [P, 3]: flip rows, flip columns, then transpose.
    """
    rows, columns = turned_offsets(side, turn)  # [P, S, S]
    image, y, x = points[:, :, None, None].unbind(1)
    limit = sizes[points[:, 0]][:, :, None, None] - 1  # [P, 2, 1, 1]
    rows = torch.minimum((y + rows).clamp(min=0), limit[:, 0])
    columns = torch.minimum((x + columns).clamp(min=0), limit[:, 1])
    _, height, width = images.shape
    return images.reshape(-1)[(image * height + rows) * width + columns].float()


def turned_offsets(side: int, turn: Tensor) -> tuple[Tensor, Tensor]:
    """Offsets (row, column) from the point that each pixel of a turned crop shows: int64 [P, S, S] each."""
    offset = torch.arange(side, device=turn.device) - side // 2
    sign = 1 - 2 * turn[:, :2].long()  # [P, 2]
    down, across = sign[:, :1] * offset, sign[:, 1:] * offset  # [P, S]
    swap = turn[:, 2].bool()[:, None, None]
    rows = torch.where(swap, down[:, None, :], down[:, :, None])
    columns = torch.where(swap, across[:, :, None], across[:, None, :])
    return rows, columns


def unturn(values: Tensor, view: int, radius: int) -> Tensor:
    """Bring predictions of one view [P, S, S] back to the image's directions: [P, 2 R + 1, 2 R + 1]."""
    if view >> 2:
        values = values.mT
    centre = values.shape[1] // 2
    flips = [axis for axis, bit in ((1, view & 1), (2, view >> 1 & 1)) if bit]
    values = values[:, centre - radius : centre + radius + 1, centre - radius : centre + radius + 1]
    return values.flip(flips) if flips else values


def normalise(crops: Tensor) -> Tensor:
    """What the network sees: float32 [P, 3, S, S] of crops [P, S, S].

    The crop's median becomes 0 and the brightest of the 3 x 3 pixels at the point 1, so that gain and offset of the
    image do not matter; where the point is no brighter than its surroundings the standard deviation takes the place.
    """
    side = crops.shape[1]
    centre = slice(side // 2 - 1, side // 2 + 2)
    median = crops.flatten(1).median(1).values[:, None, None]
    peak = crops[:, centre, centre].amax((1, 2))[:, None, None] - median
    spread = crops.std((1, 2))[:, None, None]
    scale = torch.where(peak > 0.5 * spread, peak, spread.clamp(min=1e-6))
    values = ((crops - median) / scale).clamp(-3, 3)
    maps = distance_maps(side, crops.device).expand(len(crops), 2, side, side)
    return torch.cat((values[:, None], maps), dim=1).contiguous(memory_format=torch.channels_last)


def choose(probabilities: Tensor, fallback: Tensor, threshold: float | Tensor = 0.5, link: float = 1.0) -> Tensor:
    """Each point's mask out of its probabilities, or its fallback: bool [P, K, K]; see ``Student.masks``."""
    pixels, usable, _ = own_pixels(probabilities, threshold, link)
    return torch.where(usable[:, None, None], pixels, fallback)


def stretch(probabilities: Tensor, threshold: float | Tensor) -> Tensor:
    """Two straight lines from 0 to 0, from the threshold (one, or one for each) to 0.5 and from 1 to 1."""
    below = (probabilities * (0.5 / threshold)).clamp(max=0.5 - 2**-24)
    above = 0.5 + (probabilities - threshold) * (0.5 / (1 - threshold))
    return torch.where(probabilities >= threshold, above, below)


def own_pixels(probabilities: Tensor, threshold: float | Tensor, link: float) -> tuple[Tensor, Tensor, Tensor]:
    """Pixels of each centre's target, which of the P can be used, and where each threshold lies.

    PMG cuts more off the larger a target is, and networks that learn from it are less sure of what it cuts. So the
    threshold of a target of more than LARGE pixels falls as its area grows.

    Args:
        probabilities: [P, K, K].
        threshold, link: as :class:`StudentSettings`; a threshold may be each target's own, [P, 1, 1].

    Returns:
        bool [P, K, K], bool [P] and float32 [P, 1, 1]. A mask cannot be used where no pixel within a pixel of the
        centre passes the threshold itself, or where it reaches the window's edge.
    """
    level = torch.ones_like(probabilities[:, :1, :1]) * threshold
    level = level * (LARGE / _reached(probabilities, level, link).sum((1, 2)).clamp(min=1)).clamp(max=1)[:, None, None]
    pixels, centre = _reached(probabilities, level, link), probabilities.shape[1] // 2
    at = slice(centre - 1, centre + 2)
    edge = pixels[:, 0].any(1) | pixels[:, -1].any(1) | pixels[:, :, 0].any(1) | pixels[:, :, -1].any(1)
    return pixels, (probabilities[:, at, at] >= level).any(2).any(1) & ~edge, level


def _reached(probabilities: Tensor, level: Tensor, link: float) -> Tensor:
    """Pixels [P, K, K] that pass the level [P, 1, 1] and belong to the centre's target.

    A pixel belongs where a path leads to within a pixel of the centre whose probabilities all pass the level times
    ``link`` (hysteresis): a large target keeps its parts.
    """
    linked = probabilities >= link * level
    centre = probabilities.shape[1] // 2
    at = slice(centre - 1, centre + 2)
    seeds = torch.zeros_like(linked)
    seeds[:, at, at] = True
    return touched(linked, seeds) & (probabilities >= level)


def paste(masks: Tensor, points: Tensor, shape: Sequence[int], sizes: Tensor) -> Tensor:
    """Unite masks around points, bool [P, K, K], in their images: bool [B, H, W]; nothing beyond ``sizes``."""
    position, inside = window_positions(points, masks.shape[1], shape, sizes)
    pixels = math.prod(shape)
    canvas = torch.zeros(pixels + 1, dtype=torch.bool, device=masks.device)  # the last slot takes what is outside
    canvas.scatter_(0, torch.where(masks & inside, position, pixels).flatten(), True)
    return canvas[:pixels].view(tuple(shape))


def window_positions(points: Tensor, side: int, shape: Sequence[int], sizes: Tensor) -> tuple[Tensor, Tensor]:
    """Flat positions in a batch of the pixels around points, int64 [P, K, K], and whether they lie in the image."""
    offset = torch.arange(side, device=points.device) - side // 2
    image, y, x = points[:, :, None, None].unbind(1)
    rows, columns = y + offset[:, None], x + offset  # [P, K, 1], [P, 1, K]
    limit = sizes[points[:, 0]][:, :, None, None]
    inside = (rows >= 0) & (rows < limit[:, 0]) & (columns >= 0) & (columns < limit[:, 1])
    return (image * shape[1] + rows) * shape[2] + columns, inside
