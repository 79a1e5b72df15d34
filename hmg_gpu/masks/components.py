"""Connected components (8-connected) and their moments: the one place that picks the kernels, SciPy or torch.

    CUDA or ROCm, Triton    the kernels in ``kernels/components.py``
    elsewhere               ``hmg_gpu/plain/components.py``: SciPy on the CPU, else kornia's union-find

The environment variable HMG_BACKEND (auto, triton, scipy, torch) forces a path, for tests and benchmarks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hmg_gpu.common.backend import backend_for
from hmg_gpu.common.checks import check_mask, check_sizes
from hmg_gpu.plain import components as plain
from hmg_gpu.plain.components import Components


@torch.no_grad()
def connected_components(mask: Tensor, sizes: Tensor | None = None) -> Components:
    """Label the 8-connected components of every mask of a batch and sum their moments.

    The number of components decides the result's size, so on an accelerator this synchronises; the update path uses the
    fused kernels there instead.

    Args:
        mask: bool [B, H, W].
        sizes: int64 [B, 2], valid (height, width) of padded masks; foreground outside is ignored.

    Raises:
        TypeError: mask is not bool. ValueError: a wrong shape.

    Example:
        >>> import torch
        >>> from hmg_gpu.masks.components import connected_components
        >>> mask = torch.tensor([[[1, 0, 0, 1], [0, 1, 0, 0]]]).bool()  # the first two pixels touch at a corner
        >>> connected_components(mask).labels()[0]
        tensor([[1, 0, 0, 2],
                [0, 1, 0, 0]])
    """
    if backend_for(mask) != "triton":
        return plain.connected_components(mask, sizes)
    from hmg_gpu.kernels.components import components

    check_mask(mask, "mask")
    check_sizes(sizes, mask)
    labels, counts, table = components(mask, sizes=sizes)
    pixels = labels.view(-1).nonzero()[:, 0]  # [F]
    image = torch.repeat_interleave(counts)  # [K]
    before = counts.cumsum(0) - counts  # components of the images before
    component = before[pixels // (mask.shape[1] * mask.shape[2])] + labels.view(-1)[pixels] - 1
    area, sum_y, sum_x = table[image, torch.arange(len(image), device=mask.device) - before[image], :3].unbind(1)
    return Components(tuple(mask.shape), pixels, component, image, area, sum_y, sum_x)
