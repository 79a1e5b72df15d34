"""Other people's networks: what they return is brought to one form, and nothing of them is changed by running them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from .errors import InputError

Output = str | Callable[[Any], Tensor]  # "logits", "probabilities", or what makes one of these of a network's output


class Head(nn.Module):
    """A network whose output is brought to float [b, 1, h, w] by the caller's rule."""

    def __init__(self, net: nn.Module, output: Output):
        super().__init__()
        self.net, self.output = net, output

    def forward(self, images: Tensor) -> Tensor:
        result = single(self.net(images), self.output)
        result = result[:, None] if result.dim() == 3 else result
        count, _, height, width = images.shape
        if result.dim() != 4 or result.shape[:2] != (count, 1) or result.shape[2] < height or result.shape[3] < width:
            raise InputError(
                f"net: expected [{count}, 1, {height}, {width}] or larger, got {list(result.shape)}; "
                "pass output=FUNCTION that makes this of it"
            )
        return result


def single(result: Any, output: Output) -> Tensor:
    """What a network returned, as one tensor."""
    if callable(output):
        result = output(result)
    elif isinstance(result, (list, tuple)):
        result = result[-1]
    if not isinstance(result, Tensor):
        raise InputError(
            f"prediction: expected a tensor or a list of heads, got {type(result).__name__}; pass output=FUNCTION"
        )
    return result


def level_of(output: Output, threshold: float) -> float:
    """The value above which a pixel is foreground."""
    if not callable(output) and output not in ("logits", "probabilities"):
        raise InputError(f"output {output!r}: expected logits, probabilities or a function")
    if not 0 < threshold < 1:
        raise InputError(f"threshold {threshold}: expected a probability between 0 and 1")
    return math.log(threshold / (1 - threshold)) if output == "logits" else threshold


def without_ddp(net: nn.Module) -> nn.Module:
    """The network inside DistributedDataParallel, whose forward would wait for ranks that have fewer batches."""
    inner = net
    while not isinstance(inner, DistributedDataParallel):
        if not hasattr(inner, "_orig_mod"):  # what torch.compile wraps
            return net
        inner = inner._orig_mod
    return inner.module


@contextmanager
def undisturbed(net: nn.Module, device: torch.device, ranks: int) -> Iterator[None]:
    """Leave random state, modes, buffers and autocast (with its cache of weights) as they are."""
    modules = list(net.modules()) if isinstance(net, nn.Module) else []
    modes = [module.training for module in modules]
    buffers = list(net.buffers()) if modules and ranks > 1 else []
    own = [buffer.clone() for buffer in buffers]
    generators = [device] if device.type == "cuda" else []
    with (
        torch.random.fork_rng(generators),
        torch.inference_mode(False),
        torch.no_grad(),
        torch.autocast(device.type, enabled=False, cache_enabled=False),
    ):
        try:
            for buffer in buffers:
                distributed.broadcast(buffer, 0)
            yield
        finally:
            for buffer, value in zip(buffers, own, strict=True):
                buffer.copy_(value)
            for module, mode in zip(modules, modes, strict=True):
                module.training = mode
