"""Trains a student on PMG's masks of points: lessons, loss, averaging of the weights, rounds (see ``student.py``).

Crops are gathered on the device for a whole batch of points at once; nothing in the loop reads the device. Where a CPU
multiplies bfloat16 itself the networks train in it, in half the time; the same machine gives the same student again.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hmg_gpu.common.errors import InputError
from hmg_gpu.data.batches import mix_seed
from hmg_gpu.data.record import Record, differences, record_of
from hmg_gpu.data.sets import ImageSet
from hmg_gpu.masks.makers.pmg import Pmg
from hmg_gpu.masks.student.centring import Centring, find_centring
from hmg_gpu.masks.student.crops import gather, normalise, turned_offsets
from hmg_gpu.masks.student.lessons import lesson_masks
from hmg_gpu.masks.student.network import CropNet, sibling
from hmg_gpu.masks.student.parts import DRAWS, add_parts
from hmg_gpu.masks.student.placement import Placement, centroids, find_placement
from hmg_gpu.masks.student.student import EXTENTS, Student, StudentSettings, find_lessons
from hmg_gpu.models.checkpoints import read_description, read_tensors
from hmg_gpu.models.losses import soft_iou_loss

LEVELS = tuple(round(0.05 * number, 2) for number in range(2, 11))  # thresholds to choose from: 0.1 to 0.5


@dataclass(frozen=True)
class Course:
    """What a student learns from one set."""

    data: ImageSet
    pmg: Pmg  # its extent settled
    teacher: Tensor  # float or bool [P, K, K], a mask for each point; K = 2 (radius + shift) + 1

    @property
    def extent(self) -> int:
        """L_ep of the masks in pixels."""
        return self.pmg.extent


def learned_student(
    data: ImageSet,
    path: Path,
    pmg: Pmg,
    *,
    settings: StudentSettings | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Train a student on a set and save it at ``path``, unless the file there learned from the same data already.

    A student of other points or pixels, or of a teacher with other settings, is replaced; a warning says what differs.

    Args:
        data: images and points.
        pmg: the teacher.
        settings, progress: as :func:`train_student`.

    Returns:
        ``path``.

    Raises:
        InputError: the file there holds no student, or one that learned from the same data with other settings.
    """
    settings = settings or StudentSettings()
    pmg, record = pmg.fit(data), record_of(data)
    if path.exists():
        changed = _changed(path, record, pmg, settings)
        if not changed:
            return path
        text = f"{path}: its student learned from other data: {'; '.join(changed)}; a new one is trained in its place"
        warnings.warn(text, stacklevel=2)
    makers, sets = zip(*pmg.split(data), strict=True)
    student = train_student(sets, makers, settings=settings, progress=progress)
    student.learned_from = (record,)  # of the set as a whole
    student.save(path, {"teacher": pmg.about()})
    return path


def _changed(path: Path, record: Record, pmg: Pmg, settings: StudentSettings) -> list[str]:
    """In words, what the student in a file learned from that is other now."""
    known = read_description(path) or {}
    lessons = find_lessons(read_tensors(path))
    if "student" not in known or len(lessons) != 1:
        raise InputError(
            f"{path}: holds no student that says what it learned from (another file, or one of another version); move "
            "it away, or remove it to train a new one"
        )
    changed = differences(lessons[0], record)
    teacher, mine = known.get("teacher"), json.loads(json.dumps(pmg.about()))
    if teacher != mine:
        changed.append(f"its teacher was {teacher}, now {mine}")
    if not changed and (known["student"] != asdict(settings) or "extents" not in known):
        raise InputError(
            f"{path}: a student of the same points with other settings, or of another version, which would make other "
            "masks; remove it to train a new one"
        )
    return changed


def train_student(
    sets: ImageSet | Sequence[ImageSet],
    pmg: Pmg | Sequence[Pmg] | None = None,
    *,
    settings: StudentSettings | None = None,
    progress: Callable[[int, int], None] | None = None,
    teachers: Sequence[Tensor] | None = None,
    on_round: Callable[[Student], None] | None = None,
) -> Student:
    """Train a student on PMG's masks of the points of one or more sets; their ground truth is never looked at.

    Args:
        sets: images with points, on the device to train on.
        pmg: the teacher, one for all sets or one for each; sets of one extent are taught as one kind. None: the
            paper's settings for each set.
        settings: decides the result together with the data; None: the defaults.
        progress: called with (steps done, steps in all).
        teachers: masks to learn from in the first round instead of PMG's, float or bool [P, K, K] for each set
            with K = 2 (``settings.radius + settings.shift``) + 1.
        on_round: called with the student of every round.

    Returns:
        The student, on the sets' device.

    Raises:
        InputError: there is no point in any set; a teacher does not fit.
    """
    sets = [sets] if isinstance(sets, ImageSet) else list(sets)
    makers = _makers(pmg, sets)
    settings = settings or StudentSettings()
    numbers = [number for number, data in enumerate(sets) if len(data.points)]
    if not numbers:
        raise InputError("no point label in any set: there is nothing to learn from; check the points")
    if len(numbers) > settings.batch_size:
        text = f"expected at least one crop for each of {len(numbers)} sets"
        raise InputError(f"batch_size = {settings.batch_size}: {text}")
    reach = settings.radius + settings.shift
    if teachers is None:
        teachers = [lesson_masks(data, reach, maker) for data, maker in zip(sets, makers, strict=True)]
    expected = [(len(data.points), 2 * reach + 1, 2 * reach + 1) for data in sets]
    if [tuple(teacher.shape) for teacher in teachers] != expected:
        shapes = [tuple(teacher.shape) for teacher in teachers]
        raise InputError(f"teachers of shape {shapes}: expected {expected}, a mask around each point of each set")
    courses = [Course(sets[number], makers[number], teachers[number]) for number in numbers]
    total = settings.rounds * settings.members * _steps(courses, settings)
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    student = None
    for number in range(settings.rounds):
        if student is not None:
            courses = [_taught_again(course, student) for course in courses]
        families = [
            _train(courses, shares, settings, mix_seed(settings.seed, number, member), step)
            for member, shares in enumerate(_shares(courses, settings, number))
        ]
        networks = {length: [family[length] for family in families] for length in families[0]}
        student = Student(networks, settings)
        if not settings.threshold:
            student = Student(networks, settings, _best_level(student, courses))
        student = Student(networks, settings, student.threshold, placements=_placements(student, courses))
        student.centrings = _centrings(student, courses)
        if on_round is not None:
            on_round(student)
    student.learned_from = tuple(map(record_of, sets))
    return student


def agreement(
    student: Student, sets: Sequence[ImageSet], extents: Sequence[int], levels: Sequence[float] = LEVELS
) -> list[float]:
    """How alike the masks of networks are that learned from different halves of the points, by threshold.

    Args:
        extents: L_ep in pixels, one for each set.

    Returns:
        The IoU of their masks for each level, pixels of all points and pairs of networks pooled; no ground truth is
        needed. 1 for every level where there is no pair.
    """
    level = torch.tensor(levels, device=sets[0].images.device)[:, None, None, None]
    both = either = torch.zeros(len(levels), dtype=torch.int64, device=level.device)
    for data, extent in zip(sets, extents, strict=True):
        for values in student.by_member(data.images, data.points, extent, data.sizes):
            masks = values[:, None] >= level  # [M, levels, p, K, K]
            for first, second in zip(masks[::2], masks[1::2], strict=False):
                both = both + (first & second).sum((1, 2, 3))
                either = either + (first | second).sum((1, 2, 3))
    return torch.where(either > 0, both / either.clamp(min=1), 1.0).tolist()


def _makers(pmg: Pmg | Sequence[Pmg] | None, sets: Sequence[ImageSet]) -> list[Pmg]:
    """A teacher for each set, its extent settled."""
    makers = [pmg or Pmg()] * len(sets) if isinstance(pmg, Pmg | None) else list(pmg)
    if len(makers) != len(sets):
        raise InputError(f"pmg: expected one for all {len(sets)} sets or one for each, got {len(makers)}")
    makers = [maker.fit(data) for maker, data in zip(makers, sets, strict=True)]
    extents = {maker.extent for maker in makers}
    if len(extents) > EXTENTS:
        raise InputError(f"{len(extents)} different extents: expected at most {EXTENTS}")
    return makers


def _best_level(student: Student, courses: Sequence[Course]) -> float:
    """The threshold at which halves agree best; 0.5 where there are none."""
    if student.settings.members < 2:
        return 0.5
    scores = agreement(student, [course.data for course in courses], [course.extent for course in courses])
    return LEVELS[scores.index(max(scores))]


def _placements(student: Student, courses: Sequence[Course]) -> dict[int, Placement]:
    """Where annotators put masks of each extent against what images show, told by the points."""
    alone = _unlinked(student)
    return {
        extent: find_placement(torch.cat([alone.each(one.data, one.pmg) for one in courses if one.extent == extent]))
        for extent in student.networks
    }


def _centrings(student: Student, courses: Sequence[Course]) -> dict[int, Centring | None]:
    """Where masks of each extent have their centroids against the points, with one threshold for all."""
    return {
        extent: find_centring(torch.cat([student.each(one.data, one.pmg) for one in courses if one.extent == extent]))
        for extent in student.networks
    }


def _unlinked(student: Student) -> Student:
    """Its masks have no parts beside the point's own, where images show them."""
    return Student(student.networks, replace(student.settings, link=1.0), student.threshold)


def _shares(courses: Sequence[Course], settings: StudentSettings, number: int) -> list[list[Tensor]]:
    """Which points of each course every member learns from, int64 on the CPU: all for one member, halves for a pair."""
    counts = [len(course.data.points) for course in courses]
    if settings.members == 1:
        return [[torch.arange(count) for count in counts]]
    shares = []
    for pair in range((settings.members + 1) // 2):
        generator = torch.Generator().manual_seed(mix_seed(settings.seed, number, pair, 1))
        orders = [torch.randperm(count, generator=generator) for count in counts]
        shares += [[order[::2].sort().values for order in orders]]
        shares += [[(order[1::2] if len(order) > 1 else order).sort().values for order in orders]]
    return shares[: settings.members]


def _taught_again(course: Course, student: Student) -> Course:
    """The course with PMG's masks from the centroids of the student's masks."""
    data = course.data
    moved = _recentred(data, _unlinked(student).each(data, course.pmg))
    radius = course.teacher.shape[1] // 2
    return replace(course, teacher=lesson_masks(moved, radius, course.pmg, centres=data.points[:, 1:]))


def _recentred(data: ImageSet, masks: Tensor) -> ImageSet:
    """The set with its points moved to the centroids of their masks [P, K, K], which have the points at the centre."""
    move = centroids(masks).round().long()
    size = data.sizes[data.points[:, 0]]
    moved = (data.points[:, 1:] + move).clamp(min=0).minimum(size - 1)
    return replace(data, points=torch.cat((data.points[:, :1], moved), dim=1))


def _train(
    courses: Sequence[Course],
    shares: Sequence[Tensor],
    settings: StudentSettings,
    seed: int,
    step: Callable[[], None],
) -> dict[int, CropNet]:
    """One network for each extent of the courses, what they share trained by all."""
    device, steps = courses[0].data.images.device, _steps(courses, settings)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        network = CropNet().to(device, memory_format=torch.channels_last)
    first, *others = sorted({course.extent for course in courses})
    networks = {first: network} | {extent: sibling(network) for extent in others}
    family = nn.ModuleList(networks.values())
    optimizer = torch.optim.AdamW(
        family.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        settings.learning_rate,
        total_steps=steps,
        pct_start=0.2 if steps != 5 else 0.25,  # it divides by 0.2 steps - 1
        cycle_momentum=False,
    )
    average = [value.detach().clone() for value in _floats(family)]
    generator = torch.Generator().manual_seed(seed)
    parts = [len(part) for part in torch.arange(settings.batch_size).tensor_split(len(courses))]
    lessons = [
        _draw(course, share, steps, part, settings, generator)  # on the device, so that no step waits for a copy
        for course, share, part in zip(courses, shares, parts, strict=True)
    ]
    family.train()
    in_bfloat16 = device.type == "cpu" and torch.cpu.get_capabilities().get("avx512_bf16", False)  # half the time
    for number in range(steps):
        drawn = [tuple(values[number] for values in lesson) for lesson in lessons]
        with torch.autocast("cpu", torch.bfloat16, enabled=in_bfloat16):
            loss = _loss(networks, courses, settings, drawn)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        keep = min(settings.averaging, (number + 1) / (number + 10)) if settings.averaging else 0.0
        with torch.no_grad():
            torch._foreach_lerp_(average, [value.detach() for value in _floats(family)], 1 - keep)
        step()
    with torch.no_grad():
        for value, mean in zip(_floats(family), average, strict=True):
            value.copy_(mean)
    family.eval()
    return networks


def _steps(courses: Sequence[Course], settings: StudentSettings) -> int:
    """Of one network in one round: as many again for every further set, as a batch has less of each."""
    return settings.steps * len(courses)


def _draw(
    course: Course, share: Tensor, steps: int, count: int, settings: StudentSettings, generator: torch.Generator
) -> tuple[Sequence[Tensor], ...]:
    """For each step: so many of a course's points, how their crops are turned, what decides their shifts and parts."""
    passes = -(-steps * count // len(share))  # every point once before any comes again
    order = torch.cat([share[torch.randperm(len(share), generator=generator)] for _ in range(passes)])
    rows = order[: steps * count].view(steps, count)
    turn = torch.randint(0, 2, (steps, count, 3), generator=generator)
    noise = torch.rand(steps, count, (2 * settings.shift + 1) ** 2, generator=generator)
    parts = torch.rand(steps, count, DRAWS, generator=generator)
    return tuple(value.to(course.data.images.device).unbind() for value in (rows, turn, noise, parts))


def _loss(
    networks: Mapping[int, nn.Module],
    courses: Sequence[Course],
    settings: StudentSettings,
    drawn: Sequence[tuple[Tensor, ...]],
) -> Tensor:
    """Soft-IoU and cross entropy of a batch, each course's part of it weighed by its crops; reads nothing back."""
    total, count = 0.0, sum(len(rows) for rows, *_ in drawn)
    for extent, network in networks.items():
        lessons = [
            (*_lesson(course.data, course.teacher, settings, *values), parts)
            for course, (*values, parts) in zip(courses, drawn, strict=True)
            if course.extent == extent
        ]
        crops, targets, parts = (torch.cat(values) for values in zip(*lessons, strict=True))
        seen = normalise(crops)
        seen[:, 0], targets = add_parts(seen[:, 0], targets, parts, settings.parts)
        logits = network(seen).float()
        target = targets[:, None].float()
        cross_entropy = F.binary_cross_entropy_with_logits(logits, target)
        loss = soft_iou_loss(logits, target) + settings.cross_entropy * cross_entropy
        total = total + loss * (len(crops) / count)
    return total


def _floats(network: nn.Module) -> list[Tensor]:
    """Weights and running statistics, what is shared only once."""
    return [*network.parameters(), *(value for value in network.buffers() if value.is_floating_point())]


def _lesson(
    data: ImageSet, teacher: Tensor, settings: StudentSettings, rows: Tensor, turn: Tensor, noise: Tensor
) -> tuple[Tensor, Tensor]:
    """Crops [p, S, S] around shifted points and the teacher's masks in them, both turned the same way."""
    shift, centre = settings.shift, teacher.shape[1] // 2
    points, masks = data.points[rows], teacher[rows]
    core = masks[:, centre - shift : centre + shift + 1, centre - shift : centre + shift + 1].flatten(1) > 0.5
    # A random pixel of the teacher's mask near the point; the point itself where the mask does not hold any.
    place = torch.where(core, noise, -1.0)
    place[:, place.shape[1] // 2] = noise[:, place.shape[1] // 2]
    place = place.argmax(1)
    move = torch.stack((place // (2 * shift + 1) - shift, place % (2 * shift + 1) - shift), dim=1)  # [p, 2]
    size = data.sizes[points[:, 0]]
    moved = torch.minimum((points[:, 1:] + move).clamp(min=0), size - 1)
    move = moved - points[:, 1:]
    crop = gather(data.images, torch.cat((points[:, :1], moved), 1), data.sizes, settings.crop, turn)
    down, across = turned_offsets(settings.crop, turn)
    line, column = down + move[:, :1, None] + centre, across + move[:, 1:, None] + centre
    side = masks.shape[1]
    inside = (line >= 0) & (line < side) & (column >= 0) & (column < side)
    index = line.clamp(0, side - 1) * side + column.clamp(0, side - 1)
    target = masks.flatten(1).gather(1, index.flatten(1)).view(index.shape)
    return crop, target * inside
