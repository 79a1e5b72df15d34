"""LabelMe JSON, one file an image: the shapes of type "point"; other shapes are left out.

0-based, origin at the outer corner of the top left pixel, whose centre is (0.5, 0.5); floored. The image is the one
named like the JSON file or, failing that, the stem in ``imagePath``.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hmg_gpu.common.errors import InputError
from hmg_gpu.data.points.parsing import Entry, PointFormat, declared_size, json_field, json_number, show


def matches(content: Any) -> bool:
    """Whether the file has LabelMe's list of shapes."""
    return isinstance(content, dict) and "shapes" in content


def entries(path: Path, content: Any) -> Iterator[Entry]:
    """The one entry of a file."""
    points = []
    for i, shape in enumerate(json_field(content, "shapes", list, path, "the file")):
        where = f"shapes[{i}]"
        if json_field(shape, "shape_type", str, path, where) != "point":
            continue
        corners = json_field(shape, "points", list, path, where)
        if len(corners) != 1 or not isinstance(corners[0], list) or len(corners[0]) != 2:
            raise InputError(f"{path}, {where}: {show(corners)}; expected one [[x, y]] for a shape of type point")
        x, y = (json_number(value, path, where) for value in corners[0])
        points.append((y, x, where))
    name = content.get("imagePath")
    size = declared_size(content.get("imageHeight"), content.get("imageWidth"), path, json_number)
    yield Entry(path, name if isinstance(name, str) else path.stem, size, points, own_stem=path.stem)


FORMAT = PointFormat("json", matches, entries, "LabelMe's 'shapes'")
