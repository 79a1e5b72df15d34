"""The formats of point labels: one file of any of them -> the points of each image as the file gives them.

Parsed strictly and within limits: a file that is too large, too deep or not what it seems is refused by name and place.
"""

from __future__ import annotations

import csv
import json
import math
import re
import reprlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote
from xml.etree.ElementTree import Element, TreeBuilder
from xml.parsers import expat

import numpy as np

from ..errors import InputError
from .images import read_mask

MAX_FILE_BYTES = 2**24  # of one annotation file; parsed, it takes up to 0.5 GB
MAX_POINTS = 2**20  # of one file
MAX_XML_ELEMENTS = 2**20
MAX_XML_DEPTH = 64
MAX_COORDINATE = 2**31


@dataclass
class Entry:
    """The points of one image as one file gives them, before flooring."""

    path: Path
    name: str  # as the file spells it
    size: tuple[float, float] | None  # (height, width) that the file declares
    points: list[tuple[float, float, str]]  # (y, x, where in the file)
    own_stem: str = ""  # of a file that belongs to one image


def parse(path: Path, format: str | None) -> list[Entry]:
    """The entries of one file; the format from its content where it is not given."""
    if not path.is_file():
        raise InputError(f"{path}: no such file; expected point labels ({', '.join(READERS)})")
    size = path.stat().st_size
    if size == 0:
        raise InputError(f"{path}: the file is empty (0 bytes); export the annotations again")
    if format == "png" or (format is None and _is_image(path)):
        return list(_png(path, path))  # has its own limit, in pixels
    if size > MAX_FILE_BYTES:
        raise InputError(f"{path}: {size} bytes, more than {MAX_FILE_BYTES}; split the annotations into several files")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check the file and its rights") from error
    if format is None:
        format, content = _detect(path, data)
    else:
        content = READERS[format][0](path, data)
    entries, count = [], 0
    for entry in READERS[format][1](path, content):
        count += len(entry.points)
        _check_count(count, path)
        entries.append(entry)
    return entries


def _detect(path: Path, data: bytes) -> tuple[str, Any]:
    """The format of a text file and its parsed content."""
    start = data[:64].lstrip(b"\xef\xbb\xbf\xff\xfe \t\r\n\0")
    if start.startswith(b"<"):
        root = _xml(path, data)
        if root.tag == "annotations":
            return "cvat", root
        if root.find("object") is not None or root.tag == "annotation":
            return "sirst-v2", root
        raise InputError(f"{path}: XML <{show(root.tag)}> is neither CVAT for images 1.1 nor a SIRST-V2 centroid file")
    if start.startswith((b"{", b"[")):
        content = _json(path, data)
        if isinstance(content, list):
            return "labelstudio", content
        for format, key in (("labelme", "shapes"), ("coco", "images"), ("labelstudio", "data")):
            if key in content:
                return format, content
        raise InputError(
            f"{path}: JSON with neither LabelMe's 'shapes', COCO's 'images' nor Label Studio's tasks; "
            "export the points in one of these formats"
        )
    text = _text(path, data)
    if {"image", "y", "x"} <= {cell.strip().lower() for cell in text.partition("\n")[0].split(",")}:
        return "csv", text
    raise InputError(
        f"{path}: no point format recognised; expected a point PNG, a CSV with the header image,y,x, LabelMe, COCO or "
        "Label Studio JSON, or CVAT or SIRST-V2 XML"
    )


def _is_image(path: Path) -> bool:
    with open(path, "rb") as handle:
        return handle.read(8).startswith((b"\x89PNG", b"II*\0", b"MM\0*", b"BM", b"\xff\xd8\xff"))


def _text(path: Path, data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: byte {error.start} is not UTF-8 text; save the file as UTF-8") from error


def _json(path: Path, data: bytes) -> Any:
    def refuse(constant: str) -> None:
        raise ValueError(f"the number {constant}")

    try:
        return json.loads(_text(path, data), parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: no valid JSON ({error}); export the annotations again") from error


def _xml(path: Path, data: bytes) -> Element:
    """Parse XML; a document type (the only place for entities) is refused before its first declaration is read."""
    builder, parser = TreeBuilder(), expat.ParserCreate()
    depth = elements = 0

    def start(tag: str, attributes: dict[str, str]) -> None:
        nonlocal depth, elements
        depth, elements = depth + 1, elements + 1
        if depth > MAX_XML_DEPTH or elements > MAX_XML_ELEMENTS:
            raise InputError(
                f"{path}, line {parser.CurrentLineNumber}: XML too deep or too large; split the annotations"
            )
        builder.start(tag, attributes)

    def end(tag: str) -> None:
        nonlocal depth
        depth -= 1
        builder.end(tag)

    def refuse(*_: object) -> None:
        raise InputError(
            f"{path}, line {parser.CurrentLineNumber}: <!DOCTYPE> and entities are refused; remove them or export again"
        )

    parser.StartElementHandler, parser.EndElementHandler, parser.CharacterDataHandler = start, end, builder.data
    parser.StartDoctypeDeclHandler = parser.EntityDeclHandler = refuse
    try:
        parser.Parse(data, True)
        return builder.close()
    except (expat.ExpatError, LookupError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: no valid XML ({error}); export the annotations again") from error


# ---- one parser a format


def _png(path: Path, _: Path) -> Iterator[Entry]:
    mask = read_mask(path)
    count = int(np.count_nonzero(mask))
    if count > MAX_POINTS:
        raise InputError(
            f"{path}: {count} point pixels, more than {MAX_POINTS}; expected a black image with 255 at points"
        )
    points = [(y, x, "its pixels") for y, x in np.argwhere(mask).tolist()]
    yield Entry(path, path.name, mask.shape, points, own_stem=path.stem)


def _csv(path: Path, text: str) -> Iterator[Entry]:
    reader = csv.reader(text.splitlines(), strict=True)
    entries: dict[str, Entry] = {}
    columns: list[int] = []
    total = 0
    try:
        for cells in reader:
            where = f"row {reader.line_num}"
            if not any(cell.strip() for cell in cells):
                continue
            if not columns:
                header = [cell.strip().lower() for cell in cells]
                if any(header.count(key) != 1 for key in ("image", "y", "x")):
                    raise InputError(
                        f"{path}, {where}: header {show(','.join(cells))}; expected image,y,x once each, by commas"
                    )
                columns = [header.index(key) for key in ("image", "y", "x")]
                continue
            if len(cells) <= max(columns):
                raise InputError(f"{path}, {where}: {len(cells)} cells; expected at least {max(columns) + 1}")
            name, y, x = (cells[column].strip() for column in columns)
            entry = entries.setdefault(name, Entry(path, name, None, []))
            if y or x:
                entry.points.append((_text_number(y, path, f"{where}, y"), _text_number(x, path, f"{where}, x"), where))
                total += 1
                _check_count(total, path)
    except csv.Error as error:
        raise InputError(f"{path}, row {reader.line_num}: no valid CSV ({error}); save it again with commas") from error
    if not columns:
        raise InputError(f"{path}: no header; expected a first row image,y,x")
    yield from entries.values()


def _labelme(path: Path, content: Any) -> Iterator[Entry]:
    shapes = _field(content, "shapes", list, path, "the file")
    points = []
    for i, shape in enumerate(shapes):
        where = f"shapes[{i}]"
        if _field(shape, "shape_type", str, path, where) != "point":
            continue
        corners = _field(shape, "points", list, path, where)
        if len(corners) != 1 or not isinstance(corners[0], list) or len(corners[0]) != 2:
            raise InputError(f"{path}, {where}: {show(corners)}; expected one [[x, y]] for a shape of type point")
        x, y = (_number(value, path, where) for value in corners[0])
        points.append((y, x, where))
    name = content.get("imagePath")
    size = _declared_size(content.get("imageHeight"), content.get("imageWidth"), path)
    yield Entry(path, name if isinstance(name, str) else path.stem, size, points, own_stem=path.stem)


def _cvat(path: Path, root: Element) -> Iterator[Entry]:
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
                points.append((_text_number(y, path, where), _text_number(x, path, where), where))
                _check_count(total + len(points), path)
        total += len(points)
        yield Entry(path, name, _declared_size(image.get("height"), image.get("width"), path, _text_number), points)
    _require_points(total, path, "no <points>; mark the targets with CVAT's points tool")


def _coco(path: Path, content: Any) -> Iterator[Entry]:
    images = _field(content, "images", list, path, "the file")
    annotations = _field(content, "annotations", list, path, "the file")
    entries: dict[int | str, Entry] = {}
    for i, image in enumerate(images):
        where = f"images[{i}]"
        name = _field(image, "file_name", str, path, where)
        key = _field(image, "id", (int, str), path, where)
        if key in entries:
            raise InputError(f"{path}, {where}: id {show(key)} is used twice; export the annotations again")
        entries[key] = Entry(path, name, _declared_size(image.get("height"), image.get("width"), path), [])
    total = 0
    for i, annotation in enumerate(annotations):
        where = f"annotations[{i}]"
        key = _field(annotation, "image_id", (int, str), path, where)
        if key not in entries:
            raise InputError(f"{path}, {where}: image_id {show(key)} is not among the images; export them together")
        keypoints = annotation.get("keypoints") or []
        if not isinstance(keypoints, list) or len(keypoints) % 3:
            raise InputError(f"{path}, {where}: keypoints {show(keypoints)}; expected a list x, y, v, x, y, v, ...")
        for k in range(0, len(keypoints), 3):
            x, y, visible = (_number(value, path, where) for value in keypoints[k : k + 3])
            if visible:
                entries[key].points.append((y, x, where))
                total += 1
                _check_count(total, path)
    _require_points(
        total, path, "no keypoints (CVAT's COCO export leaves plain points out); export as 'CVAT for images 1.1'"
    )
    yield from entries.values()


def _labelstudio(path: Path, content: Any) -> Iterator[Entry]:
    tasks = content if isinstance(content, list) else [content]
    total = 0
    for i, task in enumerate(tasks):
        where = f"task {i + 1}"
        points, size = [], None
        for annotation in _field(task, "annotations", list, path, where):
            if not isinstance(annotation, dict) or annotation.get("was_cancelled"):
                continue
            for j, result in enumerate(_field(annotation, "result", list, path, where)):
                here = f"{where}, result {j + 1}"
                if not isinstance(result, dict) or result.get("type") not in ("keypointlabels", "keypoint"):
                    continue
                if result.get("image_rotation"):
                    raise InputError(f"{path}, {here}: the image was rotated in the tool; annotate it unrotated")
                width, height = (
                    _number(result.get(key), path, f"{here}, {key}") for key in ("original_width", "original_height")
                )
                value = _field(result, "value", dict, path, here)
                x, y = (_number(value.get(key), path, f"{here}, {key}") for key in ("x", "y"))
                if size not in (None, (height, width)):
                    raise InputError(
                        f"{path}, {here}: drawn at {height:g} x {width:g}, others of the task at {size[0]:g} x "
                        f"{size[1]:g} (height x width); annotate one image a task"
                    )
                size = (height, width)
                points.append((y * height / 100 + 1e-6, x * width / 100 + 1e-6, here))
        total += len(points)
        yield Entry(path, _labelstudio_name(task, path, where), size, points)
    _require_points(
        total, path, "no result of type keypointlabels; mark the targets with KeyPointLabels and export as JSON"
    )


def _labelstudio_name(task: dict, path: Path, where: str) -> str:
    """The image of a task: its ``data`` holds an upload, a URL or a local-files query; only the last part counts."""
    data = _field(task, "data", dict, path, where)
    texts = [value for value in data.values() if isinstance(value, str)]
    named = data.get("image") if isinstance(data.get("image"), str) else None
    if named is None and len(texts) != 1:
        raise InputError(f"{path}, {where}: data {show(sorted(data))}; expected the image under 'image'")
    text = unquote(named or texts[0])
    if "upload/" in text:
        return re.sub(r"^[0-9a-f]{8}-", "", text.replace("\\", "/").rsplit("/", 1)[-1])
    return text.rpartition("?d=")[2]


def _sirst_v2(path: Path, root: Element) -> Iterator[Entry]:
    points = []
    for i, element in enumerate(root.findall("object")):
        where = f"<object> {i + 1}"
        texts = element.findtext("centroid/yc"), element.findtext("centroid/xc")
        if None in texts:
            raise InputError(f"{path}, {where}: no <centroid> with <yc> and <xc>; supply SIRST-V2's centroid files")
        y, x = (_text_number(text, path, where) - 1 for text in texts)
        points.append((y, x, where))
    size = _declared_size(root.findtext("size/height"), root.findtext("size/width"), path, _text_number)
    yield Entry(path, root.findtext("filename") or path.stem, size, points, own_stem=path.stem)


READERS: dict[str, tuple[Callable[[Path, bytes], Any], Callable[[Path, Any], Iterator[Entry]]]] = {
    "png": (lambda path, _: path, _png),
    "csv": (_text, _csv),
    "labelme": (_json, _labelme),
    "cvat": (_xml, _cvat),
    "coco": (_json, _coco),
    "labelstudio": (_json, _labelstudio),
    "sirst-v2": (_xml, _sirst_v2),
}


def _field(value: Any, key: str, kind: type | tuple[type, ...], path: Path, where: str) -> Any:
    found = value.get(key) if isinstance(value, dict) else None
    if not isinstance(found, kind) or isinstance(found, bool):
        kinds = " or ".join(one.__name__ for one in (kind if isinstance(kind, tuple) else (kind,)))
        raise InputError(f"{path}, {where}: {key!r} is {show(found)}; expected a {kinds}: export the annotations again")
    return found


def _number(value: Any, path: Path, where: str) -> float:
    """A number as JSON has it, finite and not beyond ``MAX_COORDINATE``."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= MAX_COORDINATE:
        return float(value)
    raise InputError(f"{path}, {where}: {show(value)} is no usable coordinate; expected a finite number")


def _text_number(text: str, path: Path, where: str) -> float:
    """The same for the text of a CSV cell or in XML."""
    try:
        number = float(text.replace("_", "no digit"))
    except ValueError:
        number = math.nan
    if abs(number) <= MAX_COORDINATE:
        return number
    raise InputError(f"{path}, {where}: {show(text)} is no usable coordinate; expected a finite number")


def _declared_size(height: Any, width: Any, path: Path, number: Callable = _number) -> tuple[float, float] | None:
    """(height, width) where the file declares both."""
    if height is None or width is None:
        return None
    return number(height, path, "image height"), number(width, path, "image width")


def _check_count(count: int, path: Path) -> None:
    if count > MAX_POINTS:
        raise InputError(f"{path}: more than {MAX_POINTS} points; split the annotations into several files")


def _require_points(total: int, path: Path, text: str) -> None:
    if total == 0:
        raise InputError(f"{path}: {text}")


def show(value: Any) -> str:
    """A value from a file on one line of bounded length."""
    try:
        text = reprlib.repr(value)  # never walks through a long list
    except ValueError:  # an integer of more digits than Python prints
        text = f"a {type(value).__name__} too long to print"
    return text if len(text) <= 60 else f"{text[:57]}..."
