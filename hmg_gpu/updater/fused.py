"""The paper's correction and the judgement of the values in one pass of the kernels, where there are any."""

from __future__ import annotations

import torch
from torch import Tensor

from hmg_gpu.common.backend import backend_for
from hmg_gpu.models.foreign import Output
from hmg_gpu.updater.report import COLUMNS, IGNORED, POSITIVE, SLACK


def can_fuse(values: Tensor) -> bool:
    """Whether :func:`correct_fused` takes them."""
    kinds = (torch.bool, torch.float32, torch.float16, torch.bfloat16)
    return values.dtype in kinds and backend_for(values) == "triton"


def correct_fused(
    values: Tensor,
    initial: Tensor,
    current: Tensor,
    points: Tensor,
    offsets: Tensor,
    sizes: Tensor,
    radius: int,
    level: float,
    output: Output,
    guard: float | None,
) -> tuple[Tensor, Tensor]:
    """:func:`hmg_gpu.updater.report.judge` and the paper's correction in the kernels' one pass.

    Args:
        values, sizes, level, output, guard: as :func:`hmg_gpu.updater.report.judge`.
        initial, current: bool [b, H, W]; what the guard refuses keeps ``current``.
        points, offsets, radius: as :func:`hmg_gpu.update`.

    Returns:
        uint8 [b, H, W], bits HYBRID and PREDICTION; int64 [b, COLUMNS], of OUTSIDE and POSITIVE whether there are any.
    """
    from hmg_gpu.kernels.update import correct

    slack = 0.0 if output == "logits" else SLACK
    planes, totals, ignored = correct(
        values, initial, current, points,
        sizes=sizes, offsets=offsets, radius=radius, threshold=level, low=-slack, high=1 + slack, guard=guard,
    )  # fmt: skip
    counts = sizes.new_zeros(len(values), COLUMNS)
    counts[:, : POSITIVE + 1], counts[:, IGNORED] = totals[:, : POSITIVE + 1], ignored
    return planes, counts
