"""A user's own network, named FILE.py:Class: loaded, built, and tried before any training."""

from __future__ import annotations

import importlib.util
import shlex
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hmg_gpu.common.errors import InputError

SIDE = 64  # of the images on which it is tried


def is_custom(name: str) -> bool:
    """Whether a model's name is FILE.py:Class."""
    return ".py:" in name


def as_option(name: str) -> str:
    """How it is given on the command line, also where the name comes from a file that anybody may have written."""
    return "--model " + (shlex.quote(name) if name.isprintable() and len(name) < 1000 else ascii(name[:80]))


def split_name(name: str) -> tuple[Path, str]:
    """The file and the class.

    Raises:
        InputError: there is no such file, or no class is named.
    """
    file, _, kind = name.rpartition(":")
    path = Path(file)
    if not path.is_file():
        raise InputError(f"model {name}: no such file {file}; expected FILE.py:Class")
    if not kind.isidentifier():
        raise InputError(f"model {name}: expected the name of a class behind the colon: FILE.py:Class")
    return path, kind


def load_custom(name: str) -> nn.Module:
    """Run FILE.py, build Class() and try it on two small images.

    Raises:
        InputError: the file or the class fails, the class is no module, or what it returns is not what a network here
            returns: logits [B, 1, H, W], or a tuple of such heads.
    """
    path, kind = split_name(name)
    network_class = getattr(_run(path, name), kind, None)
    if not (isinstance(network_class, type) and issubclass(network_class, nn.Module)):
        raise InputError(f"model {name}: {path} has no class {kind} that is a torch.nn.Module")
    try:
        network = network_class()
    except Exception as error:  # the user's own code
        raise InputError(f"model {name}: {kind}() fails ({_words(error)}); it is built without arguments") from error
    with torch.random.fork_rng(devices=[]):  # the trial costs the run no random number
        _try(network, name)
    return network.train()


def _run(path: Path, name: str) -> Any:
    """The module in a file; its own folder can be imported from, as when Python runs it, now and later."""
    spec = importlib.util.spec_from_file_location(f"hmg_gpu_custom_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    folder = str(path.resolve().parent)
    sys.path.insert(0, folder)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # the user's own code
        raise InputError(f"model {name}: {path} fails ({_words(error)})") from error
    finally:
        sys.path.remove(folder)
    if folder not in sys.path:
        sys.path.append(folder)  # behind all others: what __init__ and forward import
    return module


def _try(network: nn.Module, name: str) -> None:
    images = torch.randn(2, 1, SIDE, SIDE)
    try:
        with torch.enable_grad():  # so that the output knows what it comes from
            output = network.eval()(images)
    except Exception as error:  # the user's own code
        raise InputError(
            f"model {name}: fails on float images [2, 1, {SIDE}, {SIDE}] ({_words(error)}); sides are multiples of 32"
        ) from error
    for head in output if isinstance(output, (list, tuple)) else [output]:
        if not isinstance(head, Tensor) or head.shape != images.shape or not head.is_floating_point():
            got = f"{head.dtype} {list(head.shape)}" if isinstance(head, Tensor) else type(head).__name__
            raise InputError(
                f"model {name}: expected float logits [2, 1, {SIDE}, {SIDE}] or a tuple of such heads, got {got}"
            )
        values = head.detach()
        if _after_sigmoid(head) and float(values.min()) >= 0 and float(values.max()) <= 1:
            raise InputError(
                f"model {name}: its values lie within 0 and 1, as after a sigmoid; leave the sigmoid out: logits are "
                "expected"
            )


def _after_sigmoid(head: Tensor) -> bool:
    """Whether the last that was done, besides what has one input (resizing, cropping ...), is a sigmoid or softmax.

    The values alone do not tell: half of all ACMs, drawn anew, give logits that all lie within 0 and 1.
    """
    node = head.grad_fn
    while node is not None:
        if "sigmoid" in node.name().lower() or "softmax" in node.name().lower():
            return True
        before = [source for source, _ in node.next_functions if source is not None]
        node = before[0] if len(before) == 1 else None
    return False


def _words(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
