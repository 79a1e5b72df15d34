"""COM's evolution of a level set, for many crops at once (distance-regularised, Li et al. 2010, as COM changes it).

A crop of 2b x 2b pixels shrinks where the image ends; it then fills the upper left of its square. What lies beyond is
written before it is read, so that one path serves whole and cut crops, and none knows which others share its batch.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from hmg_gpu.plain.crops import wide

SIGMA = 1.5  # of the smoothing, pixels
MARGIN = 6  # pixels that it reads beyond the crop: 4 sigma
START = 50  # of 255: brighter is inside at the start
INNER = 5  # iterations of a block
STEP = 5.0  # size of a time step
REGULAR = 0.2 / STEP  # weight of the distance regularisation
SHRINK, CREEP = 1.5, -0.1  # speed where the inside's mean has just grown, and otherwise
WIDTH = 1.5  # of the Dirac function
DIFFERENCE = 10 * 1e-10  # weight of the difference of means; its square in the denominator starts at 1e-10
SMALL = 1e-10
REACH = 3  # pixels that the outer band is wide beyond its first


class Crops(NamedTuple):
    """Crops of P points, each in the upper left of a square.

    Attributes:
        values: float32 [P, S + 2 M, S + 2 M], intensities; M pixels around the crop mirror it.
        corner, size: int64 [P, 2], (y, x) of its first pixel in the image, and its height and width.
        position: int64 [P, S, S], y * W + x in the image, held to it.
    """

    values: Tensor
    corner: Tensor
    size: Tensor
    position: Tensor

    @property
    def valid(self) -> Tensor:
        """bool [P, S, S], the crop in its square."""
        steps = torch.arange(self.position.shape[1], device=self.size.device)
        return (steps[:, None] < self.size[:, 0, None, None]) & (steps < self.size[:, 1, None, None])

    @property
    def is_flat(self) -> Tensor:
        """bool [P, 1, 1], whether a crop has no contrast."""
        return self.values.amin((1, 2), keepdim=True) == self.values.amax((1, 2), keepdim=True)


def cut_crops(images: Tensor, points: Tensor, sizes: Tensor, half: int) -> Crops:
    """Rows y - half .. y + half - 1 around each point, columns likewise, cut at the image's border.

    Args:
        images: [N, H, W], float32 or uint8.
        points: int64 [P, 3], rows (image, y, x).
        sizes: int64 [N, 2].
        half: b, pixels.

    Example:
        >>> import torch
        >>> from hmg_gpu.plain.level_set import cut_crops
        >>> crops = cut_crops(torch.zeros(1, 9, 9), torch.tensor([[0, 4, 8]]), torch.tensor([[9, 9]]), half=2)
        >>> crops.corner.tolist(), crops.size.tolist()
        ([[2, 6]], [[4, 3]])
    """
    _, height, width = images.shape
    image, centre = points[:, 0], points[:, 1:]
    corner = (centre - half).clamp(min=0)  # [P, 2]
    size = torch.minimum(centre + half, sizes[image]) - corner
    steps = torch.arange(2 * half, device=points.device)
    rows = (corner[:, :1] + steps).clamp(max=height - 1)
    columns = (corner[:, 1:] + steps).clamp(max=width - 1)
    around = torch.arange(-MARGIN, 2 * half + MARGIN, device=points.device)
    turn = around.remainder(2 * size[:, :, None])  # [P, 2, S + 2 M]
    mirrored = corner[:, :, None] + torch.minimum(turn, 2 * size[:, :, None] - 1 - turn)
    values = images[image[:, None, None], mirrored[:, 0, :, None], mirrored[:, 1, None]].float()
    return Crops(values, corner, size, rows[:, :, None] * width + columns[:, None])


def evolve(crops: Crops, *, blocks: int, difference: bool) -> Tensor:
    """The level set after ``blocks`` of five iterations: [P, S, S], inside where it is at most 0.

    Each iteration moves the level set up, where the image has no edge, as long as the inside's mean grows: the inside
    shrinks to what is bright. Where it does not grow, the inside creeps back.

    Args:
        crops: P of them.
        blocks: b / 2 in COM.
        difference: also the energy of the difference of means, whose weight is so small that it matters where there is
            no inside left; and float64 instead of float32.

    Returns:
        float32 or float64 [P, S, S]. Beyond the crop, and where it is flat, it means nothing.
    """
    dtype = wide(crops.values) if difference else torch.float32
    low, high = (bound((1, 2), keepdim=True) for bound in (crops.values.amin, crops.values.amax))
    span = high - low  # [P, 1, 1]
    scale = torch.where(span > 0, 255 / span, 0).to(dtype)
    valid = crops.valid
    raw = torch.where(valid, (crops.values - low)[:, MARGIN:-MARGIN, MARGIN:-MARGIN], 0)  # whole numbers stay whole
    field = _Field(crops.size, crops.position.shape[1], dtype)
    field.inner.copy_(torch.where(raw * 255 > START * span, -1, 1))
    edge = _edge_indicator((crops.values - low).to(dtype) * scale, field)
    raw, valid = raw.to(dtype), valid.to(dtype)
    band = _Band(raw * scale, crops.size) if difference else None
    for _ in range(blocks):
        best = torch.zeros_like(span, dtype=wide(span))  # [P, 1, 1], the largest mean of this block
        for _ in range(INNER):
            best = _iterate(field, raw, valid, edge, best, scale, band)
    return field.inner


def _iterate(
    field: _Field, raw: Tensor, valid: Tensor, edge: Tensor, best: Tensor, scale: Tensor, band: _Band | None
) -> Tensor:
    """One time step, in place; returns the largest mean so far."""
    field.mirror()
    phi, around = field.inner, field.padded
    down, right = field.slope(around, 1), field.slope(around, 2)
    speed = torch.addcmul(down * down, right, right).sqrt_()  # |grad phi|

    inside = (phi <= 0).to(phi.dtype).mul_(valid)
    count = inside.sum((1, 2), keepdim=True)
    total = inside.mul_(raw).sum((1, 2), keepdim=True, dtype=best.dtype)
    mean = total / count.clamp(min=1)
    push = torch.where(mean > best, SHRINK, CREEP).to(phi.dtype)
    near = phi.clamp(-WIDTH, WIDTH).mul_(math.pi / WIDTH).cos_().add_(1)  # the Dirac function times 2 WIDTH
    change = (near * edge).mul_(push * (STEP / (2 * WIDTH)))
    if band is not None:
        bend = field.divergence(1 / (speed + SMALL), down, right)
        apart = (mean * scale - band.mean(phi)).square() + SMALL
        change += near * bend * (STEP / (2 * WIDTH) * DIFFERENCE / apart)

    # d = p'(s) / s; below SMALL it is 1.
    speed = speed.clamp_(min=SMALL)
    slack = speed.clamp(max=1).mul_(2 * math.pi).sin_().div_(2 * math.pi)
    slack = slack.add_((speed - 1).clamp_(min=0)).div_(speed).sub_(1)
    change.add_(field.divergence(slack, down, right).add_(field.laplacian()), alpha=STEP * REGULAR)
    phi += change
    return torch.maximum(best, mean)


def _edge_indicator(values: Tensor, field: _Field) -> Tensor:
    """1 / (1 + |grad (G * I)|^2): [P, S, S], from values with their margin; smoothed values are rounded to float32."""
    weights = [math.exp(-0.5 * (step / SIGMA) ** 2) for step in range(MARGIN + 1)]
    weights = [weight / (weights[0] + 2 * sum(weights[1:])) for weight in weights]
    for axis in (1, 2):
        side = values.shape[axis] - 2 * MARGIN
        lines = [values.narrow(axis, MARGIN + step, side) for step in range(-MARGIN, MARGIN + 1)]
        smooth = weights[0] * lines[MARGIN]
        for step in range(1, MARGIN + 1):
            smooth = smooth + weights[step] * (lines[MARGIN - step] + lines[MARGIN + step])
        values = smooth.float().to(smooth.dtype)
    around = field.widen(values)
    down, right = field.slope(around, 1), field.slope(around, 2)
    return 1 / (1 + down * down + right * right)


class _Field:
    """A level set on the crops, with one more pixel on each side: [P, S + 2, S + 2].

    Differences are those of numpy.gradient: central, and one-sided at the crop's border. A pixel beyond the border that
    repeats the one before it, and a weight of 1 instead of 1/2 there, give just that.
    """

    def __init__(self, size: Tensor, side: int, dtype: torch.dtype):
        count, device = len(size), size.device
        self.padded = torch.zeros(count, side + 2, side + 2, dtype=dtype, device=device)
        self.inner = self.padded[:, 1:-1, 1:-1]
        self.scratch = (torch.zeros_like(self.padded), torch.zeros_like(self.padded))
        steps, length = torch.arange(side, device=device), size.T[:, :, None]  # [2, P, 1]
        weight = torch.where((steps == 0) | (steps == length - 1), 1.0, 0.5).to(dtype)  # [2, P, S]
        self.weights = (weight[0, :, :, None], weight[1, :, None, :])
        # Lines of each crop, counted with the pixel before the first: [P, 2].
        last, first, none = size, torch.ones_like(size), torch.zeros_like(size)
        third, third_last = size.clamp(max=3), (size - 2).clamp(min=1)

        def lines(*places: Tensor) -> tuple[Tensor, Tensor]:
            """Rows and columns of each crop, for gather and scatter along axis 1 and 2."""
            rows, columns = torch.stack(places, dim=2).unbind(1)  # [P, L]
            return rows[:, :, None].expand(-1, -1, side + 2), columns[:, None].expand(-1, side + 2, -1)

        self.mirrored = lines(none, first, last, last + 1), lines(third, third, third_last, third_last)
        self.repeated = lines(none, last + 1), lines(first, last)

    def mirror(self) -> None:
        """COM's border: the outermost rows take the values two rows in, then columns alike; repeated beyond."""
        for axis in (1, 2):
            self._copy(self.padded, axis, self.mirrored)

    def _copy(self, padded: Tensor, axis: int, lines: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]) -> None:
        """Lines along an axis, in place: (where to, where from)."""
        to, source = (both[axis - 1] for both in lines)
        padded.scatter_(axis, to, padded.gather(axis, source))

    def widen(self, values: Tensor) -> Tensor:
        """Values [P, S, S] with a pixel more on each side."""
        padded = torch.zeros_like(self.padded)
        padded[:, 1:-1, 1:-1] = values
        for axis in (1, 2):
            self._copy(padded, axis, self.repeated)
        return padded

    def slope(self, padded: Tensor, axis: int) -> Tensor:
        """Differences along an axis: [P, S, S]."""
        side, other = padded.shape[axis] - 2, 3 - axis
        lines = padded.narrow(other, 1, side)
        return (lines.narrow(axis, 2, side) - lines.narrow(axis, 0, side)).mul_(self.weights[axis - 1])

    def divergence(self, weight: Tensor, down: Tensor, right: Tensor) -> Tensor:
        """Of a weight times a vector field, [P, S, S] each: [P, S, S]."""
        for axis, padded, values in zip((1, 2), self.scratch, (down, right), strict=True):
            torch.mul(weight, values, out=padded[:, 1:-1, 1:-1])
            self._copy(padded, axis, self.repeated)
        return self.slope(self.scratch[0], 1).add_(self.slope(self.scratch[1], 2))

    def laplacian(self) -> Tensor:
        """Of the level set, five points: [P, S, S]."""
        rows, columns = self.padded[:, :, 1:-1], self.padded[:, 1:-1]
        result = (rows[:, 2:] + rows[:, :-2]).add_(columns[:, :, 2:]).add_(columns[:, :, :-2])
        return result.sub_(self.inner, alpha=4)


class _Band:
    """The mean of COM's band outside the contour, as sums of the crop over runs that start at a pixel of the contour.

    The source lists pixels by their flat index p in the crop, so that runs go round the ends of rows; those that end
    beyond the crop are dropped, and those before its first pixel count from its end.
    """

    def __init__(self, values: Tensor, size: Tensor):
        side = values.shape[1]
        self.rows, self.columns = size[:, :1], size[:, 1:]  # [P, 1]
        self.total = self.rows * self.columns
        self.flat = torch.arange(side * side, device=size.device).expand(len(size), -1)  # [P, S * S], p
        self.place = (self.flat // self.columns).clamp(max=side - 1) * side + self.flat % self.columns
        self.inside = self.flat < self.total
        self.counted = self.inside & (self.flat > 4 * self.columns) & (self.flat < self.columns * (self.columns - 4))
        values = values.flatten(1).gather(1, self.place)
        steps, reach = range(REACH + 1), range(1, REACH + 1)
        runs = (
            [-step for step in steps],
            [*steps],
            [step * self.rows for step in steps],
            [-k * self.rows - step for k in reach for step in steps],
            [k * self.rows + step for k in reach for step in steps],
        )
        self.sums, self.counts = zip(*(self._run(values, run) for run in runs), strict=True)

    def _run(self, values: Tensor, offsets: list[int | Tensor]) -> tuple[Tensor, Tensor]:
        """Sum and number of the crop's values at p + offset, for every p: [P, S * S] each."""
        sums, counts = torch.zeros_like(values), torch.zeros_like(values)
        for offset in offsets:
            place = self.flat + offset
            kept = (place < self.total).to(values.dtype)
            counts += kept
            sums += kept * values.gather(1, place.remainder(self.total))
        return sums, counts

    def mean(self, phi: Tensor) -> Tensor:
        """For each crop, 0 where the band is empty: [P, 1, 1]."""
        outside = (phi.flatten(1).gather(1, self.place) > 0) & self.inside  # [P, S * S]

        def at(offset: int | Tensor) -> tuple[Tensor, Tensor]:
            """Whether p + offset lies outside the contour, and whether it lies in the crop at all."""
            place = self.flat + offset
            known = (place >= 0) & (place < self.total)
            return outside.gather(1, place.clamp(0, self.flat.shape[1] - 1)) & known, known

        (right, has_right), (left, has_left) = at(1), at(-1)
        (above, has_above), (below, has_below) = at(-self.columns), at(self.columns)
        starts = outside & self.counted
        at_right, at_left = starts & ~right & has_right, starts & ~left & has_left
        corner = above & ~below & has_below
        starts = (at_right, at_left, starts & ~above & has_above, at_right & corner, at_left & corner)
        total = sum((start * values).sum(1) for start, values in zip(starts, self.sums, strict=True))
        count = sum((start * values).sum(1) for start, values in zip(starts, self.counts, strict=True))
        return (total / count.clamp(min=1))[:, None, None]
