"""Masks by a small network that learns from PMG's masks of the same points (beyond the paper; no ground truth).

PMG's errors differ from target to target, what it gets right repeats. A network that sees crops around all points of a
set, with PMG's masks to learn from, keeps what repeats: the student becomes better than its teacher.

    points --PMG--> one mask a point --train--> student --crop around each point--> probabilities --> masks
                                       ^                                                              |
                                       '---- PMG from the centroids of the masks (further rounds) ----'

A student has two networks, each taught by half of the points, so that one of the two never saw PMG's error on a target.
PMG errs by leaving pixels out (its box can only cut), so the threshold of the probabilities lies low, where PMG's alpha
lies by default: the share of the contrast at which PMG lets a target begin. README shows others and what that is worth.

Crops are gathered on the device for a whole batch of points at once; nothing in the loop reads the device.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checkpoints import read_description, read_tensors, save_checkpoint
from .components import connected_components
from .data.batches import mix_seed
from .data.sets import ImageSet
from .errors import InputError
from .losses import soft_iou_loss
from .models.crop_net import CropNet, distance_maps
from .own_masks import masks_around
from .provenance import provenance

METHODS = ("pmg", "learned")  # of making initial masks
GROUP = 4096  # points whose masks are held at a time
LEVELS = tuple(round(0.05 * number, 2) for number in range(2, 11))  # thresholds to choose from: 0.1 to 0.5
NETS = 256  # crops at a time through a network that does not train


@dataclass(frozen=True)
class StudentSettings:
    """Everything that decides a student, beside the data. Lengths in pixels.

    The paper has no such step.
    """

    crop: int = 0  # S, side of the crop, a multiple of 4; 0: what PMG's extent and the shift reach, from 32 to 48
    shift: int = 3  # in training a crop's centre moves up to so far, within the teacher's mask
    steps: int = 400  # of each network in each round, for each set
    batch_size: int = 64
    learning_rate: float = 4e-3  # AdamW, one cycle
    weight_decay: float = 1e-2
    cross_entropy: float = 0.2  # weight beside soft-IoU
    averaging: float = 0.99  # of the weights from step to step; 0: the last weights alone
    flips: bool = True  # average the eight flips and transposes of a crop when predicting
    rounds: int = 1  # from the second on PMG starts from the centroids of the masks of the round before
    members: int = 2  # networks whose probabilities are averaged; those of a pair learn from half of the points each
    threshold: float = 0.15  # of the probabilities; 0: where the members agree best, of 0.1, 0.15 .. 0.5
    link: float = 0.2  # of the threshold: probabilities that join the parts of a mask (hysteresis); 1: no such
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"crop": 16 if self.crop else 0, "shift": 0, "steps": 1, "batch_size": 2, "rounds": 1, "members": 1}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise InputError(f"{name} = {getattr(self, name)}: expected at least {bound}")
        for name, bound in {"crop": 256, "members": 100}.items():  # a file may claim anything
            if getattr(self, name) > bound:
                raise InputError(f"{name} = {getattr(self, name)}: expected at most {bound}")
        if self.crop % 4:
            raise InputError(f"crop = {self.crop}: expected a multiple of 4, as the network halves it twice")
        for name in ("averaging", "threshold"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"{name} = {getattr(self, name)}: expected a number from 0 up to 1")
        if not 0 < self.link <= 1:
            raise InputError(f"link = {self.link}: expected a number above 0 and up to 1")

    def for_extent(self, extent: int) -> StudentSettings:
        """The same with a crop for masks of this extent (L_ep in pixels), where the settings leave it open."""
        reach = 2 * (extent + self.shift) + 2
        return self if self.crop else replace(self, crop=min(48, max(32, -(-reach // 8) * 8)))

    @property
    def radius(self) -> int:
        """How far a mask can reach from its point: every view of a crop has the pixels up to here."""
        return self.crop // 2 - 1


class Student:
    """Trained networks and what they were trained with; makes masks of any points without further training.

    Args:
        networks: one for each member, on one device.
        settings: as trained.
        threshold: of the probabilities, in (0, 1); None: the settings', or 0.5 where they leave it open.
    """

    def __init__(self, networks: Sequence[CropNet], settings: StudentSettings, threshold: float | None = None):
        self.networks, self.settings = [network.eval() for network in networks], settings
        self.threshold = threshold or settings.threshold or 0.5

    def save(self, path: str | os.PathLike, about: dict[str, Any] | None = None) -> None:
        """Write the student to a .safetensors file, complete in itself; ``about`` (JSON values) is kept with it."""
        tensors = {
            f"member{number}.{name}": value
            for number, network in enumerate(self.networks)
            for name, value in network.state_dict().items()
        }
        description = {"student": asdict(self.settings), "threshold": self.threshold, "versions": provenance()}
        save_checkpoint(path, tensors, description | (about or {}))

    @classmethod
    def load(cls, path: str | os.PathLike, device: str | torch.device = "cpu") -> Student:
        """Read what :meth:`save` wrote.

        Raises:
            InputError: the file is missing or damaged, or holds no student; nothing of it is ever run.
        """
        description = read_description(path)
        values = (description or {}).get("student")
        known = {field.name for field in fields(StudentSettings)}
        if not isinstance(values, dict) or values.keys() != known:
            raise InputError(f"{path}: holds no student of this version; make one with hmg-gpu masks --method learned")
        kinds = {field.name: type(field.default) for field in fields(StudentSettings)}
        for name, value in values.items():
            if type(value) is not kinds[name]:
                raise InputError(f"{path}: its setting {name} is {value!r}, expected {kinds[name].__name__}")
        settings = StudentSettings(**values)
        if not settings.crop:
            raise InputError(f"{path}: its setting crop is 0, expected the side of its crops")
        threshold = description.get("threshold")
        if type(threshold) is not float or not 0 < threshold < 1:
            raise InputError(f"{path}: its threshold is {threshold!r}, expected a number between 0 and 1")
        tensors = read_tensors(path)
        networks = []
        for number in range(settings.members):
            network = CropNet()
            prefix = f"member{number}."
            own = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
            targets = network.state_dict()
            fits = own.keys() == targets.keys() and all(own[name].shape == targets[name].shape for name in own)
            if not fits or not all(bool(value.isfinite().all()) for value in own.values()):
                raise InputError(f"{path}: the weights of member {number} are missing or damaged; copy the file again")
            network.load_state_dict(own)
            networks.append(network.to(device, memory_format=torch.channels_last))
        return cls(networks, settings, threshold)

    @torch.no_grad()
    def probabilities(self, images: Tensor, points: Tensor, *, sizes: Tensor | None = None) -> Tensor:
        """The probability of every pixel around each point to belong to the point's target.

        Args:
            images: float32 or uint8 [B, H, W], intensities as they come.
            points: int64 [P, 3], rows (image, y, x).
            sizes: int64 [B, 2], valid (height, width) of padded images; None: the whole image.

        Returns:
            float32 [P, 2 R + 1, 2 R + 1], the point at [R, R]; R = ``settings.radius``.
        """
        sizes = full_sizes(images) if sizes is None else sizes
        side, radius = self.settings.crop, self.settings.radius
        views = range(8) if self.settings.flips else range(1)
        view_bits = torch.arange(8, device=images.device)[:, None] >> torch.arange(3, device=images.device) & 1
        result = torch.zeros(len(points), 2 * radius + 1, 2 * radius + 1, device=images.device)
        for first in range(0, len(points), NETS):
            part = points[first : first + NETS]
            total = torch.zeros(len(part), 2 * radius + 1, 2 * radius + 1, device=images.device)
            for view in views:
                crops = normalise(gather(images, part, sizes, side, view_bits[view].expand(len(part), 3)))
                for network in self.networks:
                    probability = network(crops)[:, 0].sigmoid()  # [p, S, S]
                    total += unturn(probability, view, radius)
            result[first : first + len(part)] = total / (len(views) * len(self.networks))
        return result

    def masks(self, data: ImageSet, *, extent: int = 25, half_width: int = 4, alpha: float = 0.15) -> Tensor:
        """Masks of a set, united per image.

        PMG's mask of a point stays where the student finds nothing at the point, and where its mask reaches the
        window's edge: such a target is larger than the crop.

        Args:
            data: images and points; its ground truth is not looked at.
            extent, half_width, alpha: of PMG.

        Returns:
            bool [N, H, W].
        """
        masks = torch.zeros(data.images.shape, dtype=torch.bool, device=data.images.device)
        for points in data.points.split(GROUP):
            own = self.own(replace(data, points=points), extent=extent, half_width=half_width, alpha=alpha)
            masks |= paste(own, points, data.images.shape, data.sizes)
        return masks

    def own(self, data: ImageSet, *, extent: int = 25, half_width: int = 4, alpha: float = 0.15) -> Tensor:
        """As :meth:`masks`, each point's by itself around the point: bool [P, 2 R + 1, 2 R + 1]."""
        fallback = masks_around(data, self.settings.radius, extent=extent, half_width=half_width, alpha=alpha)
        found = self.probabilities(data.images, data.points, sizes=data.sizes)
        return choose(found, fallback, self.threshold, self.settings.link)

    def soft_masks(self, data: ImageSet, *, extent: int = 25, half_width: int = 4, alpha: float = 0.15) -> Tensor:
        """The probabilities behind :meth:`masks`, for :func:`hmg_gpu.soft_update`: float32 [N, H, W].

        Stretched so that the student's threshold becomes 0.5. The largest where windows overlap, 0 beyond them; where
        PMG's mask stays it is 0 and 1.
        """
        shape = data.images.shape
        soft = torch.zeros(math.prod(shape) + 1, device=data.images.device)  # the last slot takes what is outside
        for points in data.points.split(GROUP):
            part = replace(data, points=points)
            fallback = masks_around(part, self.settings.radius, extent=extent, half_width=half_width, alpha=alpha)
            found = self.probabilities(data.images, points, sizes=data.sizes)
            own, usable = own_pixels(found, self.threshold, self.settings.link)
            found = _stretch(found, self.threshold)
            found = torch.where(own | (found < 0.5), found, 0)  # other targets' pixels are theirs
            values = torch.where(usable[:, None, None], found, fallback.float())
            position, inside = window_positions(points, found.shape[1], shape, data.sizes)
            position = torch.where(inside, position, len(soft) - 1)
            soft.scatter_reduce_(0, position.flatten(), values.flatten(), "amax")
        return soft[:-1].view(shape)


def learned_student(
    data: ImageSet,
    path: Path,
    *,
    settings: StudentSettings | None = None,
    progress: Callable[[int, int], None] | None = None,
    **pmg: float,
) -> Path:
    """Train a student on a set and save it at ``path``, unless the file there learned from the same points already.

    A file of other points is replaced.

    Args:
        data: images and points.
        settings, progress: as :func:`train_student`.
        pmg: extent, half_width, alpha.

    Returns:
        ``path``.

    Raises:
        InputError: the file there learned from the same points with other settings.
    """
    settings = (settings or StudentSettings()).for_extent(pmg.get("extent", 25))
    points = hashlib.sha256(json.dumps([data.names, data.points.tolist()]).encode()).hexdigest()
    about = {"learned_from": {"points": points, "images": len(data)} | pmg}
    if path.exists():
        known = read_description(path) or {}
        if known.get("learned_from") == about["learned_from"]:
            if known.get("student") != asdict(settings):
                raise InputError(
                    f"{path}: a student of the same points with other settings, or of another version, which would "
                    "make other masks; remove it to train a new one"
                )
            return path
    train_student(data, settings=settings, progress=progress, **pmg).save(path, about)
    return path


def full_sizes(images: Tensor) -> Tensor:
    """int64 [B, 2] of images without padding."""
    return torch.tensor(images.shape[1:], device=images.device).expand(len(images), 2)


def gather(images: Tensor, points: Tensor, sizes: Tensor, side: int, turn: Tensor) -> Tensor:
    """Square crops around points, turned: float32 [P, S, S], the point at [S // 2, S // 2].

    Beyond the image its border pixels repeat.

    Args:
        side: S in pixels.
        turn: int64 or bool [P, 3]: flip rows, flip columns, then transpose.
    """
    rows, columns = _turned(side, turn)  # [P, S, S]
    image, y, x = points[:, :, None, None].unbind(1)
    limit = sizes[points[:, 0]][:, :, None, None] - 1  # [P, 2, 1, 1]
    rows = torch.minimum((y + rows).clamp(min=0), limit[:, 0])
    columns = torch.minimum((x + columns).clamp(min=0), limit[:, 1])
    _, height, width = images.shape
    return images.reshape(-1)[(image * height + rows) * width + columns].float()


def _turned(side: int, turn: Tensor) -> tuple[Tensor, Tensor]:
    """Offsets (row, column) from the point that each pixel of a turned crop shows: int64 [P, S, S] each."""
    offset = torch.arange(side, device=turn.device) - side // 2
    sign = 1 - 2 * turn[:, :2].long()  # [P, 2]
    down, across = sign[:, :1] * offset, sign[:, 1:] * offset  # [P, S]
    swap = turn[:, 2].bool()[:, None, None]
    rows = torch.where(swap, down[:, None, :], down[:, :, None])
    columns = torch.where(swap, across[:, :, None], across[:, None, :])
    return rows, columns


def unturn(values: Tensor, view: int, radius: int) -> Tensor:
    """Bring predictions of one view [P, S, S] back to the image's directions: [P, 2 R + 1, 2 R + 1]."""
    if view >> 2:
        values = values.mT
    centre = values.shape[1] // 2
    flips = [axis for axis, bit in ((1, view & 1), (2, view >> 1 & 1)) if bit]
    values = values[:, centre - radius : centre + radius + 1, centre - radius : centre + radius + 1]
    return values.flip(flips) if flips else values


def normalise(crops: Tensor) -> Tensor:
    """What the network sees: float32 [P, 3, S, S] of crops [P, S, S].

    The crop's median becomes 0 and the brightest of the 3 x 3 pixels at the point 1, so that gain and offset of the
    image do not matter; where the point is no brighter than its surroundings the standard deviation takes the place.
    """
    side = crops.shape[1]
    centre = slice(side // 2 - 1, side // 2 + 2)
    median = crops.flatten(1).median(1).values[:, None, None]
    peak = crops[:, centre, centre].amax((1, 2))[:, None, None] - median
    spread = crops.std((1, 2))[:, None, None]
    scale = torch.where(peak > 0.5 * spread, peak, spread.clamp(min=1e-6))
    values = ((crops - median) / scale).clamp(-3, 3)
    maps = distance_maps(side, crops.device).expand(len(crops), 2, side, side)
    return torch.cat((values[:, None], maps), dim=1).contiguous(memory_format=torch.channels_last)


def choose(probabilities: Tensor, fallback: Tensor, threshold: float = 0.5, link: float = 1.0) -> Tensor:
    """Each point's mask out of its probabilities, or its fallback: bool [P, K, K]; see :meth:`Student.masks`."""
    own, usable = own_pixels(probabilities, threshold, link)
    return torch.where(usable[:, None, None], own, fallback)


def _stretch(probabilities: Tensor, threshold: float) -> Tensor:
    """Two straight lines from 0 to 0, from the threshold to 0.5 and from 1 to 1."""
    below = (probabilities * (0.5 / threshold)).clamp(max=0.5 - 2**-24)
    above = 0.5 + (probabilities - threshold) * (0.5 / (1 - threshold))
    return torch.where(probabilities >= threshold, above, below)


def own_pixels(probabilities: Tensor, threshold: float, link: float) -> tuple[Tensor, Tensor]:
    """Pixels [P, K, K] that pass the threshold and belong to the centre's target, and which of the P can be used.

    A pixel belongs where a path leads to within a pixel of the centre whose probabilities all pass the threshold times
    ``link`` (hysteresis): a large target keeps its parts. A mask cannot be used where no pixel so near the centre
    passes the threshold itself, or where it reaches the window's edge.
    """
    found = connected_components(probabilities >= link * threshold)
    centre = probabilities.shape[1] // 2
    at = slice(centre - 1, centre + 2)
    labels = found.labels()[:, at, at]
    near = torch.zeros(len(found) + 1, dtype=torch.bool, device=probabilities.device)
    near[labels.flatten()] = True
    own = found.mask(near[1:]) & (probabilities >= threshold)
    edge = own[:, 0].any(1) | own[:, -1].any(1) | own[:, :, 0].any(1) | own[:, :, -1].any(1)
    return own, (probabilities[:, at, at] >= threshold).any(2).any(1) & ~edge


def paste(own: Tensor, points: Tensor, shape: Sequence[int], sizes: Tensor) -> Tensor:
    """Unite masks around points, bool [P, K, K], in their images: bool [B, H, W]; nothing beyond ``sizes``."""
    position, inside = window_positions(points, own.shape[1], shape, sizes)
    pixels = math.prod(shape)
    canvas = torch.zeros(pixels + 1, dtype=torch.bool, device=own.device)  # the last slot takes what is outside
    canvas.scatter_(0, torch.where(own & inside, position, pixels).flatten(), True)
    return canvas[:pixels].view(tuple(shape))


def window_positions(points: Tensor, side: int, shape: Sequence[int], sizes: Tensor) -> tuple[Tensor, Tensor]:
    """Flat positions in a batch of the pixels around points, int64 [P, K, K], and whether they lie in the image."""
    offset = torch.arange(side, device=points.device) - side // 2
    image, y, x = points[:, :, None, None].unbind(1)
    rows, columns = y + offset[:, None], x + offset  # [P, K, 1], [P, 1, K]
    limit = sizes[points[:, 0]][:, :, None, None]
    inside = (rows >= 0) & (rows < limit[:, 0]) & (columns >= 0) & (columns < limit[:, 1])
    return (image * shape[1] + rows) * shape[2] + columns, inside


# --- training --------------------------------------------------------------------------------------------------------


def train_student(
    sets: ImageSet | Sequence[ImageSet],
    *,
    extent: int | Sequence[int] = 25,
    half_width: int = 4,
    alpha: float = 0.15,
    settings: StudentSettings | None = None,
    progress: Callable[[int, int], None] | None = None,
    teachers: Sequence[Tensor] | None = None,
    on_round: Callable[[Student], None] | None = None,
) -> Student:
    """Train a student on PMG's masks of the points of one or more sets; their ground truth is never looked at.

    Args:
        sets: images with points, on the device to train on.
        extent: L_ep in pixels, one for all sets or one for each.
        half_width, alpha: L_dp and alpha of PMG.
        settings: decides the result together with the data; None: the defaults.
        progress: called with (steps done, steps in all).
        teachers: masks to learn from in the first round instead of PMG's, float or bool [P, K, K] for each set
            with K = 2 (``settings.radius + settings.shift``) + 1.
        on_round: called with the student of every round.

    Returns:
        The student, on the sets' device.

    Raises:
        InputError: there is no point in any set.
    """
    sets = [sets] if isinstance(sets, ImageSet) else list(sets)
    if sum(len(one.points) for one in sets) == 0:
        raise InputError("no point label in any set: there is nothing to learn from; check the points")
    extents = [extent] * len(sets) if isinstance(extent, int) else list(extent)
    settings = (settings or StudentSettings()).for_extent(max(extents))
    if len(sets) > settings.batch_size:
        raise InputError(f"batch_size = {settings.batch_size}: expected at least one crop for each of {len(sets)} sets")
    reach = settings.radius + settings.shift
    total = settings.rounds * settings.members * _steps(sets, settings)
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    def pmg(one: ImageSet, length: int, radius: int, centres: Tensor | None = None) -> Tensor:
        return masks_around(one, radius, extent=length, half_width=half_width, alpha=alpha, centres=centres)

    if teachers is None:
        teachers = [pmg(one, length, reach) for one, length in zip(sets, extents, strict=True)]
    student = None
    for number in range(settings.rounds):
        if student is not None:
            unlinked = Student(student.networks, replace(settings, link=1.0), student.threshold)  # one target alone
            again = [
                _recentred(one, unlinked.own(one, extent=length, half_width=half_width, alpha=alpha))
                for one, length in zip(sets, extents, strict=True)
            ]
            teachers = [
                pmg(new, length, reach, one.points[:, 1:])
                for one, new, length in zip(sets, again, extents, strict=True)
            ]
        shares = _shares(sum(len(one.points) for one in sets), settings, number)
        networks = [
            _train(sets, teachers, share, settings, mix_seed(settings.seed, number, member), step)
            for member, share in enumerate(shares)
        ]
        student = Student(networks, settings, settings.threshold or _best_level(networks, settings, sets))
        if on_round is not None:
            on_round(student)
    return student


def agreement(
    networks: Sequence[CropNet], settings: StudentSettings, sets: Sequence[ImageSet], levels: Sequence[float] = LEVELS
) -> list[float]:
    """How alike the masks of networks are that learned from different halves of the points, by threshold.

    Returns:
        The IoU of their masks for each level, pixels of all points and pairs of networks pooled; no ground truth is
        needed. 1 for every level where there is no pair.
    """
    alone = [Student([network], settings) for network in networks]
    level = torch.tensor(levels, device=sets[0].images.device)[:, None, None, None]
    both = either = torch.zeros(len(levels), dtype=torch.int64, device=level.device)
    for one in sets:
        for points in one.points.split(NETS):
            found = [student.probabilities(one.images, points, sizes=one.sizes) >= level for student in alone]
            for first, second in zip(found[::2], found[1::2], strict=False):
                both = both + (first & second).sum((1, 2, 3))
                either = either + (first | second).sum((1, 2, 3))
    return torch.where(either > 0, both / either.clamp(min=1), 1.0).tolist()


def _best_level(networks: Sequence[CropNet], settings: StudentSettings, sets: Sequence[ImageSet]) -> float:
    """The threshold at which halves agree best; 0.5 where there are none."""
    if len(networks) < 2:
        return 0.5
    found = agreement(networks, settings, sets)
    return LEVELS[found.index(max(found))]


def _shares(count: int, settings: StudentSettings, number: int) -> list[Tensor]:
    """Which of the points each member learns from, int64 on the CPU: all for one member, halves for a pair."""
    if settings.members == 1 or count < 2:
        return [torch.arange(count)] * settings.members
    shares = []
    for pair in range((settings.members + 1) // 2):
        generator = torch.Generator().manual_seed(mix_seed(settings.seed, number, pair, 1))
        order = torch.randperm(count, generator=generator)
        shares += [order[::2].sort().values, order[1::2].sort().values]
    return shares[: settings.members]


def _recentred(one: ImageSet, own: Tensor) -> ImageSet:
    """The set with its points moved to the centroids of their masks [P, K, K], which have the points at the centre."""
    offset = torch.arange(own.shape[1], device=own.device) - own.shape[1] // 2
    area = own.sum((1, 2)).clamp(min=1)
    move = torch.stack([(own.sum(axis) * offset).sum(1) / area for axis in (2, 1)], dim=1).round().long()
    size = one.sizes[one.points[:, 0]]
    moved = (one.points[:, 1:] + move).clamp(min=0).minimum(size - 1)
    return replace(one, points=torch.cat((one.points[:, :1], moved), dim=1))


def _train(
    sets: Sequence[ImageSet],
    teachers: Sequence[Tensor],
    share: Tensor,
    settings: StudentSettings,
    seed: int,
    step: Callable[[], None],
) -> CropNet:
    device, steps = sets[0].images.device, _steps(sets, settings)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        network = CropNet().to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.learning_rate, total_steps=steps, pct_start=0.2, cycle_momentum=False
    )
    average = [value.detach().clone() for value in _floats(network)]
    lessons = _draw(sets, share, settings, seed)  # on the device, so that no step waits for a copy
    network.train()
    for number in range(steps):
        drawn = [tuple(values[number] for values in one) for one in lessons]
        loss = _loss(network, sets, teachers, settings, drawn)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        keep = min(settings.averaging, (number + 1) / (number + 10)) if settings.averaging else 0.0
        with torch.no_grad():
            torch._foreach_lerp_(average, [value.detach() for value in _floats(network)], 1 - keep)
        step()
    with torch.no_grad():
        for value, mean in zip(_floats(network), average, strict=True):
            value.copy_(mean)
    return network.eval()


def _steps(sets: Sequence[ImageSet], settings: StudentSettings) -> int:
    """Of one network in one round: as many again for every further set that has points."""
    return settings.steps * sum(len(one.points) > 0 for one in sets)


def _draw(
    sets: Sequence[ImageSet], share: Tensor, settings: StudentSettings, seed: int
) -> list[tuple[Sequence[Tensor], ...]]:
    """For each set and each step: which of its points, how their crops are turned, and what decides their shifts.

    Sets have equal parts of every batch (but for one crop), so that a small one is not lost beside a large one.
    """
    generator = torch.Generator().manual_seed(seed)
    steps = _steps(sets, settings)
    ends = itertools.accumulate((len(one.points) for one in sets), initial=0)
    shares = [share[(share >= first) & (share < last)] - first for first, last in itertools.pairwise(ends)]
    parts = iter(torch.arange(settings.batch_size).tensor_split(sum(len(own) > 0 for own in shares)))
    orders = []
    for own in shares:
        count = len(next(parts)) if len(own) else 0
        passes = -(-steps * count // max(1, len(own)))  # every point once before any comes again
        order = [own[torch.randperm(len(own), generator=generator)] for _ in range(passes)]
        orders.append(torch.cat(order or [own])[: steps * count].view(steps, count))
    turn = torch.randint(0, 2, (steps, settings.batch_size, 3), generator=generator)
    noise = torch.rand(steps, settings.batch_size, (2 * settings.shift + 1) ** 2, generator=generator)
    counts = [order.shape[1] for order in orders]
    return [
        tuple(value.to(one.images.device).unbind() for value in values)
        for one, *values in zip(sets, orders, turn.split(counts, 1), noise.split(counts, 1), strict=True)
    ]


def _loss(
    network: nn.Module,
    sets: Sequence[ImageSet],
    teachers: Sequence[Tensor],
    settings: StudentSettings,
    drawn: Sequence[tuple[Tensor, ...]],
) -> Tensor:
    """Soft-IoU and cross entropy of one batch, each set's part of it as :func:`_draw` says; reads nothing back."""
    parts = zip(sets, teachers, drawn, strict=True)
    pairs = [_lesson(one, teacher, settings, *values) for one, teacher, values in parts if len(values[0])]
    crops, targets = (torch.cat(values) for values in zip(*pairs, strict=True))
    logits = network(normalise(crops))
    target = targets[:, None].float()
    loss = soft_iou_loss(logits, target)
    return loss + settings.cross_entropy * F.binary_cross_entropy_with_logits(logits, target)


def _floats(network: nn.Module) -> list[Tensor]:
    return [value for value in network.state_dict().values() if value.is_floating_point()]


def _lesson(
    one: ImageSet, teacher: Tensor, settings: StudentSettings, rows: Tensor, turn: Tensor, noise: Tensor
) -> tuple[Tensor, Tensor]:
    """Crops [p, S, S] around shifted points and the teacher's masks in them, both turned the same way."""
    shift, centre = settings.shift, teacher.shape[1] // 2
    points, masks = one.points[rows], teacher[rows]
    core = masks[:, centre - shift : centre + shift + 1, centre - shift : centre + shift + 1].flatten(1) > 0.5
    # A random pixel of the teacher's mask near the point; the point itself where the mask does not hold any.
    place = torch.where(core, noise, -1.0)
    place[:, place.shape[1] // 2] = noise[:, place.shape[1] // 2]
    place = place.argmax(1)
    move = torch.stack((place // (2 * shift + 1) - shift, place % (2 * shift + 1) - shift), dim=1)  # [p, 2]
    size = one.sizes[points[:, 0]]
    moved = torch.minimum((points[:, 1:] + move).clamp(min=0), size - 1)
    move = moved - points[:, 1:]
    crop = gather(one.images, torch.cat((points[:, :1], moved), 1), one.sizes, settings.crop, turn)
    down, across = _turned(settings.crop, turn)
    line, column = down + move[:, :1, None] + centre, across + move[:, 1:, None] + centre
    side = masks.shape[1]
    inside = (line >= 0) & (line < side) & (column >= 0) & (column < side)
    index = line.clamp(0, side - 1) * side + column.clamp(0, side - 1)
    target = masks.flatten(1).gather(1, index.flatten(1)).view(index.shape)
    return crop, target * inside
