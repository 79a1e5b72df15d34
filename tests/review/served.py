"""A session that is served, and a client of it that can also misbehave."""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from hmg_gpu.masks import Learned, Pmg
from hmg_gpu.review import serve
from hmg_gpu.review.gallery import FolderGallery
from hmg_gpu.review.saving import Rows
from hmg_gpu.review.session import Session, open_session

EXTENT = 8


class Client:
    """Asks as the page does, unless told otherwise; keeps one connection."""

    def __init__(self, address: str, session: Session | None = None):
        self.address = address
        parts = urlsplit(address)
        self.host, self.port, self.session = parts.hostname, parts.port, session
        self.token = parts.query.removeprefix("token=")
        self.connection = http.client.HTTPConnection(self.host, self.port, timeout=20)

    @property
    def headers(self) -> dict[str, str]:
        place = f"{self.host}:{self.port}"
        cookie = f"hmg_review_{self.port}={self.token}"
        return {"Host": place, "Origin": f"http://{place}", "Cookie": cookie, "Content-Type": "application/json"}

    def ask(self, method: str, path: str, body: Any = None, **changed: str | None) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body; ``changed`` headers replace or (None) leave out the page's."""
        headers = self.headers | {name.replace("_", "-"): value for name, value in changed.items()}
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        self.connection.request(method, path, data, {name: value for name, value in headers.items() if value})
        reply = self.connection.getresponse()
        return reply.status, {name.lower(): value for name, value in reply.getheaders()}, reply.read()

    def get(self, path: str) -> Any:
        status, _, body = self.ask("GET", path)
        assert status == 200, body
        return json.loads(body)

    def post(self, path: str, body: Any, status: int = 200) -> Any:
        found, _, reply = self.ask("POST", path, body)
        assert found == status, reply
        return json.loads(reply)

    def edit(self, row: int, what: str, status: int = 200, **values: Any) -> Any:
        """A change for the revision that the server has now."""
        revision = self.get(f"/api/images/{row}")["revision"]
        return self.post("/api/edit", {"row": row, "revision": revision, "what": what, **values}, status)

    def raw(self, data: bytes, wait: float = 20) -> bytes:
        """The answer to bytes on a connection of their own; empty where it is closed without one."""
        with socket.create_connection((self.host, self.port), timeout=wait) as connection:
            connection.sendall(data)
            answer = b""
            try:
                while part := connection.recv(65536):
                    answer += part
            except ConnectionResetError:
                pass
            return answer


@contextmanager
def served(
    root: Path,
    save: Path,
    points: Rows | None = None,
    maker: Pmg | Learned | None = None,
    export: Any = None,
) -> Iterator[Client]:
    """The images of a set in the layout of tiny.write_folder."""
    gallery = FolderGallery(sorted((root / "images").iterdir()), root / "masks" if (root / "masks").is_dir() else None)
    maker = maker or Pmg(extent=EXTENT)
    with open_session(gallery, maker, save, export, points) as session, serve(session) as address:
        client = Client(address, session)
        yield client
        client.connection.close()
