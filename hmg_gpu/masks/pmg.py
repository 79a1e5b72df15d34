"""Pseudo mask generation, PMG (HMG Sec. 3.1): from one point per target to its initial mask.

    point --point_to_box (P2B)--> box --box_to_mask (B2M)--> initial mask

The computation is in ``hmg_gpu/plain/pmg.py`` and, on GPUs with Triton, in ``kernels/pmg.py``; here the arguments are
checked. Plain PMG is batched over the points: one gather makes the four search regions of every point, one more its
window. The loops that remain run over fixed-size groups of points and bound the memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hmg_gpu.common.backend import backend_for
from hmg_gpu.common.checks import can_read, check_images, check_points, check_sizes
from hmg_gpu.plain import pmg as plain


@torch.no_grad()
def point_to_box(
    images: Tensor, points: Tensor, *, extent: int = 25, half_width: int = 4, sizes: Tensor | None = None
) -> Tensor:
    """Search the target's border in four directions around each point (HMG Sec. 3.1.1, P2B).

    In each direction the region of interest gives two profiles, index 0 being the point:

        vmax[k], vavg[k] = maximum and mean over the 2 * half_width + 1 pixels across
        D[k] = |vmax[k + 1] - vmax[k]|, T = mean(D)
        e = outer end of the contiguous run of D > T that holds the largest D
        boundary = first k with vavg[k] <= vavg[e + 1], included in the box

    A flat profile (no D > T) ends at the point, and so does a region that holds NaN or Inf; one of fewer than three
    pixels (point at the border) ends at its last pixel.
    Where the text leaves room these are the readings that gave the best masks on real data. Both comparisons are
    made without division (D * n > sum of D, sums in place of means), so integer intensities decide exactly on every
    device.

    Args:
        images: float32 or uint8 [B, H, W], intensities as they come.
        points: int64 [P, 3], rows (image, y, x) in pixels, 0-based.
        extent: L_ep, how far to search in pixels: 10 for NUDT-SIRST, 25 for the other sets.
        half_width: L_dp, pixels looked at to each side across the direction.
        sizes: int64 [B, 2], rows (height, width) of the valid area of images padded at the bottom and the right;
            the padding is never read. None: the whole image.

    Returns:
        int64 [P, 4], rows (y0, x0, y1, x1) in pixels, half open; each box holds its point.

    Raises:
        TypeError: a wrong dtype. ValueError: a wrong shape or setting, or a point outside its image (the row is named);
            points are looked at only on the CPU. On an accelerator, where looking would synchronise, such a point is
            ignored: its box is (0, 0, 0, 0) and it makes no mask.

    Example:
        >>> import torch
        >>> from hmg_gpu import point_to_box
        >>> image = torch.zeros(1, 9, 9)
        >>> image[0, 3:6, 3:6] = 100  # a bright target of 3 x 3 pixels
        >>> point_to_box(image, torch.tensor([[0, 4, 4]]))  # the box holds it and one pixel around it
        tensor([[2, 2, 7, 7]])
    """
    _check(images, points, sizes, extent=extent, half_width=half_width)
    if backend_for(images) == "triton":
        from hmg_gpu.kernels.pmg import point_to_box as fused

        return fused(images, points, extent=extent, half_width=half_width, sizes=sizes)
    return plain.point_to_box(images, points, extent, half_width, sizes)


@torch.no_grad()
def box_to_mask(images: Tensor, points: Tensor, boxes: Tensor, *, extent: int = 25, alpha: float = 0.15) -> Tensor:
    """Grow each point to a mask inside its box by directional normalisation (HMG Sec. 3.1.2, B2M).

        sigma = alpha * I(u0) + (1 - alpha) * mean(I)                              (1)
        P(u)  = 0.5 * (I - Min) / (sigma - Min)       where I <= sigma              (2)
              = 1 - 0.5 * (Max - I) / (Max - sigma)   where I >  sigma
        P_f   = (P_g + P_v + P_h) / 3, mask = P_f >= 0.5                          (3, 4)

    P_g takes the whole box; P_v the parts above and below the point, P_h those to its left and right, each part with
    its own Min, Max and sigma. The row (column) of the point belongs to both parts and gets the mean of the two values.
    A part without contrast gives 0.5. A box that holds NaN or Inf makes a mask of its point alone. Points of one image
    are united.

    Args:
        images: float32 or uint8 [B, H, W], intensities as they come.
        points: int64 [P, 3], rows (image, y, x) in pixels, 0-based.
        boxes: int64 [P, 4] from :func:`point_to_box`, rows (y0, x0, y1, x1), half open, each around its point.
        extent: L_ep in pixels; no box reaches further from its point. It bounds the window, so that no size has to be
            read from the boxes; on an accelerator a box is cut to it.
        alpha: weight of the point's own intensity in sigma, 0 to 1.

    Returns:
        bool [B, H, W].

    Raises:
        TypeError, ValueError: as :func:`point_to_box`; on the CPU also a box that leaves the image, misses its point
            or reaches beyond ``extent`` (the row is named).

    Example:
        >>> import torch
        >>> from hmg_gpu import box_to_mask
        >>> image, points = torch.zeros(1, 6, 6), torch.tensor([[0, 2, 2]])
        >>> image[0, 1:4, 1:4] = 100  # a bright target of 3 x 3 pixels
        >>> box_to_mask(image, points, torch.tensor([[0, 0, 5, 5]]))[0].int()
        tensor([[0, 0, 0, 0, 0, 0],
                [0, 1, 1, 1, 0, 0],
                [0, 1, 1, 1, 0, 0],
                [0, 1, 1, 1, 0, 0],
                [0, 0, 0, 0, 0, 0],
                [0, 0, 0, 0, 0, 0]], dtype=torch.int32)
    """
    _check(images, points, None, extent=extent, alpha=alpha)
    _check_boxes(images, points, boxes, extent)
    if backend_for(images) == "triton":
        from hmg_gpu.kernels.pmg import box_to_mask as fused

        return fused(images, points, boxes, extent=extent, alpha=alpha)
    return plain.paint(images, points, boxes, extent, alpha, soft=False)


@torch.no_grad()
def point_to_mask(
    images: Tensor,
    points: Tensor,
    *,
    extent: int = 25,
    half_width: int = 4,
    alpha: float = 0.15,
    sizes: Tensor | None = None,
) -> Tensor:
    """Make the initial pseudo masks of a batch from its points (HMG Sec. 3.1, PMG): P2B, then B2M.

    Args:
        images: float32 or uint8 [B, H, W], intensities as they come.
        points: int64 [P, 3], rows (image, y, x) in pixels, 0-based; P may be 0.
        extent: L_ep in pixels: 10 for NUDT-SIRST, 25 for the other sets.
        half_width: L_dp in pixels.
        alpha: weight of the point's own intensity in sigma.
        sizes: int64 [B, 2], valid (height, width) of padded images; None: the whole image.

    Returns:
        bool [B, H, W], the union over the points of each image.

    Raises:
        TypeError, ValueError: as :func:`point_to_box`.

    Example:
        >>> import torch
        >>> from hmg_gpu import point_to_mask
        >>> image = torch.zeros(1, 9, 9)
        >>> image[0, 3:6, 3:6] = 100  # a bright target of 3 x 3 pixels
        >>> point_to_mask(image, torch.tensor([[0, 4, 4]]))[0].int()
        tensor([[0, 0, 0, 0, 0, 0, 0, 0, 0],
                [0, 0, 0, 0, 0, 0, 0, 0, 0],
                [0, 0, 0, 0, 0, 0, 0, 0, 0],
                [0, 0, 0, 1, 1, 1, 0, 0, 0],
                [0, 0, 0, 1, 1, 1, 0, 0, 0],
                [0, 0, 0, 1, 1, 1, 0, 0, 0],
                [0, 0, 0, 0, 0, 0, 0, 0, 0],
                [0, 0, 0, 0, 0, 0, 0, 0, 0],
                [0, 0, 0, 0, 0, 0, 0, 0, 0]], dtype=torch.int32)
    """
    _check(images, points, sizes, extent=extent, half_width=half_width, alpha=alpha)
    if backend_for(images) == "triton":
        from hmg_gpu.kernels.pmg import point_to_mask as fused

        return fused(images, points, extent=extent, half_width=half_width, alpha=alpha, sizes=sizes)
    boxes = plain.point_to_box(images, points, extent, half_width, sizes)
    return plain.paint(images, points, boxes, extent, alpha, soft=False)


@torch.no_grad()
def point_to_probability(
    images: Tensor,
    points: Tensor,
    *,
    extent: int = 25,
    half_width: int = 4,
    alpha: float = 0.15,
    sizes: Tensor | None = None,
) -> Tensor:
    """The soft mask P_f behind :func:`point_to_mask` (HMG eq. 3); ``point_to_mask`` is ``P_f >= 0.5``.

    Args and errors as :func:`point_to_mask`.

    Returns:
        float32 [B, H, W] in 0 to 1; 0 outside the boxes, the maximum where boxes overlap.

    Example:
        >>> import torch
        >>> from hmg_gpu import point_to_probability
        >>> image = torch.zeros(1, 9, 9)
        >>> image[0, 3:6, 3:6] = 100
        >>> image[0, 4, 6] = 40  # a dim pixel beside the target
        >>> point_to_probability(image, torch.tensor([[0, 4, 4]]))[0, 4]  # row 4
        tensor([0.0000, 0.0000, 0.0000, 1.0000, 1.0000, 1.0000, 0.4655, 0.0000, 0.0000])
    """
    _check(images, points, sizes, extent=extent, half_width=half_width, alpha=alpha)
    if backend_for(images) == "triton":
        from hmg_gpu.kernels.pmg import point_to_probability as fused

        return fused(images, points, extent=extent, half_width=half_width, alpha=alpha, sizes=sizes)
    boxes = plain.point_to_box(images, points, extent, half_width, sizes)
    return plain.paint(images, points, boxes, extent, alpha, soft=True)


def _check(images: Tensor, points: Tensor, sizes: Tensor | None, **settings: float) -> None:
    check_images(images)
    check_sizes(sizes, images)
    check_points(points, images, sizes)
    for name, value in settings.items():
        if name == "alpha":
            if not 0 <= value <= 1:
                raise ValueError(f"alpha: expected a number from 0 to 1, got {value}")
        elif not isinstance(value, int) or value < (name == "extent"):
            raise ValueError(
                f"{name}: expected a whole number of pixels, at least {int(name == 'extent')}, got {value}"
            )


def _check_boxes(images: Tensor, points: Tensor, boxes: Tensor, extent: int) -> None:
    if boxes.dtype != torch.int64 or boxes.shape != (len(points), 4):
        raise ValueError(
            f"boxes: expected int64 [{len(points)}, 4], one row (y0, x0, y1, x1) for each point, "
            f"got {boxes.dtype} {list(boxes.shape)}"
        )
    if not can_read(boxes) or len(boxes) == 0:
        return
    _, height, width = images.shape
    _, y, x = points.unbind(1)
    y0, x0, y1, x1 = boxes.unbind(1)
    fits = (y0 >= 0) & (x0 >= 0) & (y1 <= height) & (x1 <= width)
    fits &= (y0 <= y) & (y < y1) & (x0 <= x) & (x < x1) & (plain.reach(points, boxes) <= extent)
    if not bool(fits.all()):
        row = int((~fits).nonzero()[0])
        raise ValueError(
            f"boxes row {row}: {boxes[row].tolist()} must lie in the {height} x {width} image, hold its point "
            f"{points[row].tolist()} and reach at most extent = {extent} pixels from it"
        )
