"""Some images of a set: which ones a caller means, their points, and a prediction of them in the set's own shape."""

from __future__ import annotations

import operator
import os
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from hmg_gpu.common.errors import InputError
from hmg_gpu.common.tensors import to_device
from hmg_gpu.data.points import image_stem
from hmg_gpu.data.sets import ImageSet
from hmg_gpu.models.foreign import SURPLUS

Key = str | os.PathLike | int | Tensor | Sequence


class Selection:
    """Finds images of a set by name or index; what it needs of the device is read once."""

    def __init__(self, data: ImageSet):
        self.data = data
        self._offsets = data.offsets.tolist()
        self._sizes = data.host_sizes.tolist()
        self._row = {name: row for row, name in enumerate(data.names)}

    def rows(self, key: Key) -> list[int]:
        """The rows of the set that a name, an index, or several of them stand for."""
        if isinstance(key, bytes):
            raise InputError(f"update_one: the key {key!r} is bytes; names are text: key.decode()")
        if isinstance(key, (Tensor, np.ndarray)):
            key = key.reshape(-1).tolist()
        elif isinstance(key, (str, os.PathLike)) or not isinstance(key, Iterable):
            key = [key]
        index = [self._row_of(one) for one in key]
        if len(set(index)) < len(index):
            raise InputError(f"update_one: {self.data.names[max(index, key=index.count)]} comes twice in one batch")
        return index

    def _row_of(self, key: str | os.PathLike | int | Tensor) -> int:
        if isinstance(key, bytes):
            raise InputError(f"update_one: the key {key!r} is bytes; names are text: key.decode()")
        if isinstance(key, (str, os.PathLike)):
            name = os.fspath(key)
            name = name if name in self._row else image_stem(name)
            if name not in self._row:
                raise InputError(f"update_one: no image {os.fspath(key)!r}; the set has {self.data.names[0]} ...")
            return self._row[name]
        try:
            row = operator.index(key)
        except TypeError:
            raise InputError(f"update_one: {key!r} is neither a name nor an index") from None
        if not 0 <= row < len(self.data):
            raise InputError(f"update_one: image {row} does not exist; the set has 0 to {len(self.data) - 1}")
        return row

    def planes(self, index: list[int], values: Tensor) -> Tensor:
        """A prediction on the device, in the height and width of the set: [b, H, W], bool or float32."""
        values = values.squeeze(1) if values.dim() == 4 and values.shape[1] == 1 else values
        values = values[None] if values.dim() == 2 else values
        if values.dim() != 3 or len(values) != len(index):
            raise InputError(
                f"prediction: expected [{len(index)}, 1, h, w] for {len(index)} images, got {list(values.shape)}"
            )
        if values.dtype != torch.bool and not values.is_floating_point():
            raise InputError(f"prediction: expected floating point or bool, got {values.dtype}; do not round it")
        height, width = values.shape[1:]
        tall, wide = (max([self._sizes[row][axis] for row in index], default=values.shape[1 + axis]) for axis in (0, 1))
        if height < tall or width < wide:
            raise InputError(
                f"prediction: {height} x {width} is smaller than {self.data.names[index[0]]} and its batch "
                f"({tall} x {wide}, height x width); predictions are never resized: give the full size"
            )
        if height > tall + SURPLUS or width > wide + SURPLUS:
            raise InputError(
                f"prediction: {height} x {width} for {self.data.names[index[0]]} and its batch of {tall} x {wide} "
                f"(height x width) is more than padding of up to {SURPLUS}; predictions are never resized: crop it to "
                "the image"
            )
        values = values.to(self.data.images.device)
        values = values if values.dtype == torch.bool else values.float()
        if values.shape[1:] == self.data.images.shape[1:]:
            return values
        planes = values.new_zeros(len(index), *self.data.images.shape[1:])
        height, width = min(height, planes.shape[1]), min(width, planes.shape[2])
        planes[:, :height, :width] = values[:, :height, :width]
        return planes

    def points(self, index: list[int]) -> Tensor:
        """The points of some images, renumbered; their rows are worked out on the CPU."""
        spans = [(self._offsets[row], self._offsets[row + 1]) for row in index]
        rows = torch.tensor([row for first, last in spans for row in range(first, last)], dtype=torch.int64)
        image = torch.tensor([place for place, (first, last) in enumerate(spans) for _ in range(first, last)])
        there, image = to_device(rows, self.data.images.device), to_device(image.long(), self.data.images.device)
        return torch.cat((image[:, None], self.data.points[there, 1:]), dim=1)

    def offsets(self, index: list[int]) -> Tensor:
        """Where the points of each begin among :meth:`points`: int64 [b + 1] on the device."""
        counts = [0, *(self._offsets[row + 1] - self._offsets[row] for row in index)]
        return to_device(torch.tensor(counts, dtype=torch.int64).cumsum(0), self.data.images.device)

    def on_device(self, index: list[int]) -> Tensor:
        """Rows as a tensor on the set's device: int64 [b]."""
        return to_device(torch.tensor(index, dtype=torch.int64), self.data.images.device)
