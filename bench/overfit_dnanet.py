"""Check that DNANet learns at all: python -m bench.overfit_dnanet. It must fit 16 real crops to an IoU of 0.8.

The crops are 64 x 64 pixels around targets spread evenly over NUAA-SIRST's training images (HMG_DATA names the folder
that holds the data sets), with their ground truth; the loss is the mean over the four heads. The IoU is that of the
network as it is used: eval mode, last head, over all crops. Exits with 0 when it is reached, else with 1.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from bench.scenes import in_one_line, real_folder
from hmg_gpu.data import load_folder
from hmg_gpu.data.batches import cut_crops
from hmg_gpu.models import build_model
from hmg_gpu.models.losses import soft_iou_loss

GOAL = 0.8
COUNT = 16


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=64, help="side of a crop, a multiple of 16 (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=8, help="default: %(default)s")
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="of Adam (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=200, help="at most (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: %(default)s")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_flush_denormal(True)
    images, masks = real_crops(real_folder("NUAA-SIRST"), options.size)
    return 0 if overfit(images, masks, options) >= GOAL else 1


def real_crops(folder: Path, size: int) -> tuple[Tensor, Tensor]:
    """Normalised images float32 [16, 1, S, S] and ground truth bool of the same shape, a target in each."""
    data = load_folder(folder, "train", masks=True)
    rows = torch.linspace(0, len(data.points) - 1, COUNT).long()
    image, y, x = data.points[rows].unbind(1)
    slack = (data.sizes[image] - size).clamp(min=0)  # [16, 2]
    corner = torch.minimum((torch.stack((y, x), 1) - size // 2).clamp(min=0), slack)
    plan = torch.cat((image[:, None], corner, torch.zeros(COUNT, 3, dtype=torch.int64)), 1)
    return cut_crops(data, data.masks, plan, size)


def overfit(images: Tensor, masks: Tensor, options: argparse.Namespace) -> float:
    """Train until the IoU over all crops reaches ``GOAL`` or the steps are spent; the last IoU."""
    torch.manual_seed(0)
    model = build_model("dnanet").to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), lr=options.learning_rate, fused=True)
    images = images.contiguous(memory_format=torch.channels_last)
    started, iou, step = time.perf_counter(), 0.0, 0
    while step < options.steps and iou < GOAL:
        for chosen in torch.randperm(len(images)).split(options.batch_size):
            heads = model(images[chosen])
            loss = soft_iou_loss(heads, masks[chosen])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            step += 1
        if step % 10 == 0 or step >= options.steps:
            iou = measure(model, images, masks)
            cpu, wall = time.process_time(), time.perf_counter() - started
            losses = f"loss of {len(heads)} heads {loss.item():.3f}"
            print(f"step {step:3d}  {losses}  IoU {iou:.3f}  {wall:.0f} s, CPU {cpu:.0f} s", flush=True)
    return iou


@torch.no_grad()
def measure(model: torch.nn.Module, images: Tensor, masks: Tensor) -> float:
    """IoU over all crops in eval mode."""
    model.eval()
    prediction = model(images) > 0
    model.train()
    return float((prediction & masks).sum() / (prediction | masks).sum())


if __name__ == "__main__":
    sys.exit(in_one_line(main))
