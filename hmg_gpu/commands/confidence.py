"""confidence.csv beside masks: how sure each target's mask is, the least sure first, part by part while it is made."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from hmg_gpu.common.files import write_text
from hmg_gpu.data import ImageSet
from hmg_gpu.masks import Maker

CONFIDENCE = "confidence.csv"
_PART = "confidence.part."  # and the number of the part, until all are there


def write_confidence(folder: Path, part: int, data: ImageSet, maker: Maker) -> None:
    """Keep the confidence of a part's targets until all parts are there; nothing for a maker that has none."""
    found = maker.confidence(data)
    if found is None:
        return
    points, confidence = found
    rows = zip(points.tolist(), confidence.tolist(), strict=True)
    write_text(_path(folder, part), _csv([(data.names[image], y, x, f"{value:.4f}") for (image, y, x), value in rows]))


def join_confidence(folder: Path, parts: Sequence[int]) -> None:
    """One file of all parts: image, y, x, confidence; none where no part has any."""
    paths = [path for path in (_path(folder, part) for part in parts) if path.exists()]
    rows = [row for path in paths for row in csv.reader(io.StringIO(path.read_text(encoding="utf-8")))]
    if paths:
        rows.sort(key=lambda row: float(row[-1]))
        write_text(folder / CONFIDENCE, _csv([("image", "y", "x", "confidence"), *rows]))
    else:
        (folder / CONFIDENCE).unlink(missing_ok=True)  # it tells of other masks
    for path in folder.glob(_PART + "*"):
        path.unlink()


def _path(folder: Path, part: int) -> Path:
    return folder / f"{_PART}{part}"


def _csv(rows: Sequence[Sequence[object]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()
