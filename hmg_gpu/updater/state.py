"""The saved state of a MaskUpdater: refused where it is another's."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hmg_gpu.common.checksums import KEY
from hmg_gpu.common.errors import InputError
from hmg_gpu.data.record import NAMES, Record, differences, find_record, same_images

CHANGED = "data_changed"
OLDER = "state: from an older layout of this library; make the updater's masks anew"
OTHER = "state: expected what MaskUpdater.state_dict() gives; the names in it are others"


def make_state(
    settings: Mapping[str, Any], record: Record, tensors: Mapping[str, Tensor], changed: Sequence[str]
) -> dict[str, Any]:
    """What :func:`take_state` takes: settings, the record of the data, copies of the tensors, and a checksum of it all.

    Args:
        changed: what differs from the data that the masks began with, in words.
    """
    state = {"settings": dict(settings), CHANGED: list(changed), **record}
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
    state: Any,
    settings: Mapping[str, Any],
    record: Record,
    tensors: Mapping[str, Tensor],
    *,
    changed_data: bool = False,
) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of a state, copied to the device of the updater's own, and what differs in the data, in words.

    Args:
        state: what ``MaskUpdater.state_dict`` gave.
        settings, record: the updater's own.
        tensors: its own, by their names in the state.
        changed_data: take it up where points or pixels of the same images are others.

    Raises:
        InputError: it belongs to other data, another maker, rule or settings, or is no such state.
    """
    if not isinstance(state, dict) or not isinstance(state.get("settings"), dict):
        raise InputError(OTHER)
    if not _equal(state["settings"], settings):
        if "rule" not in state["settings"]:
            raise InputError(OLDER)
        known = {*state["settings"], *settings}
        name = min((key for key in known if not _equal(state["settings"].get(key), settings.get(key))), key=str)
        raise InputError(
            f"state: its {name} is {str(state['settings'].get(name))[:300]}, this updater's {settings.get(name)}; "
            "use the same"
        )
    if NAMES not in state:
        raise InputError(OLDER)
    if state.keys() != {"settings", CHANGED, *record, KEY, *tensors}:
        raise InputError(OTHER)
    for name in (*record, *tensors):
        if not isinstance(state[name], Tensor) or state[name].layout != torch.strided:
            raise InputError(OTHER)
    theirs, before = find_record(state), state[CHANGED]
    whole = isinstance(before, list) and all(isinstance(text, str) for text in before)
    whole = whole and theirs is not None and state[KEY] == _checksum_of(state)
    found = differences(theirs, record) if whole else []
    if found and not (changed_data and same_images(theirs, record)):
        cure = ", or pass changed_data=True" if same_images(theirs, record) else ""
        raise InputError(
            f"state: the data changed since it was made: {'; '.join(found)}; load the same images and points{cure}"
        )
    for name, mine in tensors.items():
        value = state[name]
        if value.dtype != mine.dtype or value.shape != mine.shape:
            raise InputError(
                f"state: {name} is {value.dtype} {list(value.shape)}, expected {mine.dtype} {list(mine.shape)}; "
                "the images have changed"
            )
    if not whole:
        raise InputError("state: damaged or changed since it was made (its checksum does not fit); take an earlier one")
    layout = {"copy": True, "memory_format": torch.contiguous_format}
    return {name: state[name].to(mine.device, **layout) for name, mine in tensors.items()}, [*before, *found]


def _equal(theirs: Any, mine: Any) -> bool:
    """Of settings; a state may hold anything."""
    try:
        return json.dumps(theirs, sort_keys=True) == json.dumps(mine, sort_keys=True)
    except (TypeError, ValueError, RecursionError):
        return False
