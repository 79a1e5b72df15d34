"""ALCNet (Dai et al., TGRS 2021) in the form that LESPS publishes weights for: a residual feature pyramid.

Beside ACM it has four blocks a stage, no blocks on the way up, and a head at half of the resolution.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from hmg_gpu.models.acm import BidirectionalFusion, Head, check_batch, check_images, quarter_stem, stage

BLOCKS = 4  # a stage


class ALCNet(nn.Module):
    """ALCNet with 519,889 parameters, 92,928 of them unused; enlarges the logits of half the resolution bilinearly.

    The published weights hold two stages, ``uplayer1`` and ``uplayer2``, that the published forward pass leaves out.
    They stand here so that the weights load, and are left out as well.

    Args (forward):
        images: float [B, 1, H, W], normalised; H and W multiples of 16; B at least 2 in training mode.

    Returns (forward):
        logits [B, 1, H, W]; ``logits > 0`` is the prediction.

    Example:
        >>> import torch
        >>> ALCNet().eval()(torch.zeros(1, 1, 32, 48)).shape
        torch.Size([1, 1, 32, 48])
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = quarter_stem()
        self.head = Head(8)
        self.layer1 = stage(16, 16, blocks=BLOCKS)
        self.layer2 = stage(16, 32, stride=2, blocks=BLOCKS)
        self.layer3 = stage(32, 64, stride=2, blocks=BLOCKS)
        self.deconv2 = nn.ConvTranspose2d(64, 32, 4, 2, 1)
        self.uplayer2 = stage(32, 32, blocks=BLOCKS)
        self.deconv1 = nn.ConvTranspose2d(32, 16, 4, 2, 1)
        self.deconv0 = nn.ConvTranspose2d(16, 8, 4, 2, 1)
        self.uplayer1 = stage(16, 16, blocks=BLOCKS)
        self.fuse23 = BidirectionalFusion(32)
        self.fuse12 = BidirectionalFusion(16)
        for unused in (self.uplayer1, self.uplayer2):
            unused.requires_grad_(False)

    def output_convolutions(self) -> list[nn.Conv2d]:
        """The convolution that gives the logits; ``build_model`` sets its bias."""
        return [self.head.block[-1]]

    def forward(self, images: Tensor) -> Tensor:
        check_images(images)
        check_batch(self, images)
        c1 = self.layer1(self.stem(images))  # [B, 16, H/4, W/4]
        c2 = self.layer2(c1)  # [B, 32, H/8, W/8]
        c3 = self.layer3(c2)  # [B, 64, H/16, W/16]
        up2 = self.fuse23(self.deconv2(c3), c2)  # [B, 32, H/8, W/8]
        up1 = self.fuse12(self.deconv1(up2), c1)  # [B, 16, H/4, W/4]
        logits = self.head(self.deconv0(up1))  # [B, 1, H/2, W/2]
        # LESPS enlarges before its sigmoid, so enlarged logits are what the published network decides by.
        return F.interpolate(logits, size=images.shape[2:], mode="bilinear", align_corners=False)
