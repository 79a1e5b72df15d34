"""The small network that draws one target's mask in a crop around its point."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

OWN = ("down2", "coarse", "up2", "middle_out", "up1", "fine_out", "head")  # layers that siblings do not share


class CropNet(nn.Module):
    """A U-Net of three scales and about 110 thousand parameters; the point is always at the crop's centre.

    Args:
        channels: of the three scales.
    """

    CHANNELS_IN = 3  # normalised crop, and two maps of the distance to the point

    def __init__(self, channels: tuple[int, int, int] = (16, 32, 48)) -> None:
        super().__init__()
        fine, middle, coarse = channels
        self.stem = _conv(self.CHANNELS_IN, fine)
        self.fine = _Residual(fine)
        self.down1 = _conv(fine, middle, stride=2)
        self.middle = _Residual(middle)
        self.down2 = _conv(middle, coarse, stride=2)
        self.coarse = _Residual(coarse)
        self.up2 = _conv(coarse, middle, size=1)
        self.middle_out = _Residual(middle)
        self.up1 = _conv(middle, fine, size=1)
        self.fine_out = _Residual(fine)
        self.head = nn.Conv2d(fine, 1, 1)
        nn.init.constant_(self.head.bias, -3.0)  # targets cover a few per cent of a crop

    def forward(self, crops: Tensor) -> Tensor:
        """Float32 [P, 3, S, S], S a multiple of 4 -> logits [P, 1, S, S]."""
        fine = self.fine(self.stem(crops))
        middle = self.middle(self.down1(fine))
        coarse = self.coarse(self.down2(middle))
        middle = self.middle_out(middle + _twice(self.up2(coarse)))
        return self.head(self.fine_out(fine + _twice(self.up1(middle))))


def sibling(network: CropNet) -> CropNet:
    """A network with the same convolutions in the encoder's two finer scales, not copies of them; all else its own.

    Its own are the normalisation (domain-specific batch normalisation, Chang et al., CVPR 2019), the coarsest scale and
    the decoder: trained together, siblings share what targets look like, and each draws its own kind of masks.
    """
    separate = {id(weight) for name in OWN for weight in network.get_submodule(name).parameters()}
    shared = [module.weight for module in network.modules() if isinstance(module, nn.Conv2d)]
    return copy.deepcopy(network, {id(weight): weight for weight in shared if id(weight) not in separate})


class _Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = _conv(channels, channels)
        self.second = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.second(self.first(x)))


def _conv(channels_in: int, channels: int, *, size: int = 3, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels_in, channels, size, stride, size // 2, bias=False), nn.BatchNorm2d(channels), nn.ReLU()
    )


def _twice(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)


def count_parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def distance_maps(side: int, device: torch.device) -> Tensor:
    """Two maps of the distance to the centre, near and far: exp(-r / 3) and r / side; float32 [2, S, S]."""
    offset = torch.arange(side, device=device) - side // 2
    distance = (offset[:, None] ** 2 + offset**2).float().sqrt()
    return torch.stack((torch.exp(-distance / 3), distance / side))
