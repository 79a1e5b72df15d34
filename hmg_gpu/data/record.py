"""What a run remembers of its data, so that it is not gone on with other data in silence."""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import torch
from torch import Tensor

from hmg_gpu.data.sets import ImageSet

NAMES, POINTS, PIXELS, MASKS = "data.names", "data.points", "data.pixels", "data.masks"


def record_of(data: ImageSet, masks: Tensor | None = None) -> dict[str, Tensor]:
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


def data_digest(record: Mapping[str, Tensor]) -> dict[str, str]:
    """A CRC-32 of each part of a record, in hexadecimal, for results."""
    return {
        name.removeprefix("data."): f"{zlib.crc32(value.contiguous().numpy().tobytes()):08x}"
        for name, value in record.items()
    }


def differences(theirs: Mapping[str, Tensor], mine: Mapping[str, Tensor]) -> list[str]:
    """In words, what differs between two records of one set; empty where nothing does.

    Raises:
        KeyError, ValueError: one of them is no record.

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


def _names(record: Mapping[str, Tensor]) -> list[str]:
    return bytes(record[NAMES].tolist()).decode().split("\n")


def _checksums(data: ImageSet, planes: Tensor) -> Tensor:
    """CRC-32 of each image's valid area, whatever it is padded to."""
    planes = planes.cpu().numpy()
    sizes = data.host_sizes.tolist()
    found = []
    for row, (height, width) in enumerate(sizes):
        start = zlib.crc32(f"{planes.dtype} {height} x {width}".encode())
        found.append(zlib.crc32(planes[row, :height, :width].tobytes(), start))
    return torch.tensor(found, dtype=torch.int64)
