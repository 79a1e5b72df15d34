"""Images by number: nothing is read before it is asked for, and what was read is kept within a limit of bytes."""

from __future__ import annotations

import io
import threading
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from hmg_gpu.common.errors import InputError
from hmg_gpu.data import read_image, read_mask
from hmg_gpu.data.store import open_split
from hmg_gpu.review.saving import check_names

CACHE_BYTES = 2**28  # of images and masks, and once more an eighth of it for thumbnails
THUMB = 96  # pixels, the longer side


class Cache:
    """The values used last, up to so many bytes; one thread makes a value while others wait for it.

    Example:
        >>> cache = Cache(100)
        >>> cache.get("a", lambda: b"x" * 60, len), len(cache)
        (b'xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx', 1)
        >>> _ = cache.get("b", lambda: b"y" * 60, len)  # "a" has to go
        >>> len(cache), cache.bytes
        (1, 60)
    """

    def __init__(self, limit: int):
        self.limit, self.bytes = limit, 0
        self._values: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()
        self._lock = threading.Lock()
        self._making: dict[Hashable, threading.Lock] = {}

    def __len__(self) -> int:
        return len(self._values)

    def peek(self, key: Hashable) -> Any:
        """The value of a key, or None where it is not kept."""
        with self._lock:
            return self._values.get(key, (None,))[0]

    def get(self, key: Hashable, make: Callable[[], Any], size: Callable[[Any], int]) -> Any:
        """The value of a key, made where it is not kept."""
        with self._lock:
            making = self._making.setdefault(key, threading.Lock())
        with making:
            try:
                with self._lock:
                    if key in self._values:
                        self._values.move_to_end(key)
                        return self._values[key][0]
                value = make()
                self._keep(key, value, size(value))
                return value
            finally:
                with self._lock:
                    self._making.pop(key, None)

    def _keep(self, key: Hashable, value: Any, size: int) -> None:
        with self._lock:
            self._values[key] = value, size
            self.bytes += size
            while self.bytes > self.limit and len(self._values) > 1:
                self.bytes -= self._values.popitem(last=False)[1][1]


class Gallery(ABC):
    """The images of a folder or a store.

    Attributes:
        names: N stems. files: as CSV files name them. dataset: the data set's name.
        truth_errors: by number, why the ground truth of an image does not count.

    Raises:
        InputError: a name that a CSV does not keep.
    """

    def __init__(self, names: Sequence[str], files: Sequence[str], dataset: str):
        self.names, self.files, self.dataset = list(names), list(files), dataset
        check_names(dict(zip(self.names, self.files, strict=True)))
        self.row_of = {name: row for row, name in enumerate(self.names)}
        self.truth_errors: dict[int, str] = {}
        self._cache, self._thumbs = Cache(CACHE_BYTES), Cache(CACHE_BYTES // 8)

    @abstractmethod
    def _read(self, row: int) -> np.ndarray: ...

    @abstractmethod
    def _read_truth(self, row: int) -> np.ndarray | None: ...

    def pixels(self, row: int) -> np.ndarray:
        """uint8, uint16 or float32 [H, W].

        Raises:
            InputError: as :func:`hmg_gpu.data.read_image`.
        """
        return self._cache.get(row, lambda: np.ascontiguousarray(self._read(row)), lambda array: array.nbytes)

    def glance(self, row: int) -> np.ndarray:
        """As :meth:`pixels`, but nothing that is kept has to go for it."""
        kept = self._cache.peek(row)
        return self._read(row) if kept is None else kept

    def truth(self, row: int) -> np.ndarray | None:
        """Ground truth, bool [H, W], where there is any."""
        make = lambda: self._read_truth(row)  # noqa: E731
        return self._cache.get(("truth", row), make, lambda mask: 64 if mask is None else mask.nbytes)

    def thumbnail(self, row: int) -> bytes:
        """A PNG of up to ``THUMB`` pixels a side, stretched from the 1st to the 99.8th percentile."""

        def make() -> bytes:
            pixels = self.glance(row)
            step = max(1, -(-max(pixels.shape) // THUMB))
            height, width = (side // step * step for side in pixels.shape)
            small = pixels[:height, :width] if min(height, width) else pixels[::step, ::step]
            if min(height, width):  # the brightest of each block, so that small targets stay
                small = small.reshape(height // step, step, width // step, step).max((1, 3))
            low, high = np.percentile(small, (1, 99.8)).tolist()
            grey = (small.astype(np.float32) - low) * (255 / max(high - low, 1e-6))
            content = io.BytesIO()
            Image.fromarray(grey.clip(0, 255).astype(np.uint8)).save(content, format="PNG")
            return content.getvalue()

        return self._thumbs.get(row, make, len)


class FolderGallery(Gallery):
    """Image files.

    Args:
        paths: of the images.
        truth: a folder of masks named like the images, or None.
    """

    def __init__(self, paths: Sequence[Path], truth: Path | None = None):
        folder = paths[0].absolute().parent
        dataset = (folder.parent if folder.name == "images" else folder).name
        super().__init__([path.stem for path in paths], [path.name for path in paths], dataset)
        if len(self.row_of) < len(paths):
            twice = next(name for row, name in enumerate(self.names) if self.row_of[name] != row)
            raise InputError(f"{folder}: several images are called {twice}; rename: points and masks go by stem")
        self._paths, self._truth = list(paths), truth

    def _read(self, row: int) -> np.ndarray:
        return read_image(self._paths[row])

    def _read_truth(self, row: int) -> np.ndarray | None:
        path = self._truth / f"{self.names[row]}.png" if self._truth else None
        if path is None or not path.is_file():
            return None
        shape = self.pixels(row).shape
        try:
            return read_mask(path, shape)
        except InputError as error:  # the image can be annotated all the same
            self.truth_errors[row] = f"{error}; shown without ground truth"
            return None


class StoreGallery(Gallery):
    """One split of a packed store that stays open; made by :func:`open_store`."""

    def __init__(self, reader: Any):
        super().__init__(reader.names, reader.names, reader.dataset)
        self._reader = reader

    def _read(self, row: int) -> np.ndarray:
        return self._reader.read(row, row + 1).images[0].numpy().astype(self._reader.pixels.dtype)

    def _read_truth(self, row: int) -> np.ndarray | None:
        masks = self._reader.read(row, row + 1).masks
        return None if masks is None else masks[0].numpy()


@contextmanager
def open_store(path: Path, split: str) -> Iterator[StoreGallery]:
    """Errors as :func:`hmg_gpu.data.load_store`."""
    with open_split(path, split, masks=True) as reader:
        yield StoreGallery(reader)
