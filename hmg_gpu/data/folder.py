"""Folders on disk -> :class:`ImageSet`: the LESPS / BasicIRSTD layout, or images alone."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hmg_gpu.common.errors import InputError
from hmg_gpu.data.images import SUFFIXES, map_files, read_header, read_image, read_mask
from hmg_gpu.data.points.read import image_stem, read_points
from hmg_gpu.data.sets import MAX_SET_BYTES, ImageSet, padded_shape

NORMALISATION = {
    "NUAA-SIRST": (101.06385040283203, 34.619606018066406),
    "NUDT-SIRST": (107.80905151367188, 33.02274703979492),
    "IRSTD-1K": (87.4661865234375, 39.71953201293945),
    "SIRST3": (95.010, 41.511),
}
"""(mean, std) by data set as the field uses them, from the code of LESPS and BasicIRSTD; published weights expect them.
They cannot be recomputed: NUAA's own images give 111.98 / 27.63. SIRST3 is the union of the other three."""

Points = str | os.PathLike | Mapping[str, np.ndarray] | None
Progress = Callable[[int, int], None]


def load_folder(
    root: str | os.PathLike,
    split: str,
    *,
    points: Points = "masks_centroid",
    normalisation: tuple[float, float] | None = None,
    dataset: str | None = None,
    masks: bool | None = None,
    progress: Progress | None = None,
) -> ImageSet:
    """Load one split of a folder in the layout of LESPS and BasicIRSTD.

    ``images/ID.png`` (any image type), ``masks/ID.png`` where there is ground truth, ``masks_centroid/ID.png`` or other
    point labels, and ``img_idx/{split}_{NAME}.txt`` with one ID a line. NAME is ``dataset``, the folder's name, or that
    of the only list of this split.

    Args:
        root: the data set's folder.
        split: "train", "test" or any other list in ``img_idx``.
        points: a folder inside ``root``, a path to a folder or file of any format that :func:`read_points` takes,
            arrays int64 [n, 2] (y, x) by image name, or None for a set without points.
        normalisation: (mean, std); by default the data set's entry in ``NORMALISATION``, else the mean of the per-image
            means and of the per-image (population) stds of the images loaded.
        dataset: the data set's name where it is not the folder's.
        masks: True: refuse a folder without ground truth; False: leave it unread; None: read it where there is any.
        progress: called with (images read, all images).

    Returns:
        The set in the list's order; ``masks`` is None where no image of the split has one.

    Raises:
        InputError: a missing folder, list, image or mask, a mask or point that does not fit its image, an unreadable
            file, or a set over ``MAX_SET_BYTES`` (refused before allocation); the text names the file and the cure.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> import numpy as np
        >>> from hmg_gpu.common.files import write_text
        >>> from hmg_gpu.data import load_folder, write_mask
        >>> with TemporaryDirectory() as root:
        ...     for kind in ("images", "masks", "masks_centroid"):
        ...         write_mask(f"{root}/{kind}/a.png", np.array([[0, 0, 0], [0, 1, 0]], bool))
        ...     write_text(f"{root}/img_idx/train_TINY.txt", "a")
        ...     data = load_folder(root, "train")
        >>> data.dataset, data.names, data.points.tolist(), data.images[0].tolist()
        ('TINY', ['a'], [[0, 1, 1]], [[0, 0, 0], [0, 255, 0]])
    """
    root = Path(root)
    _require_folder(root, "the data set")
    _require_folder(root / "images", "the images")
    split_file, name = _find_split(root, split, dataset)
    files = _files_by_stem(root / "images")
    names = _read_split(split_file, files)
    paths = [_only(files, stem, f"{split_file} lists {stem}, but {root / 'images'}") for stem in names]
    folder = root / "masks" if masks is not False and (root / "masks").is_dir() else None
    if isinstance(points, (str, os.PathLike)):
        points = _find_points(root, points)
    result = _load(names, paths, points, folder, _settled(normalisation, name), progress)
    if masks and result.masks is None:
        raise InputError(f"{root / 'masks'}: no mask for any image of {split_file.name}; supply masks/ID.png")
    result.dataset, result.split = name, split
    return result


def load_images(
    folder_or_files: str | os.PathLike | Sequence[str | os.PathLike],
    *,
    points: Points = None,
    masks: str | os.PathLike | None = None,
    normalisation: tuple[float, float] | None = None,
    progress: Progress | None = None,
) -> ImageSet:
    """Load images that come without lists: every image file of a folder (by name, without subfolders), or given files.

    Args:
        folder_or_files: a folder, one file, or a sequence of files (for a large folder: :func:`find_images` in parts).
        points: as in :func:`load_folder`, but a path is taken as it is.
        masks: a folder of masks named like the images, or None.
        normalisation: (mean, std), default as in :func:`load_folder`.
        progress: called with (images read, all images).

    Returns:
        The set; ``split`` is empty, ``dataset`` is the folder's name (of ``NAME/images``: NAME).

    Raises:
        InputError: as :func:`load_folder`; also two images of the same stem.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> import numpy as np
        >>> from hmg_gpu.data import load_images, write_mask
        >>> with TemporaryDirectory() as folder:
        ...     write_mask(f"{folder}/a.png", np.array([[0, 0, 0], [0, 1, 0]], bool))  # serves as an image here
        ...     data = load_images(folder, points={"a": np.array([[1, 1]])})
        >>> data.names, data.points.tolist(), data.images[0].tolist()
        (['a'], [[0, 1, 1]], [[0, 0, 0], [0, 255, 0]])
    """
    if isinstance(folder_or_files, (str, os.PathLike)) and not Path(folder_or_files).is_file():
        paths = find_images(folder_or_files)
    elif isinstance(folder_or_files, (str, os.PathLike)):
        paths = [Path(folder_or_files)]
    else:
        paths = [Path(path) for path in folder_or_files]
    if not paths:
        raise InputError("no image files given; give a folder or at least one PNG, TIFF, BMP or JPEG file")
    seen: dict[str, Path] = {}
    for path in paths:
        if path.stem in seen:
            raise InputError(
                f"{path} and {seen[path.stem]} have the same stem; rename one: points and masks go by stem"
            )
        seen[path.stem] = path
    folder = paths[0].absolute().parent
    name = (folder.parent if folder.name == "images" else folder).name
    if masks is not None:
        masks = Path(masks)
        _require_folder(masks, "the masks")
    result = _load(list(seen), paths, points, masks, _settled(normalisation, name), progress)
    if masks is not None and result.masks is None:
        raise InputError(f"{masks}: no mask is named like an image ({paths[0].stem} ...); name them like the images")
    result.dataset = name
    return result


def load_points(points: Points, names: Sequence[str], sizes: torch.Tensor) -> torch.Tensor:
    """Points of images that are already loaded: int64 [P, 3] rows (image, y, x), sorted, each row once.

    Args:
        points: as in :func:`load_images`.
        names: N image stems.
        sizes: int64 [N, 2], rows (height, width).

    Raises:
        InputError: as :func:`read_points`.

    Example:
        >>> import numpy as np
        >>> import torch
        >>> from hmg_gpu.data import load_points
        >>> load_points({"b": np.array([[2, 3]])}, ["a", "b"], torch.tensor([[8, 8], [8, 8]]))  # "b" is image 1
        tensor([[1, 2, 3]])
    """
    if points is None:
        return torch.zeros(0, 3, dtype=torch.int64)
    return torch.from_numpy(_point_rows(points, list(names), sizes.cpu().numpy()))


def split_names(root: str | os.PathLike) -> list[str]:
    """The splits that a folder has lists for: the parts before the first "_" of ``img_idx``'s files.

    Raises:
        InputError: there is none.

    Example:
        >>> from pathlib import Path
        >>> from tempfile import TemporaryDirectory
        >>> from hmg_gpu.data import split_names
        >>> with TemporaryDirectory() as root:
        ...     Path(root, "img_idx").mkdir()
        ...     Path(root, "img_idx", "train_TINY.txt").touch()
        ...     split_names(root)
        ['train']
    """
    folder = Path(root) / "img_idx"
    splits = sorted({path.name.partition("_")[0] for path in folder.glob("*_*.txt")}) if folder.is_dir() else []
    if not splits:
        raise InputError(f"{folder}: no lists such as train_{Path(root).absolute().name}.txt; write one stem a line")
    return splits


def find_images(folder: str | os.PathLike) -> list[Path]:
    """The image files of a folder, by name, without its subfolders.

    Raises:
        InputError: no such folder, or no image in it.

    Example:
        >>> from pathlib import Path
        >>> from tempfile import TemporaryDirectory
        >>> from hmg_gpu.data import find_images
        >>> with TemporaryDirectory() as folder:
        ...     for name in ("b.png", "a.tif", "notes.txt"):
        ...         Path(folder, name).touch()
        ...     [path.name for path in find_images(folder)]
        ['a.tif', 'b.png']
    """
    folder = Path(folder)
    _require_folder(folder, "the images")
    paths = sorted(path for path in folder.iterdir() if _is_image(path) and path.is_file())
    if not paths:
        raise InputError(f"{folder}: no image files; expected some of {', '.join('*' + suffix for suffix in SUFFIXES)}")
    return paths


def _load(
    names: list[str],
    paths: list[Path],
    points: Path | str | Mapping[str, np.ndarray] | None,
    mask_folder: Path | None,
    normalisation: tuple[float, float] | None,
    progress: Progress | None,
) -> ImageSet:
    headers = list(map_files(read_header, paths))
    sizes = np.array([header[:2] for header in headers], dtype=np.int64)  # [N, 2]
    dtype = np.uint8 if all(header[2] for header in headers) else np.float32
    count, (height, width) = len(paths), padded_shape(sizes)
    if count * height * width * np.dtype(dtype).itemsize > MAX_SET_BYTES:
        raise InputError(
            f"{paths[0].parent}: {count} images padded to {height} x {width} need more than {MAX_SET_BYTES >> 30} GiB; "
            "load fewer at a time or cut the largest into tiles"
        )
    rows = None if points is None else _point_rows(points, names, sizes)
    masks = None if mask_folder is None else _load_masks(mask_folder, names, sizes)

    images = np.zeros((count, height, width), dtype)  # [N, H, W]
    statistics = np.zeros((count, 2))  # [N, 2] mean, std
    for i, pixels in enumerate(map_files(read_image, paths)):
        images[i, : sizes[i, 0], : sizes[i, 1]] = pixels
        statistics[i] = pixels.mean(dtype=np.float64), pixels.std(dtype=np.float64)
        if progress is not None:
            progress(i + 1, count)
    mean, std = normalisation or statistics.mean(0).tolist()
    return ImageSet(
        names,
        torch.from_numpy(images),
        torch.from_numpy(sizes),
        torch.zeros(0, 3, dtype=torch.int64) if rows is None else torch.from_numpy(rows),
        None if masks is None else torch.from_numpy(masks),
        mean=float(mean),
        std=float(std) or 1.0,  # constant images have nothing to scale
    )


def _load_masks(folder: Path, names: list[str], sizes: np.ndarray) -> np.ndarray | None:
    files = _files_by_stem(folder)
    if not any(name in files for name in names):
        return None
    paths = [_only(files, name, f"some images have masks, but {folder}") for name in names]
    masks = np.zeros((len(names), *padded_shape(sizes)), bool)  # [N, H, W]
    for i, mask in enumerate(map_files(lambda pair: read_mask(*pair), list(zip(paths, sizes.tolist(), strict=True)))):
        masks[i, : sizes[i, 0], : sizes[i, 1]] = mask
    return masks


def _point_rows(points: Path | str | Mapping[str, np.ndarray], names: list[str], sizes: np.ndarray) -> np.ndarray:
    """Points by image name -> int64 [P, 3] rows (image, y, x), sorted, each row once."""
    if not isinstance(points, Mapping):
        points = read_points(points, names=names, sizes=sizes)
    parts = [np.zeros((0, 3), np.int64)]
    for i, name in enumerate(names):
        yx = np.asarray(points.get(name, np.zeros((0, 2), np.int64)), np.int64)  # [n, 2]
        outside = np.flatnonzero(((yx < 0) | (yx >= sizes[i])).any(1))
        if len(outside):
            y, x = yx[outside[0]]
            raise InputError(
                f"points of {name}, row {outside[0]}: (y={y}, x={x}) lies outside the image of "
                f"{sizes[i, 0]} x {sizes[i, 1]}; correct or remove it"
            )
        parts.append(np.concatenate([np.full((len(yx), 1), i), yx], 1))
    return np.unique(np.concatenate(parts), axis=0)


def _find_points(root: Path, points: str | os.PathLike) -> Path:
    for path in (root / points, Path(points)):
        if path.exists():
            return path
    entries = sorted(entry.name for entry in root.iterdir() if entry.name not in ("images", "img_idx"))
    raise InputError(
        f"{root / points}: no such points folder or file; {root} has {', '.join(entries) or 'none'}: "
        "name one, give a path to a points file, or pass points=None"
    )


def find_list(root: Path, split: str, dataset: str | None = None) -> Path:
    """The text file that lists a split of a data set.

    Raises:
        InputError: there is none, or there are several.
    """
    return _find_split(root, split, dataset)[0]


def _find_split(root: Path, split: str, dataset: str | None) -> tuple[Path, str]:
    """The list of a split and the data set's name."""
    folder = root / "img_idx"
    lists = sorted(path.name for path in folder.glob("*.txt")) if folder.is_dir() else []
    for name in (dataset, root.absolute().name):
        if name and f"{split}_{name}.txt" in lists:
            return folder / f"{split}_{name}.txt", dataset or name
    matching = [name for name in lists if name.startswith(f"{split}_")]
    if len(matching) == 1:
        return folder / matching[0], dataset or matching[0][len(split) + 1 : -len(".txt")]
    how_many = "several" if matching else "no"
    raise InputError(
        f"{folder}: {how_many} lists for the split {split!r} (expected {split}_{dataset or root.absolute().name}.txt); "
        f"there: {', '.join(lists) or 'none'}. Name the data set, write a list of one image stem a line, "
        "or load the images folder without splits"
    )


def _read_split(path: Path, files: Mapping[str, list[Path]]) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as UTF-8 text ({error}); write one image stem a line") from error
    names: dict[str, int] = {}
    for row, line in enumerate(lines, 1):
        line = line.strip()
        if not line:
            continue
        if "/" in line or "\\" in line or "\0" in line or line in (".", ".."):
            raise InputError(f"{path}, row {row}: {line!r} is a path; expected the bare stem of a file in images/")
        name = line if line in files else image_stem(line)  # some lists carry the suffix
        if name in names:
            raise InputError(f"{path}, row {row}: {name} is already in row {names[name]}; remove one")
        names[name] = row
    if not names:
        raise InputError(f"{path}: the list is empty; write one image stem a line")
    return list(names)


def _is_image(path: Path) -> bool:
    """By name; hidden files, such as the parts of a write and what some systems put beside images, are none."""
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".")


def _files_by_stem(folder: Path) -> dict[str, list[Path]]:
    files: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        if _is_image(path):
            files.setdefault(path.stem, []).append(path)
    return files


def _only(files: Mapping[str, list[Path]], stem: str, where: str) -> Path:
    paths = files.get(stem, [])
    if not paths:
        raise InputError(f"{where} has no {stem}.png (nor another image type); supply it or take {stem} off the list")
    if len(paths) > 1:
        raise InputError(f"{where} has {' and '.join(path.name for path in paths)}; keep one")
    return paths[0]


def _require_folder(path: Path, what: str) -> None:
    if not path.is_dir():
        raise InputError(f"{path}: no such folder; expected {what} there")


def _settled(normalisation: Any, name: str) -> tuple[float, float] | None:
    """(mean, std) as given, else the data set's own; None: that of the images."""
    if normalisation is None:
        return NORMALISATION.get(name)
    try:
        mean, std = (float(normalisation[place]) for place in range(len(normalisation)))
        if math.isfinite(mean) and math.isfinite(std) and std > 0:
            return mean, std
    except (TypeError, ValueError, LookupError):
        pass
    raise InputError(
        f"normalisation {normalisation}: expected a finite mean and a positive std, such as (100.0, 30.0); of a dict "
        "give tuple(its.values())"
    )
