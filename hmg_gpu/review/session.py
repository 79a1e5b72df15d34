"""All that the page can ask for: the state of an image, changes of its points, undo, export. Knows no HTTP."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from hmg_gpu.common.errors import HMGError, InputError
from hmg_gpu.common.locks import one_writer
from hmg_gpu.data.points.csv_file import MAX_EXTENT
from hmg_gpu.masks import Learned, Pmg
from hmg_gpu.review.doubts import Doubts
from hmg_gpu.review.export import Export
from hmg_gpu.review.gallery import Cache, Gallery
from hmg_gpu.review.history import Click, Clicks, History, Step
from hmg_gpu.review.point_masks import PointMask, PointMasks, mask_runs
from hmg_gpu.review.saving import Rows, Saver, as_csv, digest, read_content, read_rows

MASK_BYTES = 2**26  # of point masks that are kept
MAX_CLICKS = 10_000  # of an image


class Conflict(HMGError):
    """The points were changed elsewhere since the page saw them."""


class Session:
    """A set of images that is being annotated; made by :func:`open_session`.

    Args:
        gallery: the images. maker: fitted, one extent. history: the points. save: the CSV.
        export: writes the masks of a CSV into a folder and returns the command that makes the same.
    """

    def __init__(
        self,
        gallery: Gallery,
        maker: Pmg | Learned,
        history: History,
        save: Path,
        export: Callable[[Path, Path], str],
    ):
        self.gallery, self.masks, self.history, self.save = gallery, PointMasks(maker), history, save
        self._lock = threading.RLock()
        self._kept = Cache(MASK_BYTES)
        self._files = dict(zip(gallery.names, gallery.files, strict=True))
        self.saver = Saver(save, self.as_csv, history.note_saving, history.note_saved, session_folder(save))
        self.doubts = Doubts(self._doubt)
        self.doubts.ask(row for row in reversed(range(len(gallery.names))) if history.points.get(gallery.names[row]))
        self.export = Export(save.with_name(f"{save.stem}_masks"), self._snapshot, export)

    def close(self) -> None:
        """Write what is left and end the threads."""
        self.doubts.close()
        self.saver.close()

    def as_csv(self) -> str:
        """The points as the CSV has them."""
        with self._lock:
            points = dict(self.history.points)
        return as_csv({name: clicks for name, clicks in points.items() if clicks}, self._files)

    # ---- what is there

    def about(self) -> dict[str, Any]:
        """The list of images, and what is the same for all of them."""
        with self._lock:
            counts = [len(self.history.points.get(name, ())) for name in self.gallery.names]
        return {
            "names": self.gallery.names,
            "counts": counts,
            "dataset": self.gallery.dataset,
            "saved": str(self.save),
            "maker": str(self.masks.maker),
            "extent": self.masks.extent,
            "max_extent": MAX_EXTENT,
        }

    def state(self, row: int) -> dict[str, Any]:
        """The points of an image with their masks, its IoU, and what undo and redo would do."""
        name, pixels = self._name(row), self.gallery.pixels(row)
        with self._lock:
            revision, clicks = self.history.revision(name), self.history.points.get(name, ())
            undo, redo = self.history.steps[-1:], self.history.undone[-1:]
        masks = [self._mask(row, pixels, click) for click in clicks]
        masks = self.masks.apart(masks, [(click.y, click.x) for click in clicks], pixels.shape)
        return {
            "row": row,
            "revision": revision,
            "height": pixels.shape[0],
            "width": pixels.shape[1],
            "points": [self._as_json(click, mask) for click, mask in zip(clicks, masks, strict=True)],
            "iou": self._iou(row, pixels.shape, masks),
            "undo": self._about_step(undo),
            "redo": self._about_step(redo),
            "saving": self.saver.error,
        }

    def pixels(self, row: int) -> np.ndarray:
        """uint8, uint16 or float32 [H, W]."""
        self._name(row)
        return self.gallery.pixels(row)

    def thumbnail(self, row: int) -> bytes:
        """A small PNG."""
        self._name(row)
        return self.gallery.thumbnail(row)

    def truth(self, row: int) -> dict[str, Any]:
        """Ground truth as runs of pixels; none where there is no ground truth, or (``error``) none that fits."""
        self._name(row)
        truth = self.gallery.truth(row)
        return {"runs": [] if truth is None else mask_runs(truth), "error": self.gallery.truth_errors.get(row, "")}

    def preview(self, row: int, y: int, x: int, extent: int | None) -> dict[str, Any]:
        """The mask that a point would have; nothing is changed."""
        self._name(row)
        pixels = self.gallery.pixels(row)
        click = self._checked(Click(-1, y, x, extent), pixels.shape)
        return self._as_json(click, self._mask(row, pixels, click))

    def explain(self, row: int, number: int) -> dict[str, Any]:
        """What PMG saw at a point; see :meth:`PointMasks.explain`."""
        name, pixels = self._name(row), self.gallery.pixels(row)
        click = self._find(self.history.points.get(name, ()), number)
        place = click[1:]
        return self._kept.get(("why", row, *place), lambda: self.masks.explain(pixels, *place), lambda _: 8000)

    # ---- changes

    def edit(self, row: int, revision: int, what: str, **values: Any) -> dict[str, Any]:
        """Change the points of an image.

        Args:
            revision: of the state that the change was made for.
            what: "add" (y, x, extent), "move" (id, y, x), "extent" (id, extent) or "remove" (id).

        Returns:
            As :meth:`state`.

        Raises:
            Conflict: the points were changed meanwhile. InputError: no such change.
        """
        name, shape = self._name(row), self.gallery.pixels(row).shape
        with self._lock:
            if revision != self.history.revision(name):
                raise Conflict(
                    f"the points of {name} were changed in another tab; they are shown now: change them again"
                )
            clicks = self.history.points.get(name, ())
            after = self._changed(clicks, what, shape, **values)
            if after == clicks:
                return self.state(row)
            self.history.do(what, name, after)
        return self._after(row)

    def undo(self, number: int) -> dict[str, Any]:
        """Take back step ``number``, which has to be the last one.

        Raises:
            Conflict: another step is the last one.
        """
        with self._lock:
            self._expect(self.history.steps, number)
            step = self.history.undo()
        return self._after(self.gallery.row_of.get(step.image))

    def redo(self, number: int) -> dict[str, Any]:
        """Do step ``number`` again, the one that was taken back last. Raises as :meth:`undo`."""
        with self._lock:
            self._expect(self.history.undone, number)
            step = self.history.redo()
        return self._after(self.gallery.row_of.get(step.image))

    # ---- within

    def _after(self, row: int | None) -> dict[str, Any]:
        self.saver.wake()
        if row is None:  # of an image that is not in this folder
            return {"row": None}
        self.doubts.ask([row])
        return self.state(row)

    def _expect(self, steps: list[Step], number: int) -> None:
        if not steps or steps[-1].number != number:
            raise Conflict("something else was done in another tab meanwhile; the page shows it now")

    def _changed(
        self,
        clicks: Clicks,
        what: str,
        shape: tuple[int, ...],
        id: int | None = None,
        y: int | None = None,
        x: int | None = None,
        extent: int | None = None,
    ) -> Clicks:
        if what == "add":
            if len(clicks) >= MAX_CLICKS:
                raise InputError(f"more than {MAX_CLICKS} points in an image; cut it into tiles")
            return (*clicks, self._free(clicks, self._checked(Click(self.history.next_id, y, x, extent), shape)))
        old = self._find(clicks, id)
        if what == "remove":
            return tuple(click for click in clicks if click is not old)
        if what not in ("move", "extent"):
            raise InputError(f"change {what!r}: expected add, move, extent or remove")
        new = old._replace(y=y, x=x) if what == "move" else old._replace(extent=extent)
        others = tuple(click for click in clicks if click is not old)
        new = self._free(others, self._checked(new, shape))
        return tuple(new if click is old else click for click in clicks)

    @staticmethod
    def _checked(click: Click, shape: tuple[int, ...]) -> Click:
        inside = all(type(at) is int and 0 <= at < side for at, side in zip((click.y, click.x), shape, strict=True))
        if not inside:
            raise InputError(f"point (y={click.y}, x={click.x}): expected whole pixels inside {shape[0]} x {shape[1]}")
        if click.extent is not None and (type(click.extent) is not int or not 1 <= click.extent <= MAX_EXTENT):
            raise InputError(f"extent {click.extent}: expected whole pixels from 1 to {MAX_EXTENT}")
        return click

    @staticmethod
    def _free(others: Clicks, click: Click) -> Click:
        if any((other.y, other.x) == (click.y, click.x) for other in others):
            raise InputError(f"there is a point at (y={click.y}, x={click.x}) already; choose another pixel")
        return click

    @staticmethod
    def _find(clicks: Clicks, number: int | None) -> Click:
        for click in clicks:
            if click.id == number:
                return click
        raise InputError(f"there is no point {number} in this image; reload the page")

    def _name(self, row: int) -> str:
        """The name of an image that somebody asks for."""
        self.doubts.used()
        if not 0 <= row < len(self.gallery.names):
            raise InputError(f"image {row}: expected 0 to {len(self.gallery.names) - 1}")
        return self.gallery.names[row]

    def _mask(self, row: int, pixels: np.ndarray, click: Click) -> PointMask:
        if click.y >= pixels.shape[0] or click.x >= pixels.shape[1]:  # of a CSV of other images
            return PointMask(0, 0, np.zeros((0, 0), bool), (0, 0, 0, 0))
        place = click[1:]
        return self._kept.get((row, *place), lambda: self.masks.make(pixels, *place), _bytes_of)

    def _doubt(self, row: int) -> float | None:
        clicks = self.history.points.get(self.gallery.names[row], ())
        if not clicks:
            return None
        pixels = self.gallery.glance(row)
        inside = [click for click in clicks if click.y < pixels.shape[0] and click.x < pixels.shape[1]]
        return max((self.masks.doubt(pixels, *click[1:]) for click in inside), default=None)

    def _iou(self, row: int, shape: tuple[int, ...], masks: list[PointMask]) -> float | None:
        truth = self.gallery.truth(row)
        if truth is None:
            return None
        united = np.zeros(shape, bool)
        for mask in masks:
            united[mask.y : mask.y + mask.pixels.shape[0], mask.x : mask.x + mask.pixels.shape[1]] |= mask.pixels
        union = int((united | truth).sum())
        return int((united & truth).sum()) / union if union else None

    def _as_json(self, click: Click, mask: PointMask) -> dict[str, Any]:
        values = {"area": int(mask.pixels.sum()), "box": mask.box, "runs": mask.runs()}
        return {"id": click.id, "y": click.y, "x": click.x, "extent": click.extent} | values

    def _about_step(self, steps: list[Step]) -> dict[str, Any] | None:
        if not steps:
            return None
        return {"number": steps[0].number, "what": steps[0].what, "image": steps[0].image}

    def _snapshot(self) -> tuple[str, list[dict[str, Any]]]:
        """The CSV and the changes of one moment."""
        with self._lock:
            return self.as_csv(), list(self.history.changes())


def _bytes_of(mask: PointMask) -> int:
    """About what a mask takes in memory."""
    return mask.pixels.size + 400 + (0 if mask.window is None else mask.window.nbytes)


@contextmanager
def open_session(
    gallery: Gallery,
    maker: Pmg | Learned,
    save: Path,
    export: Callable[[Path, Path], str],
    points: Rows | None = None,
) -> Iterator[Session]:
    """Open the session of a CSV, or begin one; the folder NAME.review beside the CSV keeps its journal.

    A CSV that was edited elsewhere since counts: what differs becomes a step that can be undone.

    Args:
        save: the CSV that points are saved to.
        points: to begin with, where there is neither a session nor a CSV.

    Raises:
        InputError: the session is open already, its journal is damaged, a point lies outside its image.
    """
    folder = session_folder(save)
    with one_writer(folder):
        history = _take_up(folder, save, points)
        session = Session(gallery, maker, history, save, export)
        try:
            session.saver.write()
            yield session
        finally:
            session.close()


def session_folder(save: Path) -> Path:
    """Where the session of a CSV is kept."""
    return save.with_suffix(".review")


def _take_up(folder: Path, save: Path, points: Rows | None) -> History:
    path = folder / "journal.jsonl"
    if not path.exists():
        if not save.exists():
            return History.begin(path, points or {})
        rows = read_rows(save)
        shutil.copyfile(save, folder / "original.csv")
        return History.begin(path, rows)
    history = History.resume(path)
    if save.exists() and digest(read_content(save)) not in history.saved:
        _take_over(history, read_rows(save))
    return history


def _take_over(history: History, rows: Rows) -> None:
    """Make the points those of a CSV that was edited elsewhere."""
    for name in sorted(rows.keys() | history.points.keys()):
        old = {(click.y, click.x): click for click in history.points.get(name, ())}
        after = []
        for number, (y, x, extent) in enumerate(rows.get(name, ()), history.next_id):
            after.append(Click(old[y, x].id if (y, x) in old else number, y, x, extent))
        if set(after) != set(old.values()):
            history.do("edited outside", name, tuple(after))
