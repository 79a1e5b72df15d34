"""The formats of point labels, and one file of any of them -> the points of each image as the file gives them.

A format is one file of this folder, which says how the format counts and rounds, and one line in ``READERS``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hmg_gpu.common.errors import InputError
from hmg_gpu.data.points import coco, csv_file, cvat, labelme, labelstudio, png, sirst_v2
from hmg_gpu.data.points.parsing import Entry, Kind, PointFormat, check_count, find_kind, load, show

READERS: dict[str, PointFormat] = {  # the first that matches a file's content reads it
    "png": png.FORMAT,
    "csv": csv_file.FORMAT,
    "labelme": labelme.FORMAT,
    "cvat": cvat.FORMAT,
    "coco": coco.FORMAT,
    "labelstudio": labelstudio.FORMAT,
    "sirst-v2": sirst_v2.FORMAT,
}


def parse(path: Path, format: str | None) -> list[Entry]:
    """The entries of one file; the format (one of ``READERS``) from its content where it is None.

    Raises:
        InputError: no such file, empty, not of the format or of none, or over a limit of ``parsing.py``.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file; expected point labels ({', '.join(READERS)})")
    if path.stat().st_size == 0:
        raise InputError(f"{path}: the file is empty (0 bytes); export the annotations again")
    kind = find_kind(path) if format is None else READERS[format].kind
    content = load(path, kind)
    reader = _detect(path, kind, content) if format is None else READERS[format]
    entries, count = [], 0
    for entry in reader.entries(path, content):
        count += len(entry.points)
        check_count(count, path)
        entries.append(entry)
    return entries


def _detect(path: Path, kind: Kind, content: Any) -> PointFormat:
    """The format of a file of one kind."""
    candidates = [reader for reader in READERS.values() if reader.kind == kind]
    for reader in candidates:
        if reader.matches(content):
            return reader
    *marks, last = (reader.mark for reader in candidates)
    neither = f"neither {', '.join(marks)} nor {last}"
    if kind == "xml":
        raise InputError(f"{path}: XML <{show(content.tag)}> is {neither}")
    if kind == "json":
        raise InputError(f"{path}: JSON with {neither}; export the points in one of these formats")
    raise InputError(
        f"{path}: no point format recognised; expected a point PNG, a CSV with the header image,y,x, LabelMe, COCO or "
        "Label Studio JSON, or CVAT or SIRST-V2 XML"
    )
