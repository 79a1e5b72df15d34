"""P2B + B2M fused (HMG Sec. 3.1): one program a point, one launch for all points.

Equal to :mod:`hmg_gpu.plain.pmg`: P2B exactly for integer intensities, B2M in the same float32 operations on the
same float64 sums. Compiled without fusing multiply and add (``enable_fp_fusion=False``), which would round differently
from the torch path.

Phases of a program, in order:

    boundary, four times   reads the image around the point        the box, written to boxes (SEARCH)
    paint, first pass      reads the box                           minimum, maximum and sum of its five parts
    paint, second pass     reads the box again, from the cache     stores True where P_f >= 0.5 (PAINT)

The box is read twice because each pixel's score needs sigma of five parts, which need every pixel, and a box is too
large to be held in registers meanwhile.

Why races do no harm: programs only read the image, own one row of boxes each, and the one place that two of them write
is a mask pixel where boxes overlap. Both store True there and nobody reads it, so the union needs no atomic and any
order gives the same mask. Of probabilities the maximum stays, by an atomic on their bits.
"""

from __future__ import annotations

import struct

import torch
import triton
import triton.language as tl
from torch import Tensor

from hmg_gpu.kernels import blocks
from hmg_gpu.plain import pmg as plain

ROWS = 4  # rows of the box looked at together
ONE_WARP = 15  # up to this extent one warp has a point, and no barrier is needed; beyond it would spill


@triton.jit
def boundary(
    image, y, x, STEP_Y: tl.constexpr, STEP_X: tl.constexpr, room, rows, columns, width, extent, half_width,
    ALONG: tl.constexpr, ACROSS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """How far the target reaches in one direction, in pixels; room = pixels between the point and the border."""
    reach = tl.minimum(room, extent)
    k = tl.arange(0, ALONG)
    j = tl.arange(0, ACROSS)[:, None] - half_width
    r = y + STEP_Y * k[None, :] + (1 - STEP_Y * STEP_Y) * j
    c = x + STEP_X * k[None, :] + (1 - STEP_X * STEP_X) * j
    valid = (k[None, :] <= reach) & (j <= half_width) & (r >= 0) & (r < rows) & (c >= 0) & (c < columns)
    raw = tl.load(image + r * width + c, mask=valid, other=0)  # [ACROSS, ALONG]
    vmax = tl.max(tl.where(valid, raw.to(tl.float32), float("-inf")), axis=0)  # [ALONG]
    vsum = tl.sum(raw.to(WIDE), axis=0)  # sums compare like means: equal counts

    # The neighbours of a lane's value lie in other lanes.
    following = tl.gather(vmax, tl.minimum(k + 1, ALONG - 1), 0)
    difference = tl.where(k < reach, tl.abs(following - vmax), 0.0)  # D
    # float64: sums of whole numbers are exact, so their order, which no device promises, cannot decide.
    total = tl.sum(difference.to(tl.float64), axis=0)
    transition = difference.to(tl.float64) * reach.to(tl.float64) > total  # D > mean(D)
    largest = tl.max(difference, axis=0)
    peak = tl.min(tl.where(difference == largest, k, ALONG), axis=0)
    edge = tl.min(tl.where((k > peak) & ~transition, k, ALONG), axis=0)  # e + 1
    edge = tl.minimum(edge, reach)
    threshold = tl.sum(tl.where(k == edge, vsum, 0), axis=0)
    end = tl.min(tl.where((vsum <= threshold) & (k <= reach), k, ALONG), axis=0)
    # A flat profile, and a region that holds NaN or Inf, end at the point.
    finite = tl.abs(tl.sum(vsum, axis=0).to(tl.float64)) < float("inf")
    end = tl.where((largest.to(tl.float64) * reach.to(tl.float64) > total) & finite, end, 0)
    return tl.where(reach < 2, reach, end)  # fewer than three pixels: the last


@triton.jit
def part(low, high, total, count, centre, alpha):
    """sigma of eq. (1), and the spans below and above it; 1 where the part has no contrast."""
    mean = total.to(tl.float64) / count.to(tl.float64)
    sigma = (alpha * centre.to(tl.float64) + (1.0 - alpha) * mean).to(tl.float32)
    rise, fall = sigma - low, high - sigma
    return sigma, tl.where(rise > 0, rise, 1.0), tl.where(fall > 0, fall, 1.0)


@triton.jit
def excess(value, sigma, rise, fall):
    """q of eq. (2), P = 0.5 + 0.5 * q: -1 at the part's Min, 0 at sigma, 1 at its Max."""
    above = value - sigma
    return tl.div_rn(above, tl.where(above <= 0, rise, fall))


@triton.jit
def paint(
    image, mask, y, x, y0, x0, y1, x1, width, alpha,
    SOFT: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """B2M inside one box, which holds its point; SOFT: the probability itself."""
    # The point's own row is kept apart from those above and below: it belongs to both parts.
    infinity = float("inf")
    c = x0 + tl.arange(0, COLUMNS)  # [C]
    in_columns = c < x1
    centre = tl.load(image + y * width + x).to(tl.float32)
    raw_line = tl.load(image + y * width + c, mask=in_columns, other=0)
    line = raw_line.to(tl.float32)
    line_min, line_max = (tl.where(in_columns, line, infinity), tl.where(in_columns, line, -infinity))
    line_sum = raw_line.to(WIDE)
    # Column by column: minimum, maximum and sum of the rows above and below the point's own.
    up_min = tl.full((COLUMNS,), infinity, tl.float32)
    up_max = tl.full((COLUMNS,), -infinity, tl.float32)
    up_sum = tl.zeros((COLUMNS,), WIDE)
    down_min, down_max, down_sum = up_min, up_max, up_sum
    start = y0
    while start < y1:
        r = start + tl.arange(0, ROWS)[:, None]
        inside = (r < y1) & in_columns[None, :]
        raw = tl.load(image + r * width + c[None, :], mask=inside, other=0)  # [R, C]
        value = raw.to(tl.float32)
        above, below = inside & (r < y), inside & (r > y)
        up_min = tl.minimum(up_min, tl.min(tl.where(above, value, infinity), axis=0))
        up_max = tl.maximum(up_max, tl.max(tl.where(above, value, -infinity), axis=0))
        up_sum += tl.sum(tl.where(above, raw.to(WIDE), 0), axis=0)
        down_min = tl.minimum(down_min, tl.min(tl.where(below, value, infinity), axis=0))
        down_max = tl.maximum(down_max, tl.max(tl.where(below, value, -infinity), axis=0))
        down_sum += tl.sum(tl.where(below, raw.to(WIDE), 0), axis=0)
        start += ROWS

    height_box, width_box = y1 - y0, x1 - x0
    all_min = tl.minimum(tl.minimum(up_min, line_min), down_min)
    all_max = tl.maximum(tl.maximum(up_max, line_max), down_max)
    all_sum = up_sum + line_sum + down_sum
    to_left, to_right = c <= x, c >= x
    above_min, above_max = tl.minimum(up_min, line_min), tl.maximum(up_max, line_max)
    below_min, below_max = tl.minimum(down_min, line_min), tl.maximum(down_max, line_max)
    box = height_box * width_box
    g_sigma, g_rise, g_fall = part(
        tl.min(all_min, axis=0), tl.max(all_max, axis=0), tl.sum(all_sum, axis=0), box, centre, alpha
    )
    a_sigma, a_rise, a_fall = part(
        tl.min(above_min, axis=0), tl.max(above_max, axis=0), tl.sum(up_sum + line_sum, axis=0),
        (y - y0 + 1) * width_box, centre, alpha,
    )  # fmt: skip
    b_sigma, b_rise, b_fall = part(
        tl.min(below_min, axis=0), tl.max(below_max, axis=0), tl.sum(line_sum + down_sum, axis=0),
        (y1 - y) * width_box, centre, alpha,
    )  # fmt: skip
    l_sigma, l_rise, l_fall = part(
        tl.min(tl.where(to_left, all_min, infinity), axis=0), tl.max(tl.where(to_left, all_max, -infinity), axis=0),
        tl.sum(tl.where(to_left, all_sum, 0), axis=0), (x - x0 + 1) * height_box, centre, alpha,
    )  # fmt: skip
    r_sigma, r_rise, r_fall = part(
        tl.min(tl.where(to_right, all_min, infinity), axis=0), tl.max(tl.where(to_right, all_max, -infinity), axis=0),
        tl.sum(tl.where(to_right, all_sum, 0), axis=0), (x1 - x) * height_box, centre, alpha,
    )  # fmt: skip

    # All five parts are known: the second pass scores. NaN or Inf in the box make every score NaN: the point alone is
    # foreground then.
    finite = tl.abs(tl.sum(all_sum, axis=0).to(tl.float64)) < infinity
    start = y0
    while start < y1:
        r = start + tl.arange(0, ROWS)[:, None]
        inside = (r < y1) & in_columns[None, :]
        at = r * width + c[None, :]
        value = tl.load(image + at, mask=inside, other=0).to(tl.float32)  # [R, C]
        score = excess(value, g_sigma, g_rise, g_fall)  # q_g
        before, after = excess(value, a_sigma, a_rise, a_fall), excess(value, b_sigma, b_rise, b_fall)
        score += tl.where(r < y, before, tl.where(r > y, after, 0.5 * (before + after)))  # q_v
        before, after = excess(value, l_sigma, l_rise, l_fall), excess(value, r_sigma, r_rise, r_fall)
        left, right = c[None, :] < x, c[None, :] > x
        score += tl.where(left, before, tl.where(right, after, 0.5 * (before + after)))  # q_h
        # P_f = 0.5 + score / 6, so P_f >= 0.5 is a sign.
        if SOFT:
            # Probabilities are not negative, so they are ordered like their bits.
            probability = tl.maximum(tl.where(finite, 0.5 + tl.div_rn(score, 6.0), 0.0), 0.0)
            tl.atomic_max(mask + at, probability.to(tl.int32, bitcast=True), mask=inside, sem="relaxed")
        else:
            tl.store(mask + at, tl.full((ROWS, COLUMNS), 1, tl.uint8), mask=inside & (score >= 0))
        start += ROWS
    own = mask + y * width + x
    if SOFT:
        tl.atomic_max(own, tl.full((), 0x3F000000, tl.int32), mask=~finite, sem="relaxed")  # the bits of 0.5
    else:
        tl.store(own, tl.full((), 1, tl.uint8), mask=~finite)


@triton.jit(do_not_specialize=["images", "height", "width", "extent", "half_width", "alpha_bits"])
def pmg_kernel(
    image, points, sizes, boxes, mask, images, height, width, extent, half_width, alpha_bits,
    SEARCH: tl.constexpr, PAINT: tl.constexpr, SOFT: tl.constexpr, HAS_SIZES: tl.constexpr,
    ALONG: tl.constexpr, ACROSS: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One point: find its box (SEARCH) or read it, then fill its mask (PAINT)."""
    # int64 until the point is known to lie in its image: cut to int32, a coordinate far outside could come back inside.
    # The image's start stays int64, as a batch may have 2**31 pixels or more.
    row = tl.program_id(0).to(tl.int64)
    which = tl.load(points + 3 * row)
    far_y, far_x = tl.load(points + 3 * row + 1), tl.load(points + 3 * row + 2)
    known = (which >= 0) & (which < images)
    which = tl.where(known, which, 0)
    rows, columns = height.to(tl.int64), width.to(tl.int64)
    if HAS_SIZES:
        rows = tl.minimum(rows, tl.load(sizes + 2 * which))
        columns = tl.minimum(columns, tl.load(sizes + 2 * which + 1))
    known = known & (far_y >= 0) & (far_y < rows) & (far_x >= 0) & (far_x < columns)
    y, x = far_y.to(tl.int32), far_x.to(tl.int32)
    rows, columns = rows.to(tl.int32), columns.to(tl.int32)
    base = which * height * width
    y0, x0, y1, x1 = y, x, y, x
    if SEARCH:
        if known:
            up = boundary(image + base, y, x, -1, 0, y, rows, columns, width, extent, half_width, ALONG, ACROSS, WIDE)
            down = boundary(
                image + base, y, x, 1, 0, rows - 1 - y, rows, columns, width, extent, half_width, ALONG, ACROSS, WIDE
            )
            left = boundary(image + base, y, x, 0, -1, x, rows, columns, width, extent, half_width, ALONG, ACROSS, WIDE)
            right = boundary(
                image + base, y, x, 0, 1, columns - 1 - x, rows, columns, width, extent, half_width, ALONG, ACROSS, WIDE
            )
            y0, x0, y1, x1 = y - up, x - left, y + down + 1, x + right + 1
        else:
            y0, x0, y1, x1 = y * 0, y * 0, y * 0, y * 0  # both branches must give one type
        tl.store(boxes + 4 * row, y0.to(tl.int64))
        tl.store(boxes + 4 * row + 1, x0.to(tl.int64))
        tl.store(boxes + 4 * row + 2, y1.to(tl.int64))
        tl.store(boxes + 4 * row + 3, x1.to(tl.int64))
    else:
        # A box never reaches out of the image, nor further than extent: what does is cut.
        y0 = tl.maximum(tl.load(boxes + 4 * row), tl.maximum(far_y - extent, 0)).to(tl.int32)
        x0 = tl.maximum(tl.load(boxes + 4 * row + 1), tl.maximum(far_x - extent, 0)).to(tl.int32)
        y1 = tl.minimum(tl.load(boxes + 4 * row + 2), tl.minimum(far_y + extent + 1, rows)).to(tl.int32)
        x1 = tl.minimum(tl.load(boxes + 4 * row + 3), tl.minimum(far_x + extent + 1, columns)).to(tl.int32)
        known = known & (y0 <= y) & (y < y1) & (x0 <= x) & (x < x1)
    if PAINT:  # noqa: SIM102 (a constant of the compiler, then a value of the program)
        if known:
            alpha = alpha_bits.to(tl.int64).to(tl.float64, bitcast=True)
            paint(image + base, mask + base, y, x, y0, x0, y1, x1, width, alpha, SOFT, COLUMNS, ROWS, WIDE)


def sum_type(images: Tensor, extent: int, half_width: int) -> tl.dtype:
    """In which sums are exact: int32 for bytes, whose sums over a region fit, else float64."""
    pixels = max((2 * extent + 1) ** 2, (extent + 1) * (2 * half_width + 1))
    return tl.int32 if images.dtype == torch.uint8 and 255 * pixels < 2**31 else tl.float64


def launch(
    images: Tensor, points: Tensor, boxes: Tensor | None, sizes: Tensor | None,
    extent: int, half_width: int, alpha: float, mask: bool, soft: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Run the kernel; must equal ``hmg_gpu.plain.pmg.point_to_box`` and ``paint``.

    Searches the boxes where ``boxes`` is None; fills the mask where ``mask`` is True, with ``soft`` with probabilities,
    else returns it empty.
    """
    batch, height, width = images.shape
    search = boxes is None
    device = images.device
    corners = torch.empty((len(points), 4), dtype=torch.int64, device=device) if search else boxes.contiguous()
    kind = torch.int32 if soft else torch.uint8
    plane = torch.zeros(images.shape if mask else (0,), dtype=kind, device=device)  # [B, H, W]
    if len(points) and images.numel():
        images, points = images.contiguous(), points.contiguous()
        limits = points if sizes is None else sizes.contiguous()  # any tensor serves where none is read
        # Triton passes Python floats as float32; the bits keep alpha a double.
        (alpha_bits,) = struct.unpack("<q", struct.pack("<d", alpha))
        with torch.cuda.device_of(images):
            pmg_kernel[(len(points),)](
                images, points, limits, corners, plane, batch, height, width, extent, half_width, alpha_bits,
                SEARCH=search, PAINT=mask, SOFT=soft, HAS_SIZES=sizes is not None,
                ALONG=triton.next_power_of_2(extent + 1), ACROSS=triton.next_power_of_2(2 * half_width + 1),
                COLUMNS=triton.next_power_of_2(2 * extent + 1), ROWS=ROWS, WIDE=sum_type(images, extent, half_width),
                enable_fp_fusion=False, **blocks.launch_options(1 if extent <= ONE_WARP else 2),
            )  # fmt: skip
    elif search:
        corners.zero_()
    return corners, plane.view(torch.float32 if soft else torch.bool)


@torch.library.custom_op("hmg_gpu::pmg", mutates_args=(), device_types="cuda")
def _pmg(
    images: Tensor,
    points: Tensor,
    boxes: Tensor | None,
    sizes: Tensor | None,
    extent: int,
    half_width: int,
    alpha: float,
    mask: bool,
    soft: bool,
) -> tuple[Tensor, Tensor]:
    corners, plane = launch(images, points, boxes, sizes, extent, half_width, alpha, mask, soft)
    # An op may not return its argument.
    return corners if boxes is None else boxes.new_empty((0, 4)), plane


@_pmg.register_kernel("cpu")
def _(images, points, boxes, sizes, extent, half_width, alpha, mask, soft):
    if blocks.INTERPRETED:
        corners, plane = launch(images, points, boxes, sizes, extent, half_width, alpha, mask, soft)
    else:
        corners = plain.point_to_box(images, points, extent, half_width, sizes) if boxes is None else boxes
        plane = torch.zeros((0,), dtype=torch.float32 if soft else torch.bool)
        if mask:
            plane = plain.paint(images, points, corners, extent, alpha, soft=soft)
    return corners if boxes is None else boxes.new_empty((0, 4)), plane


@_pmg.register_fake
def _(images, points, boxes, sizes, extent, half_width, alpha, mask, soft):
    corners = points.new_empty((points.shape[0] if boxes is None else 0, 4))
    return corners, images.new_empty(images.shape if mask else (0,), dtype=torch.float32 if soft else torch.bool)


def _run(
    images: Tensor, points: Tensor, boxes: Tensor | None, sizes: Tensor | None, *settings: float
) -> tuple[Tensor, Tensor]:
    run = launch if blocks.may_launch(images, points, boxes, sizes) else _pmg
    return run(images, points, boxes, sizes, *settings)


def _check(images: Tensor, points: Tensor, sizes: Tensor | None, extent: int, half_width: int) -> None:
    blocks.check_plane("images", images, (torch.float32, torch.uint8))
    blocks.check_points(points, images.device)
    blocks.check_sizes(sizes, images.shape[0], images.device)
    if extent < 1 or half_width < 0:
        raise ValueError(f"expected extent >= 1 and half_width >= 0 pixels, got {extent} and {half_width}")


@torch.no_grad()
def point_to_box(
    images: Tensor, points: Tensor, *, extent: int = 25, half_width: int = 4, sizes: Tensor | None = None
) -> Tensor:
    """The box around each point (HMG Sec. 3.1.1, P2B); equals :func:`hmg_gpu.point_to_box`. No gradient.

    Args:
        images: float32 or uint8 [B, H, W].
        points: int64 [P, 3], rows (image, y, x) in pixels.
        extent: L_ep in pixels. half_width: L_dp in pixels.
        sizes: int64 [B, 2], rows (height, width) of the valid area.

    Returns:
        int64 [P, 4], rows (y0, x0, y1, x1), half open; (0, 0, 0, 0) for a point outside its image.

    Raises:
        TypeError, ValueError: dtypes, shapes or devices that do not belong together.

    Example:
        >>> import torch
        >>> from hmg_gpu.kernels.pmg import point_to_box
        >>> image = torch.zeros(1, 9, 9)
        >>> image[0, 3:6, 3:6] = 100  # a bright target of 3 x 3 pixels
        >>> point_to_box(image, torch.tensor([[0, 4, 4]]))  # the box holds it and one pixel around it
        tensor([[2, 2, 7, 7]])
    """
    _check(images, points, sizes, extent, half_width)
    return _run(images, points, None, sizes, extent, half_width, 0.0, False, False)[0]


@torch.no_grad()
def box_to_mask(images: Tensor, points: Tensor, boxes: Tensor, *, extent: int = 25, alpha: float = 0.15) -> Tensor:
    """The mask inside each box (HMG Sec. 3.1.2, B2M); equals :func:`hmg_gpu.box_to_mask`. No gradient.

    Args:
        images, points: as :func:`point_to_box`.
        boxes: int64 [P, 4], rows (y0, x0, y1, x1), half open; cut to the image and to ``extent`` around the point.
            A box without its point makes no mask.
        alpha: weight of the point's own intensity.

    Returns:
        bool [B, H, W].

    Raises:
        TypeError, ValueError: dtypes, shapes or devices that do not belong together.

    Example:
        >>> import torch
        >>> from hmg_gpu.kernels.pmg import box_to_mask
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
    _check(images, points, None, extent, 0)
    if boxes.dtype != torch.int64 or boxes.shape != (len(points), 4) or boxes.device != images.device:
        raise ValueError(
            f"boxes: expected int64 [{len(points)}, 4] on {images.device}, "
            f"got {boxes.dtype} {list(boxes.shape)} on {boxes.device}"
        )
    return _run(images, points, boxes, None, extent, 0, alpha, True, False)[1]


@torch.no_grad()
def point_to_mask(
    images: Tensor, points: Tensor, *, extent: int = 25, half_width: int = 4, alpha: float = 0.15,
    sizes: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """P2B and B2M in one launch (HMG Sec. 3.1, PMG); equals :func:`hmg_gpu.point_to_mask`. No gradient.

    Args, Raises: as :func:`point_to_box` and :func:`box_to_mask`.

    Returns:
        bool [B, H, W], the union over the points of each image.

    Example:
        >>> import torch
        >>> from hmg_gpu.kernels.pmg import point_to_mask
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
    _check(images, points, sizes, extent, half_width)
    return _run(images, points, None, sizes, extent, half_width, alpha, True, False)[1]


@torch.no_grad()
def point_to_probability(
    images: Tensor, points: Tensor, *, extent: int = 25, half_width: int = 4, alpha: float = 0.15,
    sizes: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The soft mask behind :func:`point_to_mask`; equals :func:`hmg_gpu.point_to_probability`. No gradient.

    Args, Raises: as :func:`point_to_mask`.

    Returns:
        float32 [B, H, W] in 0 to 1; 0 outside the boxes, the maximum where boxes overlap.

    Example:
        >>> import torch
        >>> from hmg_gpu.kernels.pmg import point_to_probability
        >>> image = torch.zeros(1, 9, 9)
        >>> image[0, 3:6, 3:6] = 100
        >>> image[0, 4, 6] = 40  # a dim pixel beside the target
        >>> point_to_probability(image, torch.tensor([[0, 4, 4]]))[0, 4]  # row 4
        tensor([0.0000, 0.0000, 0.0000, 1.0000, 1.0000, 1.0000, 0.4655, 0.0000, 0.0000])
    """
    _check(images, points, sizes, extent, half_width)
    return _run(images, points, None, sizes, extent, half_width, alpha, True, True)[1]
