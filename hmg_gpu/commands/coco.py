"""Masks as COCO instance annotations: one for each 8-connected component, as run lengths or polygons."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from torch import Tensor

from hmg_gpu.common.files import write_beside
from hmg_gpu.masks.components import connected_components

FORMS = ("rle", "polygons")


@contextmanager
def write_coco(
    path: str | os.PathLike, file_names: Sequence[str], sizes: Sequence[tuple[int, int]], form: str
) -> Iterator[CocoWriter]:
    """Write a COCO JSON, annotation by annotation, so that memory does not grow with the set.

    Image ids are 1 to N in the order of ``file_names``. The file appears in one step when the block ends well.

    Args:
        path: the JSON file.
        file_names: the N image files' names.
        sizes: their (height, width) in pixels.
        form: "rle" (exact) or "polygons" (along pixel edges, origin at the outer corner of the top left pixel; exact
            but for holes, which COCO polygons cannot have).

    Yields:
        A :class:`CocoWriter`.

    Raises:
        ValueError: not one size for each file name.

    Example:
        >>> import tempfile, torch
        >>> mask = torch.tensor([[False, True], [False, True]])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = os.path.join(folder, "coco.json")
        ...     with write_coco(path, ["a.png"], [(2, 2)], "rle") as writer:
        ...         writer.add(1, mask)
        ...     with open(path, encoding="utf-8") as handle:
        ...         content = json.load(handle)
        >>> content["annotations"][0]["bbox"], content["annotations"][0]["segmentation"]
        ([1, 0, 1, 2], {'size': [2, 2], 'counts': '22'})
    """
    with write_beside(path) as temporary, open(temporary, "w", encoding="utf-8") as handle:
        images = [
            {"id": row + 1, "file_name": name, "height": int(height), "width": int(width)}
            for row, (name, (height, width)) in enumerate(zip(file_names, sizes, strict=True))
        ]
        handle.write('{"categories": [{"id": 1, "name": "target"}],\n"images": ')
        handle.write("[" + ",\n".join(map(json.dumps, images)) + '],\n"annotations": [')
        writer = CocoWriter(handle, form)
        yield writer
        handle.write("]}\n")


class CocoWriter:
    """Takes masks one image at a time; made by :func:`write_coco`. ``count`` is the number of annotations so far."""

    def __init__(self, handle: Any, form: str):
        self.handle, self.form, self.count = handle, form, 0

    def add(self, image_id: int, mask: Tensor) -> None:
        """Add the components of bool [h, w], on the CPU."""
        for annotation in annotations(mask, self.form):
            self.handle.write(",\n" if self.count else "\n")
            self.count += 1
            self.handle.write(json.dumps({"id": self.count, "image_id": image_id} | annotation))


def annotations(mask: Tensor, form: str) -> Iterator[dict[str, Any]]:
    """The COCO annotation of every component of bool [h, w], without ids.

    ``area`` is in pixels and ``bbox`` is [left, top, width, height] in pixels, whatever the form ("rle" or "polygons").
    """
    height, width = mask.shape
    components = connected_components(mask[None].contiguous())
    for index in range(len(components)):
        rows, columns = np.divmod(components.pixels[components.component == index].numpy(), width)  # [A] each
        top, left = int(rows.min()), int(columns.min())
        yield {
            "category_id": 1,
            "iscrowd": 0,
            "area": len(rows),
            "bbox": [left, top, int(columns.max()) - left + 1, int(rows.max()) - top + 1],
            "segmentation": run_lengths(rows, columns, height, width) if form == "rle" else outlines(rows, columns),
        }


def run_lengths(rows: np.ndarray, columns: np.ndarray, height: int, width: int) -> dict[str, Any]:
    """COCO's compressed RLE of some pixels: column by column, background and foreground in turn, background first.

    Args:
        rows, columns: int64 [A] each, the pixels in any order, none twice.
        height, width: of the mask they lie in.

    Returns:
        ``size`` [height, width] and ``counts`` as text, byte for byte what pycocotools writes.

    Example:
        >>> run_lengths(np.array([1, 1, 2, 2]), np.array([2, 3, 2, 3]), 4, 5)  # runs of 9, 2, 2, 2 and 5
        {'size': [4, 5], 'counts': '92203'}
    """
    place = np.sort(columns * height + rows)
    first = np.flatnonzero(np.diff(place, prepend=-2) != 1)
    starts = place[first]
    lengths = np.diff(first, append=len(place))
    edges = np.stack((starts, starts + lengths), axis=1).reshape(-1)  # where background and foreground change
    counts = np.diff(edges, prepend=0, append=height * width)
    return {"size": [height, width], "counts": _as_text(counts.tolist())}


def _as_text(counts: list[int]) -> str:
    """Five bits a character, lowest first, bit 5 for "more follows", bit 4 the sign; from the fourth count on the
    difference to the count two before. The last count is left out where it is 0."""
    if counts and counts[-1] == 0:
        counts = counts[:-1]
    text = []
    for index, count in enumerate(counts):
        value = count - counts[index - 2] if index > 2 else count
        while True:
            low, value = value & 31, value >> 5
            done = value == (-1 if low & 16 else 0)
            text.append(chr(48 + low + (0 if done else 32)))
            if done:
                break
    return "".join(text)


def outlines(rows: np.ndarray, columns: np.ndarray) -> list[list[int]]:
    """Outer outlines of some pixels along their edges: [x, y, x, y, ...] each, one for every 4-connected part.

    Example:
        >>> outlines(np.array([1, 1]), np.array([2, 3]))
        [[2, 1, 4, 1, 4, 2, 2, 2]]
    """
    pixels = set(zip(rows.tolist(), columns.tolist(), strict=True))
    leaving: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for y, x in sorted(pixels):  # edges between foreground and background, foreground to their right
        sides = (
            ((y - 1, x), (x, y), (x + 1, y)),
            ((y, x + 1), (x + 1, y), (x + 1, y + 1)),
            ((y + 1, x), (x + 1, y + 1), (x, y + 1)),
            ((y, x - 1), (x, y + 1), (x, y)),
        )
        for neighbour, start, end in sides:
            if neighbour not in pixels:
                leaving.setdefault(start, []).append(end)
    left = {(start, end): None for start, ends in leaving.items() for end in ends}  # a set that keeps its order
    loops = []
    while left:
        edge = next(iter(left))
        loop: list[tuple[int, int]] = []
        before = None
        while edge in left:
            del left[edge]
            (x, y), (next_x, next_y) = edge
            step = (next_x - x, next_y - y)
            if step != before:
                loop.append((x, y))
            before = step
            # Where two pixels meet at a corner, turning right stays with the same one.
            right = (next_x - step[1], next_y + step[0])
            ends = leaving[next_x, next_y]
            edge = ((next_x, next_y), right if right in ends else ends[0])
        loops.append(loop)
    return [[value for corner in loop for value in corner] for loop in loops if _area(loop) > 0]


def _area(loop: list[tuple[int, int]]) -> int:
    """Twice the area, positive for outer outlines, negative for holes."""
    return sum(x * next_y - next_x * y for (x, y), (next_x, next_y) in zip(loop, loop[1:] + loop[:1], strict=True))
