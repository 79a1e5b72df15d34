"""Which path a computation takes on a device: the Triton kernels, SciPy, or plain torch."""

from __future__ import annotations

import functools
import importlib.util
import os

from torch import Tensor

from hmg_gpu.common.errors import InputError

BACKENDS = ("auto", "triton", "scipy", "torch")


def backend_for(tensor: Tensor) -> str:
    """Which path works on this tensor's device: "triton", "scipy" or "torch".

    Raises:
        InputError: HMG_BACKEND is set to something else, or to a path that this device does not have.
    """
    wanted = os.environ.get("HMG_BACKEND", "auto")
    if wanted not in BACKENDS:
        raise InputError(f"HMG_BACKEND={wanted}: expected one of {', '.join(BACKENDS)}")
    if wanted == "auto":
        if tensor.device.type == "cpu":
            return "scipy"
        return "triton" if tensor.device.type == "cuda" and _has_triton() else "torch"
    if wanted == "scipy" and tensor.device.type != "cpu":
        raise InputError(
            f"HMG_BACKEND=scipy: SciPy works on CPU tensors, got one on {tensor.device}; use auto or torch"
        )
    return wanted


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
