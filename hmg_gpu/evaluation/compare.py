"""Makers of masks side by side on one set, with time and the published value of each (HMG Tables 2 and 3)."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from hmg_gpu.common.errors import InputError
from hmg_gpu.data import ImageSet
from hmg_gpu.evaluation.masks import sizes_by_maker, sweep_maker
from hmg_gpu.evaluation.metrics import measure
from hmg_gpu.evaluation.paper import paper_numbers
from hmg_gpu.evaluation.size_classes import SIZE_CLASSES
from hmg_gpu.masks import Maker

TABLE = "Tables 2 and 3"
SHORT = 2.0  # seconds; masks that took less are made and timed once more
SIDE_OF: dict[str, Callable[[int], int]] = {  # a maker's setting for the side of what it looks at
    "crop": lambda side: side,
    "extent": lambda side: side // 2,
    "half": lambda side: side // 2,
}


@dataclass
class Compared:
    """One maker, measured once for each seed.

    Attributes:
        name: its row. maker: the last one that was measured, fitted. seeds: those that its masks depend on.
        rows: of each seed what ``DetectionMetrics.compute`` gives, and ``sizes``.
        preparing, seconds: of each seed, of fitting to the set and of making all masks.
        mask: bool [N, H, W] of the first seed.
        published: IoU in percent of the paper's row, or None.
    """

    name: str
    maker: Maker
    mask: Tensor
    seeds: list[int]
    rows: list[dict[str, Any]] = field(default_factory=list)
    preparing: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    published: float | None = None

    def mean(self, name: str) -> float:
        """Of a metric, over the seeds."""
        return statistics.fmean(row[name] for row in self.rows)

    @property
    def spread(self) -> float:
        """Largest less smallest IoU over the seeds."""
        shares = [row["iou"] for row in self.rows]
        return max(shares) - min(shares)

    def of_size(self, name: str) -> float:
        """IoU of a size class, over the seeds."""
        return statistics.fmean(row["sizes"][name]["iou"] for row in self.rows)

    def about(self, points: int) -> dict[str, Any]:
        """JSON values."""
        seconds = statistics.median(self.seconds)
        return {
            "name": self.name,
            "maker": self.maker.about(),
            "seeds": self.seeds,
            "iou": self.mean("iou"),
            "spread": self.spread,
            "published": self.published,
            "seconds_preparing": statistics.median(self.preparing),
            "seconds": seconds,
            "points_per_second": points / seconds,
            "rows": self.rows,
        }


def compare_maker(
    data: ImageSet,
    name: str,
    makers: Mapping[int, Maker],
    *,
    folder: Path | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> Compared:
    """Measure one maker on a set with ground truth, for each seed that its masks depend on.

    Args:
        name: of its row.
        makers: seed -> the maker with it, not yet fitted; one that draws nothing at random is measured once.
        folder: where it may keep files, such as students.
        progress: called with 1 after each seed.

    Raises:
        InputError: as the maker's.

    Example:
        >>> from hmg_gpu.data.synthetic import make_split
        >>> from hmg_gpu.masks import Pmg
        >>> scenes = make_split("train", count=4, size=64)
        >>> compared = compare_maker(scenes, "pmg", {0: Pmg(extent=10), 1: Pmg(extent=10)})
        >>> compared.seeds, compared.spread
        ([0], 0.0)
    """
    result = None
    for seed, unfitted in makers.items():
        if result is not None and not hasattr(unfitted, "seed"):
            progress(1)
            continue
        start = _now(data)
        maker = unfitted.fit(data, folder=folder and folder / f"seed{seed}")
        fitted = _now(data)
        mask = maker.masks(data)
        taken = _now(data) - fitted
        if taken < SHORT:  # what the first call alone does counts much here
            again = _now(data)
            maker.masks(data)
            taken = _now(data) - again
        if result is None:
            sees = " (sees ground truth)" if maker.about().get("ground_truth") else ""
            result = Compared(name + sees, maker, mask, [], published=published(maker, data))
        result.maker = maker
        result.seeds.append(seed)
        result.rows.append(measure(mask, data) | {"sizes": sizes_by_maker(data, maker, mask)})
        result.preparing.append(fitted - start)
        result.seconds.append(taken)
        progress(1)
    return result


def _now(data: ImageSet) -> float:
    if data.images.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter()


def published(maker: Maker, data: ImageSet) -> float | None:
    """IoU in percent that the paper gives for the maker on the training set of this name, or None."""
    table = next(table for table in paper_numbers()["tables"] if table["table"] == TABLE)
    row = next((row for row in table["rows"] if row["row"] == maker.paper_row), {})
    return row[data.dataset][0] if data.split == "train" and data.dataset in row else None


def unpublished(data: ImageSet) -> list[tuple[str, float, str]]:
    """Rows of the paper's tables that nobody can make again: (name, IoU in percent, why)."""
    table = next(table for table in paper_numbers()["tables"] if table["table"] == TABLE)
    why = paper_numbers()["unpublished"]
    rows = [row for row in table["rows"] if row["row"] in why and data.dataset in row]
    return [(row["row"], row[data.dataset][0], why[row["row"]]) for row in rows if data.split == "train"]


def over_sides(data: ImageSet, maker: Maker, sides: Sequence[int]) -> list[dict[str, Any]] | None:
    """A maker's masks over the side of the part of the image that it looks at (HMG Figs. 4a and 4b).

    Args:
        sides: in pixels, odd.

    Returns:
        For each side a row of metrics and ``sizes``; None where the maker has no such length.
    """
    even = next((side for side in sides if side % 2 == 0 or side < 3), None)
    if even is not None:
        raise InputError(f"sides: {even}: expected odd numbers from 3 on, with the point in the middle")
    name = next((name for name in SIDE_OF if name in maker.settings()), None)
    if name is None:
        return None
    rows = sweep_maker(data, name, [SIDE_OF[name](side) for side in sides], maker)
    return [row | {"side": side} for row, side in zip(rows, sides, strict=True)]


# --- tables ----------------------------------------------------------------------------------------------------------


QUALITY = ("", "IoU %", "Pd %", "Fa 1e-6", "the paper's IoU")
DETAILS = ("IoU % by size, time", *SIZE_CLASSES, "s to prepare", "s for all masks", "points/s")


def quality(results: Sequence[Compared], data: ImageSet) -> list[list[str]]:
    """Rows of the columns :data:`QUALITY`; rows that the paper alone has come last."""
    rows = []
    for compared in results:
        spread = f" ± {50 * compared.spread:.2f}" if len(compared.seeds) > 1 else ""
        rows.append(
            [
                compared.name,
                f"{100 * compared.mean('iou'):.2f}{spread}",
                f"{100 * compared.mean('pd'):.2f}",
                f"{1e6 * compared.mean('fa'):.2f}",
                "" if compared.published is None else f"{compared.published:.2f}",
            ]
        )
    return rows + [[name, "", "", "", f"{iou:.2f}"] for name, iou, _ in unpublished(data)]


def details(results: Sequence[Compared], data: ImageSet) -> list[list[str]]:
    """Rows of the columns :data:`DETAILS`."""
    rows = []
    for compared in results:
        seconds = statistics.median(compared.seconds)
        sizes = (f"{100 * compared.of_size(name):.1f}" for name in SIZE_CLASSES)
        times = (f"{statistics.median(compared.preparing):.2f}", f"{seconds:.2f}")
        rows.append([compared.name, *sizes, *times, f"{len(data.points) / seconds:,.0f}"])
    return rows


def compare_tables(title: str, results: Sequence[Compared], data: ImageSet) -> list[Table]:
    """For the terminal."""
    tables = []
    for heading, columns, rows in (
        (escape(title), QUALITY, quality(results, data)),
        (None, DETAILS, details(results, data)),
    ):
        table = Table(title=heading)
        for place, column in enumerate(columns):
            table.add_column(column, justify="right" if place else "left")
        for row in rows:
            table.add_row(*map(escape, row))
        tables.append(table)
    tables[0].caption = "; ".join(f"{name}: {why}" for name, _, why in unpublished(data)) or None
    return tables


def compare_markdown(title: str, results: Sequence[Compared], data: ImageSet, command: str) -> str:
    """The same as Markdown, with what each maker is and the command."""
    lines = [f"# {title}", "", f"    {command}"]
    for columns, rows in ((QUALITY, quality(results, data)), (DETAILS, details(results, data))):
        lines += ["", "| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
        lines += ["| " + " | ".join(row) + " |" for row in rows]
    lines += ["", "IoU: mean over the seeds ± half the range. Times are of this machine, one run.", ""]
    lines += [f"- {compared.name}: {compared.maker}; seeds {compared.seeds}" for compared in results]
    lines += [f"- {name}: {why}" for name, _, why in unpublished(data)]
    return "\n".join(lines) + "\n"
