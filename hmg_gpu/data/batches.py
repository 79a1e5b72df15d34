"""Training batches made on the device from images that live there: crops, turned and jittered, as one gather."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from hmg_gpu.common.checks import can_read
from hmg_gpu.common.errors import InputError
from hmg_gpu.data.sets import ImageSet

PLAN = ("image", "top", "left", "flip_rows", "flip_columns", "transpose", "gain", "offset")
ONE = 1_000_000  # the unit of gain and offset in a plan


def draw_epoch(
    sizes: Tensor,
    batch_size: int,
    patch_size: int,
    *,
    seed: int,
    epoch: int,
    positive: float = 0.0,
    points: Tensor | None = None,
    images: Tensor | None = None,
    jitter: float = 0.0,
    margin: int = 0,
    places: Tensor | None = None,
    hard_examples: float = 0.0,
) -> Tensor:
    """Draw every crop of one epoch: a pure function of (seed, epoch), so that any run can resume at any step.

    Each image comes once per epoch in random order (LESPS's data handling); the last batch is filled up from the start
    of the order, so that all batches have one shape. Crop positions are uniform; flips of the rows, of the columns and
    the transpose have p = 0.5 each.

    Args:
        sizes: int64 [N, 2] on the CPU, rows (height, width) in pixels.
        batch_size: B, images in a batch.
        patch_size: side of the crop in pixels.
        positive: share of the crops that hold a point of their image, if it has any; the others lie anywhere.
        points: int64 [P, 3] on the CPU, rows (image, y, x), sorted; for ``positive``.
        images: int64 [n] on the CPU, the only images to draw from, and whose places count; None: all N of them.
        jitter: J: each crop's normalised intensities are multiplied by ``exp(J u)``, then ``J v`` is added; u and v are
            uniform in -1 to 1. The other columns do not depend on it.
        margin: crops may reach so many pixels, but not by more than half, beyond the bottom and the right border, where
            a whole image is padded for a network, too, and lie at the top and the left border as often. At 0 crops of
            large images hardly ever hold a border, and networks make false alarms there.
        places: int64 [A, 3] on the CPU, rows (image, y, x) to be seen more often; for ``hard_examples``.
        hard_examples: so many crops more, as a share of the images, rounded up; each holds a random one of ``places``.

    Returns:
        int64 [steps, B, 8] on the CPU, columns as :data:`PLAN`; steps = ceil(n / B), n with the crops more.
    """
    count = len(sizes if images is None else images)
    generator = torch.Generator().manual_seed(mix_seed(seed, epoch))
    order = torch.randperm(count, generator=generator)
    order = order if images is None else images[order]
    row = torch.full((count,), -1)  # of each crop's place
    places = _among(places, images)
    if (extra := _extra_crops(count, places, hard_examples)) > 0:
        more = torch.randint(len(places), (extra,), generator=generator)
        order, row = torch.cat((order, places[more, 0])), torch.cat((row, more))
        mixed = torch.randperm(len(order), generator=generator)
        order, row = order[mixed], row[mixed]
    count = len(order)
    steps = -(-count // batch_size)
    repeated = torch.arange(steps * batch_size) % count
    order, row = order[repeated], row[repeated]  # [steps * B]
    slack = (sizes[order] - patch_size).clamp(min=0)  # [steps * B, 2]
    margin = min(margin, patch_size // 2)
    last = torch.minimum(slack + margin, sizes[order] - 1)  # a crop always holds some of its image
    corner = (torch.rand(len(order), 2, generator=generator, dtype=torch.float64) * (last + margin + 1)).long()
    corner = (corner - margin).clamp(min=0)
    flips = torch.randint(0, 2, (len(order), 3), generator=generator)
    if positive and points is not None and len(points):
        corner = _around_points(order, corner, last, points, patch_size, positive, generator)
    if (row >= 0).any():
        draw = torch.rand(len(order), 2, generator=generator, dtype=torch.float64)
        corner = torch.where((row >= 0)[:, None], _holding(places[row, 1:], last, patch_size, draw), corner)
    light = torch.tensor([[ONE, 0]]).expand(len(order), 2)
    if jitter:
        gain, offset = (torch.rand(2, len(order), generator=generator, dtype=torch.float64) * 2 - 1) * jitter
        light = (ONE * torch.stack((gain.exp(), offset), dim=1)).round().long()
    plan = torch.cat((order[:, None], torch.minimum(corner, last), flips, light), dim=1)
    return plan.view(steps, batch_size, len(PLAN))


def count_steps(count: int, batch_size: int, images: Tensor | None, places: Tensor | None, hard_examples: float) -> int:
    """How many steps :func:`draw_epoch` gives an epoch of N = ``count`` images; the other arguments are its own."""
    drawn = count if images is None else len(images)
    return -(-(drawn + _extra_crops(drawn, _among(places, images), hard_examples)) // batch_size)


def are_places(places: Any, sizes: Tensor) -> bool:
    """Whether something is int64 [A, 3] on the CPU, rows (image, y, x) within images of ``sizes`` (int64 [N, 2])."""
    if not isinstance(places, Tensor) or places.dtype != torch.int64 or places.dim() != 2 or places.shape[1] != 3:
        return False
    known = bool((places >= 0).all() and (places[:, 0] < len(sizes)).all())
    return known and bool((places[:, 1:] < sizes[places[:, 0]]).all())


def _among(places: Tensor | None, images: Tensor | None) -> Tensor:
    """The places in these images: int64 [A, 3]; none where there are none."""
    if places is None:
        return torch.zeros(0, 3, dtype=torch.int64)
    return places if images is None else places[torch.isin(places[:, 0], images)]


def _extra_crops(count: int, places: Tensor, hard_examples: float) -> int:
    return math.ceil(hard_examples * count) if len(places) else 0


def _around_points(
    order: Tensor, corner: Tensor, last: Tensor, points: Tensor, side: int, share: float, generator: torch.Generator
) -> Tensor:
    """Corners of crops, a share of them moved so that they hold a random point of their image: int64 [C, 2].

    Args:
        order: int64 [C], the crops' images. corner, last: int64 [C, 2], where they lie and the last possible corner.
    """
    images = torch.arange(int(order.max()) + 2)
    offsets = torch.searchsorted(points[:, 0].contiguous(), images)
    first, count = offsets[order], offsets[order + 1] - offsets[order]  # [C]
    draw = torch.rand(len(order), 4, generator=generator, dtype=torch.float64)
    row = first + torch.minimum((draw[:, 1] * count).long(), (count - 1).clamp(min=0))
    target = points[row.clamp(max=len(points) - 1), 1:]  # [C, 2]
    around = _holding(target, last, side, draw[:, 2:])
    return torch.where(((draw[:, 0] < share) & (count > 0))[:, None], around, corner)


def _holding(places: Tensor, last: Tensor, side: int, draw: Tensor) -> Tensor:
    """Random corners of crops that hold places: int64 [C, 2]; ``draw`` is uniform in 0 to 1, [C, 2]."""
    low = torch.minimum((places - side + 1).clamp(min=0), last)
    return low + (draw * (torch.minimum(places, last) - low + 1)).long()


def mix_seed(*parts: int) -> int:
    """One 63-bit seed from several whole numbers; neighbours give unrelated seeds (splitmix64's finaliser)."""
    mask = (1 << 64) - 1
    state = 0
    for part in parts:
        state = (state + part + 0x9E3779B97F4A7C15) & mask
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
        state ^= state >> 31
    return state >> 1


def cut_crops(data: ImageSet, masks: Tensor, plan: Tensor, patch_size: int) -> tuple[Tensor, Tensor]:
    """Cut and augment the crops of one batch, all on the device of the images and without synchronising.

    Images are normalised, then brightened as the plan says; outside an image the crop is zero.

    Args:
        data: images, sizes, mean and std.
        masks: bool [N, H, W], the labels to train on; or uint8 soft labels, 255 is 1.
        plan: int64 [B, 8] on the same device, one batch of :func:`draw_epoch`.
        patch_size: S in pixels.

    Returns:
        float32 images [B, 1, S, S] and masks [B, 1, S, S] of the type they came in.
    """
    if can_read(plan):
        return _cut_slices(data, masks, plan, patch_size)
    _, height, width = data.images.shape
    image, top, left, flip_rows, flip_columns, transpose, *light = plan[:, :, None, None].unbind(1)  # [B, 1, 1]
    steps = torch.arange(patch_size, device=plan.device)
    down, across = steps[None, :, None], steps[None, None, :]
    # Where each output pixel comes from: undo the transpose, then the flips, then the crop.
    rows, columns = torch.where(transpose > 0, across, down), torch.where(transpose > 0, down, across)  # [B, S, S]
    rows = top + torch.where(flip_rows > 0, patch_size - 1 - rows, rows)
    columns = left + torch.where(flip_columns > 0, patch_size - 1 - columns, columns)
    size = data.sizes[image[:, 0, 0]]  # [B, 2]
    valid = (rows < size[:, 0, None, None]) & (columns < size[:, 1, None, None])
    index = (image * height + rows.clamp(max=height - 1)) * width + columns.clamp(max=width - 1)  # [B, S, S]
    gain, offset = ((column.double() / ONE).float() for column in light)
    values = (data.images.view(-1)[index].float() - data.mean) / data.std * gain + offset
    return torch.where(valid, values, 0)[:, None], (masks.view(-1)[index] * valid)[:, None]


def _cut_slices(data: ImageSet, masks: Tensor, plan: Tensor, patch_size: int) -> tuple[Tensor, Tensor]:
    """The same where the plan lies in host memory: slices and flips take a tenth of the time of the gather."""
    images = torch.zeros(len(plan), 1, patch_size, patch_size)
    labels = torch.zeros(images.shape, dtype=masks.dtype)
    for row, (image, top, left, flip_rows, flip_columns, transpose, *light) in enumerate(plan.tolist()):
        height, width = data.host_sizes[image].tolist()
        tall, wide = min(patch_size, height - top), min(patch_size, width - left)
        # A flip of the whole crop moves what is beyond the image to the other side.
        rows = slice(patch_size - tall, None) if flip_rows else slice(tall)
        columns = slice(patch_size - wide, None) if flip_columns else slice(wide)
        flips = [axis for axis, flip in enumerate((flip_rows, flip_columns)) if flip]
        gain, offset = (number / ONE for number in light)
        values = (data.images[image, top : top + tall, left : left + wide].float() - data.mean) / data.std
        if (gain, offset) != (1, 0):
            values = values * gain + offset
        mask = masks[image, top : top + tall, left : left + wide]
        to_image, to_label = (batch[row, 0].T if transpose else batch[row, 0] for batch in (images, labels))
        to_image[rows, columns], to_label[rows, columns] = values.flip(flips), mask.flip(flips)
    return images, labels


def to_targets(masks: Tensor) -> Tensor:
    """Masks, or uint8 soft labels whose 255 is 1, as float32 in 0 to 1."""
    return masks.float() / 255 if masks.dtype == torch.uint8 else masks.float()


def batches(
    data: ImageSet, masks: Tensor, *, batch_size: int, patch_size: int, seed: int, epoch: int, start: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (image, mask) batches of one epoch from step ``start`` on; see :func:`draw_epoch` and :func:`cut_crops`.

    Raises:
        InputError: the set is empty.
    """
    if len(data) == 0:
        raise InputError(f"{data.dataset} {data.split}: the set has no image; check its split file")
    plan = draw_epoch(data.host_sizes, batch_size, patch_size, seed=seed, epoch=epoch).to(data.images.device)
    for rows in plan[start:]:
        yield cut_crops(data, masks, rows, patch_size)
