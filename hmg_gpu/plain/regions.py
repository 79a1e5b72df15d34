"""The region under a point in planes of labels: 4-connected components, the small ones joined to large ones.

Order-free: a small component joins the large component that it shares most border with, the first of equal ones in
the raster. What touches no large component waits for its neighbours to join one, ``TURNS`` times at most.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hmg_gpu.common.checks import can_read

TURNS = 3
_NONE = 2**30  # of a component or a pixel


def components(labels: Tensor, valid: Tensor, width: int) -> Tensor:
    """4-connected components of equal label.

    Pixels take the smallest position among equal neighbours, and jump to what that position has; on a CPU until nothing
    changes, elsewhere as often as the longest path may ask for.

    Args:
        labels: [N, M], M = height * width pixels of each plane, row by row.
        valid: bool [N, M]; other pixels are components by themselves.
        width: of the planes in pixels.

    Returns:
        int64 [N, M]: the position of the component's first pixel in the raster.

    Example:
        >>> import torch
        >>> from hmg_gpu.plain.regions import components
        >>> labels = torch.tensor([[1, 1, 0, 1, 0, 0]])  # two rows of three
        >>> components(labels, torch.ones(1, 6).bool(), 3)
        tensor([[0, 0, 2, 0, 2, 2]])
    """
    count, pixels = labels.shape
    roots = torch.arange(pixels, dtype=torch.int32, device=labels.device).expand(count, -1).contiguous()
    walls = []
    for shift in (1, width):
        joined = (labels[:, shift:] == labels[:, :-shift]) & valid[:, shift:] & valid[:, :-shift]
        if shift == 1:
            joined &= torch.arange(1, pixels, device=labels.device) % width != 0
        walls.append((shift, torch.where(joined, 0, _NONE).int()))
    readable = can_read(roots)
    for _ in range(pixels if readable else 4 * pixels.bit_length()):
        before = roots.clone() if readable else roots
        for shift, wall in walls:
            left, right = roots[:, :-shift], roots[:, shift:]
            torch.minimum(right, left | wall, out=right)
            torch.minimum(left, right | wall, out=left)
        roots = roots.gather(1, roots.long())
        if readable and torch.equal(roots, before):
            break
    return roots.long()


def point_regions(labels: Tensor, valid: Tensor, width: int, points: Tensor, least: Tensor) -> Tensor:
    """The region that holds the point of each plane.

    Args:
        labels: [N, M], M = height * width pixels of each plane, row by row.
        valid: bool [N, M], pixels of the plane; others belong to no region.
        width: of the planes in pixels.
        points: int64 [N], positions in the plane.
        least: int64 [N], pixels of a component that is not small.

    Returns:
        bool [N, M].

    Example:
        >>> import torch
        >>> from hmg_gpu.plain.regions import point_regions
        >>> labels = torch.tensor([[1, 1, 0, 1, 2, 0]])  # two rows of three; the 2 joins the 1 around it
        >>> point_regions(labels, torch.ones(1, 6).bool(), 3, torch.tensor([0]), torch.tensor([2]))
        tensor([[ True,  True, False,  True,  True, False]])
    """
    count, pixels = labels.shape
    roots = components(labels, valid, width)
    area = torch.zeros((count, pixels), dtype=torch.int32, device=labels.device)
    area.scatter_add_(1, roots, valid.int())
    position = torch.arange(pixels, device=labels.device)
    large = (area >= least[:, None]) & (position == roots) & valid  # first pixels of large components
    number = torch.where(large, large.cumsum(1) - 1, -1)  # [N, M] large components by their first pixels, else -1
    most = int(number.max()) + 1 if can_read(number) else pixels
    owner = number.gather(1, roots)  # the large component of every pixel, -1: none yet
    for _ in range(TURNS):
        waiting = (owner < 0) & valid
        if can_read(waiting) and not bool(waiting.any()):
            break
        border = torch.zeros((count, (most + 1) * pixels), dtype=torch.int32, device=labels.device)
        for shift in (1, width):
            near = torch.ones(pixels - shift, dtype=torch.bool, device=labels.device)
            if shift == 1:
                near = position[1:] % width != 0
            for mine, other in ((slice(shift, None), slice(None, -shift)), (slice(None, -shift), slice(shift, None))):
                shared = (waiting[:, mine] & (owner[:, other] >= 0) & near).int()
                border.scatter_add_(1, (owner[:, other] + 1) * pixels + roots[:, mine], shared)
        longest = torch.zeros((count, pixels), dtype=torch.int32, device=labels.device)
        choice = torch.full((count, pixels), -1, device=labels.device)
        for large_one in range(most):
            length = border[:, (large_one + 1) * pixels : (large_one + 2) * pixels]
            choice = torch.where(length > longest, large_one, choice)
            longest = torch.maximum(longest, length)
        owner = torch.where(waiting, choice.gather(1, roots), owner)
    region = torch.where(owner < 0, roots + pixels, owner)
    return (region == region.gather(1, points[:, None])) & valid
