"""An epoch of train.py against nothing but forward, backward and optimiser of the same network: python -m bench.epoch

Both train ACM on batches of 8 crops of 256 x 256, as many as NUAA-SIRST's training set makes; the bare loop has its
batches ready in memory. Epochs run in turn, so that a busy machine slows both.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console

from bench.scenes import training_set
from hmg_gpu.common.files import write_json
from hmg_gpu.common.provenance import provenance
from hmg_gpu.data import ImageSet
from hmg_gpu.data.batches import cut_crops, draw_epoch
from hmg_gpu.models import build_model
from hmg_gpu.models.losses import soft_iou_loss
from hmg_gpu.training.loop import Training
from hmg_gpu.training.settings import Settings
from hmg_gpu.training.step import in_channels_last


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=5, help="of each, after one to warm up (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch (default: %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", help="write the figures to this file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_flush_denormal(True)

    device = torch.device(options.device)
    data = training_set("NUAA-SIRST").to(device)
    settings = Settings(epochs=(options.epochs + 1, 0))
    with tempfile.TemporaryDirectory() as folder:
        training = Training(settings, data, None, Path(folder), lambda event: None)

        def ours() -> None:
            training.train_epoch()
            training.epoch, training.step = training.epoch + 1, 0
            training.totals.zero_()

        bare = bare_epoch(training, data)
        spent: dict[str, list[float]] = {"train.py": [], "bare": []}
        for _ in range(options.epochs + 1):
            for name, epoch in (("train.py", ours), ("bare", bare)):
                start = time.perf_counter()
                epoch()
                if device.type == "cuda":
                    torch.cuda.synchronize()
                spent[name].append(time.perf_counter() - start)
    ratios = [a / b for a, b in zip(spent["train.py"][1:], spent["bare"][1:], strict=True)]
    ratio = statistics.median(ratios)
    Console().print(
        f"{data.dataset}, {len(data)} images, {options.threads} threads: epoch of train.py "
        f"{statistics.median(spent['train.py'][1:]):.2f} s, bare {statistics.median(spent['bare'][1:]):.2f} s, "
        f"ratio {ratio:.3f} ({min(ratios):.3f} to {max(ratios):.3f}; asked for: at most 1.10)",
        highlight=False,
    )
    if options.json:
        machine = {"threads": options.threads, "load": os.getloadavg(), "device": options.device}
        write_json(options.json, {"seconds": spent, "ratios": ratios, "machine": machine, "versions": provenance()})
    return int(ratio > 1.1)


def bare_epoch(training: Training, data: ImageSet) -> Callable[[], None]:
    """The same network and optimiser on batches that are ready."""
    device, settings = training.device, training.settings
    model = build_model("acm").to(device)
    layout = torch.channels_last if in_channels_last(device, settings.bf16) else torch.contiguous_format
    model = model.to(memory_format=layout).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    plan = draw_epoch(data.host_sizes, settings.batch_size, settings.patch_size, seed=0, epoch=0)
    batches = [cut_crops(data, training.masks, rows.to(device), settings.patch_size) for rows in plan]
    batches = [(images.contiguous(memory_format=layout), masks.float()) for images, masks in batches]

    def epoch() -> None:
        for images, masks in batches:
            loss = soft_iou_loss(model(images), masks)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()

    return epoch


if __name__ == "__main__":
    sys.exit(main())
