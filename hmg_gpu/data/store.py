"""A data set in one HDF5 file: images of different sizes, masks, points, names, splits, normalisation.

The file starts with a text block of 512 bytes (HDF5 skips it, so other tools read the file as it is): a magic line with
the format's version, and the SHA-256 of everything behind it, checked before the HDF5 library sees a byte. Then, for
each split, a group of

    pixels         uint8, uint16 or float32 [sum of H * W], the images row by row, one after the other
    sizes          int64 [N, 2], (height, width); image i starts at the sum of H * W of those before it
    names          UTF-8 [N]
    masks          uint8 [sum of H * W], 0 or 1; absent without ground truth
    points/NAME    int64 [P, 3], rows (image, y, x), sorted; one for each kind of points
    normalisation  float64 [2], mean and std
    dataset        UTF-8 [1]
"""

from __future__ import annotations

import hashlib
import io
import itertools
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np
import torch
from torch import Tensor

from hmg_gpu.common.errors import InputError
from hmg_gpu.common.files import write_beside
from hmg_gpu.data.folder import load_folder, load_points, split_names
from hmg_gpu.data.images import MAX_PIXELS
from hmg_gpu.data.points.read import image_stem
from hmg_gpu.data.sets import MAX_SET_BYTES, ImageSet, padded_shape

VERSION = 1
_MAGIC = b"hmg_gpu store"
_BLOCK = 512  # bytes before the HDF5 part
_CHUNK = 2**18  # elements
_MAX_RATIO = 1100  # deflate packs at most 1032 : 1
_MAX_TABLE = 2**28  # bytes of anything but pixels and masks
_FILTERS = {h5py.h5z.FILTER_DEFLATE, h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_FLETCHER32, h5py.h5z.FILTER_LZF}


def write_store(path: str | os.PathLike, sets: Iterable[ImageSet], points: str = "masks_centroid") -> None:
    """Pack sets into one file; written beside and renamed, so an old file stays whole if this fails.

    Args:
        path: the file to write.
        sets: one for each ``split`` ("" is stored as "all"), or several in a row, which are joined: one at a time is
            held, so that a generator of sets fills a file larger than the memory.
        points: the name under which their points are stored.

    Raises:
        InputError: no set, an empty one, an image given twice, parts of a split that are not alike or not in a row.
        HMGError: the file cannot be written; the text names it and the reason.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from hmg_gpu.data import store_splits, write_store
        >>> from hmg_gpu.data.synthetic import make_split
        >>> with TemporaryDirectory() as folder:
        ...     write_store(f"{folder}/tiny.h5", [make_split(name, count=2, size=64) for name in ("train", "test")])
        ...     store_splits(f"{folder}/tiny.h5")
        {'test': ['masks_centroid'], 'train': ['masks_centroid']}
    """
    _write(path, ((data, {points: data.points}) for data in sets))


def pack_folder(
    root: str | os.PathLike,
    path: str | os.PathLike,
    *,
    points: Iterable[str] = ("masks_centroid", "masks_coarse"),
    **options,
) -> None:
    """Pack every split of a folder (see :func:`load_folder`), with each of the ``points`` that it has.

    Args:
        root: the data set's folder.
        path: the file to write.
        points: names of points folders; those that do not exist are left out.
        options: ``normalisation``, ``dataset`` and ``progress`` of :func:`load_folder`.

    Raises:
        InputError, HMGError: as :func:`load_folder` and :func:`write_store`.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> import numpy as np
        >>> from hmg_gpu.common.files import write_text
        >>> from hmg_gpu.data import pack_folder, store_splits, write_mask
        >>> with TemporaryDirectory() as root:
        ...     for kind in ("images", "masks", "masks_centroid"):
        ...         write_mask(f"{root}/{kind}/a.png", np.array([[0, 0, 0], [0, 1, 0]], bool))
        ...     write_text(f"{root}/img_idx/train_TINY.txt", "a")
        ...     pack_folder(root, f"{root}/tiny.h5")
        ...     store_splits(f"{root}/tiny.h5")
        {'train': ['masks_centroid']}
    """
    kinds = [name for name in points if (Path(root) / name).exists()]

    def parts() -> Iterator[tuple[ImageSet, dict[str, Tensor]]]:
        for split in split_names(root):
            data = load_folder(root, split, points=None, **options)
            yield data, {kind: load_points(Path(root) / kind, data.names, data.sizes) for kind in kinds}

    _write(path, parts())


def load_store(
    path: str | os.PathLike,
    split: str,
    *,
    points: str | None = "masks_centroid",
    masks: bool = True,
    start: int = 0,
    stop: int | None = None,
) -> ImageSet:
    """Load one split, or its images ``start`` to ``stop``, as :func:`load_folder` would have.

    Args:
        path: a file by :func:`write_store` or :func:`pack_folder`.
        split: "train", "test" or whatever the file has.
        points: the kind of points, or None for a set without points.
        masks: False: leave the ground truth unread.
        start, stop: a range of images as in a slice.

    Raises:
        InputError: no such file, split or points, not a store, damaged, of another version, or claims beyond the limits
            (refused before allocation); the text names the file and the cure.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from hmg_gpu.data import load_store, write_store
        >>> from hmg_gpu.data.synthetic import make_split
        >>> with TemporaryDirectory() as folder:
        ...     write_store(f"{folder}/tiny.h5", [make_split("train", count=3, size=64)])
        ...     load_store(f"{folder}/tiny.h5", "train", start=1).names
        ['train_0001', 'train_0002']
    """
    with _opened(path) as file:
        reader = _Split(path, file, split, points, masks)
        first, last, _ = slice(start, stop).indices(len(reader.names))
        if first >= last:
            raise InputError(f"{path}: images {start} to {stop} of {len(reader.names)} are none; choose another range")
        return reader.read(first, last)


def iterate_store(
    path: str | os.PathLike,
    split: str,
    batch: int = 64,
    *,
    points: str | None = "masks_centroid",
    masks: bool = True,
) -> Iterator[ImageSet]:
    """Go through one split in sets of ``batch`` images, in order, holding one of them at a time.

    Arguments and errors as :func:`load_store`.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from hmg_gpu.data import iterate_store, write_store
        >>> from hmg_gpu.data.synthetic import make_split
        >>> with TemporaryDirectory() as folder:
        ...     write_store(f"{folder}/tiny.h5", [make_split("train", count=3, size=64)])
        ...     [len(part) for part in iterate_store(f"{folder}/tiny.h5", "train", batch=2)]
        [2, 1]
    """
    if batch < 1:
        raise InputError(f"batch {batch}: expected at least 1 image")
    with _opened(path) as file:
        reader = _Split(path, file, split, points, masks)
        for first in range(0, len(reader.names), batch):
            yield reader.read(first, min(first + batch, len(reader.names)))


@contextmanager
def open_split(
    path: str | os.PathLike, split: str, *, points: str | None = None, masks: bool = False
) -> Iterator[_Split]:
    """Keep one split open for reading in parts: ``names``, ``sizes``, ``points`` and ``read(first, last)``.

    Arguments and errors as :func:`load_store`.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from hmg_gpu.data.store import open_split, write_store
        >>> from hmg_gpu.data.synthetic import make_split
        >>> with TemporaryDirectory() as folder:
        ...     write_store(f"{folder}/tiny.h5", [make_split("train", count=3, size=64)])
        ...     with open_split(f"{folder}/tiny.h5", "train") as split:
        ...         split.names, split.read(1, 3).images.shape
        (['train_0000', 'train_0001', 'train_0002'], torch.Size([2, 64, 64]))
    """
    with _opened(path) as file:
        yield _Split(path, file, split, points, masks)


def store_splits(path: str | os.PathLike) -> dict[str, list[str]]:
    """The splits of a store, each with the kinds of points that it has. Raises as :func:`load_store`.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from hmg_gpu.data import store_splits, write_store
        >>> from hmg_gpu.data.synthetic import make_split
        >>> with TemporaryDirectory() as folder:
        ...     write_store(f"{folder}/tiny.h5", [make_split("test", count=1, size=64)], points="by_hand")
        ...     store_splits(f"{folder}/tiny.h5")
        {'test': ['by_hand']}
    """
    with _opened(path) as file:
        groups = {split: _child(file, split, h5py.Group) for split in file}
        return {split: sorted(_child(group, "points", h5py.Group) or ()) for split, group in groups.items() if group}


# ---- writing


def _write(path: str | os.PathLike, parts: Iterable[tuple[ImageSet, Mapping[str, Tensor]]]) -> None:
    with write_beside(path) as temporary:
        with _Sink(temporary, "w+b") as sink, h5py.File(sink, "w", userblock_size=_BLOCK) as file:
            for split, run in itertools.groupby(parts, lambda part: part[0].split or "all"):
                if split in file:
                    raise InputError(
                        f"{path}: the split {split!r} comes again after another; give its parts in one row"
                    )
                writer = _Writer(path, split, file.create_group(split))
                for data, points in run:
                    writer.append(data, points)
                    if sink.error is not None:
                        raise sink.error
                writer.finish()
            if not len(file):
                raise InputError(f"{path}: no sets given; a store needs at least one")
        if sink.error is not None:
            raise sink.error
        with open(temporary, "r+b") as handle:
            handle.write(_header(handle).ljust(_BLOCK, b"\n"))


class _Sink(io.FileIO):
    """A file that takes every write of the HDF5 library, which crashes on a full disk; the first error is kept."""

    error: OSError | None = None

    def write(self, data) -> int:
        view = memoryview(data)
        done = 0
        try:
            while self.error is None and done < len(view):
                done += super().write(view[done:])
        except OSError as error:
            self.error = error
        return len(view)

    def truncate(self, size: int | None = None) -> int:
        try:
            return super().truncate(size)
        except OSError as error:
            self.error = self.error or error
            return size or 0

    def flush(self) -> None:
        """Nothing is held back."""


class _Writer:
    """One split that is written part by part; nothing but names, sizes and points is kept."""

    def __init__(self, path: str | os.PathLike, split: str, group: h5py.Group):
        self.path, self.split, self.group = path, split, group
        self.sizes: list[np.ndarray] = []
        self.names: dict[str, None] = {}
        self.points: dict[str, list[np.ndarray]] = {}
        self.about: tuple = ()
        self.pixels = 0

    def append(self, data: ImageSet, points: Mapping[str, Tensor]) -> None:
        where = f"{self.path}: the split {self.split!r}"
        if not len(data):
            raise InputError(f"{where} has no images; leave it out")
        if doubled := next((name for name in data.names if name in self.names), None):
            raise InputError(f"{where} has the image {doubled} twice; give each image once")
        sizes = data.sizes.cpu().numpy()
        images = data.images.cpu().numpy()
        in_range = images.dtype != np.uint8 and images.min() >= 0 and images.max() <= 65535
        dtype = np.dtype(np.uint16) if in_range and (images == np.floor(images)).all() else images.dtype
        about = (dtype, data.masks is None, data.dataset, data.mean, data.std, sorted(points))
        if self.sizes and about != self.about:
            raise InputError(
                f"{where}: its parts differ in bit depth, ground truth, data set, normalisation or kinds of points; "
                "make them alike"
            )
        if not self.sizes:
            self.about = about
            chunk = (min(int(sizes.prod(1).sum()), _CHUNK),)
            room = {"shape": chunk, "maxshape": (None,), "chunks": chunk}
            self.group.create_dataset("pixels", dtype=dtype, **room, compression="lzf")
            if data.masks is not None:
                self.group.create_dataset("masks", dtype=np.uint8, **room, compression="gzip", compression_opts=1)
        _append_flat(self.group["pixels"], self.pixels, images, sizes)
        if data.masks is not None:
            _append_flat(self.group["masks"], self.pixels, data.masks.cpu().numpy(), sizes)
        self.pixels += int(sizes.prod(1).sum())
        for kind, rows in points.items():
            first = np.array([len(self.names), 0, 0])
            self.points.setdefault(kind, []).append(rows.cpu().numpy().astype(np.int64) + first)
        self.names |= dict.fromkeys(data.names)
        self.sizes.append(sizes)

    def finish(self) -> None:
        _, _, dataset, mean, std, _ = self.about
        self.group["sizes"] = np.concatenate(self.sizes)
        self.group["names"] = np.array([name.encode() for name in self.names])
        self.group["dataset"] = np.array([dataset.encode() or b" "])
        self.group["normalisation"] = np.array([mean, std], np.float64)
        kinds = self.group.create_group("points")
        for kind, rows in self.points.items():
            kinds[kind] = np.concatenate(rows)


def _append_flat(target: h5py.Dataset, first: int, images: np.ndarray, sizes: np.ndarray) -> None:
    """Some chunks' worth of images at a time: a chunk written in pieces would be packed again for each."""
    target.resize(first + int(sizes.prod(1).sum()), 0)
    held, count = [], 0
    for image, (height, width) in zip(images, sizes.tolist(), strict=True):
        held.append(image[:height, :width].reshape(-1))
        count += held[-1].size
        if count >= 16 * _CHUNK:
            target[first : first + count] = np.concatenate(held)
            first, held, count = first + count, [], 0
    if held:
        target[first:] = np.concatenate(held)


def _header(handle) -> bytes:
    """The text block of an open file: magic, version, digest of what lies behind the block."""
    handle.seek(_BLOCK)
    digest = hashlib.file_digest(handle, "sha256").hexdigest()
    handle.seek(0)
    return _MAGIC + f" {VERSION}\nsha256 {digest}\n".encode()


# ---- reading


@contextmanager
def _opened(path: str | os.PathLike) -> Iterator[h5py.File]:
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file; make a store with pack_folder (hmg-gpu pack)")
    with open(path, "rb") as handle:
        block = handle.read(_BLOCK)
        magic, _, version = block.partition(b"\n")[0].rpartition(b" ")
        if magic != _MAGIC:
            raise InputError(f"{path}: no hmg_gpu store; make one with pack_folder (hmg-gpu pack)")
        if version != str(VERSION).encode():
            raise InputError(
                f"{path}: store version {version.decode('ascii', 'replace')}, this library reads {VERSION}; pack again"
            )
        if block != _header(handle).ljust(_BLOCK, b"\n"):
            raise InputError(f"{path}: damaged or cut short (its checksum does not fit); copy it again or pack again")
    try:
        with h5py.File(path, "r") as file:
            yield file
    except InputError:
        raise
    except Exception as error:  # h5py raises anything on a file that lies about itself
        raise InputError(
            f"{path}: damaged store ({' '.join(str(error).split())}); copy it again or pack again"
        ) from error


class _Split:
    """One split of an open store, every claim checked before anything is allocated by it."""

    def __init__(self, path: str | os.PathLike, file: h5py.File, split: str, points: str | None, masks: bool):
        self.path, self.split = path, split
        group = _child(file, split, h5py.Group)
        if group is None:
            raise InputError(f"{path}: no split {split!r}; it has {', '.join(sorted(file)) or 'none'}")
        self.sizes = self._array(group, "sizes", ("int64",), (None, 2))[:]  # [N, 2]
        count = len(self.sizes)
        if not count or self.sizes.min() < 1 or self.sizes.max() > MAX_PIXELS or self.sizes.prod(1).max() > MAX_PIXELS:
            raise self._bad("sizes", f"expected at least one image of 1 to {MAX_PIXELS} pixels")
        self.offsets = np.concatenate([[0], np.cumsum(self.sizes.prod(1))])  # [N + 1]
        total = int(self.offsets[-1])
        self.pixels = self._array(group, "pixels", ("uint8", "uint16", "float32"), (total,))
        self.masks = self._array(group, "masks", ("uint8",), (total,)) if masks and "masks" in list(group) else None
        self.names = self._texts(group, "names", count)
        self.dataset = self._texts(group, "dataset", 1)[0].strip()
        self.mean, self.std = self._array(group, "normalisation", ("float64",), (2,))[:].tolist()
        if not (math.isfinite(self.mean) and math.isfinite(self.std) and self.std > 0):
            raise self._bad("normalisation", f"({self.mean}, {self.std}) is no mean and positive std")
        if any(image_stem(name + ".png") != name for name in self.names) or len(set(self.names)) < count:
            raise self._bad("names", "expected different file stems, not paths")
        self.points = np.zeros((0, 3), np.int64) if points is None else self._points(group, points)

    def read(self, first: int, last: int) -> ImageSet:
        """The images first to last - 1, padded to the largest of them."""
        sizes = self.sizes[first:last]  # [n, 2]
        height, width = padded_shape(sizes)
        dtype = np.uint8 if self.pixels.dtype == np.uint8 else np.float32
        if len(sizes) * height * width * np.dtype(dtype).itemsize > MAX_SET_BYTES:
            raise InputError(
                f"{self.path}: {len(sizes)} images padded to {height} x {width} need more than "
                f"{MAX_SET_BYTES >> 30} GiB; read a shorter range"
            )
        low, high = np.searchsorted(self.points[:, 0], (first, last))
        rows = self.points[low:high] - [first, 0, 0]
        return ImageSet(
            self.names[first:last],
            torch.from_numpy(self._padded(self.pixels, first, last, dtype)),
            torch.from_numpy(sizes.copy()),
            torch.from_numpy(rows),
            None if self.masks is None else torch.from_numpy(self._padded(self.masks, first, last, np.bool_)),
            mean=self.mean,
            std=self.std,
            dataset=self.dataset,
            split="" if self.split == "all" else self.split,
        )

    def _padded(self, source: h5py.Dataset, first: int, last: int, dtype: type) -> np.ndarray:
        height, width = padded_shape(self.sizes[first:last])
        images = np.zeros((last - first, height, width), dtype)  # [n, H, W]
        for low in range(first, last, 64):  # of so many images the flat form is held, too
            high = min(low + 64, last)
            flat = source[self.offsets[low] : self.offsets[high]]
            for i in range(low, high):
                h, w = self.sizes[i]
                images[i - first, :h, :w] = flat[self.offsets[i] - self.offsets[low] :][: h * w].reshape(h, w)
        if dtype == np.float32 and not np.isfinite(images).all():
            raise self._bad("pixels", "NaN or Inf among the intensities")
        return images

    def _points(self, group: h5py.Group, kind: str) -> np.ndarray:
        kinds = _child(group, "points", h5py.Group)
        if kinds is None or kind not in list(kinds):
            available = ", ".join(sorted(kinds or ())) or "none"
            raise InputError(
                f"{self.path}: no points {kind!r} in {self.split!r}; it has {available} (or pass points=None)"
            )
        rows = self._array(kinds, kind, ("int64",), (None, 3))[:]  # [P, 3]
        inside = (rows >= 0).all(1) & (rows[:, 0] < len(self.sizes))
        inside[inside] = (rows[inside, 1:] < self.sizes[rows[inside, 0]]).all(1)
        if not inside.all():
            row = int(np.argmin(inside))
            raise self._bad(f"points/{kind}", f"row {row}, {rows[row].tolist()}, lies outside its image")
        return np.unique(rows, axis=0)

    def _texts(self, group: h5py.Group, name: str, count: int) -> list[str]:
        data = self._array(group, name, None, (count,))
        if data.dtype.kind != "S" or data.dtype.itemsize > 1024:
            raise self._bad(name, f"type {data.dtype}, expected text")
        try:
            return [text.decode() for text in data[:].tolist()]
        except UnicodeDecodeError as error:
            raise self._bad(name, "no UTF-8 text") from error

    def _array(
        self, group: h5py.Group, name: str, kinds: tuple[str, ...] | None, shape: tuple[int | None, ...]
    ) -> h5py.Dataset:
        """A dataset whose type, shape, storage and size on disk bear out what it claims."""
        data = _child(group, name, h5py.Dataset)
        if data is None:
            raise self._bad(name, "it is missing")
        if kinds is not None and data.dtype.name not in kinds:
            raise self._bad(name, f"type {data.dtype}, expected {' or '.join(kinds)}")
        fits = data.shape is not None and len(data.shape) == len(shape)
        if not fits or any(want not in (None, got) for want, got in zip(shape, data.shape, strict=True)):
            raise self._bad(name, f"shape {data.shape}, expected {shape}")
        plan = data.id.get_create_plist()
        filters = {plan.get_filter(i)[0] for i in range(plan.get_nfilters())}
        if data.is_virtual or data.external or not filters <= _FILTERS:
            raise self._bad(name, "its data lies in another file or behind an unknown filter")
        limit = math.inf if name in ("pixels", "masks") else _MAX_TABLE  # of those, parts are read
        chunk = math.prod(data.chunks or (0,)) * data.dtype.itemsize
        if chunk > 2**26 or data.nbytes > min(limit, data.id.get_storage_size() * (_MAX_RATIO if filters else 1)):
            raise self._bad(name, f"it claims {data.nbytes} bytes, which the file cannot hold")
        return data

    def _bad(self, name: str, text: str) -> InputError:
        return InputError(f"{self.path}: {self.split}/{name}: {text}; pack the data set again")


def _child(group: h5py.Group, name: str, kind: type) -> h5py.Group | h5py.Dataset | None:
    """A direct child of the right kind that lies in this file; soft and external links are not followed."""
    if name not in list(group) or group.id.links.get_info(name.encode()).type != h5py.h5l.TYPE_HARD:
        return None
    child = group[name]
    return child if isinstance(child, kind) else None
