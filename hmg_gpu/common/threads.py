"""Work in groups on the CPU, each group whole on one thread."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

from hmg_gpu.common.checks import can_read

Item = TypeVar("Item")
Result = TypeVar("Result")

MANY = 64  # groups of small operations that several threads are worth


def map_groups(
    work: Callable[[Item], Result], groups: Iterable[Item], data: Tensor, *, many: int = MANY
) -> list[Result]:
    """``work`` of every group, in order, each whole on one thread; many groups share PyTorch's threads.

    PyTorch shares every operation among its threads and lets each wait for all of them. Where operations are small and
    other processes want the cores, one late thread holds up every operation. Groups meet at the end alone.

    Args:
        work: called under ``torch.no_grad`` where threads share, by several at a time; its operations use one thread.
        groups: what it is called with, of like size.
        data: what the work reads; threads are for a plain tensor on the CPU.
        many: fewer groups stay on the caller's thread, as they do not earn others (``python -m bench.threads``).

    Example:
        >>> import torch
        >>> from hmg_gpu.common.threads import map_groups
        >>> [int(total) for total in map_groups(torch.sum, torch.arange(6).split(2), torch.arange(6))]
        [1, 5, 9]
    """
    if not can_read(data) or (threads := torch.get_num_threads()) == 1:
        return [work(group) for group in groups]
    groups = list(groups)
    if len(groups) < many:
        try:
            torch.set_num_threads(1)
            return [work(group) for group in groups]
        finally:
            torch.set_num_threads(threads)

    def whole(group: Item) -> Result:
        with torch.no_grad():
            return work(group)

    # The setting belongs to the thread that makes it, but later threads of the process begin with the last one made.
    try:
        with ThreadPoolExecutor(min(threads, len(groups)), initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(whole, groups))
    finally:
        torch.set_num_threads(threads)
