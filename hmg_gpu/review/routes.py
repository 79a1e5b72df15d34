"""Addresses to calls of the session, and their results to bytes. Every parameter is checked for its type here."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from importlib import resources
from typing import Any, NamedTuple

import numpy as np

from hmg_gpu.common.errors import HMGError, InputError
from hmg_gpu.review.session import Conflict, Session

STATIC_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
}
EDIT = {"row": int, "revision": int, "what": str}
PLACE = {"y": int, "x": int, "extent": (int, type(None))}


class Reply(NamedTuple):
    """An answer: its status, type and body."""

    status: int
    kind: str
    body: bytes | memoryview
    headers: tuple[tuple[str, str], ...] = ()


def as_json(value: Any, status: int = 200) -> Reply:
    return Reply(status, "application/json", json.dumps(value).encode())


def refusal(status: int, text: str) -> Reply:
    return as_json({"error": text}, status)


class Routes:
    """What the server answers, given a session; the files of the page are read once, so that no request opens one."""

    def __init__(self, session: Session):
        self.session = session
        folder = resources.files("hmg_gpu.review") / "static"
        self.static = {
            entry.name: Reply(200, kind, entry.read_bytes())
            for entry in folder.iterdir()
            if (kind := STATIC_TYPES.get("." + entry.name.rpartition(".")[2]))
        }
        self._get: dict[str, Callable[..., Reply]] = {
            r"/": lambda: self.static["index.html"],
            r"/static/([a-z]+\.[a-z]+)": lambda name: self.static.get(name) or refusal(404, "no such file"),
            r"/api/images": lambda: as_json(session.about()),
            r"/api/images/(\d{1,9})": lambda row: as_json(session.state(int(row))),
            r"/api/images/(\d{1,9})/pixels": self._pixels,
            r"/api/images/(\d{1,9})/truth": lambda row: as_json(session.truth(int(row))),
            r"/api/images/(\d{1,9})/thumbnail": self._thumbnail,
            r"/api/images/(\d{1,9})/points/(\d{1,9})": lambda *numbers: as_json(session.explain(*map(int, numbers))),
            r"/api/doubts/(\d{1,9})": lambda count: as_json(session.doubts.since(int(count))),
            r"/api/export": lambda: as_json(session.export.state()),
        }
        self._post: dict[str, Callable[[dict[str, Any]], Any]] = {
            "/api/edit": lambda body: session.edit(**_checked(body, EDIT, {"id": int} | PLACE)),
            "/api/preview": lambda body: session.preview(**_checked(body, {"row": int} | PLACE)),
            "/api/undo": lambda body: session.undo(**_checked(body, {"number": int})),
            "/api/redo": lambda body: session.redo(**_checked(body, {"number": int})),
            "/api/export": lambda body: session.export.start(**_checked(body, {})),
        }

    def get(self, path: str) -> Reply:
        """Answer GET of a path without its query."""
        for pattern, call in self._get.items():
            if match := re.fullmatch(pattern, path, re.ASCII):
                return _answer(call, *match.groups())
        return refusal(404, "no such address")

    def post(self, path: str, body: bytes) -> Reply:
        """Answer POST of a JSON object."""
        if path not in self._post:
            return refusal(404, "no such address")
        try:
            value = json.loads(body, parse_constant=_refuse)
        except (ValueError, RecursionError):
            return refusal(400, "the body is no valid JSON")
        if not isinstance(value, dict):
            return refusal(400, "the body is no JSON object")
        return _answer(lambda: as_json(self._post[path](value)))

    def _pixels(self, row: str) -> Reply:
        """The raw pixels, little endian, row by row; height, width and type in headers."""
        pixels = self.session.pixels(int(row))
        about = {"X-Height": pixels.shape[0], "X-Width": pixels.shape[1], "X-Type": pixels.dtype.name}
        body = pixels.astype(pixels.dtype.newbyteorder("<"), copy=False)
        headers = tuple((name, str(value)) for name, value in about.items())
        return Reply(200, "application/octet-stream", body.reshape(-1).view(np.uint8).data, headers)

    def _thumbnail(self, row: str) -> Reply:
        return Reply(200, "image/png", self.session.thumbnail(int(row)))


def _answer(call: Callable[..., Reply], *arguments: str) -> Reply:
    try:
        return call(*arguments)
    except Conflict as error:
        return refusal(409, str(error))
    except InputError as error:
        return refusal(400, str(error))
    except HMGError as error:  # a full disk
        return refusal(500, str(error))


def _checked(body: dict[str, Any], needed: dict[str, Any], allowed: dict[str, Any] | None = None) -> dict[str, Any]:
    """The body with each value of its type, the needed ones there and no other."""
    known = needed | (allowed or {})
    for name in needed.keys() - body.keys():
        raise InputError(f"{name} is missing")
    for name, value in body.items():
        if name not in known or isinstance(value, bool) or not isinstance(value, known[name]):
            raise InputError(f"{name[:40]!r} is not expected, or of another type")
    return body


def _refuse(constant: str) -> None:
    raise ValueError(constant)
