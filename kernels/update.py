"""FAF + MDR in one pass over the prediction (HMG Sec. 3.2): label, sum, decide and unite on the device.

Equal to :func:`hmg_gpu.masks.update.update` (and, without ``initial``, to ``false_alarm_filter``), bit for bit;
with a weight and probabilities to ``soft_update``.

The prediction and the initial mask are streamed once. The output plane holds bit 0 = initial and
bit 1 = prediction until the decision is made, so later phases never read the prediction again, and they visit
only the tiles that hold foreground. Soft fusion decides bit 0 in that one pass too; bit 2 marks a prediction
inside a box, which FAF may not touch.

Phases; the union-find, and why its races do no harm, is in blocks.py:

    scan      reads prediction, initial            writes out, and which tiles hold foreground; the others are final
    link      reads out inside the tile            writes parents inside the tile, areas and sums as 0
    border    reads out around the tile            unions across the tiles' borders
    sum       reads out, parents                   writes each block's root as its parent, adds to the root's area, sums
    decide    reads parents, areas, sums, points   writes out as the final mask

    image design   one launch; each program owns one image at a time, programs = min(B, workspace / image);
                   a barrier between the phases
    tile design    four launches over tiles x images: scan + link, border, sum, decide

Deciding needs a pass of its own: a component is judged by its whole area and centroid, which are complete only when
every tile that it touches has added its part.

Why races do no harm: area and sums are whole numbers, so the atomic additions give the same bits in any order and the
decision is the same on every run; nobody reads them before the next phase. In each phase one lane of one tile at most
writes a pixel of out, and decide, which overwrites it, looks at no pixel of another tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hmg_gpu.kernels import blocks
from hmg_gpu.kernels.blocks import (
    NUM_WARPS,
    TILE_H,
    TILE_W,
    WORKSPACE_BYTES,
    all_max,
    all_min,
    all_sum,
    block_lanes,
    block_pixels,
    find,
    link_border,
    link_border_kernel,
    link_tile,
    scan_tile,
    valid_size,
)
from hmg_gpu.plain.components import connected_components
from hmg_gpu.plain.update import fuse, near_a_point

# Up to this many images the tile design runs (if its workspace fits): below one image a multiprocessor the
# image design leaves the device idle.
SMALL_BATCH = 128
MAX_PROGRAMS = 1024


@triton.jit
def start_tile(out, parents, areas, sums, blocks_n, tile, height, width, TILE_H: tl.constexpr, TILE_W: tl.constexpr):
    by, bx = block_lanes(tile, tl.cdiv(width, TILE_W), TILE_H, TILE_W)
    p00, p01, p10, p11 = block_pixels(out, by, bx, height, width)
    some = p00 | p01 | p10 | p11
    block = by * ((width + 1) // 2) + bx
    # At every block, though only roots will be added to: which of them stay roots is not known before the borders.
    zero = tl.zeros_like(block)
    tl.store(areas + block, zero, mask=some)
    tl.store(sums + block, zero.to(sums.dtype.element_ty), mask=some)
    tl.store(sums + blocks_n + block, zero.to(sums.dtype.element_ty), mask=some)
    link_tile(out, parents, by, bx, p00, p01, p10, some, height, width, TILE_H, TILE_W)


@triton.jit
def sum_tile(out, parents, areas, sums, blocks_n, tile, height, width, TILE_H: tl.constexpr, TILE_W: tl.constexpr):
    """Add area, sum of y and sum of x of a tile's foreground to its roots; leave each block's parent at its root."""
    by, bx = block_lanes(tile, tl.cdiv(width, TILE_W), TILE_H, TILE_W)
    p00, p01, p10, p11 = block_pixels(out, by, bx, height, width)
    some = p00 | p01 | p10 | p11
    block = by * ((width + 1) // 2) + bx
    root = find(parents, block, some)
    tl.store(parents + block, root, mask=some)
    wide = sums.dtype.element_ty  # int32 where an image's sums are proved to fit, see sum_dtype
    bottom = p10.to(tl.int32) + p11.to(tl.int32)
    right = p01.to(tl.int32) + p11.to(tl.int32)
    area = bottom + p00.to(tl.int32) + p01.to(tl.int32)
    sum_y = (2 * by).to(wide) * area.to(wide) + bottom.to(wide)
    sum_x = (2 * bx).to(wide) * area.to(wide) + right.to(wide)
    lowest = all_min(tl.where(some, root, 2147483647))
    if lowest == all_max(tl.where(some, root, -1)):  # one component in the tile: one atomic each, not one a block
        tl.atomic_add(areas + lowest, all_sum(area), sem="relaxed")
        tl.atomic_add(sums + lowest, all_sum(sum_y), sem="relaxed")
        tl.atomic_add(sums + blocks_n + lowest, all_sum(sum_x), sem="relaxed")
    else:
        tl.atomic_add(areas + root, area, mask=some, sem="relaxed")
        tl.atomic_add(sums + root, sum_y, mask=some, sem="relaxed")
        tl.atomic_add(sums + blocks_n + root, sum_x, mask=some, sem="relaxed")


@triton.jit
def write_pixel(out, y, x, width, keep, where):
    # Bit 2 (soft fusion, inside a box): bit 0 is decided already and FAF's word does not count.
    at = out + y * width + x
    old = tl.load(at, mask=where, other=0)
    tl.store(at, (old & 1) | (keep & ((old & 4) == 0)).to(tl.uint8), mask=where)


@triton.jit
def decide_tile(
    out, parents, areas, sums, blocks_n, points, offsets, image, radius, tile, rows, columns, height, width,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr,
):  # fmt: skip
    """Keep a component when |sum_y - A*y| + |sum_x - A*x| <= radius * A for a point inside its image."""
    by, bx = block_lanes(tile, tl.cdiv(width, TILE_W), TILE_H, TILE_W)
    p00, p01, p10, p11 = block_pixels(out, by, bx, height, width)
    some = p00 | p01 | p10 | p11
    root = tl.load(parents + by * ((width + 1) // 2) + bx, mask=some, other=0)
    area = tl.load(areas + root, mask=some, other=0).to(tl.int64)
    sum_y = tl.load(sums + root, mask=some, other=0).to(tl.int64)
    sum_x = tl.load(sums + blocks_n + root, mask=some, other=0).to(tl.int64)
    # int64 from here on: areas times coordinates, and areas times the radius, pass 2**31.
    reach = area * radius
    keep = some & ~some
    last = tl.load(offsets + image + 1)
    row = tl.load(offsets + image)
    # A loop over the image's points, all blocks at once: an image has few, and each is the same for every lane.
    while row < last:
        y = tl.load(points + 3 * row + 1)
        x = tl.load(points + 3 * row + 2)
        known = (y >= 0) & (y < rows) & (x >= 0) & (x < columns)
        keep = keep | (known & (tl.abs(sum_y - area * y) + tl.abs(sum_x - area * x) <= reach))
        row += 1
    write_pixel(out, 2 * by, 2 * bx, width, keep, p00)
    write_pixel(out, 2 * by, 2 * bx + 1, width, keep, p01)
    write_pixel(out, 2 * by + 1, 2 * bx, width, keep, p10)
    write_pixel(out, 2 * by + 1, 2 * bx + 1, width, keep, p11)


@triton.jit(do_not_specialize=["images", "height", "radius"])
def update_image_kernel(
    prediction, initial, out, points, offsets, sizes, parents, areas, sums, listed,
    images, height, width, radius, threshold, weight, rest,
    HAS_INITIAL: tl.constexpr, HAS_SIZES: tl.constexpr, LOGITS: tl.constexpr, SOFT: tl.constexpr,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr,
):  # fmt: skip
    """One program an image at a time, over and over; workspace belongs to the program, not to the image."""
    blocks_n = ((height + 1) // 2) * ((width + 1) // 2)
    tiles_n = tl.cdiv(height, TILE_H) * tl.cdiv(width, TILE_W)
    program = tl.program_id(0).to(tl.int64)
    parents += program * blocks_n
    areas += program * blocks_n
    sums += program * 2 * blocks_n
    listed += program * tiles_n
    image = program
    while image < images:
        base = image * height * width
        plane = out + base
        rows, columns = valid_size(sizes, image, height, width, HAS_SIZES)
        listed_n = 0
        for tile in range(tiles_n):
            some = scan_tile(
                prediction + base, initial + base, plane, tile, rows, columns, height, width, threshold,
                weight, rest, HAS_INITIAL, LOGITS, SOFT, TILE_H, TILE_W,
            )  # fmt: skip
            if some > 0:
                tl.store(listed + listed_n, tile)
                listed_n += 1
        # Barriers order memory among the threads of this program, the only one that works on this image.
        tl.debug_barrier()
        for i in range(listed_n):
            tile = tl.load(listed + i)
            start_tile(plane, parents, areas, sums, blocks_n, tile, height, width, TILE_H, TILE_W)
        tl.debug_barrier()
        for i in range(listed_n):
            link_border(plane, parents, tl.load(listed + i), height, width, TILE_H, TILE_W)
        tl.debug_barrier()
        for i in range(listed_n):
            tile = tl.load(listed + i)
            sum_tile(plane, parents, areas, sums, blocks_n, tile, height, width, TILE_H, TILE_W)
        tl.debug_barrier()
        for i in range(listed_n):
            tile = tl.load(listed + i)
            decide_tile(
                plane, parents, areas, sums, blocks_n, points, offsets, image, radius, tile, rows, columns,
                height, width, TILE_H, TILE_W,
            )  # fmt: skip
            # A block's four pixels belong to one lane, so no lane writes what another still reads.
        tl.debug_barrier()  # the next image uses the same workspace
        image += tl.num_programs(0)


@triton.jit(do_not_specialize=["height"])
def scan_link_kernel(
    prediction, initial, out, sizes, parents, areas, sums, filled, height, width, threshold, weight, rest,
    HAS_INITIAL: tl.constexpr, HAS_SIZES: tl.constexpr, LOGITS: tl.constexpr, SOFT: tl.constexpr,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr,
):  # fmt: skip
    blocks_n = ((height + 1) // 2) * ((width + 1) // 2)
    tiles_n = tl.cdiv(height, TILE_H) * tl.cdiv(width, TILE_W)
    image = (tl.program_id(0) // tiles_n).to(tl.int64)
    tile = tl.program_id(0) % tiles_n
    base = image * height * width
    rows, columns = valid_size(sizes, image, height, width, HAS_SIZES)
    some = scan_tile(
        prediction + base, initial + base, out + base, tile, rows, columns, height, width, threshold,
        weight, rest, HAS_INITIAL, LOGITS, SOFT, TILE_H, TILE_W,
    )  # fmt: skip
    tl.store(filled + tl.program_id(0), some)
    if some > 0:
        tl.debug_barrier()  # blocks are laid out over the lanes otherwise than the pixels that were just written
        start_tile(
            out + base, parents + image * blocks_n, areas + image * blocks_n, sums + image * 2 * blocks_n, blocks_n,
            tile, height, width, TILE_H, TILE_W,
        )  # fmt: skip


@triton.jit(do_not_specialize=["height"])
def sum_kernel(out, parents, areas, sums, filled, height, width, TILE_H: tl.constexpr, TILE_W: tl.constexpr):
    blocks_n = ((height + 1) // 2) * ((width + 1) // 2)
    tiles_n = tl.cdiv(height, TILE_H) * tl.cdiv(width, TILE_W)
    image = (tl.program_id(0) // tiles_n).to(tl.int64)
    if tl.load(filled + tl.program_id(0)) > 0:
        sum_tile(
            out + image * height * width, parents + image * blocks_n, areas + image * blocks_n,
            sums + image * 2 * blocks_n, blocks_n, tl.program_id(0) % tiles_n, height, width, TILE_H, TILE_W,
        )  # fmt: skip


@triton.jit(do_not_specialize=["height", "radius"])
def decide_kernel(
    out, points, offsets, sizes, parents, areas, sums, filled, height, width, radius,
    HAS_SIZES: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr,
):  # fmt: skip
    blocks_n = ((height + 1) // 2) * ((width + 1) // 2)
    tiles_n = tl.cdiv(height, TILE_H) * tl.cdiv(width, TILE_W)
    image = (tl.program_id(0) // tiles_n).to(tl.int64)
    if tl.load(filled + tl.program_id(0)) > 0:
        rows, columns = valid_size(sizes, image, height, width, HAS_SIZES)
        decide_tile(
            out + image * height * width, parents + image * blocks_n, areas + image * blocks_n,
            sums + image * 2 * blocks_n, blocks_n, points, offsets, image, radius, tl.program_id(0) % tiles_n,
            rows, columns, height, width, TILE_H, TILE_W,
        )  # fmt: skip


def group_points(points: Tensor, images: int) -> tuple[Tensor, Tensor]:
    """Sort points by image and give each image's range of rows; no host synchronisation.

    Args:
        points: int64 [P, 3], rows (image, y, x) in any order.
        images: number of images B.

    Returns:
        points int64 [P, 3] ordered by image (stable), offsets int64 [B + 1]: rows offsets[b] to offsets[b + 1] are
        image b's. Build it once, with the labels.

    Example:
        >>> import torch
        >>> from hmg_gpu.kernels.update import group_points
        >>> points, offsets = group_points(torch.tensor([[1, 2, 2], [0, 4, 4], [1, 0, 0]]), images=3)
        >>> points.tolist(), offsets.tolist()  # image 1 has rows 1 and 2, image 2 has none
        ([[0, 4, 4], [1, 2, 2], [1, 0, 0]], [0, 1, 3, 3])
    """
    image, order = torch.sort(points[:, 0].contiguous(), stable=True)
    numbers = torch.arange(images + 1, device=points.device)
    return points[order].contiguous(), torch.searchsorted(image, numbers)


def sum_dtype(height: int, width: int) -> torch.dtype:
    """int32 where the coordinate sum of a whole image is proved to fit, else int64.

    Example:
        >>> from hmg_gpu.kernels.update import sum_dtype
        >>> sum_dtype(512, 512), sum_dtype(4096, 4096)
        (torch.int32, torch.int64)
    """
    return torch.int32 if height * width * (max(height, width) - 1) // 2 < 2**31 else torch.int64


def image_bytes(height: int, width: int) -> int:
    """Workspace of one image: parent, area and two sums a block, and the list of its tiles.

    Example:
        >>> from hmg_gpu.kernels.update import image_bytes
        >>> image_bytes(512, 512) / (512 * 512)  # bytes a pixel
        4.001953125
    """
    item = sum_dtype(height, width).itemsize
    return blocks.block_count(height, width) * (8 + 2 * item) + 4 * blocks.tile_count(height, width)


def choose_design(images: int, height: int, width: int) -> str:
    """ "tiles" for small batches whose workspace fits, else "images"; by shape alone.

    Example:
        >>> from hmg_gpu.kernels.update import choose_design
        >>> choose_design(16, 512, 512), choose_design(4096, 512, 512)
        ('tiles', 'images')
    """
    fits = images * image_bytes(height, width) <= WORKSPACE_BYTES
    return "tiles" if images <= SMALL_BATCH and fits else "images"


def launch(
    prediction: Tensor, initial: Tensor | None, points: Tensor, offsets: Tensor, sizes: Tensor | None,
    radius: int, threshold: float, design: str | None = None, weight: float | None = None,
) -> Tensor:  # fmt: skip
    """Run the kernels; must equal ``hmg_gpu.masks.update.update``. Arguments as :func:`update`, already checked.

    With ``weight`` as :func:`soft_update`: ``prediction`` and ``initial`` are float32 probabilities.

    Workspace: at most 256 MiB (4096 x 512 x 512: 255 programs of 1 MiB) unless one image alone needs more
    (4 bytes a pixel up to 1 625 x 1 625, 6 beyond).
    """
    images, height, width = prediction.shape
    out = torch.empty(prediction.shape, dtype=torch.uint8, device=prediction.device)  # [B, H, W]
    if prediction.numel() == 0:
        return out.view(torch.bool)
    logits = prediction.dtype.is_floating_point
    if logits:  # compare as torch does: the threshold in the prediction's own precision
        threshold = float(torch.tensor(threshold, dtype=torch.float64).to(prediction.dtype))
    prediction = prediction.contiguous() if logits else prediction.contiguous().view(torch.uint8)
    soft = weight is not None
    # Where there is no initial mask or no sizes any tensor serves: none is read.
    start = out if initial is None else initial.contiguous() if soft else initial.contiguous().view(torch.uint8)
    limits = offsets if sizes is None else sizes.contiguous()
    points, offsets = points.contiguous(), offsets.contiguous()

    design = design or choose_design(images, height, width)
    blocks_n, tiles_n = (blocks.block_count(height, width), blocks.tile_count(height, width))
    slots = images
    if design == "images":
        slots = max(1, min(images, WORKSPACE_BYTES // image_bytes(height, width), MAX_PROGRAMS))
    space = {"device": prediction.device}
    parents = torch.empty(slots * blocks_n, dtype=torch.int32, **space)
    areas = torch.empty(slots * blocks_n, dtype=torch.int32, **space)
    sums = torch.empty(slots * 2 * blocks_n, dtype=sum_dtype(height, width), **space)
    listed = torch.empty(slots * tiles_n, dtype=torch.int32, **space)
    flags = {"HAS_INITIAL": initial is not None, "HAS_SIZES": sizes is not None, "LOGITS": logits, "SOFT": soft}
    if soft:
        flags["enable_fp_fusion"] = False  # a fused multiply and add would round differently from the torch path
    parts = (weight, 1 - weight) if soft else (0.0, 0.0)
    tile = {"TILE_H": TILE_H, "TILE_W": TILE_W, **blocks.launch_options(NUM_WARPS)}
    with torch.cuda.device_of(prediction):
        if design == "images":
            update_image_kernel[(slots,)](
                prediction, start, out, points, offsets, limits, parents, areas, sums, listed,
                images, height, width, radius, threshold, *parts, **flags, **tile,
            )  # fmt: skip
        else:
            grid = (images * tiles_n,)
            scan_link_kernel[grid](
                prediction, start, out, limits, parents, areas, sums, listed, height, width, threshold, *parts,
                **flags, **tile,
            )  # fmt: skip
            link_border_kernel[grid](out, parents, listed, height, width, **tile)
            sum_kernel[grid](out, parents, areas, sums, listed, height, width, **tile)
            decide_kernel[grid](
                out, points, offsets, limits, parents, areas, sums, listed, height, width, radius,
                HAS_SIZES=sizes is not None, **tile,
            )  # fmt: skip
    return out.view(torch.bool)


def without_triton(
    prediction: Tensor, initial: Tensor | None, points: Tensor, offsets: Tensor, sizes: Tensor | None,
    radius: int, threshold: float,
) -> Tensor:  # fmt: skip
    """The op on CPU tensors where Triton does not interpret: the library's own CPU path."""
    mask = prediction > threshold if prediction.dtype.is_floating_point else prediction
    components = connected_components(mask, sizes)
    filtered = components.mask(near_a_point(components, points, radius, sizes))
    return filtered if initial is None else initial | filtered


@torch.library.custom_op("hmg_gpu::update", mutates_args=(), device_types="cuda")
def _update(
    prediction: Tensor,
    initial: Tensor | None,
    points: Tensor,
    offsets: Tensor,
    sizes: Tensor | None,
    radius: int,
    threshold: float,
) -> Tensor:
    return launch(prediction, initial, points, offsets, sizes, radius, threshold)


@_update.register_kernel("cpu")
def _(prediction, initial, points, offsets, sizes, radius, threshold):
    run = launch if blocks.INTERPRETED else without_triton
    return run(prediction, initial, points, offsets, sizes, radius, threshold)


@_update.register_fake
def _(prediction, initial, points, offsets, sizes, radius, threshold):
    return torch.empty(prediction.shape, dtype=torch.bool, device=prediction.device)


@torch.library.custom_op("hmg_gpu::soft_update", mutates_args=(), device_types="cuda")
def _soft_update(
    probability: Tensor,
    initial: Tensor,
    points: Tensor,
    offsets: Tensor,
    sizes: Tensor | None,
    radius: int,
    threshold: float,
    weight: float,
) -> Tensor:
    return launch(probability, initial, points, offsets, sizes, radius, threshold, weight=weight)


@_soft_update.register_kernel("cpu")
def _(probability, initial, points, offsets, sizes, radius, threshold, weight):
    if blocks.INTERPRETED:
        return launch(probability, initial, points, offsets, sizes, radius, threshold, weight=weight)
    filtered = without_triton(probability, None, points, offsets, sizes, radius, threshold)
    return fuse(probability, initial, filtered, weight)


@_soft_update.register_fake
def _(probability, initial, points, offsets, sizes, radius, threshold, weight):
    return torch.empty(probability.shape, dtype=torch.bool, device=probability.device)


@torch.no_grad()
def update(
    prediction: Tensor, initial: Tensor | None, points: Tensor, *, radius: int = 30, sizes: Tensor | None = None,
    offsets: Tensor | None = None, threshold: float = 0.0,
) -> Tensor:  # fmt: skip
    """Filter a prediction by its points and unite it with the initial mask (HMG Sec. 3.2, FAF + MDR).

    Nothing here is differentiable: the function runs under ``torch.no_grad`` and its result carries no graph.
    No host synchronisation, no shape that depends on data; 1 launch (image design) or 4 (tile design).

        keep component c:  |sum_y - A*y| + |sum_x - A*x| <= r*A  for some point (y, x) of its image
        hybrid = initial OR kept components

    Args:
        prediction: bool [B, H, W], or logits float32, float16 or bfloat16 [B, H, W], foreground where
            ``prediction > threshold``.
        initial: bool [B, H, W], masks from the points; None for the filtered prediction alone.
        points: int64 [P, 3], rows (image, y, x) in pixels; a point outside its image counts for nothing.
        radius: r in pixels (L1), an integer so that the rule is exact.
        sizes: int64 [B, 2], rows (height, width) of the valid area; the prediction beyond it counts as background.
        offsets: int64 [B + 1] from :func:`group_points`, whose points must then be given too; None: sorted here.
        threshold: in the units of the logits; ignored for a bool prediction.

    Returns:
        bool [B, H, W].

    Raises:
        TypeError: a dtype other than those above.
        ValueError: shapes or devices that do not belong together, a negative radius.

    Example:
        >>> import torch
        >>> from hmg_gpu.kernels.update import update
        >>> initial = torch.tensor([[[0, 1, 0, 0, 0, 0, 0, 0]]]).bool()
        >>> logits = torch.tensor([[[2.0, 4.0, 1.0, -9.0, -9.0, -9.0, -9.0, 3.0]]])  # a target and a false alarm
        >>> update(logits, initial, torch.tensor([[0, 0, 1]]), radius=3)[0].int()
        tensor([[1, 1, 1, 0, 0, 0, 0, 0]], dtype=torch.int32)
    """
    blocks.check_plane("prediction", prediction, (torch.bool, torch.float32, torch.float16, torch.bfloat16))
    points, offsets = _check(prediction, initial, torch.bool, points, radius, sizes, offsets)
    return _update(prediction, initial, points, offsets, sizes, int(radius), float(threshold))


@torch.no_grad()
def soft_update(
    probability: Tensor, initial: Tensor, points: Tensor, *, radius: int = 30, sizes: Tensor | None = None,
    offsets: Tensor | None = None, threshold: float = 0.5, weight: float = 0.7,
) -> Tensor:  # fmt: skip
    """:func:`hmg_gpu.soft_update` in the launches of :func:`update`: soft fusion costs no pass of its own.

    Args:
        probability: float32 [B, H, W] in 0 to 1; NaN counts as 0.
        initial: float32 [B, H, W], 0 outside the boxes.
        points, radius, sizes, offsets: as :func:`update`.
        threshold: foreground outside the boxes where ``probability > threshold``.
        weight: of ``initial``, 0 to 1.

    Returns:
        bool [B, H, W].

    Raises:
        TypeError, ValueError: as :func:`update`.

    Example:
        >>> import torch
        >>> from hmg_gpu.kernels.update import soft_update
        >>> initial = torch.tensor([[[0.9, 0.6, 0.6, 0.0, 0.0, 0.0, 0.0]]])  # a box of three pixels
        >>> network = torch.tensor([[[0.1, 0.1, 0.9, 0.9, 0.0, 0.0, 0.9]]])  # doubts the second, sees a fourth
        >>> soft_update(network, initial, torch.tensor([[0, 0, 0]]), radius=3)[0].int()
        tensor([[1, 0, 1, 1, 0, 0, 0]], dtype=torch.int32)
    """
    blocks.check_plane("probability", probability, (torch.float32,))
    points, offsets = _check(probability, initial, torch.float32, points, radius, sizes, offsets)
    return _soft_update(probability, initial, points, offsets, sizes, int(radius), float(threshold), float(weight))


def _check(
    prediction: Tensor, initial: Tensor | None, dtype: torch.dtype, points: Tensor, radius: int,
    sizes: Tensor | None, offsets: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Refuse what does not belong together; points and offsets, built where there are none."""
    images, device = prediction.shape[0], prediction.device
    if initial is not None:
        blocks.check_plane("initial", initial, (dtype,))
        if initial.shape != prediction.shape or initial.device != device:
            raise ValueError(
                f"initial: expected {list(prediction.shape)} on {device} like the prediction, "
                f"got {list(initial.shape)} on {initial.device}"
            )
    blocks.check_points(points, device)
    blocks.check_sizes(sizes, images, device)
    if int(radius) != radius or not 0 <= radius < 2**31:
        raise ValueError(f"radius: expected an integer number of pixels from 0 to 2**31 - 1, got {radius}")
    if offsets is None:
        return group_points(points, images)
    if offsets.dtype != torch.int64 or offsets.shape != (images + 1,) or offsets.device != device:
        raise ValueError(
            f"offsets: expected int64 [{images + 1}] on {device}, got {offsets.dtype} {list(offsets.shape)} on "
            f"{offsets.device}; build points and offsets with group_points(points, B)"
        )
    return points, offsets


def false_alarm_filter(
    prediction: Tensor, points: Tensor, *, radius: int = 30, sizes: Tensor | None = None,
    offsets: Tensor | None = None, threshold: float = 0.0,
) -> Tensor:  # fmt: skip
    """Erase the predicted components far from every point (HMG Sec. 3.2.1, FAF): :func:`update` without initial.

    Example:
        >>> import torch
        >>> from hmg_gpu.kernels.update import false_alarm_filter
        >>> prediction = torch.tensor([[[1, 1, 0, 0, 0, 0, 1]]]).bool()  # one image of one row, two components
        >>> false_alarm_filter(prediction, torch.tensor([[0, 0, 0]]), radius=3)[0].int()
        tensor([[1, 1, 0, 0, 0, 0, 0]], dtype=torch.int32)
    """
    return update(prediction, None, points, radius=radius, sizes=sizes, offsets=offsets, threshold=threshold)
