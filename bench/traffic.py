"""Launches and bytes a pixel of every op, counted in Triton's interpreter: what bench.compile_report --ops shows.

Counted, not measured: each byte that the kernels of one launch read counts once, and each that they write once more, as
if a cache held all of a launch and nothing from launch to launch. Planes that PyTorch clears are not in it.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"  # before a kernel is decorated

import torch
import triton.runtime.interpreter as interpreter
from torch import Tensor

HEIGHT, WIDTH = 64, 512  # of the one image that is looked at


class Traffic:
    """What the launches since its beginning have read and written."""

    def __init__(self) -> None:
        self.launches: list[str] = []
        self.read = self.written = 0
        self._touched: dict[bool, list[np.ndarray]] = {False: [], True: []}

    def note(self, pointers: interpreter.TensorHandle, mask: interpreter.TensorHandle | None, *writes: bool) -> None:
        addresses = pointers.data if mask is None else pointers.data[np.broadcast_to(mask.data, pointers.data.shape)]
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        spread = np.unique(addresses)[:, None] + np.arange(size, dtype=np.uint64)
        for write in writes:
            self._touched[write].append(spread.reshape(-1))

    def end_launch(self) -> None:
        read, written = (
            len(np.unique(np.concatenate(touched))) if touched else 0 for touched in self._touched.values()
        )
        self.read, self.written = self.read + read, self.written + written
        self._touched = {False: [], True: []}


@contextmanager
def counted() -> Iterator[Traffic]:
    """Count what interpreted kernels move."""
    builder, executor, traffic = interpreter.interpreter_builder, interpreter.GridExecutor, Traffic()
    # Name of the operation: where its mask stands among the arguments, and whether it reads (False) and writes (True).
    operations = {
        "create_masked_load": (1, (False,)),
        "create_masked_store": (2, (True,)),
        "create_atomic_rmw": (3, (False, True)),
    }
    plain_call = executor.__call__

    def watch(name: str, place: int, writes: tuple[bool, ...]) -> Callable:
        plain = getattr(builder, name)

        def run(*arguments):
            traffic.note(arguments[1 if name == "create_atomic_rmw" else 0], arguments[place], *writes)
            return plain(*arguments)

        return run

    def call(self, *arguments, **options):
        plain_call(self, *arguments, **options)
        traffic.launches.append(self.fn.__name__)
        traffic.end_launch()

    for name, (place, writes) in operations.items():
        setattr(builder, name, watch(name, place, writes))
    executor.__call__ = call
    try:
        yield traffic
    finally:
        executor.__call__ = plain_call
        for name in operations:
            delattr(builder, name)


def ops(mask: Tensor) -> dict[str, Callable[[], object]]:
    """The ops on one image, of a prediction and an initial mask that are both as ``mask``."""
    from hmg_gpu.kernels import components, counts, update

    points, offsets = update.group_points(torch.tensor([[0, 9, 9], [0, 40, 300]]), 1)
    sizes = torch.tensor([[HEIGHT, WIDTH]])
    logits, initial, current = torch.where(mask, 2.0, -2.0), mask.clone(), mask.clone()  # a byte counts once
    correct = {"sizes": sizes, "offsets": offsets, "low": -9.0, "high": 9.0, "guard": 1.0}
    return {
        "update": lambda: update.update(mask, initial, points, offsets=offsets),
        "update, float32 logits": lambda: update.update(logits, initial, points, offsets=offsets),
        "soft_update": lambda: update.soft_update(logits.sigmoid(), mask.float(), points, offsets=offsets),
        "correct, bfloat16 logits": lambda: update.correct(logits.bfloat16(), initial, current, points, **correct),
        "detection_counts": lambda: counts.detection_counts(mask, initial),
        "components": lambda: components.components(mask, capacity=64),
    }


def rows() -> list[dict]:
    """Launches and bytes a pixel of every op, on an empty image and on one with 2 % of its pixels in blobs."""
    empty = torch.zeros((1, HEIGHT, WIDTH), dtype=torch.bool)
    sparse = empty.clone()
    for left in range(20, WIDTH, 100):
        sparse[0, 27:36, left : left + 9] = True
    found = []
    for said, mask in (("empty", empty), ("5 blobs", sparse)):
        for name, call in ops(mask).items():
            with counted() as traffic:
                call()
            found.append(
                {
                    "op": name,
                    "image": said,
                    "launches": len(traffic.launches),
                    "read": traffic.read / mask.numel(),
                    "written": traffic.written / mask.numel(),
                }
            )
    return found


def main(arguments: list[str]) -> int:
    found = rows()
    if "--json" in arguments:
        print(json.dumps(found, indent=1))
        return 0
    from rich.console import Console
    from rich.table import Table

    table = Table("op", "image", title=f"Ops on {HEIGHT} x {WIDTH} pixels, interpreted: counted, not measured")
    for column in ("launches", "bytes read a pixel", "bytes written a pixel"):
        table.add_column(column, justify="right")
    for row in found:
        table.add_row(row["op"], row["image"], str(row["launches"]), f"{row['read']:.2f}", f"{row['written']:.2f}")
    Console(width=110).print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
