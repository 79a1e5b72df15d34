"""One image or mask file in, one array out. The only module that hands files to Pillow."""

from __future__ import annotations

import io
import os
import threading
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image
from torch import Tensor

from hmg_gpu.common.errors import InputError
from hmg_gpu.common.files import write_bytes

SUFFIXES = (".png", ".bmp", ".tif", ".tiff", ".jpg", ".jpeg")
FORMATS = ("PNG", "BMP", "TIFF", "JPEG")  # other decoders (some start external programs) are never tried
MAX_PIXELS = 2**27  # of one file, 11,585 x 11,585; below the size at which Pillow itself gives up
MASK_CODINGS = (1, 255, 65535)

Item = TypeVar("Item")
Result = TypeVar("Result")

ORIENTATION = 0x0112  # the EXIF tag; 1 is as stored
_LUMINANCE_MODES = {"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr"}
_quiet_lock = threading.Lock()


def read_image(path: str | os.PathLike) -> np.ndarray:
    """Read one image in its own intensities.

    Colour, palette and transparent files give the luminance of Pillow's "L" (alpha is ignored); 16-bit greyscale keeps
    its depth; 32-bit float is taken as it is.

    Args:
        path: a PNG, TIFF, BMP or JPEG file.

    Returns:
        [H, W], uint8, uint16 or float32. Integer files outside 0..65535 come as float32.

    Raises:
        InputError: the file is missing, empty, damaged, no image, over ``MAX_PIXELS`` by its header (refused before
            decoding), holds several pages, 16-bit colour or non-finite values; the text names the file and the cure.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> import numpy as np
        >>> from PIL import Image
        >>> from hmg_gpu.data import read_image
        >>> with TemporaryDirectory() as folder:
        ...     Image.fromarray(np.array([[0, 100], [200, 300]], np.uint16)).save(f"{folder}/a.png")
        ...     read_image(f"{folder}/a.png")
        array([[  0, 100],
               [200, 300]], dtype=uint16)
    """
    with _open(path) as image:
        try:
            if image.format == "PNG":
                _check_chunks(path)
            if image.format == "TIFF":  # reads more tags while loading
                with _quiet():
                    image.load()
            else:
                image.load()
            image.info.pop("transparency", None)  # Pillow would warn about it and then drop it
            if image.mode in _LUMINANCE_MODES:
                return np.array(image.convert("L"))
            pixels = np.asarray(image)
        except Exception as error:  # decoders raise anything on damaged files
            raise _unreadable(path, error) from error
    if image.mode.startswith("I;16"):
        return pixels.astype(np.uint16)
    if image.mode == "I":
        return _from_int32(pixels, path)
    if not np.isfinite(pixels).all():
        y, x = np.argwhere(~np.isfinite(pixels))[0]
        raise InputError(f"{path}: pixel (y={y}, x={x}) is {pixels[y, x]}; replace NaN and Inf by finite intensities")
    return pixels.astype(np.float32)


def read_header(path: str | os.PathLike) -> tuple[int, int, bool]:
    """Height, width and whether :func:`read_image` will give uint8, from the header alone. Raises as it does.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from PIL import Image
        >>> from hmg_gpu.data.images import read_header
        >>> with TemporaryDirectory() as folder:
        ...     Image.new("RGB", (3, 2)).save(f"{folder}/a.png")  # width 3, height 2
        ...     read_header(f"{folder}/a.png")
        (2, 3, True)
    """
    with _open(path) as image:
        return image.height, image.width, image.mode in _LUMINANCE_MODES


def read_mask(path: str | os.PathLike, size: tuple[int, int] | None = None) -> np.ndarray:
    """Read one ground-truth or pseudo mask; see :func:`binarise` for the threshold.

    Args:
        path: an image file of any format that :func:`read_image` takes.
        size: (height, width) of the image it belongs to, checked where given.

    Returns:
        bool [H, W].

    Raises:
        InputError: as :func:`read_image`, or the mask's size is not ``size`` (masks are never resized).

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> import numpy as np
        >>> from hmg_gpu.data import read_mask, write_mask
        >>> with TemporaryDirectory() as folder:
        ...     write_mask(f"{folder}/a.png", np.array([[False, True]]))
        ...     read_mask(f"{folder}/a.png", size=(1, 2))
        array([[False,  True]])
    """
    mask = binarise(read_image(path))
    if size is not None and mask.shape != tuple(size):
        raise InputError(
            f"{path}: the mask is {mask.shape[0]} x {mask.shape[1]} (height x width) but its image is "
            f"{size[0]} x {size[1]}; masks are never resized: supply the mask that was drawn on this image"
        )
    return mask


def binarise(values: np.ndarray) -> np.ndarray:
    """Turn the values of a mask file into a mask: ``value > half of its coding's maximum``.

    The coding's maximum is the smallest of 1, 255 and 65535 that no value exceeds. So 0/1 files give ``> 0.5``, 8-bit
    files ``> 127.5``, 16-bit files ``> 32767.5``, float probabilities ``> 0.5``; a file of zeros is empty.

    Args:
        values: [H, W], any number type, finite.

    Returns:
        bool [H, W].

    Example:
        >>> import numpy as np
        >>> from hmg_gpu.data import binarise
        >>> binarise(np.array([[0, 1]]))
        array([[False,  True]])
        >>> binarise(np.array([[1, 127, 128, 255]]))
        array([[False, False,  True,  True]])
    """
    largest = float(values.max(initial=0))
    coding = next((maximum for maximum in MASK_CODINGS if largest <= maximum), MASK_CODINGS[-1])
    return values > coding / 2


def write_mask(path: str | os.PathLike, mask: np.ndarray | Tensor) -> None:
    """Write bool [H, W] as an 8-bit PNG of 0 and 255, in one step (an old file stays whole if this fails).

    Raises:
        HMGError: the folder cannot be written; the text names the path and the reason.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> import torch
        >>> from hmg_gpu.data import read_image, write_mask
        >>> with TemporaryDirectory() as folder:
        ...     write_mask(f"{folder}/new/a.png", torch.tensor([[False, True]]))  # makes the folder
        ...     read_image(f"{folder}/new/a.png")
        array([[  0, 255]], dtype=uint8)
    """
    mask = mask.detach().cpu().numpy() if isinstance(mask, Tensor) else np.asarray(mask)
    if mask.ndim != 2 or mask.dtype != np.bool_:
        raise TypeError(f"mask must be bool [H, W], got {mask.dtype} {list(mask.shape)}; threshold it first")
    content = io.BytesIO()
    Image.fromarray(mask.astype(np.uint8) * 255).save(content, format="PNG")
    write_bytes(path, content.getbuffer())


def map_files(function: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
    """``map`` on a few threads, in order; Pillow decodes outside Python's lock. The first error ends the work.

    Example:
        >>> from hmg_gpu.data.images import map_files
        >>> list(map_files(len, ["a.png", "image.png"]))  # any function of a path; results in order
        [5, 9]
    """
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        yield from pool.map(function, items)


@contextmanager
def _quiet() -> Iterator[None]:
    """Pillow's warnings off: what matters in them is checked here. One thread at a time, as the filter is global."""
    with _quiet_lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _open(path: str | os.PathLike) -> Image.Image:
    """Open a file's header, with every check that needs no pixel."""
    path = Path(path)
    if not path.is_file():
        kind = "is no regular file" if path.exists() else "does not exist"
        raise InputError(f"{path}: {kind}; expected a PNG, TIFF, BMP or JPEG image")
    if path.stat().st_size == 0:
        raise InputError(f"{path}: the file is empty (0 bytes); export or copy it again")
    try:
        with _quiet():
            image = Image.open(path, formats=FORMATS)
            pages = getattr(image, "n_frames", 1) if image.format == "TIFF" else 1
            orientation = _orientation(image)
    except Image.DecompressionBombError as error:
        raise InputError(
            f"{path}: the header claims more than {MAX_PIXELS} pixels; cut the image into tiles"
        ) from error
    except Exception as error:  # header parsers raise anything on damaged files
        raise _unreadable(path, error) from error
    try:
        if image.width * image.height > MAX_PIXELS:
            raise InputError(
                f"{path}: the header claims {image.height} x {image.width} pixels, more than {MAX_PIXELS}; "
                "cut the image into tiles"
            )
        if orientation not in (0, 1):
            raise InputError(
                f"{path}: its EXIF orientation is {orientation}: viewers turn or mirror it, others do not, so points "
                "and masks may mean either; save it as it is shown, without the tag"
            )
        if pages > 1:
            raise InputError(f"{path}: the TIFF holds {pages} pages; save one image a file")
        if any(";16" in str(tile[3]) for tile in image.tile) and image.mode in _LUMINANCE_MODES:
            raise InputError(
                f"{path}: 16-bit colour would be cut to 8 bits; save the image as 16-bit greyscale PNG or TIFF"
            )
        if image.mode not in _LUMINANCE_MODES | {"I", "F"} and not image.mode.startswith("I;16"):
            raise InputError(f"{path}: pixel format {image.mode} is not supported; save the image as greyscale")
    except InputError:
        image.close()
        raise
    return image


def _check_chunks(path: str | os.PathLike) -> None:
    """Compare every checksum of a PNG: Pillow skips those of the pixels, and a flipped bit may give other pixels.

    Raises:
        ValueError: one does not fit, or the file ends within a chunk.
    """
    content = memoryview(Path(path).read_bytes())
    start, kind = 8, b""  # behind the signature; a chunk: length, kind, data, CRC-32 of kind and data
    while kind != b"IEND":
        head = content[start : start + 8]
        length, kind = int.from_bytes(head[:4], "big"), bytes(head[4:])
        end = start + 8 + length
        checksum = content[end : end + 4]
        if len(head) + len(checksum) < 12:
            raise ValueError("the file ends too early")
        if int.from_bytes(checksum, "big") != zlib.crc32(content[start + 4 : end]):
            raise ValueError(f"the checksum of its chunk {kind.decode('latin-1')} does not fit")
        start = end + 4


def _orientation(image: Image.Image) -> int:
    """How viewers turn an open file, by its header alone."""
    if image.format != "PNG":
        return image.getexif().get(ORIENTATION, 1)
    exif = Image.Exif()  # a PNG's own getexif() would decode the pixels
    exif.load(image.info.get("exif", b""))
    return exif.get(ORIENTATION, 1)


def _from_int32(pixels: np.ndarray, path: str | os.PathLike) -> np.ndarray:
    """Pillow's mode "I": 16-bit in older versions, signed 16-bit and 32-bit files."""
    low, high = int(pixels.min()), int(pixels.max())
    if low >= 0 and high <= 65535:
        return pixels.astype(np.uint16)
    if max(-low, high) > 2**24:  # beyond it float32 skips whole numbers
        raise InputError(
            f"{path}: 32-bit values from {low} to {high} do not fit float32 exactly; "
            "rescale the image to 16 bits or save it as a 32-bit float TIFF"
        )
    return pixels.astype(np.float32)


def _unreadable(path: str | os.PathLike, error: Exception) -> InputError:
    reason = "not an image" if isinstance(error, Image.UnidentifiedImageError) else " ".join(str(error).split())
    return InputError(
        f"{path}: cannot be read ({reason or type(error).__name__}); "
        "expected an undamaged PNG, TIFF, BMP or JPEG image: export or copy it again"
    )
