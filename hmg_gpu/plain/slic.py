"""SLIC superpixels of many small crops at once, as scikit-image's ``slic`` makes them (Achanta et al., TPAMI 2012).

    grid of centres (whole numbers, on the host) -> 10 times: assign pixels, move centres -> labels

Pixels lie flat along the last axis. A distance is split into what depends on a pixel's row, on its column and on its
colour: two small tables and one matrix product for each crop. A square that all centres share is left out, so a score
takes the distance's place, and the largest wins.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hmg_gpu.common.tensors import to_device

ROUNDS = 10
_FAR = 1e6  # outside a centre's window
# The whole numbers of int(c - r) .. int(c + r + 1), the last excluded, lie within r + 0.5 of c - 0.5; one end is open.
_MIDDLE = 0.5 - 1e-4
_REST = 1e-12  # of a pixel
_TIE = 8e-6  # a step from centre to centre above the rounding: the lowest centre takes what lies between two

# Linear sRGB to XYZ over the white of D65 at 2 degrees, and from the companded XYZ to L, a, b.
_WHITE = (0.95047, 1.0, 1.08883)
_XYZ = ((0.412453, 0.357580, 0.180423), (0.212671, 0.715160, 0.072169), (0.019334, 0.119193, 0.950227))
_LAB = ((0.0, 116.0, 0.0), (500.0, -500.0, 0.0), (0.0, 200.0, -200.0))


@dataclass(frozen=True)
class Grid:
    """Where centres start in a crop.

    Attributes:
        rows, columns: of the centres, in pixels of the crop; every row meets every column.
        step: S, the larger distance between neighbours, in pixels.
        reach: half the window of a centre in rows and in columns, in pixels: twice the distances of a grid that was
            asked for as many centres as this one has.
    """

    rows: tuple[int, ...]
    columns: tuple[int, ...]
    step: int
    reach: tuple[int, int]

    def __len__(self) -> int:
        return len(self.rows) * len(self.columns)


def grid_of(height: int, width: int, segments: int = 9) -> Grid:
    """The grid of about so many centres in a crop of ``height`` x ``width`` pixels.

    The step is sqrt(height * width / segments); where a side is shorter, its step is the side itself and the other's is
    (other side) / segments. The first centre lies at half a step, rounded down; the step is rounded to even.

    Example:
        >>> from hmg_gpu.plain.slic import grid_of
        >>> grid_of(21, 21)
        Grid(rows=(3, 10, 17), columns=(3, 10, 17), step=7, reach=(14, 14))
        >>> grid_of(4, 60).columns
        (3, 10, 17, 24, 31, 38, 45, 52, 59)
    """
    steps = _steps(height, width, segments)
    rows, columns = (
        tuple(range(int(step // 2), side, round(step))) for step, side in zip(steps, (height, width), strict=True)
    )
    high, wide = (2 * round(step) for step in _steps(height, width, len(rows) * len(columns)))
    return Grid(rows, columns, max(map(round, steps)), (high, wide))


def _steps(height: int, width: int, segments: int) -> tuple[float, float]:
    """Between rows and between columns of a grid, before rounding."""
    if height * width <= segments:
        return 1.0, 1.0
    step = math.sqrt(height * width / segments)
    if min(height, width) >= step:
        return step, step
    return (float(height), width / segments) if height <= width else (height / segments, float(width))


def salted_lab(grey: Tensor, salt: Tensor, valid: Tensor, *, rescale: bool = True) -> Tensor:
    """Grey crops whose red, green and blue are salted by themselves, as CIE Lab (D65, 2 degrees).

    A salted channel is 1. ``rescale`` then maps each crop to 0..1 by its own smallest and largest value, as
    scikit-image does from 0.19 on.

    Args:
        grey: float32 [N, M], 0 to 1.
        salt: float32 [N, 3, M], 1 where a channel is salted, else 0.
        valid: bool [N, M], pixels of the crop; others have no part in its range.

    Returns:
        float32 [N, 3, M]: L of 0 to 100, a, b.

    Example:
        >>> import torch
        >>> from hmg_gpu.plain.slic import salted_lab
        >>> grey, salt = torch.tensor([[0.0, 0.5, 1.0]]), torch.zeros(1, 3, 3)
        >>> salted_lab(grey, salt, torch.ones(1, 3).bool())[0, 0]  # L
        tensor([  0.0000,  53.3890, 100.0000])
    """
    white = grey.new_ones((len(grey), 1))
    if rescale:
        whole = salt.amin(1) + ~valid  # [N, M], at least 1 where no channel shows the crop
        low = torch.maximum(grey, whole).amin(1, keepdim=True)
        high = torch.maximum(grey, salt.amax(1)).mul_(valid).amax(1, keepdim=True)
        span = torch.where(high > low, high - low, 1)
        grey, white = (grey - low).div_(span), (1 - low) / span  # white is 1, but in a crop that is all salt
    linear, white = _linear(grey)[:, None], _linear(white)[:, None]  # [N, 1, M], [N, 1, 1]
    weights = to_device(torch.tensor(_XYZ) / torch.tensor(_WHITE)[:, None], grey.device)  # [3, 3]
    xyz = torch.matmul(weights, salt)  # what salt has of each
    xyz.mul_(white - linear).addcmul_(weights.sum(1)[:, None], linear)
    companded = xyz.log().mul_(1 / 3).exp_()
    companded = torch.where(xyz > 0.008856, companded, xyz.mul_(7.787).add_(16 / 116))
    lab = torch.matmul(to_device(torch.tensor(_LAB), grey.device), companded)
    lab[:, 0] -= 16
    return lab


def _linear(values: Tensor) -> Tensor:
    """sRGB without its companding."""
    curve = values.add(0.055).mul_(1 / 1.055).log_().mul_(2.4).exp_()
    return torch.where(values > 0.04045, curve, values / 12.92)


def slic(lab: Tensor, valid: Tensor, width: int, grid: Grid, *, compactness: float = 20.0) -> Tensor:
    """Assign every pixel to one of K centres that move to the middle of their pixels, 10 times.

        D = ((y - yk)^2 + (x - xk)^2) / S^2 + |lab - lab_k|^2 / compactness^2

    A centre takes pixels of the rows int(max(yk - r, 0)) .. int(min(yk + r + 1, height)), the last excluded, r being
    the grid's reach, and of columns likewise; the lowest of equal ones wins. A pixel that no
    window reaches goes to the nearest all the same. A centre without pixels takes none from then on. Centres start
    without colour, so the first assignment goes by place alone.

    Args:
        lab: float32 [N, 3, M], M = height * width pixels of each crop, row by row.
        valid: bool [N, M], pixels of the crop; the others belong to nothing.
        width: of the crops in pixels.
        grid: K centres, from :func:`grid_of`.

    Returns:
        float32 [N, M], whole numbers: the centre of each pixel; of pixels outside any number.

    Example:
        >>> import torch
        >>> from hmg_gpu.plain.slic import Grid, slic
        >>> lab = torch.zeros(1, 3, 12)
        >>> lab[0, 0] = torch.tensor([0, 0, 0, 0, 90, 90, 0, 0, 0, 0, 0, 0])
        >>> grid = Grid(rows=(0,), columns=(2, 5, 9), step=4, reach=(8, 8))
        >>> slic(lab, torch.ones(1, 12).bool(), 12, grid).int()
        tensor([[0, 0, 0, 0, 1, 1, 2, 2, 2, 2, 2, 2]], dtype=torch.int32)
    """
    count, pixels, number = len(lab), lab.shape[2], len(grid)
    height, device = pixels // width, lab.device
    lines = torch.arange(max(height, width), device=device, dtype=torch.float32)  # of rows and columns alike
    place = torch.meshgrid(lines[:height], lines[:width], indexing="ij")
    features = lab.new_empty((count, 6, pixels))  # L, a, b, y, x, 1; nothing outside
    torch.mul(lab, math.sqrt(2) / compactness, out=features[:, :3])  # so that a product is twice that of colours
    features[:, 3:] = torch.stack((*place, torch.ones_like(place[0]))).view(3, -1)
    features *= valid[:, None].float()
    colour = features[:, :3]
    nearness = 1.0 / grid.step**2
    edges = [-nearness * (reach + 0.5) ** 2 for reach in grid.reach]
    none = lab.new_zeros(())
    tie = torch.arange(number, device=device) * _TIE  # [K]

    means = lab.new_zeros((count, 6, number))
    means[:, 3:5] = to_device(torch.cartesian_prod(torch.tensor(grid.rows), torch.tensor(grid.columns)), device).mT
    far = -5.0 * pixels
    nowhere = to_device(torch.tensor([0, 0, 0, far, far, 1]), device)[:, None]
    score = lab.new_empty((count, number, pixels))
    planes = score.view(count, number, height, width)
    best = lab.new_empty((count, 1, pixels))
    for turn in range(ROUNDS):
        # d^2 = (d + m)^2 - 2 m d - m^2, of which the last is alike for all; the first tells what is in the window.
        away = lines - means[:, 3:5, :, None]  # [N, 2, K, lines], first by rows, then by columns
        shifted = away + _MIDDLE
        table = torch.addcmul(none, shifted, shifted, value=-nearness)
        for axis, edge in enumerate(edges):
            torch.threshold_(table[:, axis], edge, -_FAR)
        table.add_(away, alpha=2 * _MIDDLE * nearness)
        table[:, 0].sub_(means[:, :3].square().sum(1).add_(tie)[..., None], alpha=0.5)
        torch.add(table[:, 0, :, :height, None], table[:, 1, :, None, :width], out=planes)
        if turn:  # until then centres have no colour
            score.baddbmm_(means[:, :3].mT, colour)
        torch.amax(score, 1, keepdim=True, out=best)
        score.eq_(best)  # 1 where a centre wins, else 0
        if turn < ROUNDS - 1:
            # A place that no window reaches weighs next to nothing, but where a centre has no pixels.
            sums = torch.bmm(features, score.mT).add_(nowhere, alpha=_REST)  # [N, 6, K]
            means = sums / sums[:, 5:]
    numbers = torch.arange(number, device=device, dtype=torch.float32).expand(count, 1, -1)
    return torch.bmm(numbers, score)[:, 0]
