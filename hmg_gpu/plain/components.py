"""Connected components (8-connected) and their moments without the kernels.

    CPU                 SciPy on runs of foreground pixels, one call for the whole batch
    any other device    kornia's union-find

``hmg_gpu/masks/components.py`` picks the kernels where there are any.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hmg_gpu.common.backend import backend_for
from hmg_gpu.common.checks import can_read, check_mask, check_sizes
from hmg_gpu.common.tensors import valid_area


@dataclass(frozen=True)
class Components:
    """The K connected components of a batch of masks, ordered by image and then by their first pixel in raster order.

    Attributes:
        shape: (B, H, W) of the batch.
        pixels: int64 [F], flat index into the batch of every foreground pixel, ascending.
        component: int64 [F], the component (0 to K - 1) of each of these pixels.
        image: int64 [K], the image that holds the component.
        area, sum_y, sum_x: int64 [K], its pixel count and the sums of its pixels' coordinates.

    Example:
        >>> import torch
        >>> from hmg_gpu.plain.components import connected_components
        >>> found = connected_components(torch.tensor([[[1, 0, 0, 1], [0, 1, 0, 0]]]).bool())
        >>> len(found), found.area.tolist(), found.centroids.tolist()
        (2, [2, 1], [[0.5, 0.5], [0.0, 3.0]])
        >>> found.mask(found.area > 1)[0].int()
        tensor([[1, 0, 0, 0],
                [0, 1, 0, 0]], dtype=torch.int32)
    """

    shape: tuple[int, int, int]
    pixels: Tensor
    component: Tensor
    image: Tensor
    area: Tensor
    sum_y: Tensor
    sum_x: Tensor

    def __len__(self) -> int:
        return len(self.area)

    @property
    def centroids(self) -> Tensor:
        """float64 [K, 2], rows (y, x) in pixels; the centre of a pixel is its integer coordinate."""
        return torch.stack((self.sum_y, self.sum_x), dim=1).double() / self.area[:, None]

    @property
    def places(self) -> Tensor:
        """int64 [K, 3], rows (image, y, x): the centroids rounded to pixels."""
        return torch.cat((self.image[:, None], self.centroids.round().long()), dim=1)

    def labels(self) -> Tensor:
        """int64 [B, H, W]: 0 for background, k + 1 for component k."""
        plane = self.pixels.new_zeros(self.shape)
        plane.view(-1)[self.pixels] = self.component + 1
        return plane

    def mask(self, chosen: Tensor) -> Tensor:
        """bool [B, H, W]: the pixels of the components where ``chosen`` (bool [K]) is True."""
        if can_read(self.pixels):  # NumPy stays on one thread: these operations are too small for several
            host = np.zeros(self.shape, dtype=np.bool_)
            host.reshape(-1)[self.pixels.numpy()[chosen.numpy()[self.component.numpy()]]] = True
            return torch.from_numpy(host)
        plane = torch.zeros(self.shape, dtype=torch.bool, device=self.pixels.device)
        plane.view(-1)[self.pixels[chosen[self.component]]] = True
        return plane


def pairs_of(counts: Tensor) -> tuple[Tensor, Tensor]:
    """Number each row's pairs: of ``counts`` (int64 [K]) the row of every pair, and its number in the row; [sum].

    Example:
        >>> import torch
        >>> from hmg_gpu.plain.components import pairs_of
        >>> pairs_of(torch.tensor([2, 0, 3]))
        (tensor([0, 0, 2, 2, 2]), tensor([0, 1, 0, 1, 2]))
    """
    if can_read(counts):  # NumPy stays on one thread
        row = torch.from_numpy(np.repeat(np.arange(len(counts)), counts.numpy()))
    else:
        row = torch.repeat_interleave(counts)
    first = (counts.cumsum(0) - counts).index_select(0, row)
    return row, torch.arange(len(row), device=counts.device) - first


@torch.no_grad()
def connected_components(mask: Tensor, sizes: Tensor | None = None) -> Components:
    """:func:`hmg_gpu.masks.components.connected_components` by SciPy or kornia; arguments and errors are the same.

    Example:
        >>> import torch
        >>> from hmg_gpu.plain.components import connected_components
        >>> mask = torch.tensor([[[1, 0, 0, 1], [0, 1, 0, 0]]]).bool()  # the first two pixels touch at a corner
        >>> connected_components(mask).labels()[0]
        tensor([[1, 0, 0, 2],
                [0, 1, 0, 0]])
    """
    check_mask(mask, "mask")
    check_sizes(sizes, mask)
    label = _label_runs if backend_for(mask) == "scipy" else _label_union_find
    return label(mask, sizes)


def _label_runs(mask: Tensor, sizes: Tensor | None) -> Components:
    """Components from horizontal runs: runs that touch are edges of a graph, whose components SciPy finds in one call.

    Infrared predictions are sparse: after one scan for foreground the cost follows the number of foreground pixels.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components as graph_components

    batch, height, width = mask.shape
    pixels = np.flatnonzero(mask.contiguous().numpy())  # [F]
    if sizes is not None:
        row, column = np.divmod(pixels, width)
        image, row = np.divmod(row, height)
        limits = sizes.numpy()[image]  # [F, 2]
        pixels = pixels[(row < limits[:, 0]) & (column < limits[:, 1])]

    # A run starts where the pixel to the left is background or belongs to the row above.
    is_start = np.ones(len(pixels), dtype=bool)
    is_start[1:] = (np.diff(pixels) != 1) | (pixels[1:] % width == 0)
    first = np.flatnonzero(is_start)  # [R]
    length = np.diff(np.append(first, len(pixels)))
    row, start = np.divmod(pixels[first], width)  # row counts through the whole batch
    stop = start + length - 1

    # Runs of the row above that reach columns start - 1 to stop + 1 touch this one. Rows are spread by two columns so
    # that neighbours at the ends of two rows stay apart; both keys ascend.
    spread = width + 2
    above = (row - 1) * spread
    low = np.searchsorted(row * spread + stop, above + start - 1, side="left")
    high = np.searchsorted(row * spread + start, above + stop + 1, side="right")
    touching = np.where(row % height == 0, 0, high - low)  # the first row of an image has none above
    lower = np.repeat(np.arange(len(first)), touching)
    upper = np.arange(len(lower)) - np.repeat(np.cumsum(touching) - touching, touching) + np.repeat(low, touching)

    edges = coo_array((np.ones(len(lower), dtype=np.int8), (lower, upper)), shape=(len(first), len(first)))
    count, run_component = graph_components(edges, directed=False) if len(first) else (0, np.zeros(0, dtype=np.int64))
    # SciPy numbers the components by their first run, which is their order in the raster.
    image, y = np.divmod(row, height)

    def total(weights: np.ndarray) -> np.ndarray:
        sums = np.zeros(count, dtype=np.int64)
        np.add.at(sums, run_component, weights)
        return sums

    image_of = np.zeros(count, dtype=np.int64)
    image_of[run_component] = image
    moments = (total(length), total(y * length), total((start + stop) * length // 2))
    return Components(
        (batch, height, width),
        torch.from_numpy(pixels.astype(np.int64, copy=False)),
        torch.from_numpy(np.repeat(run_component, length).astype(np.int64, copy=False)),
        torch.from_numpy(image_of),
        *map(torch.from_numpy, moments),
    )


def _label_union_find(mask: Tensor, sizes: Tensor | None) -> Components:
    """Components from kornia's exact union-find, renumbered by first pixel; works on every device."""
    from kornia.contrib import connected_components_union_find

    batch, height, width = mask.shape
    valid = valid_area(sizes, mask)
    mask = mask if valid is None else mask & valid
    labels = connected_components_union_find(mask[:, None]).flatten()  # [B * H * W]
    pixels = mask.flatten().nonzero()[:, 0]  # [F]
    _, component = labels[pixels].unique(return_inverse=True)
    count = int(component.max()) + 1 if len(component) else 0
    first = pixels.new_full((count,), mask.numel()).scatter_reduce_(0, component, pixels, "amin")
    order = first.argsort()
    rank = torch.empty_like(order)
    rank[order] = torch.arange(count, device=mask.device)
    component = rank[component]

    row, x = pixels // width, pixels % width
    ones = torch.ones_like(pixels)
    area, sum_y, sum_x = (
        pixels.new_zeros(count).index_add_(0, component, weights) for weights in (ones, row % height, x)
    )
    image = first[order] // (height * width)
    return Components((batch, height, width), pixels, component, image, area, sum_y, sum_x)
