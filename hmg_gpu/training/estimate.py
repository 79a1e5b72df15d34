"""How long a run will take, before it starts."""

from __future__ import annotations

import copy
import time

import torch

from hmg_gpu.common.tensors import to_device
from hmg_gpu.data.batches import draw_epoch
from hmg_gpu.training.loop import Training
from hmg_gpu.training.step import TrainingStep

TRIALS = 3  # steps that are timed, after one that warms up
WORTH = 100  # steps of a run from which on an estimate is made


def estimate_seconds(training: Training, *, bf16: bool | None = None) -> float | None:
    """Seconds that the rest of a run will train for, by a few steps of a copy of its network; None for short runs.

    Nothing of the run changes. Looks at the test set, updates and checkpoints come on top.

    Args:
        bf16: whether in bfloat16; None: as the run's settings say.
    """
    settings = training.settings
    steps_an_epoch = -(-len(training.train) // settings.batch_size)
    done = (training.stage, training.epoch)
    longer = (1.0, 1.0 + settings.hard_examples)  # an epoch of each stage, if there is anything to correct
    left = sum(
        longer[stage] * max(0, epochs - (training.epoch if stage == training.stage else 0))
        for stage, epochs in enumerate(settings.epochs)
        if stage >= done[0]
    )
    if left * steps_an_epoch < WORTH or settings.step != "eager" or training.team.ranks > 1:
        return None
    plan = draw_epoch(training.train.host_sizes, settings.batch_size, settings.patch_size, seed=0, epoch=0)
    plan = to_device(plan, training.device)
    device = [training.device] if training.device.type == "cuda" else []
    with torch.random.fork_rng(devices=device):
        step = TrainingStep(
            copy.deepcopy(training.model).train(),
            training.train,
            patch_size=settings.patch_size,
            learning_rate=settings.learning_rate,
            loss=settings.loss,
            bf16=settings.bf16 if bf16 is None else bf16,
        )
        taken = [_timed(step, training, plan[number % len(plan)]) for number in range(TRIALS + 1)]
    return min(taken[1:]) * left * steps_an_epoch


def expected_time(training: Training) -> str | None:
    """About how long a run will train, and with or without bfloat16 where that is much shorter on this CPU; None for
    short runs."""
    seconds = estimate_seconds(training)
    if seconds is None:
        return None
    text = f"training will take about {in_words(seconds)}"
    if training.device.type == "cpu" and training.stage == training.epoch == 0:
        bf16 = training.settings.bf16
        other = estimate_seconds(training, bf16=not bf16)
        if other < 0.75 * seconds:
            text += f"; {'without' if bf16 else 'with'} --bf16 about {in_words(other)}"
    return text


def _timed(step: TrainingStep, training: Training, plan: torch.Tensor) -> float:
    start = time.perf_counter()
    step(training.targets, plan)
    float(step.totals[0])  # waits for the device
    return time.perf_counter() - start


def in_words(seconds: float) -> str:
    """A duration as people say it: 40 s, 12 min, 3.5 h.

    Example:
        >>> in_words(40), in_words(700), in_words(12_600)
        ('40 s', '12 min', '3.5 h')
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
