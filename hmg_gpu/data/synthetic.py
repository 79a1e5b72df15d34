"""Synthetic infrared scenes: the embedded data set, made from a seed, so that nothing has to be downloaded.

A scene is a background (sky, cloud, sea or ground), one to three small bright targets blurred by the optics, and a
sensor's noise and stripes, in 8 bits. Scene i is a pure function of (seed, i): longer sets begin with shorter ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from hmg_gpu.common.errors import InputError
from hmg_gpu.data.batches import mix_seed
from hmg_gpu.data.sets import ImageSet

COUNTS = {"train": 96, "test": 48}
SIZE = 128  # side of a scene in pixels
NORMALISATION = (88.67, 11.86)
"""(mean, std) by the rule for sets without constants of the field: the mean of the per-image means and of the per-image
stds over train and test, of seed 0."""

MASK_SHARE = 0.22  # a pixel is target where the target's own blurred signal reaches this share of its peak
MAX_TARGETS = 3
REACH = 15  # no target leaves the window of this radius around its centre, pixels
FINE = 3  # subpixels a side, on which targets are drawn before the optics blur them
TRIES = 64  # positions drawn for a target or for its coarse point; the first that fits is taken
UNIFORMS = 1024  # random numbers a scene has for everything that is no field
GROUP = 32  # scenes made at a time; bounds the memory

Uniform = Callable[..., Tensor]  # (low, high, *shape) -> float64 [N, *shape], the next random numbers of each scene


def make_scenes(
    count: int, *, height: int, width: int, seed: int, device: str | torch.device = "cpu"
) -> tuple[Tensor, Tensor]:
    """Make infrared scenes and their ground truth.

    Ground truth is where the target's own signal, after the blur of the optics and without background or noise, is at
    least ``MASK_SHARE`` of its peak: drawn as generously as annotators do. Targets have 4 to 150 pixels and touch
    neither each other nor the border.

    Args:
        count: N scenes.
        height, width: of a scene in pixels, at least 64.
        seed: any whole number. Scene i depends on (seed, i, height, width) only.
        device: where the result goes; it is made on the CPU, so that every device gets the same bits.

    Returns:
        uint8 images [N, H, W] and bool masks [N, H, W].

    Raises:
        InputError: fewer than one scene, or scenes too small for their targets.

    Example:
        >>> from hmg_gpu.data.synthetic import make_scenes
        >>> images, masks = make_scenes(2, height=64, width=96, seed=0)
        >>> images.shape, images.dtype, masks.dtype
        (torch.Size([2, 64, 96]), torch.uint8, torch.bool)
        >>> first, _ = make_scenes(1, height=64, width=96, seed=0)
        >>> bool((first[0] == images[0]).all())  # longer sets begin with shorter ones
        True
    """
    scenes = _make(count, height, width, seed)
    return scenes.images.to(device), scenes.masks.to(device)


def make_split(
    split: str,
    *,
    points: str | None = "masks_centroid",
    seed: int = 0,
    count: int | None = None,
    size: int | None = None,
) -> ImageSet:
    """The embedded data set: one split of synthetic scenes with point labels and ground truth.

    Args:
        split: "train" or "test"; their scenes are unrelated.
        points: "masks_centroid", floor of the centroid of a target's mask (it may miss a bent target, as in real
            labels); "masks_coarse", floor(centroid + box size * N(0, 1/8)) for each axis, redrawn until it lies on the
            target; None for none. Pixels are counted from 0.
        seed: of scenes and coarse points.
        count: scenes; by default ``COUNTS[split]``.
        size: side of a scene in pixels; by default ``SIZE``.

    Returns:
        The set on the CPU, images uint8 [N, S, S].

    Raises:
        InputError: an unknown split or kind of points, or as :func:`make_scenes`.

    Example:
        >>> from hmg_gpu.data.synthetic import make_split
        >>> data = make_split("test", points="masks_coarse", count=2, size=64)
        >>> data.names
        ['test_0000', 'test_0001']
        >>> bool(data.masks[tuple(data.points.T)].all())  # coarse points lie on their targets
        True
    """
    if split not in COUNTS:
        raise InputError(f"synthetic: no split {split!r}; take one of {', '.join(COUNTS)}")
    if points not in ("masks_centroid", "masks_coarse", None):
        raise InputError(f"synthetic: no points {points!r}; take masks_centroid, masks_coarse or None")
    count, side = COUNTS[split] if count is None else count, SIZE if size is None else size
    scenes = _make(count, side, side, mix_seed(seed, list(COUNTS).index(split)))
    labels = scenes.coarse if points == "masks_coarse" else scenes.centroids
    image, slot = torch.nonzero(scenes.present & (points is not None), as_tuple=True)  # [P]
    mean, std = NORMALISATION
    return ImageSet(
        names=[f"{split}_{index:04d}" for index in range(count)],
        images=scenes.images,
        sizes=torch.tensor([[side, side]]).repeat(count, 1),
        points=torch.cat((image[:, None], labels[image, slot]), dim=1).unique(dim=0),
        masks=scenes.masks,
        mean=mean,
        std=std,
        dataset="synthetic",
        split=split,
    )


class _Scenes(NamedTuple):
    images: Tensor  # uint8 [N, H, W]
    masks: Tensor  # bool [N, H, W]
    present: Tensor  # bool [N, T], which of the targets a scene has
    centroids: Tensor  # int64 [N, T, 2], rows (y, x)
    coarse: Tensor  # int64 [N, T, 2], rows (y, x)


def _make(count: int, height: int, width: int, seed: int) -> _Scenes:
    if count < 1:
        raise InputError(f"synthetic: {count} scenes; expected at least 1")
    if min(height, width) < 64:
        raise InputError(f"synthetic: scenes of {height} x {width} pixels; expected at least 64 x 64")
    groups = [_make_group(indices.tolist(), height, width, seed) for indices in torch.arange(count).split(GROUP)]
    return _Scenes(*(torch.cat(parts) for parts in zip(*groups, strict=True)))


def _make_group(indices: list[int], height: int, width: int, seed: int) -> _Scenes:
    """Scenes of one group; in float64, so that 8 bits do not show in which order a machine adds up."""
    generator = torch.Generator()
    numbers, fields = [], []
    for index in indices:
        generator.manual_seed(mix_seed(seed, index))
        numbers.append(torch.rand(UNIFORMS, generator=generator, dtype=torch.float64))
        fields.append(torch.randn(3, height, width, generator=generator, dtype=torch.float64))
    uniform = _dispenser(torch.stack(numbers))
    coarse, fine, noise = torch.stack(fields, 1)  # [N, H, W] each

    image = _draw_background(coarse, fine, uniform)  # [N, H, W], intensities
    noise_level = uniform(0.8, 2.5)  # [N]
    clutter = torch.hypot(image.std((1, 2)), noise_level)
    contrast = 6 + clutter[:, None] * uniform(3, 8, MAX_TARGETS)  # [N, T], of a target's peak over its background
    targets = _draw_targets(uniform, height, width)
    image = image + targets.paste(targets.signal * contrast[..., None, None], height, width)
    image = image + noise_level[:, None, None] * noise
    for offsets in (fine[:, :1], fine[:, :, :1]):  # stripes: every column and every row is off by a little
        image = image + uniform(0, 1)[:, None, None] * offsets
    masks = targets.paste(targets.mask.double(), height, width) > 0
    centroids, coarse_points = _label(targets, uniform)
    return _Scenes(image.round().clamp(0, 255).to(torch.uint8), masks, targets.present, centroids, coarse_points)


# --- background ------------------------------------------------------------------------------------------------------


def _draw_background(coarse: Tensor, fine: Tensor, uniform: Uniform) -> Tensor:
    """Sky, cloud, sea or ground [N, H, W] in intensities, from two fields of white noise."""
    _, height, width = coarse.shape
    ky = torch.fft.fftfreq(height, dtype=torch.float64)[:, None]  # cycles a pixel
    kx = torch.fft.rfftfreq(width, dtype=torch.float64)
    frequency = torch.hypot(ky, kx)
    frequency[0, 0] = torch.inf  # no mean

    def plane(low: float, high: float) -> Tensor:
        return uniform(low, high)[:, None, None]  # [N, 1, 1]

    ground = _filter(coarse, frequency ** -plane(1.0, 1.5))  # amplitude falls as a power of the frequency
    detail = _filter(fine, frequency ** -plane(0.9, 1.3))
    heap = _filter(coarse, frequency ** -plane(1.6, 2.0)) + 0.15 * detail
    cloud = torch.sigmoid((heap - plane(-0.6, 0.6)) * plane(1.5, 5)) * (1 + 0.2 * detail)
    # Waves: frequencies around one vector, crests sharper than troughs.
    heading, wave = plane(0, math.pi), plane(0.06, 0.14)
    wave_y, wave_x = wave * heading.sin(), wave * heading.cos()
    spread = 2 * (0.35 * wave) ** 2
    swell = _filter(coarse, torch.exp(-((ky - wave_y) ** 2 + (kx - wave_x) ** 2) / spread) + 0.15 * (frequency < 0.3))
    sea = (0.5 * swell).exp() + 0.3 * ground

    kind = (4 * plane(0, 1)).long()
    texture = torch.where(kind == 0, heap, torch.where(kind == 1, cloud, torch.where(kind == 2, sea, ground)))
    strength = torch.tensor([2.5, 15.0, 8.0, 10.0], dtype=torch.float64)[kind] * plane(0.6, 1.6)
    y, x = (torch.linspace(-1, 1, side, dtype=torch.float64) for side in (height, width))
    slope = plane(-14, 14) * y[:, None] + plane(-5, 5) * x
    return plane(50, 125) + slope + strength * _standard(texture)


def _filter(white: Tensor, response: Tensor) -> Tensor:
    """White noise [N, H, W] shaped by a response over (ky, kx >= 0), with mean 0 and std 1."""
    return _standard(torch.fft.irfft2(torch.fft.rfft2(white) * response, s=white.shape[1:]))


def _standard(field: Tensor) -> Tensor:
    dims = tuple(range(1, field.dim()))
    return (field - field.mean(dims, keepdim=True)) / field.std(dims, keepdim=True)


# --- targets ---------------------------------------------------------------------------------------------------------


class _Targets(NamedTuple):
    signal: Tensor  # float64 [N, T, S, S], peak 1, in a window around the centre; S = 2 * REACH + 1
    mask: Tensor  # bool [N, T, S, S]
    centre: Tensor  # int64 [N, T, 2], rows (y, x)
    present: Tensor  # bool [N, T]

    def paste(self, windows: Tensor, height: int, width: int) -> Tensor:
        """The sum of the windows [N, T, S, S] of the targets that are present, each in its place: [N, H, W]."""
        tall, wide = height + 2 * REACH, width + 2 * REACH  # windows may leave the scene, targets do not
        canvas = windows.new_zeros(len(windows), tall * wide)
        step = torch.arange(2 * REACH + 1)
        y, x = self.centre[..., None, None].unbind(2)  # [N, T, 1, 1]
        position = (y + step[:, None]) * wide + x + step  # [N, T, S, S]
        canvas.scatter_add_(1, position.flatten(1), (windows * self.present[..., None, None]).flatten(1))
        return canvas.view(-1, tall, wide)[:, REACH:-REACH, REACH:-REACH]


def _draw_targets(uniform: Uniform, height: int, width: int) -> _Targets:
    """Bodies made of ellipses, blurred by a Gaussian point-spread function, in places where they touch nothing."""

    def number(low: float, high: float) -> Tensor:
        return uniform(low, high, MAX_TARGETS)[..., None, None]  # [N, T, 1, 1]

    area = 2 + 93 * number(0, 1) ** 1.5  # of the body, pixels; half of them below 35
    aspect, angle = number(1, 2.2), number(0, math.pi)
    long, short = (area * aspect / math.pi).sqrt(), (area / aspect / math.pi).sqrt()  # half axes, pixels
    step = (torch.arange(FINE * (2 * REACH + 1), dtype=torch.float64) + 0.5) / FINE - REACH - 0.5  # [F]
    y, x = step[:, None] - number(-0.5, 0.5), step - number(-0.5, 0.5)  # [N, T, F, 1], [N, T, 1, F]
    u, v = x * angle.cos() + y * angle.sin(), y * angle.cos() - x * angle.sin()  # [N, T, F, F]
    body = ((u / long) ** 2 + (v / short) ** 2 < 1).double()
    spot = number(-0.5, 0.5) * long  # a hotter part
    body += number(0, 1.2) * ((((u - spot) / long) ** 2 + (v / short) ** 2) < 0.25)
    wing = number(0.8, 1.0) * (number(0, 1) < 0.5)
    body += wing * ((u / (0.3 * long)) ** 2 + (v / (1.8 * short)) ** 2 < 1) * (body == 0)

    blur = number(0.6, 1.2)  # standard deviation of the point-spread function, pixels
    pixel = torch.arange(-REACH, REACH + 1, dtype=torch.float64)[:, None]  # [S, 1]
    spreads = torch.exp(-((pixel - step) ** 2) / (2 * blur**2))  # [N, T, S, F]
    signal = spreads @ body @ spreads.mT  # [N, T, S, S]
    signal = signal / signal.amax((2, 3), keepdim=True)
    mask = signal >= MASK_SHARE

    radius = (torch.hypot(pixel, pixel.mT) * mask).amax((2, 3))  # [N, T]
    wanted = 1 + (MAX_TARGETS * uniform(0, 1)).long()  # [N]
    size = torch.tensor([height, width])
    centres, presents = [], []
    for slot in range(MAX_TARGETS):
        margin = radius[:, slot, None, None] + 2  # [N, 1, 1]
        place = (margin + uniform(0, 1, TRIES, 2) * (size - 2 * margin)).floor()  # [N, TRIES, 2]
        free = (slot < wanted)[:, None].expand(-1, TRIES)
        for other in range(slot):
            distance = (place - centres[other][:, None]).norm(dim=2)
            free = free & (~presents[other][:, None] | (distance > margin[..., 0] + radius[:, other, None] + 1))
        presents.append(free.any(1))
        centres.append(_first(place, free))
    return _Targets(signal, mask, torch.stack(centres, 1).long(), torch.stack(presents, 1))


def _label(targets: _Targets, uniform: Uniform) -> tuple[Tensor, Tensor]:
    """Centroid and coarse point labels, int64 [N, T, 2] rows (y, x) each."""
    mask = targets.mask
    step = torch.arange(-REACH, REACH + 1)
    lines = torch.stack((mask.sum(3), mask.sum(2)), 2)  # [N, T, 2, S], pixels in each row and column
    total, area = (lines * step).sum(3), mask.sum((2, 3))[..., None]  # [N, T, 2], [N, T, 1]
    centroid = torch.div(total, area, rounding_mode="floor")
    box = (lines > 0).sum(3)  # [N, T, 2], height and width
    normal = torch.special.ndtri(uniform(0, 1, MAX_TARGETS, TRIES, 2))
    tried = (total[:, :, None] / area[:, :, None] + box[:, :, None] * normal / 8).floor().long()  # [N, T, TRIES, 2]
    held = tried.clamp(-REACH, REACH) + REACH
    flat = held[..., 0] * len(step) + held[..., 1]  # [N, T, TRIES]
    hit = mask.flatten(2).gather(2, flat) & (tried.abs() <= REACH).all(3)
    return targets.centre + centroid, targets.centre + _first(tried, hit)


def _first(rows: Tensor, good: Tensor) -> Tensor:
    """Of the rows [..., K, 2] the first one that is good [..., K] (row 0 where none is): [..., 2]."""
    index = good.to(torch.uint8).argmax(-1)[..., None, None].expand(*good.shape[:-1], 1, 2)
    return rows.gather(-2, index).squeeze(-2)


def _dispenser(numbers: Tensor) -> Uniform:
    """Hand out the columns of ``numbers`` [N, K], uniform in 0..1, in turn."""
    taken = 0

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        nonlocal taken
        start, taken = taken, taken + math.prod(shape)
        return (low + (high - low) * numbers[:, start:taken]).reshape(len(numbers), *shape)

    return uniform
