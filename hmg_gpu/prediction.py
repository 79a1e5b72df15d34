"""Masks for images that have none: files of any number and size, read in batches, by a network, by points, or both."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from .data import NORMALISATION, ImageSet, find_images, load_images, read_image, read_points
from .data.source import SYNTHETIC
from .errors import InputError
from .evaluation import Network, Pmg, at_least, initial_mask, load_set
from .student import Student
from .update import update


@dataclass
class Images:
    """Images in files, or the embedded scenes, read in batches: memory does not grow with their number."""

    paths: list[Path]  # empty for the embedded scenes
    points: Mapping[str, Any] | None
    batch: int
    scenes: ImageSet | None = None

    @property
    def names(self) -> list[str]:
        return self.scenes.names if self.scenes else [path.stem for path in self.paths]

    @property
    def dataset(self) -> str:
        """The name of the folder that holds the first image (of ``NAME/images``: NAME)."""
        if self.scenes:
            return self.scenes.dataset
        folder = self.paths[0].absolute().parent
        return (folder.parent if folder.name == "images" else folder).name

    def normalisation(self) -> tuple[float, float]:
        """The constants of a known data set, by its folder's name, else the mean of per-image means and stds."""
        if self.scenes:
            return self.scenes.mean, self.scenes.std
        if self.dataset in NORMALISATION:
            return NORMALISATION[self.dataset]
        mean = std = 0.0
        for pixels in map(read_image, self.paths):
            mean, std = mean + float(pixels.mean(dtype="float64")), std + float(pixels.std(dtype="float64"))
        return mean / len(self.paths), std / len(self.paths) or 1.0

    def batches(self, normalisation: tuple[float, float] | None) -> Iterator[ImageSet]:
        """Sets of up to ``batch`` images; without a normalisation their images are for PMG alone."""
        for first in range(0, len(self.names), self.batch):
            rows = slice(first, first + self.batch)
            if self.scenes:
                yield self.scenes.subset(range(len(self.names))[rows])
            else:
                yield load_images(self.paths[rows], points=self.points, normalisation=normalisation or (0.0, 1.0))


def open_images(sources: Sequence[str], points: str | None, batch: int, seed: int = 0) -> Images:
    """Images from files and folders (of a data set its ``images``), or without any the embedded test scenes.

    Args:
        sources: files and folders.
        points: a file or folder for ``read_points`` (of the scenes: masks_centroid or masks_coarse), or None.
        batch: images held at a time.
        seed: of the scenes.

    Raises:
        InputError: no image, two of one stem, or points that cannot be read.
    """
    at_least(1, batch=batch)
    if not sources:
        return Images([], None, batch, load_set(SYNTHETIC, "test", points=points, seed=seed))
    paths: list[Path] = []
    for path in map(Path, sources):
        paths += find_images(path / "images" if (path / "images").is_dir() else path) if path.is_dir() else [path]
    seen: dict[str, Path] = {}
    for path in paths:
        if seen.setdefault(path.stem, path) is not path:
            raise InputError(f"{path} and {seen[path.stem]} have one stem, so one mask would replace the other; rename")
    return Images(paths, None if points is None else read_points(points, names=list(seen)), batch)


def predict_masks(
    batches: Iterable[ImageSet],
    network: Network | None,
    prompt: bool,
    pmg: Pmg,
    radius: int,
    student: Student | None = None,
) -> Iterator[tuple[ImageSet, Tensor]]:
    """Masks for images with a network, with points, or with both (point prompt, HMG Sec. 4.5.1).

    Args:
        batches: sets on the device.
        network: None: PMG from the points alone.
        prompt: correct the predictions by the points; an image without points then has an empty mask.
        radius: r of FAF in pixels.
        student: makes the masks of the points in PMG's place.

    Yields:
        Each set and bool [b, H, W].
    """
    for data in batches:
        if network is None:
            yield data, initial_mask(data, pmg, student)
            continue
        masks = network.predict(data)
        if prompt:
            masks = update(masks, initial_mask(data, pmg, student), data.points, radius=radius, sizes=data.sizes)
        yield data, masks
