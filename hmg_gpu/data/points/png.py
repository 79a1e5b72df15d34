"""LESPS point images: every pixel above half of the file's coding (255 at the point) is one point.

Whole 0-based pixels, (0, 0) the top left; exact, no rounding. PNG, TIFF, BMP or JPEG, named like the image. Points that
cover a square of 2 x 2 pixels are a mask, and refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from hmg_gpu.common.errors import InputError
from hmg_gpu.data.images import read_mask
from hmg_gpu.data.points import parsing
from hmg_gpu.data.points.parsing import Entry, PointFormat


def entries(path: Path, _: Path) -> Iterator[Entry]:
    """The one entry of a point image."""
    mask = read_mask(path)
    count = int(np.count_nonzero(mask))
    if count > parsing.MAX_POINTS:
        raise InputError(
            f"{path}: {count} point pixels, more than {parsing.MAX_POINTS}; expected a black image with 255 at points"
        )
    square = mask[1:, 1:] & mask[1:, :-1] & mask[:-1, 1:] & mask[:-1, :-1]
    if square.any():
        y, x = np.argwhere(square)[0].tolist()
        raise InputError(
            f"{path}: looks like a mask, not points ({count} pixels, solid at y={y}, x={x}); expected one pixel a "
            "target: give the folder of points, such as masks_centroid"
        )
    points = [(y, x, "its pixels") for y, x in np.argwhere(mask).tolist()]
    yield Entry(path, path.name, mask.shape, points, own_stem=path.stem)


FORMAT = PointFormat("image", lambda _: True, entries)
