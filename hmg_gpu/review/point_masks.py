"""The mask of one point, how far it can be trusted, and what PMG saw: all from a cut-out of the image around it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from hmg_gpu.data import ImageSet
from hmg_gpu.masks import Learned, Maker, Pmg
from hmg_gpu.masks.pmg import point_to_box
from hmg_gpu.masks.student.neighbours import take_apart
from hmg_gpu.plain.pmg import search

REACH = 128  # pixels that a student may look at around a point
DIRECTIONS = ("left", "right", "up", "down")
NEIGHBOURS = ((-1, 0), (1, 0), (0, -1), (0, 1))

Runs = list[tuple[int, int, int]]


@dataclass(frozen=True, eq=False)
class PointMask:
    """One point's mask as a patch: bool [h, w] whose top left pixel is (y, x), and P2B's box (y0, x0, y1, x1).

    ``window``: of a student's mask, the same around the point, bool [K, K].
    """

    y: int
    x: int
    pixels: np.ndarray
    box: tuple[int, int, int, int]
    window: torch.Tensor | None = None

    def runs(self) -> Runs:
        """(row, first column, last column + 1) of each run of pixels, in the image."""
        return mask_runs(self.pixels, self.y, self.x)


def mask_runs(mask: np.ndarray, y: int = 0, x: int = 0) -> Runs:
    """(row, first column, last column + 1) of each run of a mask's pixels, moved by (y, x).

    Example:
        >>> mask_runs(np.array([[False, True, True], [True, False, True]]), 10, 20)
        [(10, 21, 23), (11, 20, 21), (11, 22, 23)]
    """
    edges = np.diff(mask.astype(np.int8), axis=1, prepend=0, append=0)
    rows, starts = np.nonzero(edges == 1)
    ends = np.nonzero(edges == -1)[1]
    return list(zip((rows + y).tolist(), (starts + x).tolist(), (ends + x).tolist(), strict=True))


def _trimmed(mask: np.ndarray, top: int, left: int, place: tuple[int, int]) -> tuple[int, int, np.ndarray]:
    """(y, x) and pixels of the smallest patch of a cut-out at (top, left); the point alone where there is nothing."""
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    if not len(rows):  # a maker may find nothing
        rows, columns = np.array([place[0] - top]), np.array([place[1] - left])
    patch = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].copy()
    return int(rows[0]) + top, int(columns[0]) + left, patch


def _in_image(mask: np.ndarray, y: int, x: int, shape: tuple[int, ...]) -> tuple[int, int, np.ndarray]:
    """As :func:`_trimmed`, of a window [K, K] around a point, of which the image's part counts."""
    top, left = y - mask.shape[0] // 2, x - mask.shape[1] // 2
    inside = mask[max(0, -top) : shape[0] - top, max(0, -left) : shape[1] - left]
    return _trimmed(inside, max(0, top), max(0, left), (y, x))


class PointMasks:
    """Masks of single points by a maker, or by PMG where a point has an extent of its own.

    Args:
        maker: :class:`Pmg` or :class:`Learned`, fitted, one extent for all images.
    """

    def __init__(self, maker: Pmg | Learned):
        self.maker = maker
        self.pmg: Pmg = maker if isinstance(maker, Pmg) else maker.pmg

    @property
    def extent(self) -> int:
        """L_ep in pixels of points without one of their own."""
        return self.pmg.extent

    def make(self, pixels: np.ndarray, y: int, x: int, extent: int | None) -> PointMask:
        """The mask of a point.

        Args:
            pixels: uint8, uint16 or float32 [H, W].
            y, x: the point in pixels, inside the image.
            extent: its own L_ep in pixels, or None.
        """
        data, (top, left) = self._cut_out(pixels, [(y, x)], extent)
        maker, box = self._by(extent), self._box(data, top, left, extent)
        if isinstance(maker, Pmg):
            return PointMask(*_trimmed(maker.masks(data)[0].numpy(), top, left, (y, x)), box)
        mask = maker.student.each(data, maker.pmg)[0]
        return PointMask(*_in_image(mask.numpy(), y, x, pixels.shape), box, mask)

    @staticmethod
    def apart(masks: list[PointMask], places: list[tuple[int, int]], shape: tuple[int, int]) -> list[PointMask]:
        """Masks of an image's points (y, x), those of a student taken apart where they touch."""
        rows = [row for row, mask in enumerate(masks) if mask.window is not None]
        if len(rows) < 2:
            return masks
        each = torch.stack([masks[row].window for row in rows])
        points = torch.tensor([(0, *places[row]) for row in rows])
        result = list(masks)
        for row, mask, before in zip(rows, take_apart(each, points), each, strict=True):
            if not torch.equal(mask, before):
                y, x, patch = _in_image(mask.numpy(), *places[row], shape)
                result[row] = replace(masks[row], y=y, x=x, pixels=patch)
        return result

    def doubt(self, pixels: np.ndarray, y: int, x: int, extent: int | None) -> float:
        """How much the mask changes when the click moves by one pixel: 1 - IoU, the mean of four directions.

        0: it does not matter where on the target the click fell; 1: every click gives another mask. It is no
        probability that the mask is wrong.
        """
        height, width = pixels.shape
        moved = [(y + down, x + right) for down, right in NEIGHBOURS]
        places = [(y, x), *((row, column) for row, column in moved if 0 <= row < height and 0 <= column < width)]
        data, _ = self._cut_out(pixels, places, extent)
        first, *others = self._by(extent).masks(data).numpy()
        changes = [1 - (first & other).sum() / max(1, (first | other).sum()) for other in others]
        return float(np.mean(changes)) if changes else 0.0

    def explain(self, pixels: np.ndarray, y: int, x: int, extent: int | None) -> dict[str, Any]:
        """What PMG saw at a point (HMG Sec. 3.1): box, profiles of P2B, the threshold of B2M, probabilities.

        Returns:
            JSON values. ``directions``: by name vmax and vavg from the point outwards, ``border`` (e + 1),
            ``threshold`` (vavg there) and ``boundary`` (pixels from the point to the box's last pixel). ``sigma``:
            eq. (1) of the whole box. ``row``, ``column``: [first pixel, probabilities] through the point, by whatever
            makes its mask.
        """
        data, (top, left) = self._cut_out(pixels, [(y, x)], extent)
        pmg = self._pmg(extent)
        found = search(data.images, data.points, pmg.extent, pmg.half_width, data.sizes)
        y0, x0, y1, x1 = box = self._box(data, top, left, extent)
        boundaries = (x - x0, x1 - 1 - x, y - y0, y1 - 1 - y)
        directions = {}
        for index, name in enumerate(DIRECTIONS):
            reach = int(found.reach[0, index])
            across = self._across(pixels.shape, y, x, index, pmg.half_width)
            average = found.vsum[0, index, : reach + 1] / across
            border = int(found.border[0, index])
            directions[name] = {
                "vmax": found.vmax[0, index, : reach + 1].tolist(),
                "vavg": average.tolist(),
                "border": border,
                "threshold": float(average[border]),
                "boundary": boundaries[index],
            }
        inside = pixels[y0:y1, x0:x1]
        sigma = pmg.alpha * float(pixels[y, x]) + (1 - pmg.alpha) * float(inside.mean(dtype=np.float64))
        soft = self._by(extent).probabilities(data)[0].numpy()
        return {
            "y": y, "x": x, "extent": pmg.extent, "by": self._by(extent).name, "box": box, "sigma": sigma,
            "directions": directions, "value": float(pixels[y, x]),
            "row": [x0, soft[y - top, x0 - left : x1 - left].tolist()],
            "column": [y0, soft[y0 - top : y1 - top, x - left].tolist()],
            "doubt": self.doubt(pixels, y, x, extent),
        }  # fmt: skip

    @staticmethod
    def _across(shape: tuple[int, ...], y: int, x: int, direction: int, half_width: int) -> int:
        """Pixels across a direction that lie in the image."""
        at, side = (y, shape[0]) if direction < 2 else (x, shape[1])
        return min(at + half_width, side - 1) - max(at - half_width, 0) + 1

    def _pmg(self, extent: int | None) -> Pmg:
        return self.pmg if extent is None else replace(self.pmg, extent=extent, why="by hand")

    def _by(self, extent: int | None) -> Maker:
        return self.maker if extent is None else self._pmg(extent)

    def _box(self, data: ImageSet, top: int, left: int, extent: int | None) -> tuple[int, int, int, int]:
        pmg = self._pmg(extent)
        settings = {"extent": pmg.extent, "half_width": pmg.half_width}
        y0, x0, y1, x1 = point_to_box(data.images[:1], data.points[:1], **settings, sizes=data.sizes[:1])[0].tolist()
        return y0 + top, x0 + left, y1 + top, x1 + left

    def _cut_out(
        self, pixels: np.ndarray, places: list[tuple[int, int]], extent: int | None
    ) -> tuple[ImageSet, tuple[int, int]]:
        """One image for each place: all that a maker looks at for these neighbouring points, and its corner (y, x)."""
        pmg = self._pmg(extent)
        margin = max(pmg.extent, pmg.half_width, REACH) + 2
        y, x = places[0]
        top, left = max(0, y - margin), max(0, x - margin)
        window = np.ascontiguousarray(pixels[top : y + margin + 1, left : x + margin + 1])
        image = torch.from_numpy(window if window.dtype == np.uint8 else window.astype(np.float32))
        images = image.expand(len(places), *image.shape).contiguous()
        sizes = torch.tensor([image.shape] * len(places))
        points = torch.tensor([(row, y - top, x - left) for row, (y, x) in enumerate(places)])
        return ImageSet([str(row) for row in range(len(places))], images, sizes, points), (top, left)


def with_one_extent(maker: Maker) -> Maker:
    """A fitted maker whose extent is the same for images of every size, as single numbers can say."""
    if isinstance(maker, Pmg):
        return replace(maker, by_size=())
    return replace(maker, pmg=replace(maker.pmg, by_size=()))
