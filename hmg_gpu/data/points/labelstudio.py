"""Label Studio's JSON export: the key points of all annotations of a task that were not cancelled.

Percent of ``original_width`` and ``original_height``, origin at the outer corner of the top left pixel; multiplied out,
plus a millionth of a pixel (so that whole pixels survive the way through percent), floored. The random prefix of an
uploaded file is taken off its name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from hmg_gpu.common.errors import InputError
from hmg_gpu.data.points.parsing import Entry, PointFormat, json_field, json_number, require_points, show


def matches(content: Any) -> bool:
    """Whether the file is a list of tasks or one task."""
    return isinstance(content, list) or "data" in content


def entries(path: Path, content: Any) -> Iterator[Entry]:
    """One entry a task."""
    tasks = content if isinstance(content, list) else [content]
    total = 0
    for i, task in enumerate(tasks):
        where = f"task {i + 1}"
        points, size = [], None
        for annotation in json_field(task, "annotations", list, path, where):
            if not isinstance(annotation, dict) or annotation.get("was_cancelled"):
                continue
            for j, result in enumerate(json_field(annotation, "result", list, path, where)):
                here = f"{where}, result {j + 1}"
                if not isinstance(result, dict) or result.get("type") not in ("keypointlabels", "keypoint"):
                    continue
                if result.get("image_rotation"):
                    raise InputError(f"{path}, {here}: the image was rotated in the tool; annotate it unrotated")
                width, height = (
                    json_number(result.get(key), path, f"{here}, {key}")
                    for key in ("original_width", "original_height")
                )
                value = json_field(result, "value", dict, path, here)
                x, y = (json_number(value.get(key), path, f"{here}, {key}") for key in ("x", "y"))
                if size not in (None, (height, width)):
                    raise InputError(
                        f"{path}, {here}: drawn at {height:g} x {width:g}, others of the task at {size[0]:g} x "
                        f"{size[1]:g} (height x width); annotate one image a task"
                    )
                size = (height, width)
                points.append((y * height / 100 + 1e-6, x * width / 100 + 1e-6, here))
        total += len(points)
        yield Entry(path, _image_name(task, path, where), size, points)
    require_points(
        total, path, "no result of type keypointlabels; mark the targets with KeyPointLabels and export as JSON"
    )


def _image_name(task: dict, path: Path, where: str) -> str:
    """The image of a task: its ``data`` holds an upload, a URL or a local-files query; only the last part counts."""
    data = json_field(task, "data", dict, path, where)
    texts = [value for value in data.values() if isinstance(value, str)]
    named = data.get("image") if isinstance(data.get("image"), str) else None
    if named is None and len(texts) != 1:
        raise InputError(f"{path}, {where}: data {show(sorted(data))}; expected the image under 'image'")
    text = unquote(named or texts[0])
    if "upload/" in text:
        return re.sub(r"^[0-9a-f]{8}-", "", text.replace("\\", "/").rsplit("/", 1)[-1])
    return text.rpartition("?d=")[2]


FORMAT = PointFormat("json", matches, entries, "Label Studio's tasks")
