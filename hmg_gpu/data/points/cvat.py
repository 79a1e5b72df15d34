"""XML of "CVAT for images 1.1": the ``<points>`` of each ``<image>``, each of which may hold several points.

0-based, origin at the outer corner of the top left pixel, whose centre is (0.5, 0.5); floored.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from xml.etree.ElementTree import Element

from hmg_gpu.common.errors import InputError
from hmg_gpu.data.points.parsing import (
    Entry,
    PointFormat,
    check_count,
    declared_size,
    require_points,
    show,
    text_number,
)


def matches(root: Element) -> bool:
    """Whether the root is CVAT's."""
    return root.tag == "annotations"


def entries(path: Path, root: Element) -> Iterator[Entry]:
    """One entry for each ``<image>``."""
    images = root.findall("image")
    if not images or root.find("track") is not None:
        raise InputError(f"{path}: no <image> elements or <track>s of a video; export as 'CVAT for images 1.1'")
    total = 0
    for i, image in enumerate(images):
        name = image.get("name")
        if not name:
            raise InputError(f"{path}, <image> {i + 1}: no name; export as 'CVAT for images 1.1'")
        points = []
        for j, element in enumerate(image.findall("points")):
            where = f"<image name={show(name)}>, <points> {j + 1}"
            for pair in filter(None, element.get("points", "").split(";")):
                x, comma, y = pair.partition(",")
                if not comma:
                    raise InputError(f"{path}, {where}: {show(pair)}; expected x,y;x,y;...")
                points.append((text_number(y, path, where), text_number(x, path, where), where))
                check_count(total + len(points), path)
        total += len(points)
        yield Entry(path, name, declared_size(image.get("height"), image.get("width"), path, text_number), points)
    require_points(total, path, "no <points>; mark the targets with CVAT's points tool")


FORMAT = PointFormat("xml", matches, entries, "CVAT for images 1.1")
