"""The search length of P2B chosen for a data set, from its images and points alone."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hmg_gpu.data.sets import ImageSet
from hmg_gpu.masks.pmg import point_to_mask

STILL = 0.42  # rate below which masks hold still
FROM_END = 2.5  # the choice lies so much below the end of the hold ...
FROM_START = 4.0  # ... but not so much above its start
LEAST = math.log(2) / 2  # a hold: half an octave or more
SMOOTHING = (1 / 16, 4 / 16, 6 / 16, 4 / 16, 1 / 16)
REACH = 0.4  # of the images' shorter side: longer searches only find the border
MAX_POINTS = 500  # more hardly change the choice
MIN_POINTS = 20
FALLBACK = 25  # the paper's length for most sets
_GROUP = 16  # images at a time


def choose_extent(data: ImageSet, *, half_width: int = 4, alpha: float = 0.15) -> int:
    """Choose L_ep without ground truth, by how long the masks hold still (HMG Sec. 4.2 sets it by hand).

    Below the targets' size every longer search grows the masks of a set. Far beyond it a search meets other structures,
    and masks run away to them. In between they hold still: the rate of change (:func:`mask_rates`) is below ``STILL``.
    Where they hold over a short range only, clutter is near, and the choice is its start; the longer they hold, the
    more can be given to the largest targets of the set:

        L_ep = max(start, min(end / 2.5, 4 start))

    of the first hold (:func:`first_hold`): masks can hold still again after they ran away. The constants were set on
    NUAA-SIRST and NUDT-SIRST, see bench/results/masks.md.

    Args:
        data: images and points; of many images about ``MAX_POINTS`` points' worth, evenly spread, are looked at.
        half_width, alpha: L_dp and alpha of PMG.

    Returns:
        L_ep in pixels; ``FALLBACK`` where there are fewer than ``MIN_POINTS`` points; where masks never hold still, the
        length at which they change least.

    Example:
        >>> from hmg_gpu.data.synthetic import make_split
        >>> from hmg_gpu.masks.extent import choose_extent
        >>> choose_extent(make_split("train", count=24, size=64))
        9
        >>> choose_extent(make_split("train", count=4, size=64))  # too few points to judge by
        25
    """
    if len(data.points) < MIN_POINTS:
        return FALLBACK
    lengths, rates = mask_rates(_sample(data), half_width=half_width, alpha=alpha)
    start, end = first_hold(lengths, rates)
    chosen = max(start, min(end / FROM_END, FROM_START * start))
    return int(chosen + 1e-6)  # down, as a mask that ran away costs more than a border that is missing


@torch.no_grad()
def mask_rates(data: ImageSet, *, half_width: int = 4, alpha: float = 0.15) -> tuple[list[int], list[float]]:
    """How fast the masks of a set change with L_ep.

    Returns:
        The lengths, from 5 pixels in quarters of an octave up to ``REACH`` of the images' shorter side (median), and
        for each neighbouring two of them the rate -ln IoU(M(L), M(L')) / ln(L' / L), M(L) the masks of the set at L.
        IoU counts pixels over the set, as the quality of masks does.

    Example:
        >>> import torch
        >>> from hmg_gpu.data import ImageSet
        >>> from hmg_gpu.masks.extent import mask_rates
        >>> image = torch.zeros(1, 40, 40)
        >>> image[0, 12:27, 12:27] = 100  # 15 x 15 pixels: its border is 8 pixels from the point
        >>> data = ImageSet(["a"], image, torch.tensor([[40, 40]]), torch.tensor([[0, 19, 19]]))
        >>> lengths, rates = mask_rates(data)
        >>> lengths, [abs(round(rate, 1)) for rate in rates]  # one pixel up to 7, all 225 from 8 on
        ([5, 6, 7, 8, 10, 12, 14], [0.0, 0.0, 40.6, 0.0, 0.0, 0.0])
    """
    shorter = float(data.sizes.amin(1).double().median())
    lengths = [round(5 * 2 ** (step / 4)) for step in range(40)]
    lengths = lengths[: max(2, sum(extent <= REACH * shorter for extent in lengths))]
    overlap = torch.zeros(len(lengths) - 1, 2, dtype=torch.int64, device=data.images.device)  # intersection, union
    for rows in torch.arange(len(data)).split(_GROUP):
        overlap += _overlap(data.subset(rows.to(data.images.device)), lengths, half_width, alpha)
    rates = []
    for (both, either), low, high in zip(overlap.tolist(), lengths, lengths[1:], strict=False):
        lost = -math.log(both / either) if both else math.inf if either else 0.0
        rates.append(lost / math.log(high / low))
    return lengths, rates


def first_hold(lengths: Sequence[int], rates: Sequence[float]) -> tuple[float, float]:
    """The first range of lengths, of at least half an octave, over which the rate stays within ``STILL``.

    A rate counts at the geometric mean of its two lengths; rates are smoothed (1 : 4 : 6 : 4 : 1 of their logarithms),
    and where they pass ``STILL`` is interpolated. Without such a range it is the longest of the shorter ones, and where
    rates never fall so low both ends are the length of the least.

    Example:
        >>> from hmg_gpu.masks.extent import first_hold
        >>> start, end = first_hold([5, 10, 20, 40, 80, 160], [2, 0.2, 0.2, 0.2, 2])  # low from 10 to 80
        >>> round(start), round(end)  # nearer together by the smoothing
        (14, 57)
    """
    at = [(math.log(low) + math.log(high)) / 2 for low, high in itertools.pairwise(lengths)]
    logs = [math.log(max(rate, 1e-3)) for rate in rates]
    logs = [logs[0]] * 2 + logs + [logs[-1]] * 2
    smooth = [
        math.exp(sum(weight * log for weight, log in zip(SMOOTHING, logs[step : step + 5], strict=True)))
        for step in range(len(rates))
    ]
    holds = []
    for still, group in itertools.groupby(range(len(smooth)), key=lambda step: smooth[step] <= STILL):
        if not still:
            continue
        steps = list(group)
        first, last = steps[0], steps[-1]
        start = _crossing(at, smooth, first, first - 1) if first else math.log(lengths[0])
        end = _crossing(at, smooth, last, last + 1) if last + 1 < len(smooth) else math.log(lengths[-1])
        holds.append((start, end))
    if not holds:
        least = float(lengths[smooth.index(min(smooth))])
        return least, least
    start, end = next((hold for hold in holds if hold[1] - hold[0] >= LEAST), max(holds, key=lambda h: h[1] - h[0]))
    return math.exp(start), math.exp(end)


def _crossing(at: Sequence[float], rates: Sequence[float], below: int, above: int) -> float:
    """Where the straight line between two rates passes ``STILL``."""
    return at[below] + (at[above] - at[below]) * (STILL - rates[below]) / (rates[above] - rates[below])


def _overlap(data: ImageSet, grid: list[int], half_width: int, alpha: float) -> Tensor:
    """int64 [len(grid) - 1, 2]: intersection and union, in pixels, of the masks at neighbouring lengths."""
    rows, before = [], None
    for extent in grid:
        masks = point_to_mask(
            data.images, data.points, extent=extent, half_width=half_width, alpha=alpha, sizes=data.sizes
        )
        if before is not None:
            rows.append(torch.stack((torch.count_nonzero(before & masks), torch.count_nonzero(before | masks))))
        before = masks
    return torch.stack(rows)


def _sample(data: ImageSet) -> ImageSet:
    """Every k-th image with points, so that about ``MAX_POINTS`` points are left."""
    stride = max(1, round(len(data.points) / MAX_POINTS))
    return data if stride == 1 else data.subset(data.points[:, 0].unique()[::stride])
