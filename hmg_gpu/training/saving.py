"""A run's state: what is saved, and how it is taken up; ``state.py`` checks it before."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hmg_gpu.common.errors import HMGError, InputError
from hmg_gpu.common.parallel import Team
from hmg_gpu.common.provenance import provenance
from hmg_gpu.data.record import Record, data_digest
from hmg_gpu.data.sets import ImageSet
from hmg_gpu.models.checkpoints import MODEL_PREFIX, save_checkpoint
from hmg_gpu.models.weights import load_weights
from hmg_gpu.training.settings import Settings
from hmg_gpu.training.state import (
    TRAINED,
    check_data,
    check_labels,
    check_places,
    check_state,
    check_trained,
    keep_previous,
    load_optimizer,
    open_state,
)
from hmg_gpu.updater import MaskUpdater


class Run(Protocol):
    """What a state holds of a run; see ``Training``."""

    settings: Settings
    train: ImageSet
    device: torch.device
    team: Team
    record: Record
    stage: int
    epoch: int
    step: int
    over: bool
    results: dict[str, Any]
    warned: list[str]
    data_changed: list[str]
    corrected: Tensor
    model: nn.Module
    averaged: nn.Module | None
    optimizer: torch.optim.Optimizer
    updater: MaskUpdater | None

    @property
    def network(self) -> nn.Module: ...

    @property
    def masks(self) -> Tensor: ...

    @property
    def totals(self) -> Tensor: ...


def describe(run: Run) -> dict[str, Any]:
    """What a checkpoint says about itself: JSON values."""
    return {
        "settings": asdict(run.settings),
        "dataset": run.train.dataset,
        "normalisation": [run.train.mean, run.train.std],
        "masks": None if run.updater is None else run.updater.maker.about(),
        "rule": None if run.updater is None else run.updater.rule.about(),
        "stage": run.stage,
        "epoch": run.epoch,
        "step": run.step,
        "over": run.over,
        "results": run.results,
        "warned": run.warned,
        "data_changed": run.data_changed,
        "versions": provenance(),
        "machine": {"device": run.device.type, "threads": torch.get_num_threads(), "ranks": run.team.ranks},
        "data": data_digest(run.record),
    }


def write(run: Run, path: Path, totals: Tensor | None) -> None:
    """Write a run's weights, with ``totals`` all that it needs to go on; what is not finite is refused.

    Args:
        totals: float64 [5], the counts of the epoch so far, of all ranks; None: the weights alone.
    """
    tensors = {MODEL_PREFIX + key: value for key, value in run.network.state_dict().items()}
    if run.averaged is not None and totals is not None:
        tensors |= {TRAINED + key: value for key, value in run.model.state_dict().items()}
    if not all(bool(value.isfinite().all()) for value in tensors.values() if value.is_floating_point()):
        raise HMGError(f"the weights are no longer finite; {path} keeps the last good ones")
    if totals is not None:
        for number, state in run.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{number}.{key}": value for key, value in state.items()}
        tensors |= run.record | {"totals": totals}
        tensors["masks.current"] = run.masks
        if run.settings.hard_examples:
            tensors["corrected.current"] = run.corrected
        if run.updater is not None and run.updater.rule.evolves:
            tensors |= {"labels.current": run.updater.labels, "pool.current": run.updater.active}
        keep_previous(path)
    save_checkpoint(path, tensors, describe(run))


def take_up(run: Run, path: Path, *, changed_data: bool) -> None:
    """Take up the state in a file; nothing of the run changes where it is refused. See ``Training.resume``."""
    description, tensors = open_state(path, describe(run), run.settings)
    changed = check_data(path, tensors, run.record, go_on=changed_data)
    if tensors["masks.current"].shape != run.masks.shape:
        raise InputError(
            f"{path}: holds masks {list(tensors['masks.current'].shape)}, but the data set gives "
            f"{list(run.masks.shape)}; the images have changed since the run began"
        )
    masks = tensors["masks.current"].to(run.device)
    if description["stage"] == 0 and not torch.equal(masks, run.masks):
        if not changed:
            raise InputError(
                f"{path}: the initial masks are others than those that the run began with; resume with the same "
                "version of this program"
            )
        masks = run.masks
    check_state(path, description, tensors, run.optimizer.param_groups[0]["params"])
    evolves = run.updater is not None and run.updater.rule.evolves
    if evolves:
        check_labels(path, tensors)
    corrected = run.corrected
    if run.settings.hard_examples:
        corrected = check_places(path, tensors, run.train.host_sizes)
    trained = None if run.averaged is None else check_trained(path, tensors, run.model.state_dict())
    run.stage, run.epoch, run.step = (description[key] for key in ("stage", "epoch", "step"))
    run.over = description["over"]
    run.results, run.warned = description["results"], description["warned"]
    run.data_changed = description["data_changed"] + changed
    load_weights(run.network, path)
    run.corrected = corrected
    if trained is not None:
        run.model.load_state_dict(trained)
    load_optimizer(run.optimizer, tensors)
    run.totals.zero_()
    if run.team.rank == 0:  # the sum over the ranks, whose number may have changed
        run.totals.copy_(tensors["totals"])
    begun = masks is not run.masks  # else the run begins anew with changed points
    if run.updater is not None:
        run.updater.masks = masks
    if evolves and begun:
        run.updater.labels = tensors["labels.current"].to(run.device)
        run.updater.active = tensors["pool.current"].to(run.device)
