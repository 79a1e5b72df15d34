"""Segment Anything behind one face: SAM, SAM 2 and SAM 3 by transformers, or a predictor of one's own.

Nothing is downloaded, and transformers is imported where weights are read, not before.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hmg_gpu.common.errors import InputError

PROMPTS = 64  # in one call of a decoder, which holds three masks for each
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


class Kind(NamedTuple):
    """A generation: the class in transformers, mean and std of its images, and whether it keeps their shape."""

    model: str
    normalisation: tuple[tuple[float, ...], tuple[float, ...]]
    keeps_shape: bool


SAM, SAM2, SAM3 = (
    Kind("SamModel", IMAGENET, True),
    Kind("Sam2Model", IMAGENET, False),
    Kind("Sam3TrackerModel", HALF, False),
)
KINDS = {  # model_type of config.json; weights are also published with those of a model for videos
    "sam": SAM,
    "sam2": SAM2,
    "sam2_video": SAM2,
    "sam3_tracker": SAM3,
    "sam3_tracker_video": SAM3,
    "sam3_video": SAM3,
}


class Segmenter(Protocol):
    """Masks for points of one image."""

    def segment(self, image: Tensor, points: Tensor, several: bool) -> tuple[Tensor, Tensor]:
        """One prompt a point.

        Args:
            image: uint8 [H, W].
            points: float32 [P, 2], rows (x, y), counted from the outer corner of the first pixel.
            several: three masks of different extent for each instead of one.

        Returns:
            bool [P, K, H, W] and float32 [P, K], masks and their predicted IoU.
        """
        ...


class TransformersSam:
    """A model of transformers; images are resized, normalised and padded here, on their device.

    Args:
        model: on any device; it is moved to that of the images.
        kind: its generation.

    Example:
        >>> KINDS["sam2"].model
        'Sam2Model'
    """

    def __init__(self, model: nn.Module, kind: Kind):
        self.model, self.kind = model.eval().requires_grad_(False), kind
        self.side = int(model.config.prompt_encoder_config.image_size)

    @torch.no_grad()
    def segment(self, image: Tensor, points: Tensor, several: bool) -> tuple[Tensor, Tensor]:
        self.model.to(image.device)
        height, width = image.shape
        pixels, size = self._prepare(image)
        embeddings = self.model.get_image_embeddings(pixels)
        scale = points.new_tensor([size[1] / width, size[0] / height])
        parts = []
        for prompts in (points * scale).split(PROMPTS):
            found = self.model(
                image_embeddings=list(embeddings) if isinstance(embeddings, (list, tuple)) else embeddings,
                input_points=prompts[None, :, None],  # [1, P, 1, 2]
                input_labels=torch.ones(1, len(prompts), 1, dtype=torch.int64, device=image.device),
                multimask_output=several,
            )
            logits = found.pred_masks[0].float()  # [P, K, h, w]
            if self.kind.keeps_shape:
                logits = _resize(logits, (self.side, self.side))[..., : size[0], : size[1]]
            parts.append((_resize(logits, (height, width)) > 0, found.iou_scores[0].float()))
        masks, scores = zip(*parts, strict=True)
        return torch.cat(masks), torch.cat(scores)

    def _prepare(self, image: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """The model's input float32 [1, 3, side, side], and the size that the image has in it."""
        longest = max(image.shape)
        size = (self.side, self.side)
        if self.kind.keeps_shape:
            size = tuple(max(1, int(length * self.side / longest + 0.5)) for length in image.shape)
        grey = F.interpolate(image[None, None].float(), size, mode="bilinear", align_corners=False, antialias=True)
        mean, std = (grey.new_tensor(values)[:, None, None] for values in self.kind.normalisation)
        pixels = (grey.round().clamp(0, 255) / 255 - mean) / std  # [1, 3, h, w]
        return F.pad(pixels, (0, self.side - size[1], 0, self.side - size[0])), size


class OwnPredictor:
    """A predictor as those of the packages segment-anything and sam2, which already has its weights.

    Args:
        predictor: has ``set_image(uint8 [H, W, 3])``, and ``predict_torch`` with ``transform`` (SAM) or a ``predict``
            that takes prompts [P, 1, 2] and labels [P, 1] (SAM 2).

    Raises:
        InputError: it has not.

    Example:
        >>> OwnPredictor(print)
        Traceback (most recent call last):
        hmg_gpu.common.errors.InputError: sam: a predictor needs set_image and predict ...
    """

    def __init__(self, predictor: Any):
        if not hasattr(predictor, "set_image") or not (
            hasattr(predictor, "predict") or hasattr(predictor, "predict_torch")
        ):
            kind = type(predictor).__name__
            raise InputError(f"sam: a predictor needs set_image and predict or predict_torch; {kind} has not")
        self.predictor = predictor

    def segment(self, image: Tensor, points: Tensor, several: bool) -> tuple[Tensor, Tensor]:
        self.predictor.set_image(image[:, :, None].expand(-1, -1, 3).contiguous().cpu().numpy())
        coordinates = points[:, None]  # [P, 1, 2]
        labels = torch.ones(len(points), 1, dtype=torch.int64, device=points.device)
        if hasattr(self.predictor, "predict_torch"):
            coordinates = self.predictor.transform.apply_coords_torch(coordinates, tuple(image.shape))
            masks, scores, *_ = self.predictor.predict_torch(coordinates, labels, multimask_output=several)
        else:
            masks, scores, *_ = self.predictor.predict(
                point_coords=coordinates.cpu().numpy(), point_labels=labels.cpu().numpy(), multimask_output=several
            )
        masks, scores = torch.as_tensor(masks, device=image.device), torch.as_tensor(scores, device=image.device)
        return masks.reshape(len(points), -1, *image.shape) > 0, scores.reshape(len(points), -1).float()


def load_sam(folder: str | Path) -> TransformersSam:
    """Weights that lie in a folder, as ``save_pretrained`` writes them: config.json and model.safetensors.

    Raises:
        InputError: no such folder, no config.json in it, another kind of model, weights that do not fit it, or
            transformers is missing.

    Example:
        >>> load_sam("no_such_folder")
        Traceback (most recent call last):
        hmg_gpu.common.errors.InputError: no_such_folder: no such folder; expected SAM's config.json ...
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; expected SAM's config.json and model.safetensors")
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
        name = config["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder / 'config.json'}: no model_type can be read; expected a folder of SAM's") from error
    if name not in KINDS:
        raise InputError(f"{folder}: model_type {name!r}; expected one of {', '.join(KINDS)}")
    kind = KINDS[name]
    try:
        import transformers
    except ImportError as error:
        raise InputError('sam: transformers is missing; pip install "hmg-gpu[sam]"') from error
    if not hasattr(transformers, kind.model):
        raise InputError(f"sam: transformers {transformers.__version__} has no {kind.model}; update it")
    try:
        with _quiet(transformers.logging):
            model, about = getattr(transformers, kind.model).from_pretrained(
                folder, local_files_only=True, use_safetensors=True, output_loading_info=True
            )
    except Exception as error:  # it raises anything on damaged or missing files
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{folder}: cannot be read as {kind.model} ({reason}); copy or export it again") from error
    wrong = [*about["missing_keys"], *(str(key) for key in about["mismatched_keys"])]
    if wrong:
        raise InputError(
            f"{folder}: weights do not fit {kind.model}: {len(wrong)} such as {wrong[0]}; check its config"
        )
    return TransformersSam(model, kind)


@contextmanager
def _quiet(logging: Any) -> Iterator[None]:
    """Neither progress bars nor warnings of transformers: what matters in them is checked here."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _resize(values: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(values, size, mode="bilinear", align_corners=False)
