"""Masks by a small network that learns from PMG's masks of the same points (beyond the paper; no ground truth).

PMG's errors differ from target to target, what it gets right repeats. A network that sees crops around all points of a
set, with PMG's masks to learn from, keeps what repeats: the student becomes better than its teacher.

    points --PMG--> one mask a point --train--> student --crop around each point--> probabilities --> masks
                                       ^                                                              |
                                       '---- PMG from the centroids of the masks (further rounds) ----'

A student has two pairs of networks. Each of a pair is taught by half of the points, so that the other never saw PMG's
error on a target; the second pair, of other halves, makes the mean steadier. PMG errs by leaving pixels out (its box
can only cut): a share of the lessons shows targets with a second part (``parts.py``), and the threshold of the
probabilities lies below a half. The results page shows others and what that is worth.

Annotators may put masks beside what an image shows; the points tell (``placement.py``), and they tell where a target
needs another threshold (``centring.py``). Masks of two points that run into each other are taken apart
(``neighbours.py``).

Sets that are taught together may want masks of different extent: each extent has a normalisation of its own, and layers
from where the network is coarsest; the convolutions before are shared. Here are the settings and what a trained student
does; ``train.py`` trains it, ``crops.py`` has the geometry.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, fields, replace
from itertools import count, takewhile
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hmg_gpu.common.errors import InputError
from hmg_gpu.common.provenance import provenance
from hmg_gpu.common.threads import map_groups
from hmg_gpu.data.record import Record, data_digest, find_record, in_words
from hmg_gpu.data.sets import ImageSet
from hmg_gpu.masks.makers.pmg import Pmg
from hmg_gpu.masks.student.centring import DEVIATION, Centring, deviations, find_levels
from hmg_gpu.masks.student.crops import (
    choose,
    full_sizes,
    gather,
    normalise,
    own_pixels,
    paste,
    stretch,
    unturn,
    window_positions,
)
from hmg_gpu.masks.student.neighbours import take_apart
from hmg_gpu.masks.student.network import CropNet
from hmg_gpu.masks.student.placement import BETWEEN, CLASSES, Placement, place
from hmg_gpu.masks.windows import masks_around
from hmg_gpu.models.checkpoints import read_description, read_tensors, save_checkpoint

GROUP = 4096  # points whose masks are held at a time
ASIDE = 64  # points on either side of them that may lie in the same image
NETS = 256  # crops at a time through a network that does not train
EXTENTS = 64  # that one student may have learned from
APART = "neighbours apart, 1"  # how masks come about beside the settings; another text where that changes
DOUBT = 0.002  # of a mask by its centroid; chosen with the ground truth of NUAA-SIRST and NUDT-SIRST
NEAR = 2  # pixels around a mask whose probabilities tell how sure it is
VIEWS = (0, 7, 1, 6, 2, 5, 3, 4)  # of a crop, each pair from opposite sides; the networks share them


@dataclass(frozen=True)
class StudentSettings:
    """Everything that decides a student, beside the data. Lengths in pixels.

    The paper has no such step.
    """

    crop: int = 48  # S, side of the crop, a multiple of 4
    shift: int = 3  # in training a crop's centre moves up to so far, within the teacher's mask
    parts: float = 0.3  # share of the crops in training whose target gets a second, dimmer part
    steps: int = 350  # of each network in each round; for every further set as many again
    batch_size: int = 32  # crops; sets that are taught together have equal parts of it
    learning_rate: float = 4e-3  # AdamW, one cycle
    weight_decay: float = 1e-2
    cross_entropy: float = 0.2  # weight beside soft-IoU
    averaging: float = 0.98  # of the weights from step to step; 0: the last weights alone
    flips: bool = True  # when predicting, the networks share the eight flips and transposes of a crop
    rounds: int = 1  # from the second on PMG starts from the centroids of the masks of the round before
    members: int = 4  # networks whose probabilities are averaged; those of a pair learn from half of the points each
    threshold: float = 0.4  # of probabilities, of small targets; 0: where members agree best, of 0.1, 0.15 .. 0.5
    link: float = 0.2  # of the threshold: probabilities that join the parts of a mask (hysteresis); 1: no such
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"crop": 16, "shift": 0, "steps": 1, "batch_size": 2, "rounds": 1, "members": 1}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise InputError(f"{name} = {getattr(self, name)}: expected at least {bound}")
        for name, bound in {"crop": 256, "members": 100}.items():  # a file may claim anything
            if getattr(self, name) > bound:
                raise InputError(f"{name} = {getattr(self, name)}: expected at most {bound}")
        if self.crop % 4:
            raise InputError(f"crop = {self.crop}: expected a multiple of 4, as the network halves it twice")
        for name in ("averaging", "threshold", "parts"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"{name} = {getattr(self, name)}: expected a number from 0 up to 1")
        if not 0 < self.link <= 1:
            raise InputError(f"link = {self.link}: expected a number above 0 and up to 1")

    @property
    def radius(self) -> int:
        """How far a mask can reach from its point: every view of a crop has the pixels up to here."""
        return self.crop // 2 - 1


class Student:
    """Trained networks and what they were trained with; makes masks of any points without further training.

    Args:
        networks: for each extent (L_ep in pixels) of the masks that they learned from, one for each member; on one
            device.
        settings: as trained.
        threshold: of the probabilities, in (0, 1); None: the settings', or 0.5 where they leave it open.
        learned_from: the record of each set that it learned from (:func:`hmg_gpu.data.record.record_of`), kept in its
            file; none where nobody knows.
        placements: for each extent where its sets have their masks against what images show; not given: there.
        centrings: for each extent where those masks have their centroids against the points; not given: unknown.
    """

    def __init__(
        self,
        networks: Mapping[int, Sequence[CropNet]],
        settings: StudentSettings,
        threshold: float | None = None,
        learned_from: Sequence[Record] = (),
        placements: Mapping[int, Placement] | None = None,
        centrings: Mapping[int, Centring | None] | None = None,
    ):
        self.networks = {extent: [network.eval() for network in networks[extent]] for extent in sorted(networks)}
        self.settings = settings
        self.threshold = threshold or settings.threshold or 0.5
        self.learned_from = tuple(learned_from)
        self.placements = {extent: (placements or {}).get(extent, ()) for extent in self.networks}
        self.centrings = {extent: (centrings or {}).get(extent) for extent in self.networks}

    def nearest(self, extent: int) -> int:
        """Of the extents it learned from the nearest (the shorter of two), whose networks make masks of ``extent``."""
        return min(self.networks, key=lambda known: abs(known - extent))

    def to(self, device: str | torch.device) -> Student:
        """The student with its networks moved to a device."""
        for network in (network for family in self.networks.values() for network in family):
            network.to(device)
        return self

    def digest(self) -> str:
        """SHA-256 of all that decides its masks: weights, settings, threshold, placements and centrings."""
        placed = [*self.placements.values(), BETWEEN, APART]
        if any(self.centrings.values()):  # a file from before them keeps its digest
            placed += [*self.centrings.values(), DEVIATION]
        text = json.dumps([asdict(self.settings), [*self.networks], self.threshold, placed])
        checksum = hashlib.sha256(text.encode())
        for network in (network for family in self.networks.values() for network in family):
            for value in network.state_dict().values():
                checksum.update(value.detach().cpu().contiguous().numpy().tobytes())
        return checksum.hexdigest()

    def member(self, number: int) -> Student:
        """One of its networks alone."""
        networks = {extent: [family[number]] for extent, family in self.networks.items()}
        places = {"placements": self.placements, "centrings": self.centrings}
        return Student(networks, replace(self.settings, members=1), self.threshold, **places)

    def save(self, path: str | os.PathLike, about: dict[str, Any] | None = None) -> None:
        """Write the student to a .safetensors file, complete in itself; ``about`` (JSON values) is kept with it."""
        tensors = {
            f"{_prefix(extent, number)}{name}": value.clone()  # extents share weights, the file's tensors may not
            for extent, networks in self.networks.items()
            for number, network in enumerate(networks)
            for name, value in network.state_dict().items()
        }
        for number, record in enumerate(self.learned_from):
            tensors |= {f"{_lesson(number)}{name}": value for name, value in record.items()}
        description = {"student": asdict(self.settings), "extents": [*self.networks], "threshold": self.threshold}
        description["learned_from"] = [{"data": in_words(record)} | data_digest(record) for record in self.learned_from]
        description["placements"] = [*self.placements.values()]
        description["centrings"] = [*self.centrings.values()]
        save_checkpoint(path, tensors, description | {"versions": provenance()} | (about or {}))

    @classmethod
    def load(cls, path: str | os.PathLike, device: str | torch.device = "cpu") -> Student:
        """Read what :meth:`save` wrote.

        Raises:
            InputError: the file is missing or damaged, or holds no student; nothing of it is ever run.
        """
        description = read_description(path) or {}
        values, extents = description.get("student"), description.get("extents")
        known = {field.name for field in fields(StudentSettings)}
        if not isinstance(values, dict) or values.keys() != known or not isinstance(extents, list):
            raise InputError(f"{path}: holds no student of this version; make one with hmg-gpu masks --masks learned")
        kinds = {field.name: type(field.default) for field in fields(StudentSettings)}
        for name, value in values.items():
            if type(value) is not kinds[name]:
                raise InputError(f"{path}: its setting {name} is {value!r}, expected {kinds[name].__name__}")
        settings = StudentSettings(**values)
        threshold = description.get("threshold")
        if type(threshold) is not float or not 0 < threshold < 1:
            raise InputError(f"{path}: its threshold is {threshold!r}, expected a number between 0 and 1")
        valid = all(type(extent) is int and 0 < extent < 10**5 for extent in extents)
        if not valid or not 1 <= len(extents) <= EXTENTS or extents != sorted(set(extents)):
            raise InputError(f"{path}: its extents are {str(extents)[:80]}, expected up to {EXTENTS} rising lengths")
        placements = _checked_placements(path, description.get("placements", [()] * len(extents)), len(extents))
        centrings = _checked_centrings(path, description.get("centrings", [None] * len(extents)), len(extents))
        tensors = read_tensors(path)
        networks: dict[int, list[CropNet]] = {}
        for extent in extents:
            networks[extent] = []
            for number in range(settings.members):
                network = _filled(tensors, _prefix(extent, number))
                if network is None:
                    raise InputError(
                        f"{path}: the weights of member {number} for extent {extent} are missing or damaged; "
                        "copy the file again"
                    )
                networks[extent].append(network.to(device, memory_format=torch.channels_last))
        placed, centred = (dict(zip(extents, values, strict=True)) for values in (placements, centrings))
        return cls(networks, settings, threshold, find_lessons(tensors), placed, centred)

    @torch.no_grad()
    def probabilities(self, images: Tensor, points: Tensor, *, extent: int = 25, sizes: Tensor | None = None) -> Tensor:
        """The probability of every pixel around each point to belong to the point's target.

        Args:
            images: float32 or uint8 [B, H, W], intensities as they come.
            points: int64 [P, 3], rows (image, y, x).
            extent: L_ep in pixels, see :meth:`nearest`.
            sizes: int64 [B, 2], valid (height, width) of padded images; None: the whole image.

        Returns:
            float32 [P, 2 R + 1, 2 R + 1], the point at [R, R]; R = ``settings.radius``.
        """
        side = 2 * self.settings.radius + 1
        result = torch.zeros(len(points), side, side, device=images.device)
        done = 0
        for values in self.by_member(images, points, extent, full_sizes(images) if sizes is None else sizes):
            mean = values.mean(0)
            result[done : done + len(mean)] = self._placed(mean, mean, extent)
            done += len(mean)
        return result

    @torch.no_grad()
    def by_member(self, images: Tensor, points: Tensor, extent: int, sizes: Tensor) -> Iterator[Tensor]:
        """What each network makes of its views, of some points at a time and where images show it: [M, p, K, K]."""
        networks, radius = self.networks[self.nearest(extent)], self.settings.radius
        view_bits = torch.arange(8, device=images.device)[:, None] >> torch.arange(3, device=images.device) & 1
        for part in points.split(NETS):

            def by_one(number: int, part: Tensor = part) -> Tensor:
                views = _views(number, len(networks)) if self.settings.flips else (0,)
                total = torch.zeros(len(part), 2 * radius + 1, 2 * radius + 1, device=images.device)
                with _without_autocast(images.device.type):
                    for view in views:
                        turn = view_bits[view].expand(len(part), 3)
                        crops = normalise(gather(images, part, sizes, self.settings.crop, turn))
                        total += unturn(networks[number](crops)[:, 0].sigmoid(), view, radius) / len(views)
                return total

            values = torch.stack(map_groups(by_one, range(len(networks)), images, many=2))
            yield values

    def _placed(self, mean: Tensor, values: Tensor, extent: int) -> Tensor:
        """Probabilities where the annotators have their masks, by the area that the mean of all networks gives."""
        placement = self.placements[self.nearest(extent)]
        if not placement:
            return values
        areas = own_pixels(mean, self.threshold, 1.0)[0].sum((1, 2))
        return place(values, areas, placement, self.threshold)

    def _levels(self, probabilities: Tensor, extent: int) -> Tensor:
        """The threshold that each target's point asks for: float32 [P, 1, 1]."""
        return find_levels(probabilities, self.threshold, self.settings.link, self.centrings[self.nearest(extent)])

    def masks(self, data: ImageSet, pmg: Pmg) -> Tensor:
        """Masks of a set, united per image.

        PMG's mask of a point stays where the student finds nothing at the point, and where its mask reaches the
        window's edge: such a target is larger than the crop. Masks of different points do not touch
        (``neighbours.py``).

        Args:
            data: images and points; its ground truth is not looked at.
            pmg: of the points, its extent settled; see :meth:`nearest`.

        Returns:
            bool [N, H, W].
        """
        masks = torch.zeros(data.images.shape, dtype=torch.bool, device=data.images.device)
        for part, rows in _in_groups(data):
            each = take_apart(self.each(part, pmg), part.points)[rows]
            masks |= paste(each, part.points[rows], data.images.shape, data.sizes)
        return masks

    def each(self, data: ImageSet, pmg: Pmg) -> Tensor:
        """As :meth:`masks`, each point's by itself around the point, not taken apart: bool [P, 2 R + 1, 2 R + 1]."""
        return self.windows(data, pmg)[0]

    def windows(self, data: ImageSet, pmg: Pmg) -> tuple[Tensor, Tensor, Tensor]:
        """As :meth:`each`, with the probabilities, float32 [P, 2 R + 1, 2 R + 1], and their thresholds [P, 1, 1].

        Where PMG's mask stays probabilities are 0 and 1.
        """
        fallback = masks_around(data, self.settings.radius, pmg)
        extent = pmg.fit(data).extent
        probabilities = self.probabilities(data.images, data.points, extent=extent, sizes=data.sizes)
        pixels, usable, level = own_pixels(probabilities, self._levels(probabilities, extent), self.settings.link)
        usable = usable[:, None, None]
        return torch.where(usable, pixels, fallback), torch.where(usable, probabilities, fallback.float()), level

    def confidence(self, data: ImageSet, pmg: Pmg) -> Tensor:
        """How sure each point's mask is, without ground truth: float32 [P] in [0, 1], in the points' order.

        The soft IoU of the mask (:meth:`each`) with each network's probabilities near it, and the mean over the
        networks; times what the point says, where the set's centring is known (``centring.py``). It is low where one
        network doubts, where networks differ, and where the mask's centroid is not where the point is.

            sum(p m) / (sum(m) + sum(p (1 - m)))  *  exp(-DOUBT d^2 / s^4)

        for a centroid d away where the set's centroids have the variance s^2: the more they scatter, the less it says.

        Args:
            data, pmg: as :meth:`masks`.
        """
        result = torch.zeros(len(data.points), device=data.images.device)
        done, extent = 0, pmg.fit(data).extent
        centring = self.centrings[self.nearest(extent)]
        for values in self.by_member(data.images, data.points, extent, data.sizes):
            rows = slice(done, done + values.shape[1])
            done = rows.stop
            mean = values.mean(0)
            part = replace(data, points=data.points[rows])
            fallback = masks_around(part, self.settings.radius, pmg)
            placed = self._placed(mean, mean, extent)
            mask = choose(placed, fallback, self._levels(placed, extent), self.settings.link).float()
            near = F.max_pool2d(mask[:, None], 2 * NEAR + 1, 1, NEAR)[:, 0]
            for own in values:
                own = self._placed(mean, own, extent) * near
                hit = (own * mask).sum((1, 2))
                result[rows] += hit / (mask.sum((1, 2)) + own.sum((1, 2)) - hit).clamp(min=1e-6) / len(values)
            if centring is not None:
                result[rows] *= (-DOUBT * deviations(mask, centring) / centring[2]).exp()
        return result

    def soft_masks(self, data: ImageSet, pmg: Pmg) -> Tensor:
        """The probabilities behind :meth:`masks`, for :func:`hmg_gpu.soft_update`: float32 [N, H, W].

        Stretched so that the student's threshold becomes 0.5. The largest where windows overlap, 0 beyond them; where
        PMG's mask stays it is 0 and 1.
        """
        shape = data.images.shape
        soft = torch.zeros(math.prod(shape) + 1, device=data.images.device)  # the last slot takes what is outside
        for part, rows in _in_groups(data):
            each, probabilities, level = self.windows(part, pmg)
            own, stretched = take_apart(each, part.points), stretch(probabilities, level)
            values = torch.where(own | (stretched < 0.5), stretched, 0)[rows]  # other targets' pixels are theirs
            position, inside = window_positions(part.points[rows], values.shape[1], shape, data.sizes)
            position = torch.where(inside, position, len(soft) - 1)
            soft.scatter_reduce_(0, position.flatten(), values.flatten(), "amax")
        return soft[:-1].view(shape)


def _in_groups(data: ImageSet) -> Iterator[tuple[ImageSet, slice]]:
    """Some points at a time with some before and after them, as they may be neighbours, and which of them count."""
    image, y, x = data.points.unbind(1)
    _, height, width = data.images.shape
    points = data.points[((image * height + y) * width + x).argsort()]
    for start in range(0, len(points), GROUP):
        first = max(start - ASIDE, 0)
        part = replace(data, points=points[first : start + GROUP + ASIDE])
        yield part, slice(start - first, start - first + GROUP)


def _without_autocast(kind: str) -> AbstractContextManager:
    """Full precision on a kind of device, whatever a caller asks for: threads would not share it."""
    return torch.autocast(kind, enabled=False) if kind in ("cpu", "cuda") else nullcontext()


def _views(number: int, members: int) -> tuple[int, ...]:
    """Of a network's crops when predicting; together the networks see all."""
    first = len(VIEWS) * number // members
    return VIEWS[first : max(first + 1, len(VIEWS) * (number + 1) // members)]


def _prefix(extent: int, number: int) -> str:
    """Of the names of a network's tensors in a student's file."""
    return f"extent{extent}.member{number}."


def _lesson(number: int) -> str:
    """Of the names of a record's tensors in a student's file."""
    return f"lesson{number}."


def find_lessons(tensors: Mapping[str, Tensor]) -> list[Record]:
    """The records of what a student learned from, in its file; none in one of an older version."""
    records = takewhile(lambda record: record is not None, (find_record(tensors, _lesson(row)) for row in count()))
    return list(records)


def _checked_placements(path: str | os.PathLike, values: Any, extents: int) -> list[Placement]:
    """Of a file; one before placements has none."""
    rows = [row for placement in values for row in placement] if _lists(values) and all(map(_lists, values)) else [0]
    valid = all(_lists(row) and [type(value) for value in row] == [float] * 3 for row in rows)
    valid = valid and all(area > 0 and max(abs(down), abs(across)) <= 8 for area, down, across in rows)
    areas = [[area for area, *_ in placement] for placement in values] if valid else []
    valid = valid and all(rising == sorted(rising) and len(rising) <= CLASSES for rising in areas)
    if not valid or len(values) != extents:
        raise InputError(f"{path}: its placements are {str(values)[:80]}, expected rows of area, down and across")
    return [tuple(map(tuple, placement)) for placement in values]


def _checked_centrings(path: str | os.PathLike, values: Any, extents: int) -> list[Centring | None]:
    """Of a file; one before centrings has none."""
    rows = [row for row in values if row is not None] if _lists(values) else [0]
    valid = all(_lists(row) and [type(value) for value in row] == [float] * 3 for row in rows)
    if not valid or len(values) != extents or not all(0 < row[2] < 1e4 and max(map(abs, row)) < 1e4 for row in rows):
        raise InputError(f"{path}: its centrings are {str(values)[:80]}, expected down, across and variance of each")
    return [row and tuple(row) for row in values]


def _lists(value: Any) -> bool:
    return isinstance(value, list | tuple)


def _filled(tensors: Mapping[str, Tensor], prefix: str) -> CropNet | None:
    """A network of the weights with this prefix; None where one is missing, is of another kind or not finite."""
    network = CropNet()
    state = {}
    for name, target in network.state_dict().items():
        value = tensors.get(prefix + name)
        if value is None or value.shape != target.shape or value.dtype != target.dtype or not value.isfinite().all():
            return None
        state[name] = value
    network.load_state_dict(state)
    return network
