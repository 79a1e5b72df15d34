"""Running a network over a set of images of different sizes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import closing

import torch
from torch import Tensor, nn

from .data.sets import ImageSet
from .errors import InputError

PADDINGS = ("least", "lesps")


def padded_side(side: int, padding: str = "least") -> int:
    """The side to which an image is padded: the next multiple of 32, or LESPS's (side // 32 + 1) * 32.

    LESPS's rule adds 32 pixels to a side that is a multiple already; published counts need it.
    """
    return (side // 32 + 1) * 32 if padding == "lesps" else -(-side // 32) * 32


@torch.no_grad()
def predict_logits(
    model: nn.Module,
    data: ImageSet,
    *,
    mean: float | None = None,
    std: float | None = None,
    batch_size: int = 8,
    padding: str = "least",
    autocast: bool = False,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Run a network in eval mode over a set; images that pad to the same size share a batch.

    Padding is zero, at the bottom and the right, after normalisation (what a padded pixel holds changes the prediction,
    so an image is never padded further than its own size asks for).

    Args:
        model: takes float32 [B, 1, H, W] and gives logits of that shape (the last of a list of heads is used).
        data: the images, on the model's device.
        mean, std: normalisation of the set the model was trained on; None: that of ``data``.
        padding: "least" or "lesps", see :func:`padded_side`.
        autocast: predict in bfloat16.

    Yields:
        (int64 [b] indices into the set on the CPU, float32 logits [b, H, W], cropped or filled up with -inf to the
        set's padded height and width).
    """
    if padding not in PADDINGS:
        raise InputError(f"padding {padding!r}: expected one of {', '.join(PADDINGS)}")
    mean = data.mean if mean is None else mean
    std = data.std if std is None else std
    device = data.images.device
    _, height, width = data.images.shape
    shapes: dict[tuple[int, int], list[int]] = {}
    for index, (h, w) in enumerate(data.sizes.tolist()):
        shapes.setdefault((padded_side(h, padding), padded_side(w, padding)), []).append(index)

    was_training = model.training
    model.eval()
    try:
        for (tall, wide), members in shapes.items():
            for chunk in torch.tensor(members).split(batch_size):
                group = data.images[chunk.to(device), :tall, :wide].float()
                size = data.sizes[chunk.to(device)]  # [b, 2]
                rows = torch.arange(group.shape[1], device=device)[None, :, None] < size[:, 0, None, None]
                columns = torch.arange(group.shape[2], device=device)[None, None, :] < size[:, 1, None, None]
                batch = torch.zeros(len(chunk), 1, tall, wide, device=device)
                batch[:, 0, : group.shape[1], : group.shape[2]] = torch.where(rows & columns, (group - mean) / std, 0)
                with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
                    output = model(batch)
                if isinstance(output, (list, tuple)):
                    output = output[-1]
                logits = torch.full((len(chunk), height, width), -torch.inf, device=device)
                tall_kept, wide_kept = min(tall, height), min(wide, width)
                logits[:, :tall_kept, :wide_kept] = output[:, 0, :tall_kept, :wide_kept].float()
                yield chunk, logits
    finally:
        model.train(was_training)


def predict(
    model: nn.Module,
    data: ImageSet,
    *,
    threshold: float = 0.5,
    progress: Callable[[int], None] | None = None,
    **settings,
) -> Tensor:
    """Predicted masks of a whole set: bool [N, H, W], True where the probability exceeds ``threshold``.

    Args:
        threshold: between 0 and 1, exclusive.
        progress: called with the number of images of each finished batch.
        settings: as :func:`predict_logits`.
    """
    if not 0 < threshold < 1:
        raise InputError(f"threshold {threshold}: expected a probability between 0 and 1")
    level = math.log(threshold / (1 - threshold))
    prediction = torch.zeros(data.images.shape, dtype=torch.bool, device=data.images.device)
    rows = torch.arange(prediction.shape[1], device=prediction.device)[None, :, None]
    columns = torch.arange(prediction.shape[2], device=prediction.device)[None, None, :]
    with closing(predict_logits(model, data, **settings)) as parts:  # restores the network's mode whatever happens
        for chunk, logits in parts:
            chunk = chunk.to(prediction.device)
            size = data.sizes[chunk]
            inside = (rows < size[:, 0, None, None]) & (columns < size[:, 1, None, None])
            prediction[chunk] = (logits > level) & inside
            if progress is not None:
                progress(len(chunk))
    return prediction
