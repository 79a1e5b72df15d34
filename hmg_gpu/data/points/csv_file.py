"""CSV with a header naming the columns ``image``, ``y`` and ``x`` in any order (others are left alone), by commas.

0-based, origin at the outer corner of the top left pixel, whose centre is (0.5, 0.5); decimals are floored, so whole
numbers are pixel indices. A row with empty y and x is an image without points. UTF-8.

A column ``extent`` may give single points a search length of their own (L_ep of P2B, whole pixels; empty: none), which
``hmg-gpu masks`` and ``hmg-gpu review`` take; every other reader leaves it alone.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator
from pathlib import Path

from hmg_gpu.common.errors import InputError
from hmg_gpu.data.points.parsing import Entry, PointFormat, check_count, show, text_number

COLUMNS = ("image", "y", "x")
EXTENT = "extent"
MAX_EXTENT = 4096  # pixels; no target is larger


def matches(text: str) -> bool:
    """Whether the first line names the three columns."""
    return set(COLUMNS) <= {cell.strip().lower() for cell in text.partition("\n")[0].split(",")}


def entries(path: Path, text: str) -> Iterator[Entry]:
    """One entry an image, in the order in which the images first appear."""
    by_name: dict[str, Entry] = {}
    total = 0
    for where, name, y, x, _ in _rows(path, text):
        entry = by_name.setdefault(name, Entry(path, name, None, []))
        if y or x:
            entry.points.append((text_number(y, path, f"{where}, y"), text_number(x, path, f"{where}, x"), where))
            total += 1
            check_count(total, path)
    yield from by_name.values()


def extents(path: Path, text: str) -> Iterator[tuple[str, int, int, int]]:
    """(image as the file spells it, y, x, extent) of each point that has an extent of its own; y and x floored."""
    for where, name, y, x, extent in _rows(path, text):
        if not extent or not (y or x):
            continue
        if not extent.isdecimal() or not 1 <= len(extent) <= 4 or not 1 <= int(extent) <= MAX_EXTENT:
            raise InputError(
                f"{path}, {where}: extent {show(extent)}; expected whole pixels from 1 to {MAX_EXTENT}, or nothing"
            )
        row, column = (text_number(cell, path, f"{where}, {axis}") for cell, axis in ((y, "y"), (x, "x")))
        yield name, math.floor(row), math.floor(column), int(extent)


def _rows(path: Path, text: str) -> Iterator[tuple[str, str, str, str, str]]:
    """Where, image, y, x and extent ("" where there is no such column) of each row, as text."""
    reader = csv.reader(text.splitlines(), strict=True)
    columns: list[int] = []
    extent: int | None = None
    try:
        for cells in reader:
            where = f"row {reader.line_num}"
            if not any(cell.strip() for cell in cells):
                continue
            if not columns:
                header = [cell.strip().lower() for cell in cells]
                if any(header.count(key) != 1 for key in COLUMNS):
                    raise InputError(
                        f"{path}, {where}: header {show(','.join(cells))}; expected image,y,x once each, by commas"
                    )
                columns = [header.index(key) for key in COLUMNS]
                extent = header.index(EXTENT) if EXTENT in header else None
                continue
            if len(cells) <= max(columns):
                raise InputError(f"{path}, {where}: {len(cells)} cells; expected at least {max(columns) + 1}")
            name, y, x = (cells[column].strip() for column in columns)
            yield where, name, y, x, cells[extent].strip() if extent is not None and extent < len(cells) else ""
    except csv.Error as error:
        raise InputError(f"{path}, row {reader.line_num}: no valid CSV ({error}); save it again with commas") from error
    if not columns:
        raise InputError(f"{path}: no header; expected a first row image,y,x")


FORMAT = PointFormat("text", matches, entries)
