"""One step of mean field in a fully connected CRF of two labels, every pair of pixels taken exactly.

Kraehenbuehl and Koltun, NeurIPS 2011, with their symmetric normalisation; at some hundred pixels a crop all pairs cost
less than a lattice that approximates them.
"""

from __future__ import annotations

import torch
from torch import Tensor

NEAR, NEAR_WEIGHT = 3.0, 3.0  # spread in pixels, and weight, of the kernel of places
WIDE, ALIKE, ALIKE_WEIGHT = 32.0, 13.0, 10.0  # spread in pixels and in intensities of 0 to 255, of the bilateral one
CHANNELS = 3  # the kernel is one of colours, and grey counts three times
PAIRS = {"cpu": 1 << 18}  # held at a time: small enough for a CPU's cache
PAIRS_ACCELERATOR = 1 << 26


def mean_field(probability: Tensor, grey: Tensor, valid: Tensor, width: int) -> Tensor:
    """Labels after one step: 1 where the energy of the target is lower, ties to the background.

        q = p clipped to 1e-5..1, normalised with 1 - p
        log(p / (1 - p)) + 3 K_near (2 q - 1) + 10 K_alike (2 q - 1) > 0

    K_near = exp(-d^2 / (2 * 3^2)) of the distance d in pixels, K_alike = exp(-d^2 / (2 * 32^2) - 3 c^2 / (2 * 13^2)) of
    d and the difference c of intensities; each divided by the square roots of its row sums on both sides.

    Args:
        probability: float32 [N, M] in 0 to 1, M = height * width pixels of each crop, row by row.
        grey: float32 [N, M], intensities of 0 to 255.
        valid: bool [N, M], pixels of the crop; others take no part and are False.
        width: of the crops in pixels.

    Returns:
        bool [N, M].

    Example:
        >>> import torch
        >>> from hmg_gpu.plain.crf import mean_field
        >>> grey = torch.tensor([[10.0, 12.0, 200.0, 198.0, 11.0]])  # a row; the fourth pixel is like the third
        >>> mean_field(torch.tensor([[0.0, 0.1, 1.0, 0.4, 0.0]]), grey, torch.ones(1, 5).bool(), 5)
        tensor([[False, False,  True,  True, False]])
    """
    count, pixels = probability.shape
    clipped, rest = probability.clamp(1e-5, 1), (1 - probability).clamp(1e-5, 1)
    here = valid.float()
    pull = (2 * clipped / (clipped + rest) - 1) * here  # [N, M], 2 q - 1
    rows = torch.arange(pixels // width, device=grey.device, dtype=torch.float32)
    columns = torch.arange(width, device=grey.device, dtype=torch.float32)
    by_row, by_column = ((-(line[:, None] - line).square() / (2 * NEAR**2)).exp() for line in (rows, columns))

    def near(values: Tensor) -> Tensor:
        """K_near is one kernel by rows and one by columns."""
        return (by_row @ values.view(count, -1, width) @ by_column).reshape(count, pixels)

    scale = torch.where(valid, near(here), 1).rsqrt()
    energy = (clipped / rest).log() + NEAR_WEIGHT * scale * near(scale * pull)

    apart = (rows[:, None] - rows).square()[:, None, :, None] + (columns[:, None] - columns).square()[None, :, None]
    apart = -apart.reshape(pixels, pixels) / (2 * WIDE**2)  # [M, M]
    shades = grey * (CHANNELS / 2) ** 0.5 / ALIKE
    limit = PAIRS.get(grey.device.type, PAIRS_ACCELERATOR)
    for some in torch.arange(count, device=grey.device).split(max(1, limit // pixels**2)):
        kernel = _Alike(shades[some], apart, max(1, limit // pixels))
        mine = here[some]
        scale = torch.where(mine > 0, kernel.times(mine), 1).rsqrt()  # [n, M]
        energy[some] += ALIKE_WEIGHT * scale * kernel.times(scale * pull[some])
    return (energy > 0) & valid


class _Alike:
    """K_alike of some crops before its normalisation; made once where it fits into ``lines`` rows, else at each use."""

    def __init__(self, shades: Tensor, apart: Tensor, lines: int):
        count, pixels = shades.shape
        self._shades, self._apart, self._lines = shades, apart, min(lines, pixels)
        self._room = shades.new_empty((count, self._lines, pixels))
        self._whole = self._rows(0) if self._lines == pixels else None

    def _rows(self, first: int) -> Tensor:
        """Rows from the first on: [n, lines, M]."""
        apart = self._apart[first : first + self._lines]
        rows = self._room[:, : len(apart)]
        torch.sub(self._shades[:, first : first + len(apart), None], self._shades[:, None], out=rows)
        return torch.sub(apart, rows.square_(), out=rows).exp_()

    def times(self, values: Tensor) -> Tensor:
        """The kernel times values [n, M]."""
        if self._whole is not None:
            return torch.bmm(self._whole, values[:, :, None])[..., 0]
        starts = range(0, values.shape[1], self._lines)
        return torch.cat([torch.bmm(self._rows(first), values[:, :, None])[..., 0] for first in starts], dim=1)
