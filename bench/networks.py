"""What the networks cost: parameters, multiply-adds, seconds a training step: python -m bench.networks [--json FILE]

A step is forward, soft-IoU and backward of a batch of 8 images of 256 x 256. Networks take turns, so that ratios hold
on a busy machine.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from bench.__main__ import machine
from hmg_gpu.common.files import write_json
from hmg_gpu.common.provenance import provenance
from hmg_gpu.models import NETWORKS, build_model
from hmg_gpu.models.losses import soft_iou_loss

RESOLUTION = {"acm": "1/4", "alcnet": "1/2", "dnanet": "full", "unet": "full"}  # at which the logits are made
SMALL = ("dnanet:channels=one,backbone=resnet_10", "dnanet:channels=two,backbone=resnet_10")
SIDE, BATCH = 256, 8


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="steps of each network (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to this file")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    torch.set_flush_denormal(True)
    networks = {name: build_model(name).to(memory_format=torch.channels_last) for name in (*NETWORKS, *SMALL)}
    seconds: dict[str, list[float]] = {name: [] for name in networks}
    for turn in range(options.rounds + 1):
        for name, network in networks.items():
            taken = step(network)
            if turn:  # the first warms up
                seconds[name].append(taken)
    fastest = min(map(statistics.median, seconds.values()))
    rows = []
    for name, network in networks.items():
        median = statistics.median(seconds[name])
        about = {"network": name, "parameters": sum(value.numel() for value in network.parameters())}
        about |= {"multiply_adds": multiply_adds(network), "resolution": RESOLUTION[name.partition(":")[0]]}
        rows.append(about | {"seconds_a_step": median, "ratio": median / fastest})
    table = Table(title=f"{BATCH} images of {SIDE} x {SIDE}, {options.threads} threads")
    for heading in ("network", "parameters", "multiply-adds an image", "logits made at", "seconds a step", "ratio"):
        table.add_column(heading, justify="left" if heading == "network" else "right")
    for row in rows:
        numbers = (f"{row['parameters']:,}", f"{row['multiply_adds'] / 1e9:.2f} G", row["resolution"])
        table.add_row(row["network"], *numbers, f"{row['seconds_a_step']:.2f}", f"{row['ratio']:.1f} x")
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    if options.json:
        write_json(options.json, {"rows": rows, "machine": machine(None), "versions": provenance()})
    return 0


def step(network: nn.Module) -> float:
    """Seconds of one forward and backward pass."""
    images = torch.randn(BATCH, 1, SIDE, SIDE).contiguous(memory_format=torch.channels_last)
    masks = torch.rand(BATCH, 1, SIDE, SIDE) > 0.999
    start = time.perf_counter()
    soft_iou_loss(network(images), masks).backward()
    network.zero_grad(set_to_none=True)
    return time.perf_counter() - start


def multiply_adds(network: nn.Module) -> int:
    """Of the convolutions, for one image."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network.eval()(torch.zeros(1, 1, SIDE, SIDE))
    network.train()
    return counter.get_total_flops() // 2


if __name__ == "__main__":
    sys.exit(main())
