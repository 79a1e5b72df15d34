"""CSV with a header naming the columns ``image``, ``y`` and ``x`` in any order (others are left alone), by commas.

0-based, origin at the outer corner of the top left pixel, whose centre is (0.5, 0.5); decimals are floored, so whole
numbers are pixel indices. A row with empty y and x is an image without points. UTF-8.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

from hmg_gpu.common.errors import InputError
from hmg_gpu.data.points.parsing import Entry, PointFormat, check_count, show, text_number

COLUMNS = ("image", "y", "x")


def matches(text: str) -> bool:
    """Whether the first line names the three columns."""
    return set(COLUMNS) <= {cell.strip().lower() for cell in text.partition("\n")[0].split(",")}


def entries(path: Path, text: str) -> Iterator[Entry]:
    """One entry an image, in the order in which the images first appear."""
    reader = csv.reader(text.splitlines(), strict=True)
    by_name: dict[str, Entry] = {}
    columns: list[int] = []
    total = 0
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
                continue
            if len(cells) <= max(columns):
                raise InputError(f"{path}, {where}: {len(cells)} cells; expected at least {max(columns) + 1}")
            name, y, x = (cells[column].strip() for column in columns)
            entry = by_name.setdefault(name, Entry(path, name, None, []))
            if y or x:
                entry.points.append((text_number(y, path, f"{where}, y"), text_number(x, path, f"{where}, x"), where))
                total += 1
                check_count(total, path)
    except csv.Error as error:
        raise InputError(f"{path}, row {reader.line_num}: no valid CSV ({error}); save it again with commas") from error
    if not columns:
        raise InputError(f"{path}: no header; expected a first row image,y,x")
    yield from by_name.values()


FORMAT = PointFormat("text", matches, entries)
