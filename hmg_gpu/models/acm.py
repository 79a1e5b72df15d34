"""ACM (Dai et al., WACV 2021): a small residual U-Net whose skips are fused by channel attention in both directions.

This is the variant that LESPS publishes weights for: one input channel and a stem that quarters the resolution.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from hmg_gpu.common.errors import InputError

MOMENTUM = 0.9  # LESPS's batch norms outside the residual blocks: the running statistics follow the last few batches


def check_images(images: Tensor) -> None:
    """Refuse what the networks cannot halve four times; only shapes are read, so compiling and exporting stay possible.

    Args:
        images: float [B, 1, H, W], normalised.

    Raises:
        InputError: not [B, 1, H, W], or H or W is no multiple of 16; pad bottom and right with zeros.

    Example:
        >>> import torch
        >>> from hmg_gpu.models.acm import check_images
        >>> check_images(torch.zeros(1, 1, 32, 48))
        >>> check_images(torch.zeros(1, 1, 30, 48))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        hmg_gpu.common.errors.InputError: image sides must be multiples of 16, got 30 x 48; ...
    """
    if images.ndim != 4 or images.shape[1] != 1:
        raise InputError(f"images must be [B, 1, H, W], got {list(images.shape)}; add the channel with images[:, None]")
    if images.shape[2] % 16 != 0 or images.shape[3] % 16 != 0:
        raise InputError(
            f"image sides must be multiples of 16, got {images.shape[2]} x {images.shape[3]}; "
            "pad bottom and right with zeros after normalisation and crop the output back"
        )


def check_batch(network: nn.Module, images: Tensor) -> None:
    """Refuse a training batch of one image: batch norm of globally pooled maps needs two.

    Raises:
        InputError: the network is in training mode and the batch has one image.
    """
    if network.training and images.shape[0] < 2:
        name = type(network).__name__
        raise InputError(f"{name} trains on batches of at least 2 images (batch norm of globally pooled maps), got 1")


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions beside an identity, or beside a strided 1x1 projection where the shape changes.

    Example:
        >>> import torch
        >>> from hmg_gpu.models.acm import ResidualBlock
        >>> ResidualBlock(8, 16, stride=2)(torch.zeros(1, 8, 32, 32)).shape
        torch.Size([1, 16, 16, 16])
    """

    def __init__(self, channels_in: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = None
        if stride != 1 or channels_in != channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.BatchNorm2d(channels, momentum=MOMENTUM)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class BidirectionalFusion(nn.Module):
    """Asymmetric channel modulation: the deep map weighs the shallow one by channel, and is weighed by it per pixel.

    fused = post(2 * low * topdown(high) + 2 * high * bottomup(low))

    Example:
        >>> import torch
        >>> from hmg_gpu.models.acm import BidirectionalFusion
        >>> high = low = torch.zeros(2, 16, 8, 8)
        >>> BidirectionalFusion(16)(high, low).shape
        torch.Size([2, 16, 8, 8])
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        narrow = channels // 4
        self.topdown = nn.Sequential(nn.AdaptiveAvgPool2d(1), *_attention(channels, narrow))
        self.bottomup = nn.Sequential(*_attention(channels, narrow))
        self.post = nn.Sequential(
            nn.Conv2d(channels, channels, 3, 1, 1), nn.BatchNorm2d(channels, momentum=MOMENTUM), nn.ReLU()
        )

    def forward(self, high: Tensor, low: Tensor) -> Tensor:
        return self.post(2 * low * self.topdown(high) + 2 * high * self.bottomup(low))


class Head(nn.Module):
    """A 3x3 convolution to a quarter of the channels, dropout, and the output convolution.

    Example:
        >>> import torch
        >>> from hmg_gpu.models.acm import Head
        >>> Head(16)(torch.zeros(1, 16, 8, 8)).shape
        torch.Size([1, 1, 8, 8])
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        narrow = channels // 4
        self.block = nn.Sequential(
            nn.Conv2d(channels, narrow, 3, 1, 1, bias=False),
            nn.BatchNorm2d(narrow, momentum=MOMENTUM),
            nn.ReLU(),
            nn.Dropout(0.1),
            nn.Conv2d(narrow, 1, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


class ACM(nn.Module):
    """ACM with 397,823 parameters; works at a quarter of the resolution and enlarges the logits bilinearly.

    Args (forward):
        images: float [B, 1, H, W], normalised; H and W multiples of 16; B at least 2 in training mode, where the
            globally pooled fusion branch has one value per image and channel for its batch norm.

    Returns (forward):
        logits [B, 1, H, W]; ``logits > 0`` is the prediction.

    Example:
        >>> import torch
        >>> from hmg_gpu.models import ACM
        >>> net = ACM().eval()
        >>> net(torch.zeros(1, 1, 32, 48)).shape
        torch.Size([1, 1, 32, 48])
        >>> sum(weight.numel() for weight in net.parameters())
        397823
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = quarter_stem()
        self.layer1 = stage(16, 16)
        self.layer2 = stage(16, 32, stride=2)
        self.layer3 = stage(32, 64, stride=2)
        self.deconv2 = nn.ConvTranspose2d(64, 32, 4, 2, 1)
        self.uplayer2 = stage(32, 32)
        self.fuse2 = BidirectionalFusion(32)
        self.deconv1 = nn.ConvTranspose2d(32, 16, 4, 2, 1)
        self.uplayer1 = stage(16, 16)
        self.fuse1 = BidirectionalFusion(16)
        self.head = Head(16)

    def output_convolutions(self) -> list[nn.Conv2d]:
        """The convolutions that give logits, whose bias is the network's prior; see ``build_model``."""
        return [self.head.block[-1]]

    def forward(self, images: Tensor) -> Tensor:
        check_images(images)
        check_batch(self, images)
        c1 = self.layer1(self.stem(images))  # [B, 16, H/4, W/4]
        c2 = self.layer2(c1)  # [B, 32, H/8, W/8]
        c3 = self.layer3(c2)  # [B, 64, H/16, W/16]
        up2 = self.uplayer2(self.fuse2(self.deconv2(c3), c2))  # [B, 32, H/8, W/8]
        up1 = self.uplayer1(self.fuse1(self.deconv1(up2), c1))  # [B, 16, H/4, W/4]
        return F.interpolate(self.head(up1), scale_factor=4, mode="bilinear", align_corners=False)  # [B, 1, H, W]


def _convolve(channels_in: int, channels: int, stride: int = 1) -> list[nn.Module]:
    return [
        nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False),
        nn.BatchNorm2d(channels, momentum=MOMENTUM),
        nn.ReLU(),
    ]


def _attention(channels: int, narrow: int) -> list[nn.Module]:
    return [
        nn.Conv2d(channels, narrow, 1),
        nn.BatchNorm2d(narrow, momentum=MOMENTUM),
        nn.ReLU(),
        nn.Conv2d(narrow, channels, 1),
        nn.BatchNorm2d(channels, momentum=MOMENTUM),
        nn.Sigmoid(),
    ]


def stage(channels_in: int, channels: int, stride: int = 1, blocks: int = 3) -> nn.Sequential:
    """Residual blocks, of which the first changes shape."""
    first = ResidualBlock(channels_in, channels, stride)
    return nn.Sequential(first, *(ResidualBlock(channels, channels) for _ in range(blocks - 1)))


def quarter_stem() -> nn.Sequential:
    """Image [B, 1, H, W] to 16 channels at a quarter of the resolution."""
    return nn.Sequential(
        nn.BatchNorm2d(1, momentum=MOMENTUM),
        *_convolve(1, 8, stride=2),
        *_convolve(8, 8),
        *_convolve(8, 16),
        nn.MaxPool2d(3, 2, 1),
    )
