"""The two networks of the paper (HMG Sec. 4): parameter names of the published weights, logits as output."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..errors import InputError
from .acm import ACM
from .dnanet import DNANet

NETWORKS = {"acm": ACM, "dnanet": DNANet}

__all__ = ["ACM", "NETWORKS", "DNANet", "build_model"]


def build_model(name: str, *, output_bias: float | None = -4.0) -> nn.Module:
    """Build a segmentation network by name (HMG Sec. 4: ACM and DNANet).

    The soft-IoU loss barely has a gradient while everything is foreground: from PyTorch's initialisation, whose first
    predictions are near 0.5 everywhere, it sits near 0.99 for tens of epochs. Targets cover far less than 2 % of an
    image, so the output starts at that prior instead: ACM on NUAA-SIRST reached a test IoU of 54.6 after 50 epochs with
    -4, and 18.3 without. Loading weights overwrites the bias.

        first probability ~ sigmoid(output_bias);   sigmoid(-4) = 0.018

    Args:
        name: "acm" or "dnanet".
        output_bias: logit that fills the bias of every output convolution; None keeps PyTorch's initialisation.

    Returns:
        A network in training mode: float [B, 1, H, W], normalised, H and W multiples of 16 -> logits [B, 1, H, W]
        (DNANet in training mode: a tuple of its four heads' logits). ``logits > 0`` is the prediction.

    Raises:
        InputError: the name is unknown; the message lists the choices.
    """
    if name not in NETWORKS:
        raise InputError(f"unknown model {name!r}; choose one of: {', '.join(NETWORKS)}")
    network = NETWORKS[name]()
    if output_bias is not None:
        for convolution in network.output_convolutions():
            nn.init.constant_(convolution.bias, output_bias)
            _mix_signs(convolution.weight)
    return network


@torch.no_grad()
def _mix_signs(weight: Tensor) -> None:
    """Flip every second weight where all have one sign.

    The features come from a ReLU, so with negative weights alone no logit could rise above the bias and nothing would
    be learned, and with positive ones alone none could fall below it. ACM has four output weights: one seed in eight.
    """
    if bool((weight < 0).all()) or bool((weight > 0).all()):
        weight.abs_()
        weight[:, 1::2] *= -1
