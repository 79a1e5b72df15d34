"""Running a network over a set of images of different sizes."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing

import torch
from torch import Tensor, nn

from hmg_gpu.common.errors import HMGError, InputError
from hmg_gpu.common.parallel import ALONE, Team
from hmg_gpu.common.tensors import last_head, logit, to_device, valid_area
from hmg_gpu.data.sets import ImageSet
from hmg_gpu.models.foreign import explained

PADDINGS = ("least", "lesps")


def padded_side(side: int, padding: str = "least") -> int:
    """The side to which an image is padded: the next multiple of 32, or LESPS's (side // 32 + 1) * 32.

    LESPS's rule adds 32 pixels to a side that is a multiple already; published counts need it.
    """
    return (side // 32 + 1) * 32 if padding == "lesps" else -(-side // 32) * 32


def share(sizes: Tensor, rank: int, ranks: int, *, batch_size: int = 8, padding: str = "least") -> list[int]:
    """The images that one of several processes predicts: every ``ranks``-th of the batches that one alone would make.

    Predicted in this order they fall into those batches again, so that every prediction has the bits of one process.

    Args:
        sizes: int64 [N, 2] on the CPU, rows (height, width).
        rank, ranks: of the process, and how many there are.
        batch_size, padding: as :func:`predict_logits`.
    """
    batches = [
        rows[first : first + batch_size]
        for rows in _by_padded_size(sizes, range(len(sizes)), padding).values()
        for first in range(0, len(rows), batch_size)
    ]
    # A group keeps the order of its batches and only its last may be short.
    return [row for batch in batches[rank::ranks] for row in batch]


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
    rows: Sequence[int] | None = None,
    channels: int = 1,
) -> Iterator[tuple[list[int], Tensor]]:
    """Run a network in eval mode over a set; images that pad to the same size share a batch.

    Padding is zero, at the bottom and the right, after normalisation (what a padded pixel holds changes the prediction,
    so an image is never padded further than its own size asks for). Where the device has no memory for a batch, it is
    halved until there is, with one warning. Nothing is read from the device.

    Args:
        model: takes [B, channels, H, W] in the dtype of its own weights and gives logits [B, 1, H, W] (the last of a
            list of heads is used).
        data: the images, on the model's device.
        mean, std: normalisation of the set the model was trained on; None: that of ``data``.
        padding: "least" or "lesps", see :func:`padded_side`.
        autocast: predict in bfloat16.
        rows: the images to predict, such as a :func:`share`; None: all.
        channels: of the network's input; the image is repeated in each.

    Yields:
        (b indices into the set, float32 logits [b, H, W], cropped or filled up with -inf to the
        set's padded height and width).

    Raises:
        HMGError: not even one image fits into the device's memory.
        InputError: the network takes another number of channels, or is on another device.
    """
    if padding not in PADDINGS:
        raise InputError(f"padding {padding!r}: expected one of {', '.join(PADDINGS)}")
    if channels < 1:
        raise InputError(f"channels {channels}: expected at least 1")
    mean = data.mean if mean is None else mean
    std = data.std if std is None else std
    device = data.images.device
    _, height, width = data.images.shape
    groups = _by_padded_size(data.host_sizes, range(len(data)) if rows is None else rows, padding)
    order = [row for members in groups.values() for row in members]
    on_device = to_device(torch.tensor(order, dtype=torch.int64), device)  # all indices in one copy

    weight = next((value for value in model.parameters() if value.is_floating_point()), None)
    dtype = torch.float32 if weight is None else weight.dtype

    def forward(first: int, last: int, tall: int, wide: int) -> Tensor:
        images = _padded(data, on_device[first:last], tall, wide, mean, std)
        images = images.to(dtype).repeat(1, channels, 1, 1)  # not expanded: networks reshape and write in place
        with explained(model, images), torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            output = last_head(model(images))
        logits = torch.full((last - first, height, width), -torch.inf, device=device)
        tall_kept, wide_kept = min(tall, height), min(wide, width)
        logits[:, :tall_kept, :wide_kept] = output[:, 0, :tall_kept, :wide_kept].float()
        return logits

    was_training = model.training
    model.eval()
    try:
        first = 0
        for (tall, wide), members in groups.items():
            end = first + len(members)
            while first < end:
                last = min(first + batch_size, end)
                logits, batch_size = _halving(forward, first, last, tall, wide, batch_size, device)
                last = first + len(logits)
                yield order[first:last], logits
                first = last
    finally:
        model.train(was_training)


def _padded(data: ImageSet, index: Tensor, tall: int, wide: int, mean: float, std: float) -> Tensor:
    """Some images, normalised, with zeros in the padding: float32 [b, 1, tall, wide]."""
    values = data.images[index, :tall, :wide].float()
    inside = valid_area(data.sizes[index], values)
    batch = torch.zeros(len(index), 1, tall, wide, device=values.device)
    batch[:, 0, : values.shape[1], : values.shape[2]] = torch.where(inside, (values - mean) / std, 0)
    return batch


def _halving(
    forward: Callable[[int, int, int, int], Tensor],
    first: int,
    last: int,
    tall: int,
    wide: int,
    batch_size: int,
    device: torch.device,
) -> tuple[Tensor, int]:
    """Run ``forward`` on as many of the images as fit into memory; the logits, and the batch size from now on."""
    failed = 0
    while True:
        try:
            logits = forward(first, last, tall, wide)
        except torch.OutOfMemoryError as error:
            failed = max(failed, last - first)
            batch_size = (last - first) // 2
            if not batch_size:
                text = f"{device} has no memory for one image of {tall} x {wide}; free some, or use cpu"
                raise HMGError(text) from error
            logits = None
        if logits is not None:
            break
        if device.type == "cuda":  # outside the handler, which keeps the failed batch alive
            torch.cuda.empty_cache()
        last = first + batch_size
    if failed:
        text = f"{device} has no memory for {failed} images of {tall} x {wide}"
        warnings.warn(f"{text}: predicting {batch_size} at a time", stacklevel=3)
    return logits, batch_size


def _by_padded_size(sizes: Tensor, rows: Iterable[int], padding: str) -> dict[tuple[int, int], list[int]]:
    """Images that pad to the same height and width."""
    sides = sizes.tolist()
    groups: dict[tuple[int, int], list[int]] = {}
    for row in rows:
        groups.setdefault(tuple(padded_side(side, padding) for side in sides[row]), []).append(row)
    return groups


def predict(
    model: nn.Module,
    data: ImageSet,
    *,
    threshold: float = 0.5,
    soft: bool = False,
    progress: Callable[[int], None] | None = None,
    team: Team = ALONE,
    **settings,
) -> Tensor:
    """Predicted masks of a whole set: bool [N, H, W], True where the probability exceeds ``threshold``.

    Args:
        threshold: between 0 and 1, exclusive.
        soft: give the probabilities themselves: float32 [N, H, W], 0 in the padding.
        progress: called with the number of images of each finished batch.
        team: ranks that hold the same set and network and predict a :func:`share` each; all get the bits that one
            process alone would.
        settings: as :func:`predict_logits`.
    """
    if not 0 < threshold < 1:
        raise InputError(f"threshold {threshold}: expected a probability between 0 and 1")
    if team.ranks > 1:
        batches = {name: settings[name] for name in ("batch_size", "padding") if name in settings}
        settings["rows"] = share(data.host_sizes, team.rank, team.ranks, **batches)
    kind = torch.float32 if soft else torch.bool
    prediction = torch.zeros(data.images.shape, dtype=kind, device=data.images.device)
    with closing(predict_logits(model, data, **settings)) as parts:  # restores the network's mode whatever happens
        for chunk, logits in parts:
            on_device = to_device(torch.tensor(chunk), prediction.device)
            inside = valid_area(data.sizes[on_device], logits)
            prediction[on_device] = logits.sigmoid() * inside if soft else (logits > logit(threshold)) & inside
            if progress is not None:
                progress(len(chunk))
    if team.ranks > 1:  # every image was predicted by one rank and is False or 0 on the others
        return team.add(prediction) if soft else team.add(prediction.to(torch.uint8)) > 0
    return prediction
