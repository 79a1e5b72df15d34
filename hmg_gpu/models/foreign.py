"""Other people's networks: what they return is brought to one form, and nothing of them is changed by running them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from hmg_gpu.common.errors import InputError
from hmg_gpu.common.tensors import logit

Output = str | Callable[[Any], Tensor]  # "logits", "probabilities", or what makes one of these of a network's output


SURPLUS = 64  # pixels by which a prediction may exceed its image at the bottom and the right: padding


class Head(nn.Module):
    """A network whose output is brought to float [b, 1, h, w] by the caller's rule."""

    def __init__(self, net: nn.Module, output: Output, head: int | None = None):
        super().__init__()
        self.net, self.output, self.head = net, output, head
        self.training = net.training  # so that whoever restores this mode restores the network's

    def forward(self, images: Tensor) -> Tensor:
        result = single(self.net(images), self.output, self.head)
        result = result[:, None] if result.dim() == 3 else result
        count, _, height, width = images.shape
        fits = result.dim() == 4 and result.shape[:2] == (count, 1)
        fits = fits and all(0 <= a - b <= SURPLUS for a, b in zip(result.shape[2:], (height, width), strict=True))
        if not fits:
            raise InputError(
                f"net: expected [{count}, 1, {height}, {width}], got {list(result.shape)}; "
                "pass output=FUNCTION that makes this of it"
            )
        return result


def require_module(net: Any) -> None:
    """Refuse a function in a module's place: eval mode could not reach the layers behind it.

    Raises:
        InputError: it is no ``torch.nn.Module``.
    """
    if not isinstance(net, nn.Module):
        raise InputError(
            f"net: expected a torch.nn.Module, got {type(net).__name__}, whose layers would stay in training mode; "
            "pass the module itself, and output=FUNCTION for what follows it"
        )


@contextmanager
def explained(net: nn.Module, images: Tensor) -> Iterator[None]:
    """Say in words what torch says in terms of weights: another number of channels, another device.

    Raises:
        InputError: one of these is why the network failed.
    """
    try:
        yield
    except RuntimeError as error:
        weight = next(net.parameters(), images)
        if weight.device != images.device:
            raise InputError(
                f"net: its weights are on {weight.device}, the images on {images.device}; "
                f'move it: net.to("{images.device}")'
            ) from error
        first = next((module for module in net.modules() if isinstance(module, nn.Conv2d)), None)
        given, wanted = images.shape[1], images.shape[1] if first is None else first.in_channels
        if wanted != given and f"{wanted} channels" in str(error):
            raise InputError(
                f"net: takes {wanted} channels, got {given}; pass channels={wanted}: the image is repeated in each"
            ) from error
        raise


def single(result: Any, output: Output, head: int | None = None) -> Tensor:
    """What a network returned, as one tensor.

    Args:
        head: which of several heads; None: there may be only one.

    Raises:
        InputError: there are several heads and nobody says which; or it is no tensor.
    """
    if callable(output):
        result = output(result)
    elif isinstance(result, (list, tuple)):
        if head is None and len(result) != 1:
            raise InputError(
                f"net: returned {len(result)} heads; say which by head=: -1 is the last (DNANet), 0 the first (UIUNet, "
                "ISNet), or pass output=FUNCTION"
            )
        try:
            result = result[head or 0]
        except IndexError:
            raise InputError(f"net: has no head {head}; it returned {len(result)}") from None
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
    return logit(threshold) if output == "logits" else threshold


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
