"""What a run, a student or an updater remembers of its data, so that none goes on with other data in silence."""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import torch
from torch import Tensor

from hmg_gpu.data.sets import ImageSet

Record = Mapping[str, Tensor]  # what record_of gives
NAMES, POINTS, PIXELS, MASKS = "data.names", "data.points", "data.pixels", "data.masks"


def record_of(data: ImageSet, masks: Tensor | None = None) -> Record:
    """Names, points and a CRC-32 of each image's pixels, as tensors on the CPU that a checkpoint can hold.

    Args:
        masks: bool [N, H, W], the labels that the run begins with; None: none are recorded.

    Returns:
        ``data.names`` uint8 (UTF-8, a line each), ``data.points`` int64 [P, 3], ``data.pixels`` int64 [N] and, with
        ``masks``, ``data.masks`` int64 [N].
    """
    names = torch.tensor(list("\n".join(data.names).encode()), dtype=torch.uint8)
    record = {NAMES: names, POINTS: data.points.cpu().clone(), PIXELS: _checksums(data, data.images)}
    return record if masks is None else record | {MASKS: _checksums(data, masks)}


def data_digest(record: Record) -> dict[str, str]:
    """A CRC-32 of each part of a record, in hexadecimal, for results."""
    return {
        name.removeprefix("data."): f"{zlib.crc32(value.contiguous().numpy().tobytes()):08x}"
        for name, value in record.items()
    }


def in_words(record: Record) -> str:
    """How much it is, and where it begins: "270 points in 213 images, Misc_1 and more"."""
    names = _names(record)
    return f"{len(record[POINTS])} points in {len(names)} images, {names[0]} and more"


def find_record(tensors: Mapping[str, Tensor], prefix: str = "") -> Record | None:
    """The record among the tensors of a file, whose names there begin with ``prefix``; None where there is none."""
    record = {name: tensors[prefix + name] for name in (NAMES, POINTS, PIXELS, MASKS) if prefix + name in tensors}
    try:
        _names(record)
    except ValueError:
        return None
    return record


def same_images(theirs: Record, mine: Record) -> bool:
    """Whether two records are of images of the same names in the same order."""
    return torch.equal(theirs[NAMES], mine[NAMES])


def differences(theirs: Record, mine: Record) -> list[str]:
    """In words, what differs between two records of one set; empty where nothing does.

    Raises:
        ValueError: one of them is no record.

    Example:
        >>> from dataclasses import replace
        >>> from hmg_gpu.data.synthetic import make_split
        >>> scenes = make_split("train", count=4, size=64)
        >>> moved = replace(scenes, points=scenes.points + torch.tensor([0, 0, 1]))
        >>> differences(record_of(scenes), record_of(moved))
        ['7 points of 7 differ, first in train_0000']
    """
    before, now = _names(theirs), _names(mine)
    if before != now:
        new, gone = [name for name in now if name not in set(before)], [name for name in before if name not in set(now)]
        if not new and not gone:
            return [f"the {len(now)} images come in another order"]
        parts = [f"{len(names)} {what} ({names[0]} ...)" for names, what in ((new, "more"), (gone, "fewer")) if names]
        return [f"the list of images is another: {' and '.join(parts)}"]
    found = []
    points, old = ({tuple(row) for row in record[POINTS].tolist()} for record in (mine, theirs))
    if changed := sorted(points ^ old):
        count = max(len(points - old), len(old - points))
        found.append(f"{count} points of {len(old)} differ, first in {now[changed[0][0]]}")
    for key, what in ((PIXELS, "images"), (MASKS, "initial masks")):
        if key in theirs and key in mine and (other := (theirs[key] != mine[key]).nonzero()[:, 0].tolist()):
            found.append(f"{len(other)} {what} of {len(now)} differ, first {now[other[0]]}")
    return found


def _names(record: Record) -> list[str]:
    """The images' names; a file may claim anything.

    Raises:
        ValueError: it is no record.
    """
    if not record.keys() >= {NAMES, POINTS, PIXELS}:
        raise ValueError("parts of the record are missing")
    names, points = record[NAMES], record[POINTS]
    if names.dtype != torch.uint8 or names.dim() != 1 or points.dtype != torch.int64 or points.shape[1:] != (3,):
        raise ValueError("names or points are of another kind")
    found = bytes(names.tolist()).decode().split("\n")
    for key in {PIXELS, MASKS} & record.keys():
        if record[key].dtype != torch.int64 or record[key].shape != (len(found),):
            raise ValueError(f"{key} is of another kind")
    if points.numel() and not 0 <= int(points[:, 0].min()) <= int(points[:, 0].max()) < len(found):
        raise ValueError("points of images that are not there")
    return found


def _checksums(data: ImageSet, planes: Tensor) -> Tensor:
    """CRC-32 of each image's valid area, whatever it is padded to."""
    planes = planes.cpu().numpy()
    sizes = data.host_sizes.tolist()
    found = []
    for row, (height, width) in enumerate(sizes):
        start = zlib.crc32(f"{planes.dtype} {height} x {width}".encode())
        found.append(zlib.crc32(planes[row, :height, :width].tobytes(), start))
    return torch.tensor(found, dtype=torch.int64)
