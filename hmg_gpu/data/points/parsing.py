"""What the formats of point labels share: limits, safe reading of text, JSON and XML, numbers, and one image's points.

Strict and within limits: a file that is too large, too deep or not what it seems is refused by name and place.
"""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from xml.etree.ElementTree import Element, TreeBuilder
from xml.parsers import expat

from hmg_gpu.common.errors import InputError

MAX_FILE_BYTES = 2**24  # of one annotation file; parsed, it takes up to 0.5 GB
MAX_POINTS = 2**20  # of one file
MAX_XML_ELEMENTS = 2**20
MAX_XML_DEPTH = 64
MAX_COORDINATE = 2**31

Kind = Literal["image", "text", "json", "xml"]

_IMAGE_STARTS = (b"\x89PNG", b"II*\0", b"MM\0*", b"BM", b"\xff\xd8\xff")


@dataclass
class Entry:
    """The points of one image as one file gives them, before flooring."""

    path: Path
    name: str  # as the file spells it
    size: tuple[float, float] | None  # (height, width) that the file declares
    points: list[tuple[float, float, str]]  # (y, x, where in the file)
    own_stem: str = ""  # of a file that belongs to one image


@dataclass(frozen=True)
class PointFormat:
    """One format of point labels; each file of this folder that is named like a format makes one.

    Args:
        kind: of its files. Content is the file's path for "image", str for "text", the parsed value for "json" and the
            root element for "xml".
        matches: whether content of this kind is of this format, by a mark that no other format has.
        entries: (path, content) -> the entries of the file; 0-based, origin at the outer corner of the top left pixel.
        mark: the mark in words, for the error about a file that has none ("" for images and text).
    """

    kind: Kind
    matches: Callable[[Any], bool]
    entries: Callable[[Path, Any], Iterator[Entry]]
    mark: str = ""


# ---- files


def find_kind(path: Path) -> Kind:
    """What a file is by its first bytes."""
    try:
        with open(path, "rb") as handle:
            head = handle.read(64)
    except OSError as error:
        raise _unreadable(path, error) from error
    if head.startswith(_IMAGE_STARTS):
        return "image"
    start = head.lstrip(b"\xef\xbb\xbf\xff\xfe \t\r\n\0")
    if start.startswith(b"<"):
        return "xml"
    return "json" if start.startswith((b"{", b"[")) else "text"


def load(path: Path, kind: Kind) -> Any:
    """The content of a file as :class:`PointFormat` describes it.

    Raises:
        InputError: larger than ``MAX_FILE_BYTES`` (images have a limit of their own, in pixels), or not of this kind.
    """
    if kind == "image":
        return path
    size = path.stat().st_size
    if size > MAX_FILE_BYTES:
        raise InputError(f"{path}: {size} bytes, more than {MAX_FILE_BYTES}; split the annotations into several files")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from error
    return {"text": _text, "json": _json, "xml": _xml}[kind](path, data)


def _unreadable(path: Path, error: OSError) -> InputError:
    return InputError(f"{path}: cannot be read ({error.strerror}); check the file and its rights")


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


# ---- values


def json_field(value: Any, key: str, kind: type | tuple[type, ...], path: Path, where: str) -> Any:
    """``value[key]`` of JSON, refused where it is missing or not of ``kind``."""
    item = value.get(key) if isinstance(value, dict) else None
    if not isinstance(item, kind) or isinstance(item, bool):
        kinds = " or ".join(allowed.__name__ for allowed in (kind if isinstance(kind, tuple) else (kind,)))
        raise InputError(f"{path}, {where}: {key!r} is {show(item)}; expected a {kinds}: export the annotations again")
    return item


def json_number(value: Any, path: Path, where: str) -> float:
    """A number as JSON has it, finite and not beyond ``MAX_COORDINATE``."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= MAX_COORDINATE:
        return float(value)
    raise InputError(f"{path}, {where}: {show(value)} is no usable coordinate; expected a finite number")


def text_number(text: str, path: Path, where: str) -> float:
    """The same for the text of a CSV cell or in XML."""
    try:
        number = float(text.replace("_", "no digit"))
    except ValueError:
        number = math.nan
    if abs(number) <= MAX_COORDINATE:
        return number
    raise InputError(f"{path}, {where}: {show(text)} is no usable coordinate; expected a finite number")


def declared_size(
    height: Any, width: Any, path: Path, number: Callable[[Any, Path, str], float]
) -> tuple[float, float] | None:
    """(height, width) where the file declares both; ``number`` is :func:`json_number` or :func:`text_number`."""
    if height is None or width is None:
        return None
    return number(height, path, "image height"), number(width, path, "image width")


def check_count(count: int, path: Path) -> None:
    """Refuse a file with more than ``MAX_POINTS`` points; to be called while they are read, before memory is full."""
    if count > MAX_POINTS:
        raise InputError(f"{path}: more than {MAX_POINTS} points; split the annotations into several files")


def require_points(total: int, path: Path, text: str) -> None:
    """Refuse a file without any point, in the format's own words."""
    if total == 0:
        raise InputError(f"{path}: {text}")


def show(value: Any) -> str:
    """A value from a file on one line of bounded length."""
    try:
        text = reprlib.repr(value)  # never walks through a long list
    except ValueError:  # an integer of more digits than Python prints
        text = f"a {type(value).__name__} too long to print"
    return text if len(text) <= 60 else f"{text[:57]}..."
