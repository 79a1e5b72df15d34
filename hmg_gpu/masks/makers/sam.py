"""Segment Anything as a maker: each point is a prompt."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from hmg_gpu.common.errors import InputError
from hmg_gpu.common.options import META, check_settings, parse_value, setting
from hmg_gpu.data.sets import ImageSet
from hmg_gpu.masks.makers.maker import Maker, Sampled, Steps
from hmg_gpu.masks.sam import OwnPredictor, Segmenter, load_sam

SHARE = 0.001  # of an image's pixels that may fall below 0, and above 255, when it is not 8-bit


@dataclass(frozen=True)
class Sam(Maker):
    """Masks by SAM, SAM 2 or SAM 3, prompted by one point a target; masks of an image are united.

    Weights are the user's: a folder with those of transformers, or a predictor that has its own. Nothing is downloaded.
    A point stands for the middle of its pixel: (x + 0.5, y + 0.5) in SAM's coordinates. Images that are not 8-bit are
    stretched between their 0.1 and 99.9 percentiles.

    Args:
        path: a folder with config.json and model.safetensors, as transformers' ``save_pretrained`` writes it.
        select: of three masks the one with the best predicted IoU ("score") or the smallest that is not empty
            ("smallest"), or the one that SAM gives when asked for one ("single"). The best-scored one is often what
            lies around a small target.
        crop: side in pixels of a square around each point that is enlarged to the model's input; 0: the whole image,
            which is then looked at once for all its points.
        predictor: instead of a path; see :class:`hmg_gpu.masks.sam.OwnPredictor`.

    Raises:
        InputError: neither path nor predictor, or a setting out of its range (on construction); a folder that cannot be
            used, or no transformers (when it is read).

    Example:
        >>> import torch
        >>> from hmg_gpu.data import ImageSet
        >>> class Squares:  # stands in for a predictor of the package sam2
        ...     def set_image(self, image):
        ...         self.shape = image.shape[:2]
        ...     def predict(self, point_coords, point_labels, multimask_output):
        ...         masks = torch.zeros(len(point_coords), 1, *self.shape)
        ...         for mask, ((x, y),) in zip(masks, point_coords):
        ...             mask[0, int(y) - 1 : int(y) + 2, int(x) - 1 : int(x) + 2] = 1
        ...         return masks.numpy(), torch.ones(len(masks), 1).numpy(), None
        >>> data = ImageSet(["a"], torch.zeros(1, 9, 9), torch.tensor([[9, 9]]), torch.tensor([[0, 4, 4]]))
        >>> int(Sam(predictor=Squares()).masks(data).sum())
        9
    """

    name: ClassVar[str] = "sam"

    path: str = ""
    select: str = setting("score", "which of SAM's masks", choices=("score", "smallest", "single"))
    crop: int = setting(0, "side of a square around each point, pixels; 0: the whole image", least=0)
    predictor: Any = field(default=None, compare=False, repr=False)
    segmenter: Segmenter | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        check_settings(self)
        if not self.path and self.predictor is None:
            raise InputError("sam: expected sam:PATH, a folder with SAM's config.json and model.safetensors")
        if 0 < self.crop < 8:
            raise InputError(f"crop = {self.crop}: expected 0 or at least 8")

    @property
    def paper_row(self) -> str | None:
        return "SAM vit_h"

    def fit(self, data: Sampled, *, folder: Path | None = None, progress: Steps | None = None) -> Sam:
        if self.segmenter is not None:
            return self
        segmenter = load_sam(self.path) if self.predictor is None else OwnPredictor(self.predictor)
        return replace(self, segmenter=segmenter)

    def masks(self, data: ImageSet) -> Tensor:
        segmenter = self.fit(data).segmenter
        canvas = torch.zeros(data.images.shape, dtype=torch.bool, device=data.images.device)
        own: dict[int, list[tuple[int, int]]] = {}
        for image, y, x in data.points.tolist():
            own.setdefault(image, []).append((y, x))
        for index, points in own.items():
            height, width = data.host_sizes[index].tolist()
            image = _to_8_bit(data.images[index, :height, :width])
            # Without a crop one window holds every point, with one each point has its own.
            windows = [((y, x), [(y, x)]) for y, x in points] if self.crop else [((0, 0), points)]
            for centre, inside in windows:
                y0, x0 = (max(place - self.crop // 2, 0) if self.crop else 0 for place in centre)
                y1, x1 = (
                    min(place - self.crop // 2 + self.crop, length) if self.crop else length
                    for place, length in zip(centre, (height, width), strict=True)
                )
                prompts = torch.tensor([(x - x0 + 0.5, y - y0 + 0.5) for y, x in inside], device=image.device)
                masks, scores = segmenter.segment(image[y0:y1, x0:x1], prompts, self.select != "single")
                canvas[index, y0:y1, x0:x1] |= self._choose(masks, scores).any(0)
        return canvas

    def _choose(self, masks: Tensor, scores: Tensor) -> Tensor:
        """One mask a prompt: bool [P, H, W] of [P, K, H, W] and [P, K]."""
        if self.select == "smallest":
            area = masks.sum((2, 3))
            scores = -torch.where(area > 0, area, masks[0, 0].numel() + 1).float()
        best = scores.argmax(1)
        return masks[torch.arange(len(masks), device=masks.device), best]

    def about(self) -> dict[str, Any]:
        source = {"path": self.path} if self.predictor is None else {"predictor": type(self.predictor).__qualname__}
        return {"maker": self.name} | source | self.settings()

    def __str__(self) -> str:
        source = Path(self.path).name if self.predictor is None else type(self.predictor).__qualname__
        return f"SAM by {source}, select {self.select}, crop {self.crop}"

    @classmethod
    def from_text(cls, text: str, **given: Any) -> Sam:
        """PATH, or PATH,NAME=VALUE; a path may hold commas."""
        known = {entry.name: entry for entry in fields(cls) if META in entry.metadata}
        parts, values = text.split(","), {}
        while parts and parts[-1].partition("=")[0].strip() in known:
            name, _, value = parts.pop().partition("=")
            values[name.strip()] = parse_value(known[name.strip()], value.strip())
        return cls(",".join(parts), **values)


def _to_8_bit(image: Tensor) -> Tensor:
    """uint8 [H, W]; what is not 8-bit, whatever the batch is stored as, is stretched between its percentiles."""
    if image.dtype == torch.uint8 or bool(((image >= 0) & (image <= 255) & (image == image.round())).all()):
        return image.to(torch.uint8)
    values = image.flatten().sort().values
    cut = int(SHARE * (len(values) - 1))
    low, high = values[cut], values[len(values) - 1 - cut]
    span = torch.where(high > low, high - low, 1)
    return ((image - low) / span * 255).clamp(0, 255).round().to(torch.uint8)
