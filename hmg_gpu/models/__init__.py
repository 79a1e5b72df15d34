"""Networks: float images [B, 1, H, W], normalised, to logits of that shape, or a tuple of heads, the last the best.

To add one, write a file and a line in NETWORKS; or give ``--model FILE.py:Class`` and change nothing here.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from hmg_gpu.common.errors import InputError
from hmg_gpu.models.acm import ACM
from hmg_gpu.models.alcnet import ALCNet
from hmg_gpu.models.custom import is_custom, load_custom, split_name
from hmg_gpu.models.dnanet import DNANet
from hmg_gpu.models.unet import UNet

NETWORKS: dict[str, type[nn.Module]] = {
    "acm": ACM,  # the paper's light network; a quarter of the resolution
    "alcnet": ALCNet,  # the third network of LESPS; half of the resolution
    "dnanet": DNANet,  # the paper's default; full resolution, for GPUs
    "unet": UNet,  # ours; full resolution, light enough for a CPU
}
MODEL_HELP = (
    f"{', '.join(NETWORKS)}, with options such as unet:widths=16-32-64-128 or dnanet:channels=one,backbone=resnet_10; "
    "or FILE.py:Class, a module of your own that gives logits"
)

__all__ = ["ACM", "MODEL_HELP", "NETWORKS", "ALCNet", "DNANet", "UNet", "build_model", "check_model"]


def check_model(name: str) -> None:
    """Refuse a name that :func:`build_model` does not know.

    Raises:
        InputError: no such network, or no such file.

    Example:
        >>> check_model("dnanet")
    """
    if is_custom(name):
        split_name(name)
    else:
        with torch.device("meta"):
            _build(name)


def _build(name: str) -> nn.Module:
    """A network of ours from NAME or NAME:OPTION=VALUE,OPTION=VALUE."""
    base, _, text = name.partition(":")
    if base not in NETWORKS:
        raise InputError(f"unknown model {name!r}; choose one of: {', '.join(NETWORKS)}, or FILE.py:Class")
    known = inspect.signature(NETWORKS[base]).parameters
    options: dict[str, Any] = {}
    for pair in filter(None, text.split(",")):
        key, _, value = pair.partition("=")
        if key not in known or not 0 < len(value) < 100:
            expected = f"OPTION=VALUE of {', '.join(known)}" if known else "no option"
            raise InputError(f"model {name!r}: {pair!r}: expected {expected}")
        numbers = value.split("-")
        options[key] = tuple(map(int, numbers)) if all(map(str.isdecimal, numbers)) else value
    return NETWORKS[base](**options)


def build_model(name: str, *, output_bias: float | None = -4.0) -> nn.Module:
    """Build a segmentation network by name (HMG Sec. 4: ACM and DNANet).

    The soft-IoU loss barely has a gradient while everything is foreground: from PyTorch's initialisation, whose first
    predictions are near 0.5 everywhere, it sits near 0.99 for tens of epochs. Targets cover far less than 2 % of an
    image, so the output starts at that prior instead: ACM on NUAA-SIRST reached a test IoU of 54.6 after 50 epochs with
    -4, and 18.3 without. Loading weights overwrites the bias.

        first probability ~ sigmoid(output_bias);   sigmoid(-4) = 0.018

    Args:
        name: a key of ``NETWORKS``, alone or with options of its class ("unet:widths=16-32-64-128",
            "dnanet:channels=one,backbone=resnet_10"); or "FILE.py:Class": a module of your own that is built without
            arguments. Its code is run. It may have ``output_convolutions()``, a list of its last layers, whose bias is
            then set.
        output_bias: logit that fills the bias of every output convolution; None keeps PyTorch's initialisation.

    Returns:
        A network in training mode: float [B, 1, H, W], normalised, H and W multiples of 16 -> logits [B, 1, H, W]
        (DNANet in training mode: a tuple of its four heads' logits). ``logits > 0`` is the prediction.

    Raises:
        InputError: the name is unknown (the message lists the choices), or a module of your own does not fit.

    Example:
        >>> network = build_model("unet").eval()
        >>> network(torch.zeros(1, 1, 64, 64)).shape
        torch.Size([1, 1, 64, 64])
    """
    network = load_custom(name) if is_custom(name) else _build(name)
    if output_bias is not None and hasattr(network, "output_convolutions"):
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
