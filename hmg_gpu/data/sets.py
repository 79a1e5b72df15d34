"""The form in which a set of images lives in memory and on the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

MAX_SET_BYTES = 2**34  # of one padded batch of images


def padded_shape(sizes: np.ndarray | Tensor) -> tuple[int, int]:
    """Height and width of the batch that holds images of these sizes, [N, 2] rows (height, width).

    Where widths differ, so that there is padding anyway, the width is rounded up to a multiple of 16: the kernels then
    read 16 bytes at a time.

    Example:
        >>> import torch
        >>> from hmg_gpu.data.sets import padded_shape
        >>> padded_shape(torch.tensor([[30, 50], [41, 20]])), padded_shape(torch.tensor([[30, 50], [41, 50]]))
        ((41, 64), (41, 50))
    """
    rows, columns = zip(*sizes.tolist(), strict=True)
    height, width = max(rows), max(columns)
    return height, width if min(columns) == width else -(-width // 16) * 16


@dataclass(eq=False)  # tensors have no single truth value
class ImageSet:
    """Images of any sizes in one padded batch, with their points and, where there are any, masks.

    Attributes:
        names: N stems, unique.
        images: [N, H, W], own intensities, zero padded at the bottom and right; uint8 when every file is 8-bit, else
            float32 (which holds 16-bit values exactly).
        sizes: int64 [N, 2], rows (height, width) of the valid area in pixels.
        points: int64 [P, 3], rows (image, y, x), 0-based pixels, sorted, each row once.
        masks: bool [N, H, W], False in the padding, or None where the set has no ground truth.
        mean, std: normalisation ``(image - mean) / std`` in the images' intensities.
        dataset, split: where the set comes from; for messages, logs and tables.

    Example:
        >>> import torch
        >>> from hmg_gpu.data import ImageSet
        >>> points = torch.tensor([[0, 1, 1], [1, 2, 3]])
        >>> data = ImageSet(["small", "large"], torch.zeros(2, 4, 6), torch.tensor([[2, 2], [4, 6]]), points)
        >>> len(data), data.offsets.tolist()
        (2, [0, 1, 2])
    """

    names: list[str]
    images: Tensor
    sizes: Tensor
    points: Tensor
    masks: Tensor | None = None
    mean: float = 0.0
    std: float = 1.0
    dataset: str = ""
    split: str = ""

    def __len__(self) -> int:
        return len(self.names)

    @cached_property
    def offsets(self) -> Tensor:
        """int64 [N + 1]: the points of image i are ``points[offsets[i]:offsets[i + 1]]``; built once."""
        images = torch.arange(len(self) + 1, device=self.points.device)
        return torch.searchsorted(self.points[:, 0].contiguous(), images)  # [N + 1]

    @cached_property
    def host_sizes(self) -> Tensor:
        """``sizes`` on the CPU; known from the start where the set was read there and then moved."""
        return self.sizes.cpu()

    def sample(self, points: int, pixels: int) -> ImageSet:
        """What a maker of masks may look at before it starts: of a set in memory the whole; see ``masks.makers``."""
        return self

    def to(self, device: str | torch.device) -> ImageSet:
        """The same set with its tensors on ``device``."""
        moved = replace(
            self,
            images=self.images.to(device),
            sizes=self.sizes.to(device),
            points=self.points.to(device),
            masks=None if self.masks is None else self.masks.to(device),
        )
        moved.host_sizes = self.host_sizes
        return moved

    def subset(self, indices: Sequence[int] | Tensor) -> ImageSet:
        """The images ``indices`` (in that order), their points renumbered, padding cut as :func:`padded_shape` says.

        Args:
            indices: int64 [M] or a sequence of M ints in 0..N-1.

        Example:
            >>> import torch
            >>> from hmg_gpu.data import ImageSet
            >>> points = torch.tensor([[0, 1, 1], [1, 2, 3]])
            >>> data = ImageSet(["small", "large"], torch.zeros(2, 4, 6), torch.tensor([[2, 2], [4, 6]]), points)
            >>> data.subset([0]).images.shape, data.subset([1]).points.tolist()
            (torch.Size([1, 2, 2]), [[0, 2, 3]])
        """
        index = torch.as_tensor(indices, dtype=torch.int64, device=self.images.device)  # [M]
        counts = self.offsets[index + 1] - self.offsets[index]  # [M]
        image = torch.repeat_interleave(torch.arange(len(index), device=index.device), counts)  # [P']
        first = torch.cumsum(counts, 0) - counts  # [M] first new row of each image
        rows = torch.arange(len(image), device=index.device) - first[image] + self.offsets[index][image]  # [P']
        sizes = self.sizes[index]  # [M, 2]
        height, width = padded_shape(sizes) if len(index) else self.images.shape[1:]
        chosen = index.tolist()
        part = replace(
            self,
            names=[self.names[i] for i in chosen],
            images=self.images[index, :height, :width],
            sizes=sizes,
            points=torch.cat([image[:, None], self.points[rows, 1:]], 1),
            masks=None if self.masks is None else self.masks[index, :height, :width],
        )
        part.host_sizes = self.host_sizes[torch.tensor(chosen, dtype=torch.int64)]
        return part
