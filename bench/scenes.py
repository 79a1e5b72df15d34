"""What the cases run on: real images, points and predictions where HMG_DATA and HMG_CHECKPOINTS name them."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from hmg_gpu import point_to_mask
from hmg_gpu.common.console import tell_error
from hmg_gpu.common.errors import HMGError, InputError
from hmg_gpu.data import NORMALISATION, ImageSet
from hmg_gpu.data.source import default_extent, load_split
from hmg_gpu.data.synthetic import make_split
from hmg_gpu.models.predict import predict
from hmg_gpu.models.weights import load_model

MOST_IMAGES = 2048  # a set is repeated up to here; more points than it then holds lie beside the real ones
DISC = 4  # largest radius of a blob in pixels


def real_folder(name: str) -> Path:
    """The folder of a set in ``HMG_DATA``.

    Raises:
        InputError: the variable is not set.
    """
    if not os.environ.get("HMG_DATA"):
        raise InputError("HMG_DATA is not set; name the folder that holds NUAA-SIRST/ and NUDT-SIRST/")
    return Path(os.environ["HMG_DATA"]) / name


def in_one_line(command: Callable[[], int | None]) -> int:
    """The exit status of a command; an error of ours becomes one line and 2."""
    try:
        return command() or 0
    except HMGError as error:
        return tell_error(error)


@cache
def training_set(name: str, images: int | None = None, size: int | None = None) -> ImageSet:
    """The real set where HMG_DATA has it, else synthetic scenes; its first ``images`` where that is given.

    ``size``: side of synthetic scenes in pixels; they are made in any case then.
    """
    root = os.environ.get("HMG_DATA")
    if size is None and root and (Path(root) / name).is_dir():
        data = load_split(str(Path(root) / name), "train")
    else:
        data = make_split("train", count=images, size=size or 256)
    return data if images is None or images >= len(data) else data.subset(range(images))


def points_scene(points: int, name: str, size: int | None = None) -> tuple[ImageSet, str]:
    """A set with exactly so many points, and what it is in words.

    Few points: the first images that hold them. Many: the set repeated, up to ``MOST_IMAGES`` images; then more points
    within 2 pixels of the real ones, as several annotators would click.
    """
    data = training_set(name, None if size is None else 2, size)
    here = len(data.points)
    if points <= here:
        rows = data.points[:points]
        return _with_points(data.subset(range(int(rows[-1, 0]) + 1)), rows), f"{points} points of {data.dataset}"
    copies = min(-(-points // here), max(1, MOST_IMAGES // len(data)))
    shift = torch.tensor([len(data), 0, 0])
    copied = torch.cat([data.points + copy * shift for copy in range(copies)])  # [copies * here, 3], by image
    clicks = -(-points // len(copied))
    generator = torch.Generator().manual_seed(0)
    rows = copied.repeat_interleave(clicks, dim=0)
    rows[:, 1:] += torch.randint(-2, 3, (len(rows), 2), generator=generator) * (clicks > 1)
    sizes = data.sizes.repeat(copies, 1)
    rows[:, 1:] = torch.minimum(rows[:, 1:].clamp(min=0), sizes[rows[:, 0]] - 1)
    rows = rows[:points]
    repeated = ImageSet(
        names=[str(number) for number in range(copies * len(data))],
        images=data.images.repeat(copies, 1, 1),
        sizes=sizes,
        points=data.points,
        dataset=data.dataset,
    )
    said = f"{here} points of {data.dataset} {copies} times, {clicks} clicks a target"
    last = int(rows[-1, 0]) + 1
    return _with_points(repeated if last == len(sizes) else repeated.subset(range(last)), rows), said


def _with_points(data: ImageSet, points: Tensor) -> ImageSet:
    return ImageSet(data.names, data.images, data.sizes, points, dataset=data.dataset)


def blob_scene(images: int, side: int, blobs: int) -> tuple[Tensor, Tensor, Tensor]:
    """Predictions of discs of radius 1 to 4 px, initial masks and points: what a network with false alarms gives.

    Returns:
        bool predictions [B, S, S], bool initial masks [B, S, S] (discs of radius 2 at the points), int64 points
        [2 * B, 3]: two an image, one of them on a disc.
    """
    generator = torch.Generator().manual_seed(0)
    margin = min(DISC + 2, side // 2 - 1)
    centres = torch.randint(margin, side - margin, (images, blobs, 2), generator=generator)
    radius = torch.randint(1, DISC + 1, (images, blobs), generator=generator)
    image = torch.arange(images)[:, None].expand(images, blobs)
    prediction = torch.zeros((images, side, side), dtype=torch.bool)
    for size in range(1, DISC + 1):
        chosen = radius == size
        _stamp(prediction, image[chosen], centres[chosen], size)
    other = torch.randint(0, side, (images, 2), generator=generator)
    points = torch.stack((centres[:, 0], other), dim=1).reshape(-1, 2)
    points = torch.cat((torch.arange(images).repeat_interleave(2)[:, None], points), dim=1)
    initial = torch.zeros_like(prediction)
    _stamp(initial, points[:, 0], points[:, 1:], 2)
    return prediction, initial, points


def blobs_for(density: float, side: int) -> int:
    """How many discs of :func:`blob_scene` cover this share of an image, overlaps counted."""
    area = sum(len(_disc(radius)) for radius in range(1, DISC + 1)) / DISC
    return max(1, round(-torch.log1p(torch.tensor(-density)).item() * side**2 / area))


def _disc(radius: int) -> Tensor:
    """int64 [K, 2], the offsets of a disc's pixels."""
    steps = torch.arange(-radius, radius + 1)
    offsets = torch.cartesian_prod(steps, steps)
    return offsets[(offsets**2).sum(1) <= radius**2]


def _stamp(planes: Tensor, image: Tensor, centres: Tensor, radius: int) -> None:
    """Set discs in place; what leaves the image is cut off."""
    side = planes.shape[1]
    at = centres[:, None] + _disc(radius)  # [N, K, 2]
    inside = ((at >= 0) & (at < side)).all(-1)
    rows = image[:, None].expand(inside.shape)
    planes[rows[inside], at[..., 0][inside], at[..., 1][inside]] = True


@cache
def predicted_scene(
    images: int, weights: str, name: str, size: int | None = None
) -> tuple[Tensor, Tensor, Tensor, str]:
    """Predictions of published weights on real images: prediction, initial masks, points and what it is, in words.

    Without HMG_DATA and HMG_CHECKPOINTS (or with ``size``) stand-ins: two discs an image.
    """
    root = os.environ.get("HMG_CHECKPOINTS")
    path = Path(root) / weights if root else None
    if size is not None or path is None or not path.is_file() or not os.environ.get("HMG_DATA"):
        scene = blob_scene(images, size or 256, 2)
        return *scene, "stand-ins: HMG_DATA and HMG_CHECKPOINTS are not set"
    data = training_set(name, images)
    model, _ = load_model(path)
    mean, std = NORMALISATION["SIRST3"]
    prediction = predict(model, data, mean=mean, std=std, padding="lesps")
    initial = point_to_mask(data.images, data.points, extent=default_extent(data.dataset), sizes=data.sizes)
    return prediction, initial, data.points, f"predictions of {weights} on {data.dataset}"


def describe(prediction: Tensor, said: str) -> str:
    """Number and density of what is in a batch of predictions."""
    from hmg_gpu.plain.components import connected_components

    count = len(connected_components(prediction)) / len(prediction)
    shape = " x ".join(str(side) for side in prediction.shape)
    return f"{shape}, {count:.1f} components an image, {100 * prediction.double().mean():.2f} % foreground; {said}"
