"""Set-up for the kernel tests: Triton's interpreter where there is no GPU, shuffled programs, poisoned memory.

Import this before anything of hmg_gpu.kernels: whether a kernel is interpreted is decided when it is decorated.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import triton.runtime.interpreter as interpreter

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


_patched: set[str] = set()


def _call_device_function(self, *args, **kwargs):
    module = self.fn.__globals__["__name__"]
    if (
        not module.startswith("hmg_gpu.") and module not in _patched
    ):  # Triton's own library, through triton.language.core
        _patched.add(module)
        interpreter._patch_lang(self.fn)
    return self.rewrite()(*args, **kwargs)


# The interpreter patches triton.language anew, and never undoes it, at each call of one device function by another:
# half of the time, and slower with every call. The patch of the running kernel is enough for our modules.
interpreter.InterpretedFunction.__call__ = _call_device_function


@contextmanager
def shuffled_programs(seed: int) -> Iterator[None]:
    """Interpret the programs of every launch in a random order instead of 0, 1, 2, ..."""
    builder = interpreter.interpreter_builder
    plain = type(builder).set_grid_idx
    generator = torch.Generator().manual_seed(seed)
    orders: dict[int, list[int]] = {}

    def set_grid_idx(x: int, y: int, z: int) -> None:
        if x == 0:
            orders[0] = torch.randperm(builder.grid_dim[0], generator=generator).tolist()
        plain(builder, orders[0][x], y, z)

    builder.set_grid_idx = set_grid_idx
    try:
        yield
    finally:
        del builder.set_grid_idx


@contextmanager
def program_at(index: int) -> Iterator[None]:
    """Let a launch of one program be the program ``index`` of a larger grid."""
    builder = interpreter.interpreter_builder
    builder.set_grid_idx = lambda _x, _y, _z: setattr(builder, "grid_idx", (index, 0, 0))
    try:
        yield
    finally:
        del builder.set_grid_idx


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill what torch.empty returns with a pattern that no kernel may take for a result."""
    plain = torch.empty

    def empty(*args, **kwargs):
        tensor = plain(*args, **kwargs)
        tensor.untyped_storage().fill_(0xAB)
        return tensor

    torch.empty = empty
    try:
        yield
    finally:
        torch.empty = plain


def launches(monkeypatch, modules, call) -> list[str]:
    """Names of the kernels that ``call()`` launches from the modules, without running them."""
    names: list[str] = []

    class Stub:
        def __init__(self, name: str):
            self.name = name

        def __getitem__(self, _grid):
            return lambda *_args, **_kwargs: names.append(self.name)

    with monkeypatch.context() as patch:
        for module in modules:
            for name in [n for n in vars(module) if n.endswith("_kernel")]:
                patch.setattr(module, name, Stub(name))
        call()
    return names
