"""The region under a point in planes of labels: 4-connected components, the small ones joined to large ones.

Order-free: a small component joins the large component that it shares most border with, of equal ones the first in the
raster. What touches no large component waits for its neighbours to join one, ``TURNS`` times at most.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from hmg_gpu.common.checks import can_read

TURNS = 3
_SWEEPS = 2  # between two jumps


def components(labels: Tensor, valid: Tensor, width: int) -> Tensor:
    """4-connected components of equal label.

    Pixels take the smallest position among equal neighbours, and jump to what that position has. On a CPU until nothing
    changes; elsewhere positions also take what their pixels have, and the number of rounds is fixed.

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
    kind = torch.int16 if pixels < 2**15 else torch.int32
    roots = torch.arange(pixels, dtype=kind, device=labels.device).expand(count, -1).contiguous()
    walls = []
    for shift, beside in _steps(pixels, width, labels.device):
        joined = (labels[:, shift:] == labels[:, :-shift]) & valid[:, shift:] & valid[:, :-shift] & beside
        walls.append((shift, (~joined).to(kind).mul_(torch.iinfo(kind).max)))
    readable = can_read(roots)
    for turn in range(pixels if readable else 2 * pixels.bit_length()):
        before = roots.clone()
        for _ in range(_SWEEPS):
            for shift, wall in walls:
                left, right = roots[:, :-shift], roots[:, shift:]
                torch.minimum(right, left | wall, out=right)
                torch.minimum(left, right | wall, out=left)
        if not readable:
            roots = roots.scatter_reduce(1, before.long(), roots, "amin")
        roots = roots.gather(1, roots.long())
        if readable and turn > 2 and torch.equal(roots, before):  # seldom sooner
            break
    return roots.long()


def point_regions(labels: Tensor, valid: Tensor, width: int, points: Tensor, segments: int) -> Tensor:
    """The region that holds the point of each plane.

    A component is small below int(0.5 * pixels / segments).

    Args:
        labels: [N, M], M = height * width pixels of each plane, row by row.
        valid: bool [N, M], pixels of the plane; others belong to no region.
        width: of the planes in pixels.
        points: int64 [N], positions in the plane.
        segments: that a plane was meant to have.

    Returns:
        bool [N, M].

    Example:
        >>> import torch
        >>> from hmg_gpu.plain.regions import point_regions
        >>> labels = torch.tensor([[1, 1, 0, 1, 2, 0]])  # two rows of three; the 2 joins the 1 around it
        >>> point_regions(labels, torch.ones(1, 6).bool(), 3, torch.tensor([0]), segments=1)
        tensor([[True, True, True, True, True, True]])
    """
    count, pixels = labels.shape
    roots = components(labels, valid, width)
    area = torch.zeros((count, pixels), dtype=torch.int32, device=labels.device).scatter_add_(1, roots, valid.int())
    position = torch.arange(pixels, device=labels.device)
    least = torch.div(valid.sum(1, keepdim=True), 2 * segments, rounding_mode="floor")
    first = (position == roots) & valid
    large = first & (area >= least)
    small = first ^ large
    owner, most = _numbered(large, roots, 3 * segments)  # the large component of every pixel; 0: none yet
    # Where components can be small, each large one has two thirds of (pixels / 2 / segments) or more, hence the bound.
    waiting, count = _numbered(small, roots, pixels)  # the small component of every pixel
    for turn in range(TURNS):
        if turn == 0 or not can_read(owner):
            owner = _join(owner, waiting, width, most, count)
        elif len(some := ((owner == 0) & (waiting > 0)).any(1).nonzero()[:, 0]):
            owner[some] = _join(owner[some], waiting[some], width, most, count)
    region = torch.where(owner == 0, -waiting, owner)
    return (region == region.gather(1, points[:, None])) & valid


def _numbered(chosen: Tensor, roots: Tensor, bound: int) -> tuple[Tensor, int]:
    """Components by numbers from 1 in the raster of their first pixels, 0 for the others, and the most there can be."""
    number = chosen.cumsum(1)
    most = int(number[:, -1].max()) if can_read(number) else bound
    return (number * chosen).gather(1, roots), most


def _join(owner: Tensor, small: Tensor, width: int, most: int, count: int) -> Tensor:
    """Owners (1..most) after small components (1..count) without one took that which they share most border with."""
    planes, pixels = owner.shape
    waits = owner == 0
    lone = torch.where(waits, small, 0)
    target = owner.clamp(max=most) * (count + 1)
    border = torch.zeros((planes, (most + 1) * (count + 1)), dtype=torch.int32, device=owner.device)
    for shift, beside in _steps(pixels, width, owner.device):
        beside = beside.int().expand(planes, -1)
        border.scatter_add_(1, target[:, :-shift] + lone[:, shift:], beside)
        border.scatter_add_(1, target[:, shift:] + lone[:, :-shift], beside)
    border = border.view(planes, most + 1, count + 1)[:, 1:]
    rank = torch.arange(most, dtype=torch.int32, device=owner.device)[:, None]
    best = (border * most - rank).amax(1) if most else border.sum(1)  # most border first, then the first
    chosen = torch.where(best > 0, torch.remainder(-best, max(most, 1)) + 1, 0)  # [N, count + 1]
    return torch.where(waits, chosen.long().gather(1, lone) * (lone > 0), owner)


def _steps(pixels: int, width: int, device: torch.device) -> Iterator[tuple[int, Tensor]]:
    """From a pixel to its neighbour to the right and below: how far, and bool [M - step], whether there is one."""
    if width > 1:
        yield 1, torch.arange(1, pixels, device=device) % width != 0
    if pixels > width:
        yield width, torch.ones(pixels - width, dtype=torch.bool, device=device)
