"""CSV with a header naming the columns ``image``, ``y`` and ``x`` in any order and case (others are left alone).

Cells are separated by commas; as spreadsheets export them, also by semicolons or tabs, and then numbers may have
decimal commas. ``filename``, ``file``, ``name`` or ``image_name`` may stand for ``image``. Whatever is not the plain
form is told by a warning. What may mean two things is refused: points beside commas in numbers, marks that may all be
of thousands (1,234), more cells than the header has.

0-based, origin at the outer corner of the top left pixel, whose centre is (0.5, 0.5); decimals are floored, so whole
numbers are pixel indices. A row with empty y and x is an image without points. UTF-8.

A column ``extent`` may give single points a search length of their own (L_ep of P2B, whole pixels; empty: none), which
``hmg-gpu masks`` and ``hmg-gpu review`` take; every other reader leaves it alone.
"""

from __future__ import annotations

import csv
import math
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hmg_gpu.common.errors import InputError
from hmg_gpu.data.points.parsing import Entry, PointFormat, check_count, show, text_number

COLUMNS = ("image", "y", "x")
OTHER_NAMES = ("filename", "file", "name", "image_name")  # of the column image, where there is none
SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs"}
EXTENT = "extent"
MAX_EXTENT = 4096  # pixels; no target is larger


def matches(text: str) -> bool:
    """Whether the first line names the three columns."""
    return _separator(text.partition("\n")[0]) is not None


def _separator(line: str) -> str | None:
    """What separates the cells of a header that names the three columns."""
    for separator in SEPARATORS:
        names = {cell.strip().strip('"').lower() for cell in line.split(separator)}
        if {"y", "x"} <= names and not names.isdisjoint(("image", *OTHER_NAMES)):
            return separator
    return None


def _columns(path: Path, where: str, cells: list[str], separator: str) -> tuple[list[int], int | None]:
    """Where image, y and x stand in a header, and extent if it is there."""
    header = [cell.strip().lower() for cell in cells]
    others = [name for name in header if name in OTHER_NAMES]
    if "image" not in header and len(others) > 1:
        raise InputError(f"{path}, {where}: {' and '.join(others)} may both name the image; call one of them image")
    image = "image" if "image" in header or not others else others[0]
    if any(header.count(key) != 1 for key in (image, "y", "x")):
        raise InputError(f"{path}, {where}: header {show(separator.join(cells))}; expected image,y,x once each")
    if separator != "," or image != "image":
        text = f"{path}: read as separated by {SEPARATORS[separator]}, images by the column {image}"
        warnings.warn(text, stacklevel=2)
    return [header.index(key) for key in (image, "y", "x")], header.index(EXTENT) if EXTENT in header else None


@dataclass
class _Marks:
    """The decimal marks in the numbers of a file, which must be of one kind and no marks of thousands."""

    path: Path
    kind: str = ""
    thousands: str = ""  # the first number that may have one
    decimals: bool = False  # some number can have no other

    def plain(self, text: str, where: str) -> str:
        """A number with a decimal point."""
        kinds = {mark for mark in ".," if mark in text}
        if len(kinds | set(self.kind)) > 1:
            raise InputError(
                f"{self.path}, {where}: {show(text)}: the file has decimal points and decimal commas; use one kind"
            )
        if kinds:
            if not self.kind and kinds == {","}:
                warnings.warn(f"{self.path}: read with decimal commas, as {show(text)} in {where}", stacklevel=2)
            self.kind = kinds.pop()
            if re.fullmatch(r"[1-9]\d{0,2}[.,]\d{3}", text):
                self.thousands = self.thousands or f"{where}: {show(text)}"
            else:
                self.decimals = True
        return text.replace(",", ".")

    def check(self) -> None:
        """After the last number: refuse a file whose marks may all be of thousands."""
        if self.thousands and not self.decimals:
            raise InputError(
                f"{self.path}, {self.thousands} may be a decimal number, or thousands with a mark, as every number of "
                "the file with one; write 1 or 2 decimals, or no marks of thousands"
            )


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
    lines = text.splitlines()
    first = next((line for line in lines if line.strip()), "")
    separator = _separator(first) or ","
    reader = csv.reader(lines, strict=True, delimiter=separator)
    columns: list[int] = []
    width = 0
    extent: int | None = None
    marks = _Marks(path)
    try:
        for cells in reader:
            where = f"row {reader.line_num}"
            if not any(cell.strip() for cell in cells):
                continue
            if not columns:
                columns, extent = _columns(path, where, cells, separator)
                width = len(cells)
                continue
            if len(cells) <= max(columns):
                raise InputError(f"{path}, {where}: {len(cells)} cells; expected at least {max(columns) + 1}")
            if any(cell.strip() for cell in cells[width:]):
                raise InputError(
                    f"{path}, {where}: {len(cells)} cells, the header has {width}; where numbers have decimal commas, "
                    "put them in quotes or export with semicolons"
                )
            name, y, x = (cells[column].strip() for column in columns)
            if separator != ",":
                y, x = (marks.plain(cell, where) for cell in (y, x))
            yield where, name, y, x, cells[extent].strip() if extent is not None and extent < len(cells) else ""
    except csv.Error as error:
        raise InputError(f"{path}, row {reader.line_num}: no valid CSV ({error}); save it again with commas") from error
    if not columns:
        raise InputError(f"{path}: no header; expected a first row image,y,x")
    marks.check()


FORMAT = PointFormat("text", matches, entries)
