"""Checks of arguments that public functions and commands share.

Of tensors shapes and types always; values only where reading them is free.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hmg_gpu.common.errors import InputError


def usable_device(name: str) -> torch.device:
    """The device that a command's --device names, after trying it.

    Raises:
        InputError: this machine or this PyTorch does not have it.
    """
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # how torch says that there is none
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"--device {name}: cannot be used ({reason[:120]}); try cpu") from error


def at_least(bound: int, **values: int) -> int:
    """The (last) value, refused where it is below the bound.

    Raises:
        InputError: it is; the text names it.
    """
    for name, value in values.items():
        if value < bound:
            raise InputError(f"{name} {value}: expected at least {bound}")
    return value


def can_read(tensor: Tensor) -> bool:
    """Whether the tensor's values may decide what Python does next.

    True for plain CPU tensors: on an accelerator a read synchronises; while tracing or compiling there is no value.
    """
    return tensor.device.type == "cpu" and type(tensor) is Tensor and not torch.compiler.is_compiling()


def check_images(images: Tensor, name: str = "images") -> None:
    """Images are float32 or uint8 [B, H, W]."""
    if images.dtype not in (torch.float32, torch.uint8):
        raise TypeError(f"{name}: expected float32 (or uint8), got {images.dtype}; convert with .float()")
    check_batch(images, name)


def check_mask(mask: Tensor, name: str) -> None:
    """Masks are bool [B, H, W]."""
    if mask.dtype != torch.bool:
        raise TypeError(f"{name}: expected bool, got {mask.dtype}; threshold logits with `logits > 0` first")
    check_batch(mask, name)


def check_same(first: Tensor, second: Tensor, first_name: str, second_name: str) -> None:
    """Two batches of one shape on one device."""
    if first.shape != second.shape:
        raise ValueError(
            f"{first_name} and {second_name}: expected one shape, got {list(first.shape)} and {list(second.shape)}"
        )
    if first.device != second.device:
        raise ValueError(f"{first_name} and {second_name}: expected one device, got {first.device} and {second.device}")


def check_sizes(sizes: Tensor | None, batch: Tensor) -> None:
    """Sizes are int64 [B, 2], rows (height, width), each inside the padded batch."""
    if sizes is None:
        return
    count, height, width = batch.shape
    if sizes.dtype != torch.int64 or sizes.shape != (count, 2):
        raise ValueError(
            f"sizes: expected int64 [{count}, 2], one row (height, width) for each image, "
            f"got {sizes.dtype} {list(sizes.shape)}"
        )
    if can_read(sizes) and count:
        wrong = ((sizes < 1) | (sizes > sizes.new_tensor([height, width]))).any(1)
        if bool(wrong.any()):
            row = int(wrong.nonzero()[0])
            raise ValueError(f"sizes row {row}: {sizes[row].tolist()} does not fit the batch of {height} x {width}")


def check_points(points: Tensor, batch: Tensor, sizes: Tensor | None) -> None:
    """Points are int64 [P, 3], rows (image, y, x), each inside its image where that can be looked at."""
    if points.dtype != torch.int64 or points.dim() != 2 or points.shape[1] != 3:
        raise ValueError(
            f"points: expected int64 [P, 3], rows (image, y, x), got {points.dtype} {list(points.shape)}; "
            "torch.nonzero(point_mask) gives this form"
        )
    if points.device != batch.device:
        raise ValueError(f"points: expected on {batch.device} like the images, got {points.device}")
    if not can_read(points) or len(points) == 0:
        return
    count, height, width = batch.shape
    image, y, x = points.unbind(1)
    known = (image >= 0) & (image < count)
    if sizes is None:
        heights, widths = torch.full_like(y, height), torch.full_like(x, width)
    else:
        heights, widths = sizes[image.clamp(0, max(count - 1, 0))].unbind(1)
    wrong = ~(known & (y >= 0) & (y < heights) & (x >= 0) & (x < widths))
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        if not bool(known[row]):
            raise ValueError(f"points row {row}: image {int(image[row])} does not exist, the batch has {count}")
        raise ValueError(
            f"points row {row}: (y, x) = ({int(y[row])}, {int(x[row])}) lies outside image {int(image[row])} "
            f"of {int(heights[row])} x {int(widths[row])} pixels"
        )


def check_offsets(offsets: Tensor | None, points: Tensor, batch: Tensor) -> None:
    """Offsets are int64 [B + 1]; where that can be looked at, points are ordered as they say."""
    if offsets is None:
        return
    count = len(batch)
    if offsets.dtype != torch.int64 or offsets.shape != (count + 1,) or offsets.device != batch.device:
        raise ValueError(
            f"offsets: expected int64 [{count + 1}] on {batch.device}, "
            f"got {offsets.dtype} {list(offsets.shape)} on {offsets.device}"
        )
    if can_read(offsets) and can_read(points):
        images = torch.arange(count + 1)
        ordered = bool((points[1:, 0] >= points[:-1, 0]).all())
        if not ordered or not torch.searchsorted(points[:, 0].contiguous(), images).equal(offsets):
            raise ValueError("offsets: expected points ordered by image, offsets[b] the first row of image b")


def check_batch(batch: Tensor, name: str) -> None:
    """Batches are [B, H, W] with at least one pixel."""
    if batch.dim() != 3:
        raise ValueError(f"{name}: expected [B, H, W], got {list(batch.shape)}; drop the channel with .squeeze(1)")
    if batch.shape[1] == 0 or batch.shape[2] == 0:
        raise ValueError(f"{name}: expected at least one pixel, got {list(batch.shape)}")
