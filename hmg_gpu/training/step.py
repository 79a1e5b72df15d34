"""One step of training: crops, forward, loss, backward, optimiser, counts; nothing in it is read from the device.

The step can run in three ways that give the same result within rounding:

    eager    operation by operation
    compile  the network through torch.compile; the rest as before
    graph    everything captured once as a CUDA graph and replayed, without a launch from Python for each operation
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from hmg_gpu.common.errors import InputError
from hmg_gpu.common.parallel import ALONE, Team
from hmg_gpu.common.tensors import last_head
from hmg_gpu.data.batches import cut_crops, to_targets
from hmg_gpu.data.sets import ImageSet
from hmg_gpu.masks import to_masks
from hmg_gpu.models.losses import soft_iou_loss
from hmg_gpu.plain.components import connected_components

WAYS = ("eager", "compile", "graph")
COUNTS = ("loss", "intersection", "union", "foreground", "pixels")
WARM_UP = 3  # steps that a graph is preceded by, so that lazy initialisation and autotuning lie behind it


def in_channels_last(device: torch.device, bf16: bool) -> bool:
    """Whether the network and its input are stored with the channels last.

    Measured on the CPU: the faster layout. On a GPU it is the layout that tensor cores read (PyTorch recommends it for
    half precision); float32 without TF32 does not use them, and its kernels are written for the plain layout.
    """
    return device.type == "cpu" or bf16


class TrainingStep:
    """Trains a network by one batch a call, with Adam.

    On one rank of several it takes its share of the batch and the gradients are averaged; on a GPU (``SyncBatchNorm``)
    batch norm sees the whole batch, on the CPU, where PyTorch has no such layer, every rank's own share.

    Args:
        model: in training mode when called; on the device of the data and in the layout of :func:`in_channels_last`.
        data: the images.
        patch_size: side of a crop in pixels.
        learning_rate: of Adam; see :meth:`set_rate`.
        loss: reduction of :func:`hmg_gpu.models.losses.soft_iou_loss`.
        bf16: autocast to bfloat16.
        way: one of ``WAYS``.
        team: the ranks that share each batch.
        averaged: a copy of the network that becomes the moving average of its weights; None: none is kept.
        keep: the share of the average that each step keeps.

    Attributes:
        optimizer: fused Adam.
        totals: float64 [5] on the device: what was counted so far, see ``COUNTS``; of a team, this rank's part of the
            sum.

    Raises:
        InputError: this machine, or a team, cannot do it in this way; the text says why.
    """

    def __init__(
        self,
        model: nn.Module,
        data: ImageSet,
        *,
        patch_size: int,
        learning_rate: float,
        loss: str = "image",
        bf16: bool = False,
        way: str = "eager",
        team: Team = ALONE,
        averaged: nn.Module | None = None,
        keep: float = 0.0,
    ):
        self.device = data.images.device
        check_step(way, self.device, team)
        self.model, self.data, self.patch_size, self.loss, self.bf16 = model, data, patch_size, loss, bf16
        self.way, self.team = way, team
        self._total = None if team.ranks == 1 else lambda sums: _OverRanks.apply(sums, team)
        self._average = None if averaged is None else _Average(averaged, model, keep)
        self.network = torch.compile(model, dynamic=False) if way == "compile" else model
        graph = way == "graph"
        # A graph holds addresses: its learning rate is a tensor, and Adam counts its steps on the device.
        rate = torch.tensor(learning_rate, device=self.device) if graph else learning_rate
        self.optimizer = torch.optim.Adam(model.parameters(), lr=rate, fused=True, capturable=graph)
        self.totals = torch.zeros(len(COUNTS), dtype=torch.float64, device=self.device)
        self._gradients = _flat_gradients(model) if team.ranks > 1 else None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._aside = torch.cuda.Stream(self.device) if graph else None  # of the warm-up
        self._masks: Tensor | None = None
        self._steps = 0  # with these masks

    def set_rate(self, rate: float) -> None:
        """Set Adam's learning rate."""
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate

    def __call__(self, masks: Tensor, plan: Tensor) -> None:
        """Train by one batch.

        Random numbers (dropout) come from PyTorch's generator of the device, in the same order in every way: a graph
        reads the generator's seed and offset when it is replayed, so ``torch.manual_seed`` before a call decides them.

        Args:
            masks: bool [N, H, W], the labels; or uint8 soft labels, which are counted as masks where above 0.5.
            plan: int64 [B, 8] on the device, one batch of :func:`hmg_gpu.data.batches.draw_epoch` (or a rank's rows).
        """
        if self.way != "graph":
            self._run(masks, plan)
            return
        if masks is not self._masks:  # a graph holds the address of the old ones
            self._graph, self._masks, self._steps = None, masks, 0
        if self._steps < WARM_UP:
            self._steps += 1
            here = torch.cuda.current_stream()
            self._aside.wait_stream(here)
            with torch.cuda.stream(self._aside):
                self._run(masks, plan)
            here.wait_stream(self._aside)
            return
        if self._graph is None:
            self._plan = plan.clone()
            self.optimizer.zero_grad(set_to_none=True)  # so that the gradients are made in the graph's own memory
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):  # notes the step down without doing it
                self._run(masks, self._plan)
            self._graph = graph  # only now: a capture that failed is not to be replayed
        self._plan.copy_(plan)
        self._graph.replay()

    def _run(self, masks: Tensor, plan: Tensor) -> None:
        images, labels = cut_crops(self.data, masks, plan, self.patch_size)  # [B, 1, S, S]
        soft = labels.dtype == torch.uint8
        target, masks = (to_targets(labels), to_masks(labels)) if soft else (labels, labels)
        if in_channels_last(self.device, self.bf16):
            images = images.contiguous(memory_format=torch.channels_last)
        # A cast that was cached outside a graph would be missing in it.
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16, cache_enabled=self.way != "graph"):
            output = self.network(images)
        loss = soft_iou_loss(output, target, reduction=self.loss, total=self._total)
        if self._gradients is None:
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
        else:
            self._gradients.zero_()
            loss.backward()
            self.team.add(self._gradients.div_(self.team.ranks))
        self.optimizer.step()
        if self._average is not None:
            self._average.step()
        with torch.no_grad():
            prediction = last_head(output) > 0
            counts = (
                loss.detach() / self.team.ranks,
                (prediction & masks).sum(),
                (prediction | masks).sum(),
                prediction.sum(),
                torch.full_like(loss, prediction.numel()),
            )
            self.totals += torch.stack([count.double() for count in counts])


class _OverRanks(torch.autograd.Function):
    """The sum of a tensor over the ranks. Gradients are averaged afterwards, so they grow by as much here."""

    @staticmethod
    def forward(context: Any, values: Tensor, team: Team) -> Tensor:
        context.ranks = team.ranks
        return team.add(values.clone())

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * context.ranks, None


class _Average:
    """Moves one network's weights and running statistics towards another's, all at once."""

    def __init__(self, averaged: nn.Module, model: nn.Module, keep: float):
        self.keep = keep
        pairs = list(zip(averaged.state_dict().values(), model.state_dict().values(), strict=True))
        self.floats = [pair for pair in pairs if pair[0].is_floating_point()]
        self.counters = [pair for pair in pairs if not pair[0].is_floating_point()]

    @torch.no_grad()
    def step(self) -> None:
        averages, weights = map(list, zip(*self.floats, strict=True))
        torch._foreach_lerp_(averages, weights, 1 - self.keep)
        for average, counter in self.counters:
            average.copy_(counter)


def check_step(way: str, device: torch.device, team: Team = ALONE) -> None:
    """Refuse a step that cannot work here, before anything is trained.

    Raises:
        InputError: the way is unknown, or the device, the compiler or the number of processes stand against it.
    """
    if way not in WAYS:
        raise InputError(f"step = {way!r}: expected one of {', '.join(WAYS)}")
    if way == "graph" and device.type != "cuda":
        raise InputError(f"step = graph: CUDA graphs need a CUDA device, the data is on {device.type}; use eager")
    if way == "graph" and team.ranks > 1:
        raise InputError("step = graph: works in one process; use eager or compile under torchrun")
    if way == "compile":
        try_compiling(device)


@cache
def try_compiling(device: torch.device) -> None:
    """Compile something small, so that a compiler that is missing or broken shows at once and in plain words."""
    try:
        torch.compile(torch.relu, dynamic=False)(torch.zeros(2, device=device))
    except Exception as error:  # whatever the compiler's layers raise
        reason = " ".join(str(error).split())[:160]
        raise InputError(
            f"step = compile: torch.compile does not work here ({reason}); "
            "install a C++ compiler (g++ or clang++), or use eager"
        ) from error


def synchronised(model: nn.Module, device: torch.device, team: Team) -> nn.Module:
    """The network with batch norms over the batches of all ranks, where PyTorch has them: on CUDA."""
    if team.ranks > 1 and device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return model


def _flat_gradients(model: nn.Module) -> Tensor:
    """One tensor that holds all gradients, each parameter's ``grad`` a part of it in the parameter's own layout.

    So a step exchanges them in a single call, in an order that does not depend on how the backward pass went: a run
    that resumes goes on to the same bits. The networks are small (0.4 and 4.7 million weights).
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    flat = parameters[0].detach().new_zeros(sum(map(torch.numel, parameters)))
    first = 0
    for parameter in parameters:
        parameter.grad = flat.as_strided(parameter.shape, parameter.stride(), first)
        first += parameter.numel()
    return flat


def centres(data: ImageSet) -> Tensor:
    """A point in the middle of each target of the ground truth, for crops that hold one: int64 [K, 3] on the CPU."""
    return connected_components(data.masks.cpu(), data.sizes.cpu()).places
