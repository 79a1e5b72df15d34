"""The pass over whole planes: reads each pixel once, writes each once, and lists the tiles that hold foreground.

Infrared predictions are almost empty, so this pass decides the time of an update, and the rest of the work is done on
the listed tiles alone. Four pixels, a byte each, are one int32 word: a thread moves 16 bytes at a time, and a program
looks at a chunk of several tiles with one reduction. Where that finds nothing, zeros are written and the program ends.

A byte of a mask need not be 0 or 1: a bool tensor that is a view of bytes may hold 255. ``as_bits`` makes it so, where
there is anything at all.

    PACKED   planes of bytes are read and written as words: the width and all addresses are multiples of 16
    else     byte by byte, for any width

Logits and probabilities are read pixel by pixel, 16 bytes at a time where the width allows, and thresholded into words.

The order of the list is that in which programs arrive. Nothing depends on it: each tile is listed once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hmg_gpu.kernels import blocks
from hmg_gpu.kernels.blocks import valid_size

CHUNK = 16384  # pixels that a program looks at where they come as words, 64 a thread
CHUNK_PIXELS = 4096  # where they come one by one; half of it at any width
REGISTERS = 64  # a thread, on CUDA: four programs a multiprocessor, enough loads in flight
REGISTERS_JUDGED, REGISTERS_JUDGED_ANY = 72, 80  # where numbers are judged, which would spill: three programs
LARGEST = tl.constexpr(torch.finfo(torch.float32).max)
# Columns of the totals of each image.
NON_FINITE, OUTSIDE, POSITIVE, FOREGROUND, TOTALS = range(5)


@triton.jit
def as_bits(words):
    """Every byte that is not 0 becomes 1."""
    # Neighbours reach into a byte from above, four bits, then two, then one: never as far down as its lowest bit.
    words |= words >> 4
    words |= words >> 2
    words |= words >> 1
    return words & 0x01010101


@triton.jit
def row_length(width, PACKED: tl.constexpr):
    """The width; where it is a multiple of 16, in a form that shows the compiler so."""
    if PACKED:
        width = (width // 16) * 16
    return width


@triton.jit
def chunk_place(height, width, CHUNK_H: tl.constexpr, CHUNK_W: tl.constexpr):
    """This program's image, and the row and column of its chunk."""
    chunks_x = tl.cdiv(width, CHUNK_W)
    chunks_n = tl.cdiv(height, CHUNK_H) * chunks_x
    chunk = tl.program_id(0) % chunks_n
    return tl.program_id(0) // chunks_n, (chunk // chunks_x) * CHUNK_H, (chunk % chunks_x) * CHUNK_W


@triton.jit
def chunk_words(top, left, CHUNK_H: tl.constexpr, CHUNK_W: tl.constexpr):
    """Rows y, [CHUNK_H, 1], and places in the row w, [1, CHUNK_W // 4], of a chunk's words; a word begins at 4 w."""
    return top + tl.arange(0, CHUNK_H)[:, None], left // 4 + tl.arange(0, CHUNK_W // 4)[None, :]


@triton.jit
def chunk_pixels(y, w, height, width):
    """Offsets of the four pixels of each word in their plane, [CHUNK_H, CHUNK_W // 4, 4], and which lie inside."""
    column = 4 * w[:, :, None] + tl.arange(0, 4)[None, None, :]
    return y[:, :, None] * width + column, (y[:, :, None] < height) & (column < width)


@triton.jit
def pack(bytes4):
    """Four numbers of 0 to 255, on the last axis, as a word."""
    return tl.sum(bytes4.to(tl.int32) << (8 * tl.arange(0, 4)[None, None, :]), axis=2)


@triton.jit
def load_words(plane, base, y, w, height, width, PACKED: tl.constexpr):
    """The words of a chunk of a plane of bytes; 0 beyond the plane."""
    if PACKED:
        row = tl.multiple_of(width // 4, 4)
        words = tl.load(plane + tl.multiple_of(base // 4, 4) + y * row + w, mask=(y < height) & (w < row), other=0)
    else:
        at, inside = chunk_pixels(y, w, height, width)
        words = pack(tl.load(plane + base + at, mask=inside, other=0))
    return words


@triton.jit
def store_words(plane, base, y, w, words, height, width, PACKED: tl.constexpr):
    if PACKED:
        row = tl.multiple_of(width // 4, 4)
        tl.store(plane + tl.multiple_of(base // 4, 4) + y * row + w, words, mask=(y < height) & (w < row))
    else:
        at, inside = chunk_pixels(y, w, height, width)
        values = (words[:, :, None] >> (8 * tl.arange(0, 4)[None, None, :])) & 255
        tl.store(plane + base + at, values.to(tl.uint8), mask=inside)


@triton.jit
def within(words, y, w, rows, columns):
    """Words with the bytes outside of the valid area cleared."""
    left = tl.minimum(tl.maximum(columns - 4 * w, 0), 4)  # pixels of the word that are valid
    kept = tl.where(left == 4, -1, (1 << (8 * left)) - 1)
    return tl.where(y < rows, words & kept, 0)


@triton.jit
def any_set(words):
    return tl.max(tl.ravel(words.to(tl.uint32, bitcast=True)), axis=0) > 0


@triton.jit
def count_set(words):
    """Bytes that are 1 in a chunk."""
    words += words >> 16
    return tl.sum(tl.ravel((words & 3) + ((words >> 8) & 3)), axis=0)


@triton.jit
def list_tiles(
    words, listed, listed_n, image, top, left, height, width,
    CHUNK_H: tl.constexpr, CHUNK_W: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr,
):  # fmt: skip
    """Append the tiles of a chunk that hold foreground to the list: numbers that count through all images."""
    ROWS: tl.constexpr = CHUNK_H // TILE_H
    COLUMNS: tl.constexpr = CHUNK_W // TILE_W
    by_tile = tl.reshape(words.to(tl.uint32, bitcast=True), (ROWS, TILE_H, COLUMNS, TILE_W // 4))
    filled = tl.ravel((tl.max(tl.max(by_tile, axis=3), axis=1) > 0).to(tl.int32))
    index = tl.arange(0, ROWS * COLUMNS)
    tiles_x = tl.cdiv(width, TILE_W)
    tile = (top // TILE_H + index // COLUMNS) * tiles_x + left // TILE_W + index % COLUMNS
    start = tl.atomic_add(listed_n, tl.sum(filled, axis=0), sem="relaxed")
    place = start + tl.cumsum(filled, axis=0) - filled
    tl.store(listed + place, image * (tl.cdiv(height, TILE_H) * tiles_x) + tile, mask=filled > 0)


@triton.jit
def judge_values(value, valid, low, high, totals):
    """Note how many of an image's values are not finite, whether some lie outside low..high, whether some are > 0."""
    number = tl.where(valid & (value == value), value, 0.0)
    broken = tl.sum(tl.ravel((valid & ~(tl.abs(value) <= LARGEST)).to(tl.int32)), axis=0)
    largest = tl.max(tl.ravel(number), axis=0)
    if broken > 0:
        tl.atomic_add(totals, broken, sem="relaxed")
    # Whoever stores here stores the same.
    if (tl.min(tl.ravel(number), axis=0) < low) | (largest > high):
        tl.store(totals + 1, 1)
    if largest > 0:
        tl.store(totals + 2, 1)


@triton.jit(do_not_specialize=["start", "height", "width"])
def stream_kernel(
    prediction, initial, out, sizes, listed, listed_n, totals, start, height, width,
    threshold, weight, rest, low, high,
    HAS_INITIAL: tl.constexpr, HAS_SIZES: tl.constexpr, LOGITS: tl.constexpr, SOFT: tl.constexpr, JUDGE: tl.constexpr,
    PACKED: tl.constexpr, CHUNK_H: tl.constexpr, CHUNK_W: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr,
):  # fmt: skip
    """Write initial + 2 * foreground to the output and list the tiles with foreground.

    SOFT: both are probabilities, and where the initial one is not 0 its weighted sum with the other takes its place;
    foreground there has bit 2 as well, which tells the end to keep out.
    JUDGE: note in ``totals`` what the values of each image are, and how many pixels are foreground.
    """
    width = row_length(width, PACKED)
    slot, top, left = chunk_place(height, width, CHUNK_H, CHUNK_W)
    image = (start + slot).to(tl.int64)
    base = image * height * width
    totals += 4 * image
    y, w = chunk_words(top, left, CHUNK_H, CHUNK_W)
    rows, columns = valid_size(sizes, image, height, width, HAS_SIZES)
    zero = tl.zeros((CHUNK_H, CHUNK_W // 4), tl.int32)
    first = zero
    if HAS_INITIAL and not SOFT:
        # Initial masks count beyond the valid area too: the result is a superset of them.
        first = load_words(initial, base, y, w, height, width, PACKED)
    if LOGITS:
        at, inside = chunk_pixels(y, w, height, width)
        value = tl.load(prediction + base + at, mask=inside, other=0).to(tl.float32)
        column = 4 * w[:, :, None] + tl.arange(0, 4)[None, None, :]
        valid = inside & (y[:, :, None] < rows) & (column < columns)
        is_set = valid & (value > threshold)
        words = pack(is_set)
        if JUDGE:
            judge_values(value, valid, low, high, totals)
        if SOFT:
            probability = tl.load(initial + base + at, mask=inside, other=0)
            second = tl.minimum(tl.maximum(tl.where(value == value, value, 0.0), -LARGEST), LARGEST)  # as nan_to_num
            in_box = probability > 0
            fused = in_box & (weight * probability + rest * second >= 0.5)
            first = pack(fused.to(tl.int32) + 4 * (in_box & is_set).to(tl.int32))
    else:
        words = load_words(prediction, base, y, w, height, width, PACKED)
    if any_set(words | first):
        if not LOGITS:
            words = as_bits(words)
            if HAS_SIZES:
                words = within(words, y, w, rows, columns)
        if HAS_INITIAL and not SOFT:
            first = as_bits(first)
        store_words(out, base, y, w, first | (words << 1), height, width, PACKED)
        if JUDGE:
            tl.atomic_add(totals + 3, count_set(words), sem="relaxed")
        list_tiles(words, listed, listed_n, slot, top, left, height, width, CHUNK_H, CHUNK_W, TILE_H, TILE_W)
    else:
        store_words(out, base, y, w, zero, height, width, PACKED)


def chunk_options(
    width: int, packed: bool, *, by_pixel: bool, judged: bool = False, backend: str = ""
) -> dict[str, int | bool]:
    """Chunk, tile and compiler options of the kernels that go over whole planes.

    Chunks are as wide as the image, up to four tiles.

    Args:
        width: of the image. packed: from :func:`as_words`. by_pixel: some plane is read pixel by pixel.
        judged: its values are judged.

    Example:
        >>> from hmg_gpu.kernels.stream import chunk_options
        >>> chunk_options(512, True, by_pixel=False, backend="hip")
        {'TILE_H': 16, 'TILE_W': 128, 'num_warps': 8, 'num_stages': 1, 'PACKED': True, 'CHUNK_H': 32, 'CHUNK_W': 512}
    """
    options = blocks.tile_options(backend)
    pixels = CHUNK if not by_pixel else CHUNK_PIXELS if packed else CHUNK_PIXELS // 2
    most = max(1, pixels // (blocks.TILE_H * blocks.TILE_W))  # tiles
    wide = blocks.TILE_W * min(4, most, 1 << (blocks.ceil_div(width, blocks.TILE_W) - 1).bit_length())
    high = max(blocks.TILE_H, pixels // wide)
    if "maxnreg" in options:
        options["maxnreg"] = registers(packed, judged)
    return {**options, "PACKED": packed, "CHUNK_H": high, "CHUNK_W": wide}


def registers(packed: bool, judged: bool) -> int:
    """Registers that a thread may take, on CUDA.

    Example:
        >>> from hmg_gpu.kernels.stream import registers
        >>> registers(packed=True, judged=False), registers(packed=False, judged=True)
        (64, 80)
    """
    return (REGISTERS_JUDGED if packed else REGISTERS_JUDGED_ANY) if judged else REGISTERS


def as_words(*planes: Tensor) -> tuple[bool, list[Tensor]]:
    """Whether planes [B, H, W] of bytes can be read as words, and then they as such; other planes stay as they are.

    Example:
        >>> import torch
        >>> from hmg_gpu.kernels.stream import as_words
        >>> packed, planes = as_words(torch.zeros(1, 2, 16, dtype=torch.uint8), torch.zeros(1, 2, 16))
        >>> packed, planes[0].shape, planes[1].shape
        (True, torch.Size([1, 2, 4]), torch.Size([1, 2, 16]))
    """
    packed = planes[0].shape[2] % 16 == 0 and all(
        plane.data_ptr() % 16 == 0 for plane in planes if plane.dtype == torch.uint8
    )
    return packed, [plane.view(torch.int32) if packed and plane.dtype == torch.uint8 else plane for plane in planes]


def chunk_count(height: int, width: int, options: dict[str, int | bool]) -> int:
    """Chunks that cover an image."""
    return blocks.ceil_div(height, options["CHUNK_H"]) * blocks.ceil_div(width, options["CHUNK_W"])
