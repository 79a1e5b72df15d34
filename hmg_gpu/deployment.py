"""PMG and "network, threshold, update" as modules that torch.export can take: fixed shapes, no look at any value.

    program = torch.export.export(HybridMasks(net, mean=..., std=...), (images, points))
    torch.export.save(program, "hybrid.pt2")     # torch.export.load("hybrid.pt2").module()(images, points)

The same program becomes ONNX, for runtimes without PyTorch (needs the extra "onnx"):

    torch.onnx.export(program, (images, points)).save("hybrid.onnx")

Batch, height, width and the number of rows of ``points`` are those of the example; unused rows hold -1.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from hmg_gpu.common.tensors import last_head, logit
from hmg_gpu.masks.pmg import point_to_mask


class PointMasks(nn.Module):
    """:func:`hmg_gpu.point_to_mask` (HMG Sec. 3.1) as a module.

    Args:
        extent, half_width, alpha: as :func:`hmg_gpu.point_to_mask`.

    Example:
        >>> import torch
        >>> from hmg_gpu.deployment import PointMasks
        >>> image = torch.nn.functional.pad(torch.ones(1, 3, 3), (3, 3, 3, 3))  # 9 x 9 around a target of 3 x 3
        >>> program = torch.export.export(PointMasks(), (image, torch.tensor([[0, 4, 4], [-1, -1, -1]])))
        >>> program.module()(image, torch.tensor([[0, 4, 4], [-1, -1, -1]])).sum()
        tensor(9)
    """

    def __init__(self, *, extent: int = 25, half_width: int = 4, alpha: float = 0.15):
        super().__init__()
        self.settings = {"extent": extent, "half_width": half_width, "alpha": alpha}

    def forward(self, images: Tensor, points: Tensor) -> Tensor:
        """Float32 [B, H, W] and int64 [P, 3] (rows of -1 are ignored) -> bool [B, H, W]."""
        return point_to_mask(images, points, **self.settings)


class HybridMasks(nn.Module):
    """The point prompt (HMG Sec. 4.5.1): the network's prediction, corrected by the points.

    Args:
        net: normalised float32 [B, 1, H, W] -> logits of that shape, or a list of heads, of which the last is used.
        mean, std: normalisation of the images that the network was trained on.
        threshold: probability above which a pixel is foreground.
        radius: r of FAF in pixels.
        settings: as :class:`PointMasks`.

    Example:
        >>> import torch
        >>> from hmg_gpu.deployment import HybridMasks
        >>> image = torch.zeros(1, 32, 32)
        >>> image[0, 3:6, 3:6] = image[0, 25:30, 25:30] = 100  # a target of 9 pixels, clutter of 25
        >>> net = torch.nn.Identity()  # stands for a network: its logits are the normalised images
        >>> HybridMasks(net, mean=50, std=10, radius=5)(image, torch.tensor([[0, 4, 4]])).sum()
        tensor(9)
    """

    def __init__(
        self,
        net: nn.Module,
        *,
        mean: float,
        std: float,
        threshold: float = 0.5,
        radius: int = 30,
        **settings: float,
    ):
        super().__init__()
        self.net, self.initial = net.eval(), PointMasks(**settings)
        self.mean, self.std, self.radius = mean, std, radius
        self.level = logit(threshold)

    def forward(self, images: Tensor, points: Tensor) -> Tensor:
        """Float32 [B, H, W], H and W multiples of 32, and int64 [P, 3] (rows of -1 are ignored) -> bool [B, H, W]."""
        logits = self.net((images[:, None] - self.mean) / self.std)
        logits = last_head(logits)[:, 0]
        return self.initial(images, points) | filter_by_propagation(logits > self.level, points, self.radius)


def filter_by_propagation(prediction: Tensor, points: Tensor, radius: int) -> Tensor:
    """:func:`hmg_gpu.false_alarm_filter` in operations of fixed shape.

    The kernels and SciPy are no torch operations and kornia's labeller looks at values, so none of them exports. Here
    labels spread to the eight neighbours until nothing changes; the rest is the same whole numbers. Meant for export:
    outside an exported program torch compiles the loop first.

    Args:
        prediction: bool [B, H, W].
        points: int64 [P, 3]; rows outside their image are ignored.
        radius: r in pixels.

    Example:
        >>> import torch
        >>> from hmg_gpu.deployment import filter_by_propagation
        >>> prediction = torch.tensor([[[1, 1, 0, 0, 0, 0, 1]]]).bool()  # one image of one row, two components
        >>> filter_by_propagation(prediction, torch.tensor([[0, 0, 0]]), radius=3)[0].int()
        tensor([[1, 1, 0, 0, 0, 0, 0]], dtype=torch.int32)
    """
    batch, height, width = prediction.shape
    start = torch.arange(1, height * width + 1, device=prediction.device).view(1, height, width)
    start = start * prediction  # [B, H, W], 0 is background

    def spread(labels: Tensor) -> Tensor:
        padded = functional.pad(labels, (1, 1, 1, 1))
        across = torch.maximum(torch.maximum(padded[..., :-2], padded[..., 2:]), padded[..., 1:-1])
        around = torch.maximum(torch.maximum(across[:, :-2], across[:, 2:]), across[:, 1:-1])
        return around * (labels > 0)

    def step(labels: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
        after = spread(labels)
        return after, (after != labels).any()

    labels, _ = torch.while_loop(lambda _, going: going.clone(), step, (start, prediction.any()))

    flat = labels.view(batch, -1)  # [B, H * W]
    rows = torch.arange(height, device=flat.device).repeat_interleave(width).expand(batch, -1)
    columns = torch.arange(width, device=flat.device).repeat(height).expand(batch, -1)
    area, sum_y, sum_x = (  # int64 [B, H * W + 1], at each label's place
        torch.zeros(batch, height * width + 1, dtype=torch.int64, device=flat.device).scatter_add(1, flat, weights)
        for weights in (torch.ones_like(flat), rows, columns)
    )
    image, y, x = points.unbind(1)
    inside = (image >= 0) & (image < batch) & (y >= 0) & (y < height) & (x >= 0) & (x < width)
    image = image.clamp(0, batch - 1)
    distance = (sum_y[image] - area[image] * y[:, None]).abs() + (sum_x[image] - area[image] * x[:, None]).abs()
    near = (distance <= radius * area[image]) & inside[:, None]  # [P, H * W + 1]
    kept = torch.zeros_like(area).index_add(0, image, near.long())  # [B, H * W + 1]
    return (kept.gather(1, flat) > 0).view(prediction.shape) & prediction
