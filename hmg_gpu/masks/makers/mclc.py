"""MCLC: Monte Carlo linear clustering around each point (ICCV 2023), and MCLC in boxes of P2B."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hmg_gpu.common.errors import InputError
from hmg_gpu.common.options import like, setting
from hmg_gpu.data.sets import ImageSet
from hmg_gpu.masks.clustering import Clustering, Crops, point_streams
from hmg_gpu.masks.components import connected_components
from hmg_gpu.masks.makers.maker import Sampled, Steps
from hmg_gpu.masks.makers.pmg import Pmg
from hmg_gpu.masks.pmg import point_to_box
from hmg_gpu.plain.noise import stream, uniform

PRIOR = "prior"
MOST = 71  # side of a crop; the CRF compares all its pixels with each other, in 0.3 GB here
# Of the size prior: the largest area of a class, then the least and the largest offset up, down, left and right.
CLASSES = (
    (9, ((3, 5), (3, 5), (3, 5), (3, 3))),
    (81, ((10, 11), (10, 11), (10, 11), (10, 11))),
    (2**31, ((15, 25), (15, 25), (15, 25), (15, 25))),
)
OFFSETS = 2**31  # names their stream; the copies of a crop count from 0


@dataclass(frozen=True)
class Mclc(Clustering):
    """Monte Carlo linear clustering (MCLC, ICCV 2023) in crops around the points.

    Args:
        repeats: salted copies of each crop.
        salt: share of values, of each channel by itself, that become white.
        rescale: map each copy to 0..1 by its own range, as scikit-image does from 0.19 on.
        final: "crf", or "threshold" for all above ``threshold``.
        threshold: of the probability; 0.7 in the source.
        overlap: "union", so that no point changes another's mask; "overwrite" as the source, a later point's crop
            erases what earlier ones have in it.
        seed: of the salt.
        crop: side of the crop around the point, odd, in pixels; or "prior": the source's sizes by three classes of
            the target's area, **which are read from the ground truth**, as is the middle of the crop.

    Raises:
        InputError: a setting out of its range; "prior" where the set has no ground truth.

    Example:
        >>> from hmg_gpu.data.synthetic import make_split
        >>> scenes = make_split("train", count=2, size=64)
        >>> Mclc(crop=15, repeats=4).masks(scenes).shape
        torch.Size([2, 64, 64])
        >>> str(Mclc(crop="prior", repeats=4))
        'MCLC, crops sized by ground truth, 4 copies, crf, seed 0'
    """

    name: ClassVar[str] = "mclc"

    crop: int | str = setting(
        21,
        "side of the crop, odd, pixels; prior: by the target's size in the ground truth",
        least=3,
        most=MOST,
        words=(PRIOR,),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.crop != PRIOR and self.crop % 2 == 0:
            raise InputError(f"crop = {self.crop}: expected an odd number, with the point in the middle, or {PRIOR}")

    @property
    def paper_row(self) -> str | None:
        return "MCLC with size prior" if self.crop == PRIOR else "MCLC"

    def fit(self, data: Sampled, *, folder: Path | None = None, progress: Steps | None = None) -> Mclc:
        if self.crop == PRIOR and isinstance(data, ImageSet):
            _need_truth(data)
        return self

    def crops(self, data: ImageSet) -> Crops:
        if self.crop == PRIOR:
            return prior_crops(data, self.seed)
        points, limits = _host(data)
        boxes = np.concatenate((points - self.crop // 2, points + self.crop // 2 + 1), axis=1)
        return Crops(_inside(boxes, limits), points, side=self.crop)

    def about(self) -> dict[str, Any]:
        return super().about() | ({"ground_truth": True} if self.crop == PRIOR else {})

    def __str__(self) -> str:
        crops = "crops sized by ground truth" if self.crop == PRIOR else f"crops of {self.crop}"
        return f"MCLC, {crops}, {self.repeats} copies, {self.final}, seed {self.seed}"


@dataclass(frozen=True)
class P2bMclc(Clustering):
    """MCLC in the boxes that P2B finds (HMG Sec. 3.1.1), made wider by a margin.

    Args:
        repeats, salt, rescale, final, threshold, overlap, seed: as of :class:`Mclc`.
        margin: pixels that a box is widened by on each side; 0 is the bare box, whose nine superpixels are smaller than
            the target. **4 was chosen with NUAA-SIRST's ground truth in view**: figures on that set are optimistic.
        cut: cut the masks back to the bare boxes.
        extent, half_width: of P2B, as of :class:`hmg_gpu.masks.Pmg`.

    Raises:
        InputError: a setting out of its range.

    Example:
        >>> from hmg_gpu.data.synthetic import make_split
        >>> scenes = make_split("train", count=2, size=64)
        >>> P2bMclc(extent=10, repeats=4).masks(scenes).shape
        torch.Size([2, 64, 64])
    """

    name: ClassVar[str] = "p2b-mclc"

    margin: int = setting(4, "pixels that P2B's box is widened by on each side", least=0)
    cut: bool = setting(False, "cut the masks back to P2B's boxes")
    extent: int | str | None = like(Pmg, "extent")
    half_width: int = like(Pmg, "half_width")
    by_size: tuple[tuple[int, int, int], ...] = field(default=(), repr=False)  # as of Pmg
    why: str = field(default="as given", compare=False, repr=False)

    @property
    def _pmg(self) -> Pmg:
        return Pmg(self.extent, self.half_width, by_size=self.by_size, why=self.why)

    @property
    def paper_row(self) -> str | None:
        return "P2B+MCLC"

    def fit(self, data: Sampled, *, folder: Path | None = None, progress: Steps | None = None) -> P2bMclc:
        pmg = self._pmg.fit(data)
        return replace(self, extent=pmg.extent, by_size=pmg.by_size, why=pmg.why)

    def masks(self, data: ImageSet) -> Tensor:
        parts = self._pmg.split(data)  # an image's points have one extent, so no crops of two parts overlap
        makers = [(replace(self, extent=pmg.extent, by_size=()), part) for pmg, part in parts]
        return functools.reduce(torch.logical_or, (Clustering.masks(maker, part) for maker, part in makers))

    def crops(self, data: ImageSet) -> Crops:
        boxes = point_to_box(data.images, data.points, extent=self.extent, half_width=self.half_width, sizes=data.sizes)
        points, limits = _host(data)
        boxes = boxes.cpu().numpy()
        widened = boxes + self.margin * np.array([-1, -1, 1, 1])
        if len(widened) and (largest := int((widened[:, 2:] - widened[:, :2]).max()) + 1) > MOST:
            raise InputError(
                f"p2b-mclc: a box of {largest} pixels, more than {MOST}, needs too much memory to be clustered; give a "
                "shorter --extent or a smaller margin"
            )
        return Crops(_inside(widened, limits), points, kept=boxes if self.cut else None)

    def change(self, name: str, value: Any) -> P2bMclc:
        changed = super().change(name, value)
        return replace(changed, by_size=(), why="as given") if name == "extent" else changed

    def about(self) -> dict[str, Any]:
        more = {"by_size": [list(row) for row in self.by_size]} if self.by_size else {}
        return {"maker": self.name} | self.settings() | more

    def __str__(self) -> str:
        boxes = f"boxes of P2B + {self.margin}{', cut back' if self.cut else ''} (extent {self.extent}, {self.why})"
        return f"MCLC, {boxes}, {self.repeats} copies, {self.final}, seed {self.seed}"


def prior_crops(data: ImageSet, seed: int) -> Crops:
    """Crops by the size prior of the source: the ground truth gives each target's area and the crop's middle.

    A point belongs to the component whose centroid is nearest. How far its crop reaches up, down, left and right is
    drawn by the class of the area, both ends included. As in the source the crop ends before the image's last row and
    column. Without ground truth in an image a point is a target of no area.

    Raises:
        InputError: the set has no ground truth.
    """
    _need_truth(data)
    points, limits = _host(data)
    image = data.points[:, 0].cpu().numpy()
    targets = connected_components(data.masks.cpu(), data.sizes.cpu())
    places, areas = targets.centroids.numpy(), targets.area.numpy()
    first = np.searchsorted(targets.image.numpy(), np.arange(len(data) + 1))
    middle, area = points.astype(np.float64), np.zeros(len(points), dtype=np.int64)
    for row, start, stop in zip(range(len(points)), first[image], first[image + 1], strict=True):
        if stop > start:
            nearest = start + np.square(places[start:stop] - points[row]).sum(1).argmin()
            middle[row], area[row] = places[nearest], areas[nearest]
    kind = np.searchsorted([largest for largest, _ in CLASSES], area)
    ranges = np.array([ranges for _, ranges in CLASSES])[kind]  # [P, 4, 2]
    streams = point_streams(data, seed)[:, None]
    words = (torch.tensor(one, device=streams.device) for one in (OFFSETS, range(4)))
    drawn = uniform(stream(streams, *words)).cpu().numpy()  # [P, 4]
    offsets = ranges[..., 0] + np.floor(drawn * (ranges[..., 1] - ranges[..., 0] + 1)).astype(np.int64)
    up, down, left, right = offsets.T
    (y, x), (height, width) = middle.T, limits.T
    low = np.stack((y - up, x - left), axis=1).clip(min=0).astype(np.int64)
    high = np.minimum(np.stack((y + down, x + right), axis=1), np.stack((height, width), axis=1) - 1).astype(np.int64)
    high = np.maximum(high, low + 1)  # in an image of one row or column there is no other crop
    return Crops(np.concatenate((low, high), axis=1), np.clip(middle.astype(np.int64), low, high - 1))


def _host(data: ImageSet) -> tuple[NDArray, NDArray]:
    """The points (y, x) and the sizes of their images, each int64 [P, 2], on the host."""
    points = data.points.cpu().numpy()
    limits = data.host_sizes.numpy()[points[:, 0]]
    return np.clip(points[:, 1:], 0, limits - 1), limits


def _inside(boxes: NDArray, limits: NDArray) -> NDArray:
    """Boxes held inside their images."""
    return np.clip(boxes, 0, np.concatenate((limits, limits), axis=1))


def _need_truth(data: ImageSet) -> None:
    if data.masks is None:
        raise InputError("mclc: crop=prior takes the targets' sizes from the ground truth, and this set has none")
