"""A run's saved state: checked before it is taken up, kept twice, recovered where the newest is damaged."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hmg_gpu.common.errors import InputError
from hmg_gpu.common.files import write_beside
from hmg_gpu.data.batches import are_places
from hmg_gpu.data.record import differences, find_record, record_of, same_images
from hmg_gpu.data.sets import ImageSet
from hmg_gpu.masks import to_masks
from hmg_gpu.models.checkpoints import quote, read_description, read_tensors, write_sidecar
from hmg_gpu.training.settings import Settings

TRAINED = "trained."  # the weights that are trained, where those that predict are their average
STATE = {"totals", "masks.current"}  # what a checkpoint needs besides weights so that a run can go on
PREVIOUS = "previous.safetensors"  # beside last.safetensors: the one before it


def open_state(path: Path, mine: Mapping[str, Any], settings: Settings) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read a run's state: its description and tensors.

    Args:
        mine: the description of the run that takes it up. settings: that run's.

    Raises:
        InputError: there is none, or it belongs to other settings, another set or other masks.
    """
    description, tensors = read_description(path), read_tensors(path)
    if description is None or not (mine.keys() <= description.keys() and tensors.keys() >= STATE):
        raise InputError(
            f"{path}: not the state of a run of train.py (bare weights cannot be resumed); give a run's folder"
        )
    theirs = asdict(Settings.from_dict(description["settings"]))
    for key, value, ours in (
        ("settings", theirs, asdict(settings)),
        *((key, description[key], mine[key]) for key in ("dataset", "masks")),
    ):
        if value != ours:
            raise InputError(f"{path}: {_difference(key, value, ours)}; resume with the run's own")
    return description, tensors


def check_state(
    path: Path, description: Mapping[str, Any], tensors: Mapping[str, Tensor], parameters: Sequence[Tensor]
) -> None:
    """Refuse a run's state whose parts are not what ``Training.save`` writes, before any of it is taken up.

    Args:
        path: where it comes from.
        description, tensors: what :func:`read_description` and :func:`read_tensors` gave.
        parameters: those of the network, in the optimiser's order.

    Raises:
        InputError: the position, the results, or a tensor of the optimiser is none; the text names it.
    """

    require = partial(_require, path)
    for key in ("stage", "epoch", "step"):
        require(type(description[key]) is int and 0 <= description[key] < 2**31, key)
    require(description["stage"] <= 2, "stage")
    require(type(description["over"]) is bool, "over")
    warned, results = description["warned"], description["results"]
    for name, texts in (("warned", warned), ("data_changed", description["data_changed"])):
        require(isinstance(texts, list) and all(isinstance(text, str) for text in texts), name)
    require(isinstance(results, dict), "results")
    rows = [row for name, row in results.items() if name != "masks"]
    masks = results.get("masks", {})
    require(isinstance(masks, dict), "results of the masks")
    for row in (*rows, *masks.values()):
        known = isinstance(row, dict) and row.keys() >= {"iou", "niou", "pd", "fa", "pixel_fa", "matched", "targets"}
        require(known, "results")
        for value in row.values():  # Pd is NaN where there are no targets
            require(type(value) in (int, float) and not abs(value) > 1e18, "results")
    require(tensors["totals"].dtype == torch.float64 and tensors["totals"].shape == (5,), "totals")
    require(tensors["masks.current"].dtype == torch.bool, "masks.current")
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            parsed = re.fullmatch(r"optimizer\.(\d{1,6})\.(step|exp_avg|exp_avg_sq)", name)
            require(parsed is not None and int(parsed[1]) < len(parameters), quote(name))
            shape = () if parsed[2] == "step" else parameters[int(parsed[1])].shape
            require(value.shape == shape and value.dtype == torch.float32, name)
            others = {f"optimizer.{parsed[1]}.{key}" for key in ("step", "exp_avg", "exp_avg_sq")}
            require(others <= tensors.keys(), name)


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Take up an optimiser's state, checked by :func:`check_state`."""
    parameters = optimizer.param_groups[0]["params"]
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, number, key = name.split(".")
            if value.dim():  # in the parameter's memory layout: the fused optimiser walks both as they lie
                value = torch.empty_like(parameters[int(number)]).copy_(value)
            state.setdefault(int(number), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def check_labels(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Refuse labels of a rule that evolves which do not belong to the masks beside them.

    Raises:
        InputError: they are missing, of another type or shape, or other masks'.
    """
    masks = tensors["masks.current"]
    labels, pool = tensors.get("labels.current"), tensors.get("pool.current")
    good = labels is not None and labels.dtype == torch.uint8 and labels.shape == masks.shape
    _require(path, good and torch.equal(to_masks(labels), masks), "labels.current")
    _require(path, pool is not None and pool.dtype == torch.bool and pool.shape == masks.shape[:1], "pool.current")


def check_places(path: Path, tensors: Mapping[str, Tensor], sizes: Tensor) -> Tensor:
    """The places of hard examples in a state: int64 [A, 3], rows (image, y, x).

    Args:
        sizes: int64 [N, 2] of the training images, on the CPU.

    Raises:
        InputError: they are missing, of another type or shape, or outside their images.
    """
    found = tensors.get("corrected.current")
    _require(path, are_places(found, sizes), "corrected.current")
    return found


def _require(path: Path, good: bool, what: str) -> None:
    if not good:
        raise InputError(f"{path}: {what} is not what a run of train.py writes; take an earlier checkpoint")


def check_trained(path: Path, tensors: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The trained weights in a state whose network is their moving average, by the names of the network.

    Raises:
        InputError: they are not those of the network.
    """
    found = {name.removeprefix(TRAINED): value for name, value in tensors.items() if name.startswith(TRAINED)}
    _require(path, found.keys() == targets.keys(), "the trained network")
    for name, target in targets.items():
        value = found[name]
        good = value.shape == target.shape and value.dtype == target.dtype
        good &= not value.is_floating_point() or bool(value.isfinite().all())
        _require(path, good, quote(TRAINED + name))
    return found


def check_data(path: Path, tensors: Mapping[str, Tensor], mine: Mapping[str, Tensor], *, go_on: bool) -> list[str]:
    """What differs between the data of a state and the present data, in words.

    Args:
        tensors: of the state, with the record that :func:`hmg_gpu.data.record.record_of` made.
        mine: the present record.
        go_on: do not refuse points, pixels or initial masks that differ; the images must be the same.

    Raises:
        InputError: something differs, or the state holds no record.
    """
    theirs = find_record(tensors)
    _require(path, theirs is not None and theirs.keys() >= mine.keys(), "the record of its data")
    found, same = differences(theirs, mine), same_images(theirs, mine)
    if found and not (go_on and same):
        cure = "; to go on nevertheless, add --changed-data" if same else ""
        raise InputError(
            f"{path}: the data changed since the run began: {'; '.join(found)}; resume with the same data, or train "
            f"anew{cure}"
        )
    return found


def check_data_of(path: Path, train: ImageSet, *, go_on: bool) -> None:
    """As :func:`check_data` without the initial masks: before they are made, which may take minutes."""
    tensors = read_tensors(path)
    if find_record(tensors) is not None:  # else Training.resume says what is wrong
        check_data(path, tensors, record_of(train), go_on=go_on)


def keep_previous(path: str | os.PathLike) -> None:
    """Before a checkpoint is replaced: let ``previous.safetensors`` beside it be what it is now (no copy where the file
    system has hard links)."""
    path = Path(path)
    if not path.exists():
        return
    with write_beside(path.with_name(PREVIOUS), path.stat().st_size) as temporary:
        temporary.unlink(missing_ok=True)
        try:
            os.link(path, temporary)
        except OSError:
            shutil.copyfile(path, temporary)


def recover(path: str | os.PathLike) -> str | None:
    """Where a checkpoint is missing or damaged, put the one that :func:`keep_previous` kept in its place.

    Returns:
        What was done, in words, or None where nothing had to be done.

    Raises:
        InputError: it is not readable, and neither is another.
    """
    path = Path(path)
    previous = path.with_name(PREVIOUS)
    try:
        read_description(path)
        return None
    except InputError as error:
        if not previous.exists():
            raise
        about = read_description(previous)
        if about is None:
            raise error
        with write_beside(path, previous.stat().st_size) as temporary:
            shutil.copyfile(previous, temporary)
        write_sidecar(path)
        place = f"stage {about.get('stage', 0) + 1}, epoch {about.get('epoch', 0) + 1}"
        return f"{error}; it is skipped: going on from the checkpoint before it, {place}"


def _difference(key: str, theirs: Any, mine: Any) -> str:
    """The first place in which a checkpoint's description and this run differ, in words."""
    if isinstance(theirs, dict) and isinstance(mine, dict):
        name = next(name for name in (theirs | mine) if theirs.get(name) != mine.get(name))
        key, theirs, mine = name, theirs.get(name), mine.get(name)
    return f"its run had {key} = {theirs!r}, this one has {mine!r}"
