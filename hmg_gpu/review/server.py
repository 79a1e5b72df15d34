"""HTTP on 127.0.0.1 for one person: a token, checked hosts and origins, and a limit on everything.

A request is answered only when it names this server in Host, carries the token (in the first address, then in a cookie
that scripts cannot read and other sites' requests do not carry) and comes from this page. Bodies are small or refused
unread; connections are few, and a new one takes the place of the one that was idle longest.
"""

from __future__ import annotations

import hmac
import secrets
import socketserver
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.cookies import CookieError, SimpleCookie
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from hmg_gpu.common.errors import HMGError, InputError
from hmg_gpu.review.routes import Reply, Routes, refusal
from hmg_gpu.review.session import Session

HOST = "127.0.0.1"
MAX_BODY = 2**16  # bytes
MAX_CONNECTIONS = 64
POLL = 0.05  # seconds until the end is noticed
SECONDS = 10  # for a request to arrive, and an idle connection to be kept
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = (
    ("Content-Security-Policy", POLICY),
    ("X-Content-Type-Options", "nosniff"),
    ("X-Frame-Options", "DENY"),
    ("Referrer-Policy", "no-referrer"),
    ("Cross-Origin-Resource-Policy", "same-origin"),
    ("Cross-Origin-Opener-Policy", "same-origin"),
    ("Cache-Control", "no-store"),
)


@contextmanager
def serve(session: Session, port: int = 0) -> Iterator[str]:
    """Answer for a session in threads; yields the address, with its token.

    Args:
        port: 0: any that is free.

    Raises:
        HMGError: the port is taken. InputError: no port.
    """
    if not 0 <= port <= 65535:
        raise InputError(f"port {port}: expected 0 (any that is free) to 65535; check --port")
    try:
        server = Server(session, port)
    except OSError as error:
        raise HMGError(f"port {port}: cannot be used ({error.strerror}); leave out --port") from error
    thread = threading.Thread(target=server.serve_forever, args=(POLL,), daemon=True, name="server")
    thread.start()
    try:
        yield server.address
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class Server(ThreadingHTTPServer):
    """Takes up to ``MAX_CONNECTIONS`` at a time."""

    daemon_threads = True
    block_on_close = False
    allow_reuse_address = False
    request_queue_size = 128

    def __init__(self, session: Session, port: int):
        self.routes = Routes(session)
        self.token = secrets.token_urlsafe(32)
        self._open: set[Any] = set()
        self._idle: dict[Any, None] = {}  # connections without a request at work, the longest idle first
        self._free = threading.BoundedSemaphore(MAX_CONNECTIONS)
        self._lock = threading.Lock()
        super().__init__((HOST, port), Handler)
        self.hosts = {f"{name}:{self.server_port}" for name in (HOST, "localhost")}
        self.cookie = f"hmg_review_{self.server_port}"

    @property
    def address(self) -> str:
        return f"http://{HOST}:{self.server_port}/?token={self.token}"

    def server_bind(self) -> None:
        """Without looking up the name of the machine, as http.server would."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = HOST, self.server_address[1]

    def process_request(self, request: Any, client_address: Any) -> None:
        """A thread for the connection, in the place of the one that is idle longest where there are too many."""
        if not self._free.acquire(blocking=False):
            with self._lock:
                oldest = next(iter(self._idle), None)
                self._idle.pop(oldest, None)
            if oldest is not None:
                with suppress(OSError):
                    oldest.shutdown(2)
            if not self._free.acquire(timeout=1):
                self.shutdown_request(request)
                return
        with self._lock:
            self._open.add(request)
        try:
            super().process_request(request, client_address)
        except RuntimeError:  # no more threads: socketserver closes the connection
            self._leave(request)
            raise

    def server_close(self) -> None:
        """End every connection, too."""
        super().server_close()
        with self._lock:
            for connection in self._open:
                with suppress(OSError):
                    connection.shutdown(2)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._leave(request)

    def _leave(self, request: Any) -> None:
        with self._lock:
            self._idle.pop(request, None)
            self._open.discard(request)
        self._free.release()

    def idle(self, connection: Any, is_idle: bool) -> None:
        """Note whether a connection waits for its next request."""
        with self._lock:
            self._idle.pop(connection, None)
            if is_idle:
                self._idle[connection] = None

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection that broke is the other side's affair."""


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    server: Server
    protocol_version = "HTTP/1.1"
    server_version = "hmg-gpu"
    sys_version = ""
    timeout = SECONDS
    disable_nagle_algorithm = True
    wbufsize = MAX_BODY  # head and body in one packet

    def handle_one_request(self) -> None:
        self.server.idle(self.connection, True)
        super().handle_one_request()

    def parse_request(self) -> bool:
        """Whoever sends a head slowly stays idle, and has to go for others."""
        result = super().parse_request()
        self.server.idle(self.connection, False)
        return result

    def do_GET(self) -> None:
        if "Content-Length" in self.headers or "Transfer-Encoding" in self.headers:
            return self._close_with(refusal(400, "expected no body"))
        return self._answer(self.server.routes.get)

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length", "")
        if "Transfer-Encoding" in self.headers or not (length.isascii() and length.isdecimal()):
            return self._close_with(refusal(411, "expected a Content-Length"))
        if len(length) > 9 or int(length) > MAX_BODY:
            return self._close_with(refusal(413, f"expected at most {MAX_BODY} bytes"))
        if self.headers.get("Content-Type", "").partition(";")[0].strip() != "application/json":
            return self._close_with(refusal(415, "expected application/json"))
        if "Origin" not in self.headers:
            return self._close_with(refusal(403, "expected an Origin"))
        return self._answer(lambda path: self._post(path, int(length)))

    def _post(self, path: str, length: int) -> Reply:
        body = self.rfile.read(length)
        if len(body) < length:
            self.close_connection = True
            return refusal(400, "the body ended early")
        return self.server.routes.post(path, body)

    def _answer(self, call: Callable[[str], Reply]) -> None:
        """Call for the path, where the request may ask at all."""
        try:
            address = urlsplit(self.path)
            query = parse_qs(address.query, max_num_fields=8)
        except ValueError:
            return self._close_with(refusal(400, "no valid address"))
        if why := self._refused(address.path, query):
            return self._close_with(refusal(403, why))
        try:
            reply = call(address.path)
        except TimeoutError:
            raise
        except Exception as error:  # the server lives on, and the page says what happened
            reply = refusal(500, f"{type(error).__name__}: {error}"[:300])
        if self._by_address(address.path, query):
            cookie = f"{self.server.cookie}={self.server.token}; HttpOnly; SameSite=Strict; Path=/"
            reply = reply._replace(headers=(*reply.headers, ("Set-Cookie", cookie)))
        return self._send(reply)

    def _refused(self, path: str, query: dict[str, list[str]]) -> str:
        """Why a request is not answered."""
        if self.headers.get("Host", "") not in self.server.hosts:
            return "another Host"
        origin = self.headers.get("Origin")
        if origin is not None and origin not in {f"http://{host}" for host in self.server.hosts}:
            return "another Origin"
        if self.headers.get("Sec-Fetch-Site", "none") not in ("none", "same-origin") and path != "/":
            return "another site"
        if not self._by_address(path, query) and not self._is_token(self._cookie()):
            return "no token: open the address that hmg-gpu review printed"
        return ""

    def _by_address(self, path: str, query: dict[str, list[str]]) -> bool:
        """Whether the address itself carries the token, which only the page's own may."""
        return path == "/" and self._is_token(query.get("token", [""])[0])

    def _is_token(self, text: str) -> bool:
        return hmac.compare_digest(text.encode(errors="replace"), self.server.token.encode())

    def _cookie(self) -> str:
        try:
            found = SimpleCookie(self.headers.get("Cookie", "")).get(self.server.cookie)
        except CookieError:
            return ""
        return found.value if found else ""

    def _close_with(self, reply: Reply) -> None:
        self.close_connection = True
        self._send(reply)

    def _send(self, reply: Reply) -> None:
        if self.request_version == "HTTP/0.9":  # knows no head, and so no token
            return
        self.send_response(reply.status)
        for name, value in (
            *HEADERS,
            *reply.headers,
            ("Content-Type", reply.kind),
            ("Content-Length", len(reply.body)),
        ):
            self.send_header(name, str(value))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(reply.body)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What http.server itself refuses, in the same form."""
        self._close_with(refusal(code, message or "refused"))

    def log_message(self, format: str, *values: Any) -> None:
        """Nothing: the console belongs to the command."""
