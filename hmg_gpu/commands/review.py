"""hmg-gpu review: the page for the person who annotates."""

from __future__ import annotations

import argparse
import io
import shlex
import threading
import webbrowser
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console

from hmg_gpu.commands.inputs import listed_images, open_source
from hmg_gpu.commands.masks import masks
from hmg_gpu.commands.options import make_makers
from hmg_gpu.common.console import say, steps
from hmg_gpu.common.errors import InputError
from hmg_gpu.data import ImageSet, store_splits
from hmg_gpu.masks import Learned, Pmg
from hmg_gpu.review import serve
from hmg_gpu.review.gallery import FolderGallery, Gallery, open_store
from hmg_gpu.review.point_masks import with_one_extent
from hmg_gpu.review.saving import Rows, read_rows
from hmg_gpu.review.session import open_session, session_folder


def review(options: argparse.Namespace, console: Console) -> int:
    """Click points in a browser, see their masks at once, correct and export them; on this machine alone."""
    with _open_gallery(options) as gallery:
        options.points = _find_points(options)
        save = _where_to_save(options, gallery)
        points = None if save.exists() else _read_points(options)
        maker = _fit(options, console, gallery, save, points)
        export = _Export(options, maker)
        with (
            open_session(gallery, maker, save, export, points) as session,
            serve(session, options.port) as address,
        ):
            count, steps_known = sum(map(len, session.history.points.values())), len(session.history.steps)
            more = f"; goes on where it was left, {steps_known} steps can be undone" if steps_known else ""
            say(console, f"{len(gallery.names)} images, {count} points, saved in {save}{more}")
            say(console, f"masks: {maker}")
            say(console, f"open {address}")
            say(console, "Ctrl-C ends it")
            if options.browser:
                threading.Thread(target=webbrowser.open, args=(address,), daemon=True).start()
            threading.Event().wait()
    return 0


@contextmanager
def _open_gallery(options: argparse.Namespace) -> Iterator[Gallery]:
    images = options.images
    if images.suffix == ".h5" and not images.is_dir():
        splits = store_splits(images)
        split = options.split or ("train" if "train" in splits or len(splits) != 1 else next(iter(splits)))
        with open_store(images, split) as gallery:
            yield gallery
        return
    if (images / "images").is_dir():
        options.images = images = images / "images"
    beside = images.absolute().parent / "masks"
    truth = options.truth or (beside if images.name == "images" and beside.is_dir() else None)
    if truth is not None and not truth.is_dir():
        raise InputError(f"{truth}: no such folder of masks; check --truth")
    yield FolderGallery(listed_images(images, options.split, options.list), truth)


def _find_points(options: argparse.Namespace) -> Path | None:
    """--points, which may be a folder of the images' data set such as masks_centroid, or a store's own."""
    points, images = options.points, options.images
    if points is None or points.exists() or points.suffix.lower() == ".csv":
        return points
    if images.name == "images" and (images.absolute().parent / points).exists():
        return images.absolute().parent / points
    if images.is_dir():
        raise InputError(f"{points}: no such file or folder of points; check --points")
    return points


def _where_to_save(options: argparse.Namespace, gallery: Gallery) -> Path:
    """The CSV of the session: --save, else --points where it is one, else one that is named after the data set."""
    save, points = options.save, options.points
    if save is None and points is not None and points.suffix.lower() == ".csv" and not points.is_dir():
        save = points
    save = save or Path(f"{gallery.dataset}_clicks.csv")
    if save.suffix.lower() != ".csv":
        raise InputError(f"{save}: expected a name that ends in .csv for --save")
    return save


def _read_points(options: argparse.Namespace) -> Rows | None:
    """The points to begin with; a CSV that is not there yet is a new one."""
    points = options.points
    if points is None or (points.suffix.lower() == ".csv" and not points.exists()):
        return None
    if points.exists():
        return read_rows(points)
    with open_source(options.images, points, None, options.split) as source:  # a store's own
        return {name: [(y, x, None) for y, x in rows.tolist()] for name, rows in source.points.items()}


def _fit(
    options: argparse.Namespace, console: Console, gallery: Gallery, save: Path, begun: Rows | None
) -> Pmg | Learned:
    """The maker of --masks; what it learns is kept in the session's folder and taken up again."""
    student = session_folder(save) / "student.safetensors"
    if options.masks == "learned" and student.exists():
        options.masks = f"learned:{student}"
    (maker,) = make_makers(options)
    if not isinstance(maker, (Pmg, Learned)):
        raise InputError(f"--masks {options.masks}: makes no mask of a single point; choose pmg or learned")
    points = save if save.exists() else options.points
    rows = read_rows(save) if save.exists() else begun or {}
    has_points = any(rows.get(name) for name in gallery.names)
    if options.masks == "learned" and not has_points:
        raise InputError(
            "--masks learned: learns from points, and there are none yet; give --points, or begin with pmg"
        )
    if not has_points or (options.masks != "learned" and options.extent != "auto"):
        return with_one_extent(maker.fit(_without_images(gallery.dataset)))
    source = open_source(options.images, points, None, options.split, options.list)
    with source as data, steps(console, "preparing") as advance:
        return with_one_extent(maker.fit(data, folder=student.parent, progress=advance))


def _without_images(dataset: str) -> ImageSet:
    """For makers that have only to know the data set's name, so that a start opens no image."""
    sizes, points = torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 3, dtype=torch.int64)
    return ImageSet([], torch.zeros(0, 1, 1), sizes, points, dataset=dataset)


class _Export:
    """Writes the masks of a CSV by hmg-gpu masks itself."""

    def __init__(self, options: argparse.Namespace, maker: Pmg | Learned):
        pmg = maker if isinstance(maker, Pmg) else maker.pmg
        self.options = argparse.Namespace(**vars(options))
        self.options.masks = "pmg" if isinstance(maker, Pmg) else f"learned:{maker.file}"
        self.options.extent = pmg.extent

    def __call__(self, points: Path, out: Path) -> str:
        options = argparse.Namespace(**vars(self.options))
        more = {"format": "csv", "resume": False, "coco": "rle", "overlays": False, "batch": 8, "checkpoint": None}
        vars(options).update(more, points=points, out=out, device="cpu", rule="union", radius=30)
        masks(options, Console(file=io.StringIO()))
        return self.command(points, out)

    def command(self, points: Path, out: Path) -> str:
        """What makes the same masks."""
        options = self.options
        words = ["hmg-gpu", "masks", "--images", options.images, "--points", points, "--out", out]
        for name in ("split", "list"):
            if getattr(options, name) is not None:
                words += [f"--{name}", getattr(options, name)]
        for name in ("masks", "extent", "half_width", "alpha"):
            words += [f"--{name.replace('_', '-')}", getattr(options, name)]
        return shlex.join([*map(str, words), "--coco", "rle"])
