"""The saved state of a MaskUpdater: refused where it is another's."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hmg_gpu.common.checksums import KEY
from hmg_gpu.common.errors import InputError
from hmg_gpu.data.sets import ImageSet


def make_state(settings: Mapping[str, Any], data: ImageSet, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """What :func:`take_state` takes: names, settings, points, copies of the tensors, and a checksum of it all."""
    state = {"names": list(data.names), "settings": dict(settings), "points": data.points}
    state |= {name: value.clone() for name, value in tensors.items()}
    return state | {KEY: _checksum_of(state)}


def _checksum_of(state: Mapping[str, Any]) -> str:
    """Of everything but the checksum; the device does not matter."""
    known = {name: value for name, value in state.items() if name != KEY}
    text = {name: value for name, value in known.items() if not isinstance(value, Tensor)}
    value = zlib.crc32(json.dumps(text, sort_keys=True).encode())
    for name in sorted(known.keys() - text.keys()):
        tensor = known[name].detach().cpu().contiguous()
        value = zlib.crc32(f"{name} {tensor.dtype} {list(tensor.shape)}".encode(), value)
        value = zlib.crc32(tensor.view(torch.uint8).numpy(), value)
    return f"{value:08x}"


def take_state(
    state: Any, settings: Mapping[str, Any], data: ImageSet, tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The tensors of a state, copied to the device of the set.

    Args:
        state: what ``MaskUpdater.state_dict`` gave.
        settings, data: the updater's own.
        tensors: its own, by their names in the state.

    Raises:
        InputError: it belongs to other images, points, another maker, rule or settings, or is no such state.
    """
    if not isinstance(state, dict) or not isinstance(state.get("settings"), dict):
        raise InputError("state: expected what MaskUpdater.state_dict() gives; the names in it are others")
    if state["settings"] != settings:
        known = {*state["settings"], *settings}
        name = min(key for key in known if state["settings"].get(key) != settings.get(key))
        if "rule" not in state["settings"]:
            raise InputError("state: from an older layout of this library; make the updater's masks anew")
        raise InputError(
            f"state: its {name} is {state['settings'].get(name)}, this updater's {settings.get(name)}; use the same"
        )
    if state.keys() != {"names", "settings", "points", KEY, *tensors}:
        raise InputError("state: expected what MaskUpdater.state_dict() gives; the names in it are others")
    if state["names"] != data.names:
        raise InputError(
            f"state: belongs to {len(state['names'])} other images, this updater has {len(data)}; "
            "load the same split in the same order"
        )
    device = data.images.device
    if not torch.equal(state["points"].to(device), data.points):
        raise InputError("state: the points are others; load the same point labels")
    for name, mine in tensors.items():
        value = state[name]
        if value.dtype != mine.dtype or value.shape != mine.shape:
            raise InputError(
                f"state: {name} is {value.dtype} {list(value.shape)}, expected {mine.dtype} {list(mine.shape)}; "
                "the images have changed"
            )
    if state[KEY] != _checksum_of(state):
        raise InputError("state: damaged or changed since it was made (its checksum does not fit); take an earlier one")
    layout = {"copy": True, "memory_format": torch.contiguous_format}
    return {name: state[name].to(device, **layout) for name in tensors}
