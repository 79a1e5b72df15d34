"""MCLC in crops of one padded shape (ICCV 2023): how often a pixel is in the superpixel of the point, under salt."""

from __future__ import annotations

import torch
from torch import Tensor

from hmg_gpu.plain.noise import chance, stream
from hmg_gpu.plain.regions import point_regions
from hmg_gpu.plain.slic import Grid, salted_lab, slic

# Pixels times centres of the copies that are worked on at a time: small enough for a CPU's last cache.
_CELLS = {"cpu": 1 << 20}

_CELLS_ACCELERATOR = 1 << 23


def target_probability(
    grey: Tensor,
    valid: Tensor,
    width: int,
    points: Tensor,
    grid: Grid,
    streams: Tensor,
    *,
    repeats: int = 50,
    salt: float = 0.05,
    rescale: bool = True,
) -> Tensor:
    """The share of salted copies of a crop in which a pixel lies in the superpixel of the point.

        each copy: salt -> Lab -> SLIC -> small components joined to large ones -> the region that holds the point

    A component is small below half of (pixels of the crop) / (centres). Shares are of the largest one in the crop, as
    in the source.

    Args:
        grey: float32 [N, M], 0 to 1, M = height * width pixels of each crop, row by row.
        valid: bool [N, M], pixels of the crop; the rest is padding.
        width: of the padded crops in pixels.
        points: int64 [N], positions in the padded crop.
        grid: of the centres, from :func:`hmg_gpu.plain.slic.grid_of`.
        streams: int32 [N], random numbers of each crop, from :func:`hmg_gpu.plain.noise.stream`.
        repeats: copies of each crop.
        salt: share of values, of each channel by itself, that become 1.
        rescale: map each copy to 0..1 by its own range.

    Returns:
        float32 [N, M], 0 to 1; 0 in the padding.

    Example:
        >>> import torch
        >>> from hmg_gpu.plain.mclc import target_probability
        >>> from hmg_gpu.plain.noise import stream
        >>> from hmg_gpu.plain.slic import grid_of
        >>> grey = torch.zeros(1, 15, 15)
        >>> grey[0, 5:9, 5:9] = 0.8  # a target of 4 x 4 pixels
        >>> crop = grey.view(1, -1), torch.ones(1, 225).bool(), 15
        >>> names = stream(torch.tensor([1]))
        >>> found = target_probability(*crop, torch.tensor([7 * 15 + 7]), grid_of(15, 15), names).view(15, 15)
        >>> bool((found[5:9, 5:9] > 0.5).all()), bool((found[:3] < 0.5).all())
        (True, True)
    """
    count, pixels = grey.shape
    device, number = grey.device, len(grid)
    place = torch.arange(pixels, device=device)
    channels = torch.arange(3, device=device)[:, None]
    positions = stream(place // width, place % width, channels).reshape(-1)  # [3 M], of any padding
    total = torch.zeros((count, pixels), device=device)
    group = max(1, _CELLS.get(device.type, _CELLS_ACCELERATOR) // (pixels * number))
    for copies in torch.arange(count * repeats, device=device).split(group):
        crop = torch.div(copies, repeats, rounding_mode="floor")
        drawn = chance(stream(streams[crop], copies % repeats), positions, salt)
        here = valid[crop]
        lab = salted_lab(grey[crop], drawn.view(-1, 3, pixels).float(), here, rescale=rescale)
        labels = slic(lab, here, width, grid)
        total.index_add_(0, crop, point_regions(labels, here, width, points[crop], number).float())
    return total / total.amax(1, keepdim=True).clamp(min=1)
