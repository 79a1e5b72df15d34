"""A light residual U-Net that keeps the full resolution: ours, not the paper's.

ACM predicts at a quarter of the resolution, too coarse for targets of a few pixels. Here the finest scale has every
pixel, so a correction can pay where targets are small.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hmg_gpu.common.errors import InputError
from hmg_gpu.models.acm import check_images

WIDTHS = (16, 16, 32, 64, 128)  # channels by scale, from every pixel to a sixteenth of the resolution


class Block(nn.Module):
    """Two 3x3 convolutions beside an identity, or beside a 1x1 projection where the number of channels changes."""

    def __init__(self, channels_in: int, channels: int) -> None:
        super().__init__()
        self.first = nn.Sequential(
            nn.Conv2d(channels_in, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()
        )
        self.second = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels))
        self.shortcut = None
        if channels_in != channels:
            self.shortcut = nn.Sequential(nn.Conv2d(channels_in, channels, 1, bias=False), nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.second(self.first(x)) + (x if self.shortcut is None else self.shortcut(x)))


class UNet(nn.Module):
    """A residual U-Net, by default of five scales and 0.53 million parameters.

    Args:
        widths: channels of each scale, the finest first: two to five scales, so that sides may be multiples of 16.

    Raises:
        InputError: other than two to five widths, or one out of 1 to 1024.

    Args (forward):
        images: float [B, 1, H, W], normalised; H and W multiples of 16.

    Returns (forward):
        logits [B, 1, H, W]; ``logits > 0`` is the prediction.

    Example:
        >>> UNet(widths=(4, 8)).eval()(torch.zeros(1, 1, 32, 48)).shape
        torch.Size([1, 1, 32, 48])
    """

    def __init__(self, widths: Sequence[int] = WIDTHS) -> None:
        super().__init__()
        if not (2 <= len(widths) <= 5 and all(type(width) is int and 1 <= width <= 1024 for width in widths)):
            raise InputError(f"unet: widths = {widths}: expected two to five whole numbers of 1 to 1024: 16-32-64-128")
        self.encoder = nn.ModuleList(map(Block, (1, *widths[:-1]), widths))
        self.decoder = nn.ModuleList(
            Block(coarse + fine, fine) for fine, coarse in zip(widths[-2::-1], widths[:0:-1], strict=True)
        )
        self.head = nn.Conv2d(widths[0], 1, 1)

    def output_convolutions(self) -> list[nn.Conv2d]:
        return [self.head]

    def forward(self, images: Tensor) -> Tensor:
        check_images(images)
        skips: list[Tensor] = []
        x = images
        for number, block in enumerate(self.encoder):
            x = block(F.max_pool2d(x, 2) if number else x)  # [B, widths[number], H / 2^number, W / 2^number]
            skips.append(x)
        for block, skip in zip(self.decoder, skips[-2::-1], strict=True):
            x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
            x = block(torch.cat((x, skip), 1))
        return self.head(x)
