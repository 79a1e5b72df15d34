"""What a student learns from: PMG's masks, each with a search as long as its target is wide."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from hmg_gpu.data.sets import ImageSet
from hmg_gpu.masks.makers.pmg import Pmg
from hmg_gpu.masks.windows import masks_around

WIDTHS = 2.0  # of a target (the root of its mask's area) that PMG looks for its edge
SHORTEST, RATIO, TIMES = 4, 0.8, 3  # pixels, of one length to the next shorter one, masks from lengths from masks
HALF_WIDTH, ALPHA = 1 / 2, 2 / 3  # of PMG's, so that less of a target is cut off


def lesson_masks(data: ImageSet, radius: int, pmg: Pmg, *, centres: Tensor | None = None) -> Tensor:
    """PMG's mask of each point, in a window around it: bool [P, 2 R + 1, 2 R + 1].

    PMG has one L_ep for all targets of a set. For a small target that is too long: what lies around it counts as part
    of it. Here each target's length follows from its own mask, up to the set's: of lengths that fall by a fifth the
    shortest of at least two widths. L_dp is half as long and alpha two thirds, as masks in lessons had better be too
    large than cut off; these three were chosen on NUAA-SIRST and NUDT-SIRST with their ground truth.

    Args:
        data: images and points; the masks come in the points' order.
        radius: R in pixels.
        pmg: its extent settled; the longest search.
        centres: int64 [P, 2], (y, x) of the windows' centres where they are not the points.

    Example:
        >>> from hmg_gpu.data.synthetic import make_split
        >>> from hmg_gpu.masks.student.lessons import lesson_masks
        >>> scenes = make_split("train", count=2, size=64)
        >>> lesson_masks(scenes, 9, Pmg(10)).shape[1:]
        torch.Size([19, 19])
    """
    pmg = replace(pmg, half_width=round(pmg.half_width * HALF_WIDTH), alpha=pmg.alpha * ALPHA)
    shorter = {max(SHORTEST, round(pmg.extent * RATIO**step)) for step in range(1, 12)}
    lengths = sorted({pmg.extent} | {length for length in shorter if length < pmg.extent})
    table = torch.tensor(lengths, dtype=torch.float32, device=data.points.device)
    centres = data.points[:, 1:] if centres is None else centres
    masks = masks_around(data, radius, pmg, centres=centres)
    for _ in range(TIMES):
        wanted = WIDTHS * masks.sum((1, 2)).clamp(min=1).sqrt()
        number = torch.bucketize(wanted, table).clamp(max=len(lengths) - 1)
        for index, length in enumerate(lengths):
            rows = (number == index).nonzero()[:, 0]
            part = replace(data, points=data.points[rows])
            masks[rows] = masks_around(part, radius, replace(pmg, extent=length), centres=centres[rows])
    return masks
