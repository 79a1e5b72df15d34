"""COCO keypoints JSON: every keypoint (x, y, v) with v > 0 of every annotation is one point.

0-based, origin at the outer corner of the top left pixel, whose centre is (0.5, 0.5); floored.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hmg_gpu.common.errors import InputError
from hmg_gpu.data.points.parsing import (
    Entry,
    PointFormat,
    check_count,
    declared_size,
    json_field,
    json_number,
    require_points,
    show,
)


def matches(content: Any) -> bool:
    """Whether the file has COCO's list of images."""
    return isinstance(content, dict) and "images" in content


def entries(path: Path, content: Any) -> Iterator[Entry]:
    """One entry for each of the file's images."""
    images = json_field(content, "images", list, path, "the file")
    annotations = json_field(content, "annotations", list, path, "the file")
    by_id: dict[int | str, Entry] = {}
    for i, image in enumerate(images):
        where = f"images[{i}]"
        name = json_field(image, "file_name", str, path, where)
        key = json_field(image, "id", (int, str), path, where)
        if key in by_id:
            raise InputError(f"{path}, {where}: id {show(key)} is used twice; export the annotations again")
        by_id[key] = Entry(path, name, declared_size(image.get("height"), image.get("width"), path, json_number), [])
    total = 0
    for i, annotation in enumerate(annotations):
        where = f"annotations[{i}]"
        key = json_field(annotation, "image_id", (int, str), path, where)
        if key not in by_id:
            raise InputError(f"{path}, {where}: image_id {show(key)} is not among the images; export them together")
        keypoints = annotation.get("keypoints") or []
        if not isinstance(keypoints, list) or len(keypoints) % 3:
            raise InputError(f"{path}, {where}: keypoints {show(keypoints)}; expected a list x, y, v, x, y, v, ...")
        for k in range(0, len(keypoints), 3):
            x, y, visible = (json_number(value, path, where) for value in keypoints[k : k + 3])
            if visible:
                by_id[key].points.append((y, x, where))
                total += 1
                check_count(total, path)
    require_points(
        total, path, "no keypoints (CVAT's COCO export leaves plain points out); export as 'CVAT for images 1.1'"
    )
    yield from by_id.values()


FORMAT = PointFormat("json", matches, entries, "COCO's 'images'")
