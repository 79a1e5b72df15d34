"""Labels the listed tiles of a batch of planes: the phases between the pass over the planes and the decision.

stream.py lists the tiles that hold foreground. As many programs as the device runs at a time go through that list,
once for each phase; between two phases every program must have finished, so each is a launch. Parents, and whatever is
summed at them, are read and written only at blocks that hold foreground: nothing is cleared beforehand.

    link_kernel    reads the plane inside a tile  writes the parents of its own blocks, then unions inside the tile;
                                                  area and sums as 0, and each block's first pixel
    border_kernel  reads the plane around a tile  unions with the tiles to the left and above
    sum_kernel     reads plane and parents        writes each block's root as its parent; adds to the root's area and
                                                  sums and lowers its first pixel; lists the roots

Why races do no harm: of the parents see blocks.py. Areas, sums and first pixels are whole numbers, so atomics in any
order give the same bits, and nobody reads them before the next launch. Each tile is listed once, so every other store
is by the one lane that owns the block.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hmg_gpu.kernels.blocks import (
    FAR,
    all_max,
    all_min,
    all_sum,
    block_count,
    block_edges,
    block_lanes,
    block_pixels,
    ceil_div,
    find,
    link_tile,
    tile_count,
    tile_options,
    union_edges,
    valid_size,
)

WORKSPACE_BYTES = 2**30  # images whose workspace needs more are worked on in groups
PROGRAMS = 4  # a multiprocessor


@triton.jit
def listed_tile(
    listed, i, plane, other, sizes, start, height, width,
    HAS_SIZES: tl.constexpr, PAIR: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr,
):  # fmt: skip
    """What entry i of the list stands for: a plane, the place of its workspace, a tile, and the plane's valid area.

    PAIR: images have two planes, in turn ``plane`` and ``other``.
    """
    tiles_n = tl.cdiv(height, TILE_H) * tl.cdiv(width, TILE_W)
    number = tl.load(listed + i)
    slot = number // tiles_n
    # An image has less than 2**31 pixels (check_plane), a batch may have more: int64 across images, int32 inside one.
    image = (start + slot).to(tl.int64)
    if PAIR:
        image = (start + slot // 2).to(tl.int64)
        if slot % 2 == 1:
            plane = other
    rows, columns = valid_size(sizes, image, height, width, HAS_SIZES)
    return plane + image * height * width, image, slot.to(tl.int64), number % tiles_n, rows, columns


@triton.jit
def first_pixel(by, bx, p00, p01, p10, width):
    """Offset of each block's first pixel in raster order."""
    corner = 2 * by * width + 2 * bx
    return tl.where(p00, corner, tl.where(p01, corner + 1, tl.where(p10, corner + width, corner + width + 1)))


# do_not_specialize: one binary for all sizes and places in the batch; a width of 1 would be a constant of the compiler.
@triton.jit(do_not_specialize=["start", "height", "width"])
def link_kernel(
    plane, other, sizes, listed, listed_n, parents, areas, sums, first, start, height, width,
    HAS_SIZES: tl.constexpr, PAIR: tl.constexpr, FIRST: tl.constexpr, BITS: tl.constexpr,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr,
):  # fmt: skip
    blocks_x = (width + 1) // 2
    blocks_n = ((height + 1) // 2) * blocks_x
    for i in range(tl.program_id(0), tl.load(listed_n), tl.num_programs(0)):
        here, _image, slot, tile, rows, columns = listed_tile(
            listed, i, plane, other, sizes, start, height, width, HAS_SIZES, PAIR, TILE_H, TILE_W
        )
        by, bx = block_lanes(tile, tl.cdiv(width, TILE_W), TILE_H, TILE_W)
        p00, p01, p10, p11 = block_pixels(here, by, bx, rows, columns, width, BITS)
        some = p00 | p01 | p10 | p11
        block = by * blocks_x + bx
        # At every block, though only roots will be added to: which of them stay roots is not known before the borders.
        at = slot * blocks_n + block
        zero = tl.zeros_like(block)
        tl.store(areas + at, zero, mask=some)
        tl.store(sums + at + slot * blocks_n, zero.to(sums.dtype.element_ty), mask=some)
        tl.store(sums + at + (slot + 1) * blocks_n, zero.to(sums.dtype.element_ty), mask=some)
        if FIRST:
            tl.store(first + at, first_pixel(by, bx, p00, p01, p10, width), mask=some)
        nw, n, ne, w = block_edges(here, by, bx, p00, p01, p10, rows, columns, width, False, BITS, TILE_H, TILE_W)
        link_tile(parents + slot * blocks_n, block, some, nw, n, ne, w, blocks_x)


@triton.jit(do_not_specialize=["start", "height", "width"])
def border_kernel(
    plane, other, sizes, listed, listed_n, parents, start, height, width,
    HAS_SIZES: tl.constexpr, PAIR: tl.constexpr, BITS: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr,
):  # fmt: skip
    blocks_x = (width + 1) // 2
    blocks_n = ((height + 1) // 2) * blocks_x
    for i in range(tl.program_id(0), tl.load(listed_n), tl.num_programs(0)):
        here, _image, slot, tile, rows, columns = listed_tile(
            listed, i, plane, other, sizes, start, height, width, HAS_SIZES, PAIR, TILE_H, TILE_W
        )
        by, bx = block_lanes(tile, tl.cdiv(width, TILE_W), TILE_H, TILE_W)
        p00, p01, p10, _p11 = block_pixels(here, by, bx, rows, columns, width, BITS)
        nw, n, ne, w = block_edges(here, by, bx, p00, p01, p10, rows, columns, width, True, BITS, TILE_H, TILE_W)
        block = by * blocks_x + bx
        union_edges(parents + slot * blocks_n, block, block, nw, n, ne, w, blocks_x)


@triton.jit(do_not_specialize=["start", "height", "width"])
def sum_kernel(
    plane, other, sizes, listed, listed_n, parents, areas, sums, first, roots, roots_n, start, height, width,
    HAS_SIZES: tl.constexpr, PAIR: tl.constexpr, FIRST: tl.constexpr, ROOTS: tl.constexpr, BITS: tl.constexpr,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr,
):  # fmt: skip
    blocks_x = (width + 1) // 2
    blocks_n = ((height + 1) // 2) * blocks_x
    wide = sums.dtype.element_ty  # int32 where an image's sums are proved to fit, see sum_dtype
    for i in range(tl.program_id(0), tl.load(listed_n), tl.num_programs(0)):
        here, _image, slot, tile, rows, columns = listed_tile(
            listed, i, plane, other, sizes, start, height, width, HAS_SIZES, PAIR, TILE_H, TILE_W
        )
        by, bx = block_lanes(tile, tl.cdiv(width, TILE_W), TILE_H, TILE_W)
        p00, p01, p10, p11 = block_pixels(here, by, bx, rows, columns, width, BITS)
        some = p00 | p01 | p10 | p11
        block = by * blocks_x + bx
        own = parents + slot * blocks_n
        root = find(own, block, some)
        tl.store(own + block, root, mask=some)
        bottom = p10.to(tl.int32) + p11.to(tl.int32)
        right = p01.to(tl.int32) + p11.to(tl.int32)
        area = bottom + p00.to(tl.int32) + p01.to(tl.int32)
        sum_y = (2 * by).to(wide) * area.to(wide) + bottom.to(wide)
        sum_x = (2 * bx).to(wide) * area.to(wide) + right.to(wide)
        own_areas = areas + slot * blocks_n
        own_sums = sums + slot * 2 * blocks_n
        lowest = all_min(tl.where(some, root, FAR))
        if lowest == all_max(tl.where(some, root, -1)):  # one component in the tile: one atomic each, not one a block
            tl.atomic_add(own_areas + lowest, all_sum(area), sem="relaxed")
            tl.atomic_add(own_sums + lowest, all_sum(sum_y), sem="relaxed")
            tl.atomic_add(own_sums + blocks_n + lowest, all_sum(sum_x), sem="relaxed")
        else:
            tl.atomic_add(own_areas + root, area, mask=some, sem="relaxed")
            tl.atomic_add(own_sums + root, sum_y, mask=some, sem="relaxed")
            tl.atomic_add(own_sums + blocks_n + root, sum_x, mask=some, sem="relaxed")
        if FIRST:
            pixel = first_pixel(by, bx, p00, p01, p10, width)
            tl.atomic_min(first + slot * blocks_n + root, pixel, mask=some & (root != block), sem="relaxed")
        if ROOTS:
            is_root = (some & (root == block)).to(tl.int32)
            begins = tl.ravel(is_root)
            place = tl.atomic_add(roots_n + slot, tl.sum(begins, axis=0), sem="relaxed") + tl.cumsum(begins, axis=0) - 1
            tl.store(roots + slot * blocks_n + place, tl.ravel(block), mask=begins > 0)


def sum_dtype(height: int, width: int) -> torch.dtype:
    """int32 where the coordinate sum of a whole image is proved to fit, else int64.

    Example:
        >>> from hmg_gpu.kernels.tiles import sum_dtype
        >>> sum_dtype(512, 512), sum_dtype(4096, 4096)
        (torch.int32, torch.int64)
    """
    return torch.int32 if height * width * (max(height, width) - 1) // 2 < 2**31 else torch.int64


class Space(NamedTuple):
    """Workspace of a group of planes; of those that are not wanted the first stands in."""

    parents: Tensor  # int32 [planes, blocks]
    areas: Tensor  # int32 [planes, blocks]
    sums: Tensor  # sum_dtype [planes, 2, blocks], of y and of x
    listed: Tensor  # int32 [planes * tiles]
    first: Tensor  # int32 [planes, blocks]
    roots: Tensor  # int32 [planes, blocks]


def plane_bytes(height: int, width: int, extra: int = 0) -> int:
    """Workspace of one plane: parent, area and two sums a block, ``extra`` more numbers, and the list of its tiles.

    Example:
        >>> from hmg_gpu.kernels.tiles import plane_bytes
        >>> plane_bytes(512, 512) / (512 * 512)  # bytes a pixel
        4.001953125
    """
    sums = 2 * sum_dtype(height, width).itemsize
    return block_count(height, width) * (8 + sums + 4 * extra) + 4 * tile_count(height, width)


def group_size(images: int, height: int, width: int, planes: int = 1, extra: int = 0) -> int:
    """How many images are worked on at a time: as many as WORKSPACE_BYTES hold, by shape alone.

    Example:
        >>> from hmg_gpu.kernels.tiles import group_size
        >>> group_size(8, 512, 512), group_size(4096, 512, 512), group_size(4096, 2048, 2048)
        (8, 1023, 42)
    """
    return max(1, min(images, WORKSPACE_BYTES // (planes * plane_bytes(height, width, extra))))


def make_space(
    planes: int, height: int, width: int, device: torch.device, *, first: bool = False, roots: bool = False
) -> Space:
    """Reserve it; nothing is cleared.

    Example:
        >>> import torch
        >>> from hmg_gpu.kernels.tiles import make_space
        >>> space = make_space(2, 32, 128, torch.device("cpu"))
        >>> space.parents.shape, space.sums.shape, space.listed.shape
        (torch.Size([2, 1024]), torch.Size([2, 2, 1024]), torch.Size([4]))
    """
    shape = (planes, block_count(height, width))
    parents, areas = (torch.empty(shape, dtype=torch.int32, device=device) for _ in range(2))
    sums = torch.empty((planes, 2, shape[1]), dtype=sum_dtype(height, width), device=device)
    listed = torch.empty(planes * tile_count(height, width), dtype=torch.int32, device=device)
    more = (torch.empty(shape, dtype=torch.int32, device=device) if wanted else parents for wanted in (first, roots))
    return Space(parents, areas, sums, listed, *more)


def make_counters(groups: int, planes: int, device: torch.device) -> Tensor:
    """int32 zeros [groups, 4 + planes or more]: each row, and its fifth number, begin at a multiple of 16 bytes.

    Another alignment would be another binary.
    """
    return torch.zeros((groups, 4 + ceil_div(planes, 4) * 4), dtype=torch.int32, device=device)


@functools.cache
def programs_of(device: torch.device) -> int:
    """How many programs go through a list of tiles: what the device runs at a time."""
    if device.type != "cuda":
        return PROGRAMS
    return PROGRAMS * torch.cuda.get_device_properties(device).multi_processor_count


def label_tiles(
    plane: Tensor, other: Tensor | None, sizes: Tensor | None, space: Space, counters: Tensor, start: int, count: int,
    *, first: bool = False, roots: bool = False,
) -> tuple[tuple[int], dict[str, int]]:  # fmt: skip
    """Launch the three phases on the listed tiles of a group of images.

    Args:
        plane: uint8 [B, H, W], foreground in bit 1; with ``other`` in any bit of either.
        sizes: int64 [B, 2] or None, valid areas; for planes that are not cut to them yet.
        counters: int32, row of :func:`make_counters`: the length of ``space.listed`` and, with ``roots``, from
            place 4 on the number of roots of each plane.
        start, count: the group, images start to start + count - 1.

    Returns:
        The grid and the tile's options, for what comes after.
    """
    height, width = plane.shape[1:]
    options = {"PAIR": other is not None, "HAS_SIZES": sizes is not None, "BITS": 2 if other is None else 255}
    tile = tile_options()
    options |= tile
    pair = (plane, plane if other is None else other, counters if sizes is None else sizes)
    planes = count * (1 if other is None else 2)
    grid = (min(planes * tile_count(height, width), programs_of(plane.device)),)
    s, where = space, (start, height, width)
    link_kernel[grid](*pair, s.listed, counters, s.parents, s.areas, s.sums, s.first, *where, FIRST=first, **options)
    border_kernel[grid](*pair, s.listed, counters, s.parents, *where, **options)
    sum_kernel[grid](
        *pair, s.listed, counters, s.parents, s.areas, s.sums, s.first,
        s.roots, counters[4:] if roots else counters, *where,
        FIRST=first, ROOTS=roots, **options,
    )  # fmt: skip
    return grid, tile
