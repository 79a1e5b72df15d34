"""DNANet (Li et al., TIP 2022): a U-Net whose encoder and decoder are joined by a dense grid of attention blocks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hmg_gpu.common.errors import InputError
from hmg_gpu.models.acm import check_images

WIDTHS = {  # by the published names of channel sizes: channels by level; level i has 1 / 2^i of the resolution
    "one": (4, 8, 16, 32, 64),
    "two": (8, 16, 32, 64, 128),
    "three": (16, 32, 64, 128, 256),
}
BLOCKS = {"resnet_10": 1, "resnet_18": 2}  # by the published names of backbones: in a node below full resolution


class ChannelAttention(nn.Module):
    """One weight per channel from the mean and the maximum over the image, through a shared two-layer bottleneck.

    The bottleneck has a sixteenth of the channels, and at least one. Without that, the published sizes "one" and "two"
    have bottlenecks of no channel, which PyTorch does not run any more.

    Example:
        >>> import torch
        >>> from hmg_gpu.models.dnanet import ChannelAttention
        >>> ChannelAttention(16)(torch.zeros(1, 16, 8, 8)).shape  # one weight a channel
        torch.Size([1, 16, 1, 1])
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        bottleneck = max(1, channels // 16)
        self.fc1 = nn.Conv2d(channels, bottleneck, 1, bias=False)
        self.fc2 = nn.Conv2d(bottleneck, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        # mean and amax instead of adaptive pooling: their backward pass is deterministic on every device
        mean = self.fc2(F.relu(self.fc1(x.mean((2, 3), keepdim=True))))
        maximum = self.fc2(F.relu(self.fc1(x.amax((2, 3), keepdim=True))))
        return torch.sigmoid(mean + maximum)  # [B, C, 1, 1]


class SpatialAttention(nn.Module):
    """One weight per pixel from the mean and the maximum over the channels.

    Example:
        >>> import torch
        >>> from hmg_gpu.models.dnanet import SpatialAttention
        >>> SpatialAttention()(torch.zeros(1, 16, 8, 8)).shape  # one weight a pixel
        torch.Size([1, 1, 8, 8])
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 1, 7, padding=3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.conv1(torch.cat((x.mean(1, keepdim=True), x.amax(1, keepdim=True)), 1)))  # [B,1,H,W]


class AttentionBlock(nn.Module):
    """Residual block with channel, then spatial attention before the sum.

    Example:
        >>> import torch
        >>> from hmg_gpu.models.dnanet import AttentionBlock
        >>> AttentionBlock(1, 16)(torch.zeros(1, 1, 8, 8)).shape
        torch.Size([1, 16, 8, 8])
    """

    def __init__(self, channels_in: int, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = None
        if channels_in != channels:
            self.shortcut = nn.Sequential(nn.Conv2d(channels_in, channels, 1), nn.BatchNorm2d(channels))
        self.ca = ChannelAttention(channels)
        self.sa = SpatialAttention()

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y = self.ca(y) * y
        y = self.sa(y) * y
        return F.relu(y + (x if self.shortcut is None else self.shortcut(x)))


class DNANet(nn.Module):
    """DNANet, by default with 4,696,568 parameters: node conv{i}_{j} is level i of column j, column 0 the encoder.

    A node of a later column sees all earlier nodes of its level, the previous column's node one level below (enlarged)
    and its own column's node one level above (reduced). Heads 0 to 2 read conv0_1, conv0_2 and conv0_3; head 3 reads
    conv0_4_final, which joins the last node of every level, and is the one used at inference.

    Args:
        channels: "one", "two" or "three" (the paper's default): 4, 8 or 16 at full resolution, twice as many a level.
        backbone: "resnet_10" or "resnet_18" (the default): one or two blocks in each node below full resolution.

    Raises:
        InputError: another channel size or backbone.

    Args (forward):
        images: float [B, 1, H, W], normalised; H and W multiples of 16.
        heads: True returns all heads, False the inference head; None (default) means all in training mode only.

    Returns (forward):
        logits [B, 1, H, W] of head 3, or a tuple of the four heads' logits in the order above.

    Example:
        >>> import torch
        >>> from hmg_gpu.models import DNANet
        >>> net = DNANet().eval()
        >>> net(torch.zeros(1, 1, 16, 32)).shape
        torch.Size([1, 1, 16, 32])
        >>> len(net(torch.zeros(1, 1, 16, 32), heads=True))
        4
        >>> sum(weight.numel() for weight in net.parameters())
        4696568
    """

    def __init__(self, channels: str = "three", backbone: str = "resnet_18") -> None:
        super().__init__()
        for name, value, known in (("channels", channels, WIDTHS), ("backbone", backbone, BLOCKS)):
            if value not in known:
                raise InputError(f"dnanet: {name} = {value}: expected one of {', '.join(known)}")
        widths = WIDTHS[channels]
        for column in range(5):
            for level in range(5 - column):
                setattr(self, f"conv{level}_{column}", _node(widths, level, column, BLOCKS[backbone]))
        self.conv0_4_final = nn.Sequential(AttentionBlock(5 * widths[0], widths[0]))
        for level in (4, 3, 2, 1):
            setattr(self, f"conv0_{level}_1x1", nn.Conv2d(widths[level], widths[0], 1))
        self.final1 = nn.Conv2d(widths[0], 1, 1)
        self.final2 = nn.Conv2d(widths[0], 1, 1)
        self.final3 = nn.Conv2d(widths[0], 1, 1)
        self.final4 = nn.Conv2d(widths[0], 1, 1)

    def output_convolutions(self) -> list[nn.Conv2d]:
        """The convolutions that give logits, whose bias is the network's prior; see ``build_model``."""
        return [self.final1, self.final2, self.final3, self.final4]

    def forward(self, images: Tensor, heads: bool | None = None) -> Tensor | tuple[Tensor, ...]:
        check_images(images)
        grid: list[list[Tensor]] = [[] for _ in range(5)]  # [level][column]: [B, width, H / 2^level, W / 2^level]
        for diagonal in range(5):  # nodes of one diagonal need only earlier diagonals
            for column in range(diagonal + 1):
                level = diagonal - column
                if column == 0:
                    x = images if level == 0 else F.max_pool2d(grid[level - 1][0], 2)
                else:
                    sources = [*grid[level], _resize(grid[level + 1][column - 1], 2)]
                    if level > 0:
                        sources.append(_resize(grid[level - 1][column], 0.5))
                    x = torch.cat(sources, 1)
                grid[level].append(getattr(self, f"conv{level}_{column}")(x))
        joined = [
            _resize(getattr(self, f"conv0_{level}_1x1")(grid[level][-1]), 2**level) for level in (4, 3, 2, 1)
        ]  # each [B, widths[0], H, W]
        last = self.final4(self.conv0_4_final(torch.cat([*joined, grid[0][4]], 1)))  # [B, 1, H, W]
        if heads is False or (heads is None and not self.training):
            return last
        return self.final1(grid[0][1]), self.final2(grid[0][2]), self.final3(grid[0][3]), last


def _node(widths: tuple[int, ...], level: int, column: int, blocks: int) -> nn.Sequential:
    width = widths[level]
    if column == 0:
        channels_in = 1 if level == 0 else widths[level - 1]
    else:
        channels_in = column * width + widths[level + 1] + (widths[level - 1] if level > 0 else 0)
    more = (AttentionBlock(width, width) for _ in range(blocks - 1 if level > 0 else 0))
    return nn.Sequential(AttentionBlock(channels_in, width), *more)


def _resize(x: Tensor, factor: float) -> Tensor:
    return F.interpolate(x, scale_factor=factor, mode="bilinear", align_corners=True)
