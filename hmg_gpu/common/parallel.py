"""Several processes that work as one, started by torchrun: who this one is, and what all of them agree on."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
from torch import Tensor, distributed

from hmg_gpu.common.errors import HMGError, InputError

Value = TypeVar("Value")
WAIT = 300.0  # seconds that a rank waits for the others to make the same call

_met = 0  # calls that this process has made together with the others


@dataclass(frozen=True)
class Team:
    """The processes of one run. Every rank makes the same calls in the same order; one process alone waits for nobody.

    Attributes:
        rank: of this process, 0 to ranks - 1; rank 0 writes and prints.
        ranks: number of processes.
        local: number of this process on its machine: the GPU that it takes.
    """

    rank: int = 0
    ranks: int = 1
    local: int = 0

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank. Host memory only: a GPU's queue is not waited for."""
        if self.ranks == 1:
            return flag
        flags = torch.tensor([int(flag)])
        distributed.all_reduce(flags, distributed.ReduceOp.MAX)
        return bool(flags)

    def add(self, values: Tensor) -> Tensor:
        """The sum over the ranks, in place; any device. Ranks end with the same bits."""
        if self.ranks > 1:
            distributed.all_reduce(values)
        return values

    def same(self, values: Iterator[Tensor]) -> None:
        """Replace tensors by those of rank 0."""
        if self.ranks > 1:
            for value in values:
                distributed.broadcast(value, 0)

    def first(self, work: Callable[[], Value]) -> Value:
        """Do something on rank 0 while the others wait, and give its result to all; where it fails, all fail.

        Args:
            work: gives a JSON value (tuples come back as lists where there are several ranks).
        """
        if self.ranks == 1:
            return work()
        failure, text = None, b""
        if self.rank == 0:
            try:
                text = json.dumps(work()).encode()
            except Exception as error:
                failure = error
        size = torch.tensor([-1 if failure else len(text)])
        distributed.broadcast(size, 0)
        if failure:
            raise failure
        if size < 0:
            raise HMGError("rank 0 failed; its own message says why")
        values = torch.tensor(list(text), dtype=torch.uint8) if self.rank == 0 else torch.empty(size, dtype=torch.uint8)
        distributed.broadcast(values, 0)
        return json.loads(bytes(values.tolist()))

    def device(self, name: str) -> str:
        """The device of this rank: of "cuda" the GPU with its own number."""
        return f"cuda:{self.local}" if self.ranks > 1 and name == "cuda" else name


ALONE = Team()


def position() -> tuple[int, int]:
    """(rank, ranks) of this process."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def meet(call: str) -> tuple[int, int]:
    """(rank, ranks) of this process, once every rank has made the same call.

    Args:
        call: names it; the same on every rank.

    Raises:
        HMGError: some rank has not within ``WAIT`` seconds, as where only rank 0 makes it.
    """
    global _met
    rank, ranks = position()
    if ranks > 1:
        store = distributed.distributed_c10d._get_default_store()
        keys = [f"hmg_gpu {_met} {call} {number}" for number in range(ranks)]
        store.set(keys[rank], "here")
        for number, key in enumerate(keys):
            try:
                store.wait([key], timedelta(seconds=WAIT))
            except Exception as error:  # the store's own time-out, of another type in every release
                store.delete_key(keys[rank])  # who comes too late must not go on alone
                raise HMGError(
                    f"{call}: rank {number} has not made this call within {WAIT:g} s; every rank must make it: "
                    "leave out `if rank == 0`"
                ) from error
        _met += 1
    return rank, ranks


def who() -> str:
    """What stands before a message of a rank other than 0: "rank 1: "."""
    rank = os.environ.get("RANK", "0")
    return f"rank {rank}: " if rank != "0" and os.environ.get("WORLD_SIZE", "1") != "1" else ""


@contextmanager
def joined() -> Iterator[Team]:
    """Take part in the run that torchrun started, or work alone where it did not.

    Tensors on the CPU travel by gloo, those on a GPU by NCCL.

    Raises:
        HMGError: another process has ended too early; nothing waits for it.
    """
    ranks = _number("WORLD_SIZE", 1)
    if ranks == 1 or "RANK" not in os.environ:
        yield ALONE
        return
    team = Team(_number("RANK", 0), ranks, _number("LOCAL_RANK", 0))
    if torch.cuda.is_available() and team.local < torch.cuda.device_count():
        torch.cuda.set_device(team.local)
    distributed.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield team
        team.any(False)  # whoever leaves early makes torchrun end the others
    except RuntimeError as error:
        if isinstance(error, distributed.DistError) or "gloo" in str(error):
            raise HMGError("another process of the run has ended; its own message says why") from error
        raise
    finally:
        distributed.destroy_process_group()


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise InputError(f"{name}={text}: expected a whole number in the environment, as torchrun sets it")
    return int(text)
