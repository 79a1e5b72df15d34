"""PMG as a maker (HMG Sec. 3.1): P2B, then B2M."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from hmg_gpu.common.errors import HMGError
from hmg_gpu.common.options import check_settings, setting
from hmg_gpu.data.sets import ImageSet
from hmg_gpu.data.source import default_extent
from hmg_gpu.masks.extent import FALLBACK, MAX_POINTS, MIN_POINTS, choose_extent
from hmg_gpu.masks.makers.maker import Maker, Sampled, Steps
from hmg_gpu.masks.pmg import box_to_mask, point_to_box, point_to_mask, point_to_probability

SAMPLE_PIXELS = 2**26  # held at once while the extent is chosen
GROUP_PIXELS = 1 << 22  # of the windows held at a time
SHARE = 0.1  # of the points: a resolution that has so many may have an extent of its own
DISAGREE = 1.25  # ratio of extents from which on they are chosen for each resolution


@dataclass(frozen=True)
class Pmg(Maker):
    """The paper's initial masks (HMG Sec. 3.1). Lengths in pixels.

    Args:
        extent: L_ep; None: the paper's for the data set (10 for NUDT-SIRST, else 25); "auto": chosen from images and
            points by :meth:`fit`, see :func:`hmg_gpu.masks.extent.choose_extent`.
        half_width: L_dp.
        alpha: weight of the point's intensity in B2M.
        directional: False: P_g alone, without the directional maps (the ablation of Sec. 3.1.2).

    Raises:
        InputError: a setting out of its range.

    Example:
        >>> from hmg_gpu.data.synthetic import make_split
        >>> scenes = make_split("train", count=4, size=64)
        >>> maker = Pmg(extent=10).fit(scenes)
        >>> maker.masks(scenes).shape
        torch.Size([4, 64, 64])
        >>> maker.about()["extent"]
        10
    """

    name: ClassVar[str] = "pmg"

    extent: int | str | None = setting(
        None,
        "L_ep of P2B, pixels; auto: chosen from images and points; not given: the paper's, 10 for NUDT-SIRST, else 25",
        least=1,
        words=("auto", None),
    )
    half_width: int = setting(4, "L_dp of P2B, pixels", least=0)
    alpha: float = setting(0.15, "weight of the point's intensity in B2M", least=0, most=1)
    directional: bool = setting(True, "the directional maps P_v and P_h besides P_g")
    by_size: tuple[tuple[int, int, int], ...] = field(default=(), repr=False)  # (height, width, extent) of some images
    why: str = field(default="as given", compare=False, repr=False)  # where the extent comes from, in words

    def __post_init__(self) -> None:
        check_settings(self)

    @property
    def paper_row(self) -> str | None:
        return "PMG" if self.directional else None

    def fit(self, data: Sampled, *, folder: Path | None = None, progress: Steps | None = None) -> Pmg:
        if isinstance(self.extent, int):
            return self
        extent, by_size = default_extent(data.dataset), ()
        why = f"the paper's for {'this data set' if extent != FALLBACK else 'most data sets'}"
        if self.extent == "auto":
            part = data.sample(MAX_POINTS, SAMPLE_PIXELS)
            if len(part.points) < MIN_POINTS:
                why += f"; {len(part.points)} points are too few to choose by"
            else:
                extent, by_size, why = _choose(part, self.half_width, self.alpha)
        return replace(self, extent=extent, by_size=by_size, why=why)

    def split(self, data: ImageSet) -> list[tuple[Pmg, ImageSet]]:
        """A maker of one extent, and the set with the points that it is for, for every extent that images ask for.

        Where images of some resolution have an extent of their own, others keep ``extent``.
        """
        settled = self.fit(data)
        if not settled.by_size:
            return [(settled, data)]
        extent_of = {(height, width): extent for height, width, extent in settled.by_size}
        image = data.points[:, 0].tolist()
        sizes = [tuple(size) for size in data.host_sizes.tolist()]
        extents = torch.tensor([extent_of.get(sizes[row], settled.extent) for row in image], device=data.points.device)
        return [
            (replace(settled, extent=extent, by_size=()), replace(data, points=data.points[extents == extent]))
            for extent in sorted({settled.extent, *extent_of.values()})
        ]

    def masks(self, data: ImageSet) -> Tensor:
        return functools.reduce(torch.logical_or, (maker._masks(part) for maker, part in self.split(data)))

    def _masks(self, data: ImageSet) -> Tensor:
        """Of one extent."""
        if self.directional:
            return point_to_mask(data.images, data.points, sizes=data.sizes, **self._arguments)
        canvas = torch.zeros(data.images.numel(), dtype=torch.bool, device=data.images.device)
        plane = data.images.shape[1] * data.images.shape[2]
        for points, position, masks in self.each(data, data.points):
            canvas[(points[:, 0, None, None] * plane + position)[masks]] = True
        return canvas.view(data.images.shape)

    def probabilities(self, data: ImageSet) -> Tensor:
        if not self.directional:
            return self.masks(data).float()
        parts = (
            point_to_probability(part.images, part.points, sizes=part.sizes, **maker._arguments)
            for maker, part in self.split(data)
        )
        return functools.reduce(torch.maximum, parts)

    def knows_each(self, data: ImageSet) -> bool:
        return not self.fit(data).by_size

    def each(self, data: ImageSet, points: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        if self.fit(data).by_size:
            raise HMGError("pmg: images have extents of their own; take its parts by split(data)")
        return self.fit(data)._each(data, points)

    def _each(self, data: ImageSet, points: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        _, height, width = data.images.shape
        extent, half_width, alpha = self._arguments.values()
        radius = max(extent, half_width)  # of a window that holds every pixel PMG looks at for its point
        side = 2 * radius + 1
        steps = torch.arange(side, device=points.device)
        for group in points.split(max(1, GROUP_PIXELS // side**2)):
            image = group[:, 0]
            corner = (group[:, 1:] - radius).clamp(min=0)  # [p, 2]
            rows = (corner[:, :1] + steps).clamp(max=height - 1)[:, :, None]  # [p, S, 1]
            columns = (corner[:, 1:] + steps).clamp(max=width - 1)[:, None]  # [p, 1, S]
            windows = data.images[image[:, None, None], rows, columns]  # [p, S, S]
            sizes = (data.sizes[image] - corner).clamp(max=side)
            local = torch.cat((torch.arange(len(group), device=points.device)[:, None], group[:, 1:] - corner), dim=1)
            boxes = point_to_box(windows, local, extent=extent, half_width=half_width, sizes=sizes)
            make = box_to_mask if self.directional else _threshold_global
            yield group, rows * width + columns, make(windows, local, boxes, extent=extent, alpha=alpha)

    @property
    def _arguments(self) -> dict[str, Any]:
        """Of :func:`hmg_gpu.point_to_mask`, the extent settled."""
        return {"extent": self.extent, "half_width": self.half_width, "alpha": self.alpha}

    def change(self, name: str, value: Any) -> Pmg:
        changed = Maker.change(self, name, value)
        return replace(changed, by_size=(), why="as given") if name == "extent" else changed

    def ablations(self) -> Mapping[str, Maker]:
        return {"P_g only": replace(self, directional=False)} if self.directional else {}

    def about(self) -> dict[str, Any]:
        more = {"by_size": [list(row) for row in self.by_size]} if self.by_size else {}
        return {"maker": self.name} | self.settings() | more

    def __str__(self) -> str:
        kind = "PMG" if self.directional else "PMG, P_g only"
        return f"{kind}, extent {self.extent} ({self.why}), half width {self.half_width}, alpha {self.alpha}"


def _choose(data: ImageSet, half_width: int, alpha: float) -> tuple[int, tuple[tuple[int, int, int], ...], str]:
    """The extent, those of single resolutions where images disagree, and why, in words.

    A resolution that many points share is a set of its own, such as those that are joined in SIRST3: 256 x 256 and
    512 x 512 among images of many sizes. Its extent stands where it differs from the others' by a quarter or more.
    """
    settings = {"half_width": half_width, "alpha": alpha}
    count = f"{len(data.points)} points in {len(data)} images"
    plain = f"chosen from {count}: by how long masks hold still"
    sizes = data.host_sizes.to(data.points.device)[data.points[:, 0]]  # [P, 2]
    kinds, numbers = sizes.unique(dim=0, return_counts=True)
    common = kinds[numbers >= SHARE * len(sizes)].tolist()
    image_sizes = data.host_sizes
    groups = [(image_sizes == torch.tensor(size)).all(1) for size in common]
    rest = ~torch.stack(groups).any(0) if groups else torch.ones(len(data), dtype=torch.bool)
    parts = [
        (size, data.subset(rows.nonzero()[:, 0])) for size, rows in zip([*common, None], [*groups, rest], strict=True)
    ]
    parts = [(size, part) for size, part in parts if len(part.points) >= MIN_POINTS]
    if len(parts) < 2:
        return choose_extent(data, **settings), (), plain
    chosen = [(size, choose_extent(part, **settings), len(part.points)) for size, part in parts]
    lengths = [extent for _, extent, _ in chosen]
    if max(lengths) < DISAGREE * min(lengths):
        return choose_extent(data, **settings), (), plain
    others = next((extent for size, extent, _ in chosen if size is None), max(chosen, key=lambda row: row[2])[1])
    by_size = tuple((*size, extent) for size, extent, _ in chosen if size is not None)
    words = [
        f"{extent} for {'the others' if size is None else f'{size[0]} x {size[1]}'} ({number} points)"
        for size, extent, number in chosen
    ]
    return others, by_size, f"images disagree, chosen by resolution: {', '.join(words)}"


def _threshold_global(windows: Tensor, points: Tensor, boxes: Tensor, *, extent: int, alpha: float) -> Tensor:
    """P_g >= 0.5, which eq. (2) makes the same as I >= sigma, in the box of each window's one point."""
    steps = torch.arange(windows.shape[1], device=windows.device)
    y0, x0, y1, x1 = boxes[:, :, None].unbind(1)  # [p, 1]
    inside = ((steps >= y0) & (steps < y1))[:, :, None] & ((steps >= x0) & (steps < x1))[:, None]  # [p, S, S]
    values = windows.float()
    wide = torch.float32 if values.device.type == "mps" else torch.float64
    mean = torch.where(inside, values, 0).sum((1, 2), dtype=wide) / inside.sum((1, 2)).clamp(min=1)
    sigma = (alpha * values[points.unbind(1)].to(wide) + (1 - alpha) * mean).float()
    return inside & (values >= sigma[:, None, None])
