"""The server: what the page gets, what everybody else gets, and what is left after kill -9."""

from __future__ import annotations

import http.client
import itertools
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from command_tools import run
from refusal import refused
from tiny import write_folder

from hmg_gpu.data import pack_folder, read_image
from hmg_gpu.data.points.csv_file import extents
from hmg_gpu.review import server
from hmg_gpu.review.saving import read_rows
from tests.review.browser import read_until
from tests.review.served import Client, served


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "tiny")


@pytest.fixture
def client(root: Path, tmp_path: Path):
    with served(root, tmp_path / "out" / "p.csv") as client:
        yield client


# ---- the page's own requests


def test_the_page_and_its_files(client: Client) -> None:
    status, headers, body = client.ask("GET", f"/?token={client.token}", Cookie=None, Origin=None)
    assert status == 200 and b"<!doctype html>" in body
    cookie = headers["set-cookie"]
    assert cookie == f"hmg_review_{client.port}={client.token}; HttpOnly; SameSite=Strict; Path=/"
    assert "default-src 'none'" in headers["content-security-policy"] and headers["referrer-policy"] == "no-referrer"
    names = [name for name in os.listdir(Path(server.__file__).parent / "static")]
    assert len(names) == 14
    for name in names:
        status, headers, body = client.ask("GET", f"/static/{name}")
        assert status == 200 and body and headers["x-content-type-options"] == "nosniff"
        assert b"http://" not in body.replace(b"http://www.w3.org/2000/svg", b"") and b"https://" not in body
    assert client.ask("GET", "/static/app.js")[1]["content-type"].startswith("text/javascript")
    assert "Set-Cookie" not in client.ask("GET", "/")[1]


def test_pixels_come_as_they_are(client: Client, root: Path) -> None:
    for row, path in enumerate(sorted((root / "images").iterdir())):
        status, headers, body = client.ask("GET", f"/api/images/{row}/pixels")
        size = int(headers["x-height"]), int(headers["x-width"])
        assert status == 200 and headers["x-type"] == "uint8"
        assert np.array_equal(np.frombuffer(body, np.uint8).reshape(size), read_image(path))
        assert client.ask("GET", f"/api/images/{row}/thumbnail")[2].startswith(b"\x89PNG")


def test_one_annotation(client: Client) -> None:
    about = client.get("/api/images")
    assert about["names"][0] == "test0" and about["counts"] == [0] * 8 and about["extent"] == 8
    state = client.edit(0, "add", y=9, x=12, extent=None)
    number = state["points"][0]["id"]
    shown = client.post("/api/preview", {"row": 0, "y": 11, "x": 12, "extent": None})
    state = client.edit(0, "move", id=number, y=11, x=12)
    assert state["points"][0]["runs"] == shown["runs"] and state["iou"] is not None
    assert client.get(f"/api/images/0/points/{number}")["box"] == state["points"][0]["box"]
    state = client.post("/api/undo", {"number": state["undo"]["number"]})
    assert (state["points"][0]["y"], state["redo"]["what"]) == (9, "move")
    state = client.post("/api/redo", {"number": state["redo"]["number"]})
    assert client.get("/api/images/0/truth")["runs"]
    client.session.saver.write()
    assert read_rows(client.session.save) == {"test0": [(11, 12, None)]}


def test_two_tabs_do_not_overwrite_each_other(client: Client) -> None:
    first = client.edit(0, "add", y=9, x=12)
    body = {"row": 0, "revision": first["revision"], "what": "add", "y": 3}
    client.post("/api/edit", body | {"x": 3})
    found = client.post("/api/edit", body | {"x": 4}, 409)
    assert "changed in another tab" in found["error"]
    assert len(client.get("/api/images/0")["points"]) == 2
    assert "another tab" in client.post("/api/undo", {"number": first["undo"]["number"]}, 409)["error"]
    client.edit(1, "add", y=3, x=4)  # another image has a revision of its own


# ---- everybody else's

PATHS = ("/", "/api/images", "/api/images/0", "/api/images/0/pixels", "/static/app.js", "/api/doubts/0")


@pytest.mark.parametrize("path", PATHS)
def test_without_the_token_nothing(client: Client, path: str) -> None:
    right = f"hmg_review_{client.port}={client.token}"
    for cookie in (None, "", right[:-1], right + "x", right.replace(client.token, "é"), f"other={client.token}", "=;;"):
        status, _, body = client.ask("GET", path, Cookie=cookie and cookie.encode().decode("latin-1"))
        assert status == 403 and "no token" in json.loads(body)["error"], cookie
    assert client.ask("GET", path)[0] == 200
    for query in ("?token=", "?token=x", f"?token={client.token[:-1]}", f"?Token={client.token}", "?token=%00"):
        assert client.ask("GET", path + query, Cookie=None)[0] == 403
    if path != "/":  # only the first address may carry it
        assert client.ask("GET", f"{path}?token={client.token}", Cookie=None)[0] == 403


@pytest.mark.parametrize(
    "changed",
    [
        {"Host": "evil.example"}, {"Host": "127.0.0.1"}, {"Host": "127.0.0.1:1"}, {"Host": "evil.example:PORT"},
        {"Origin": "http://evil.example"}, {"Origin": "null"}, {"Origin": "http://127.0.0.1:1"},
        {"Origin": "https://127.0.0.1:PORT"}, {"Sec_Fetch_Site": "cross-site"}, {"Sec_Fetch_Site": "same-site"},
        {"Cookie": None}, {"Cookie": "hmg_review_PORT=wrong"},
    ],
)  # fmt: skip
def test_other_hosts_origins_and_sites_are_refused(client: Client, changed: dict[str, str]) -> None:
    changed = {name: value and value.replace("PORT", str(client.port)) for name, value in changed.items()}
    body = {"row": 0, "revision": 0, "what": "add", "y": 1, "x": 1}
    assert client.ask("GET", "/api/images/0", **changed)[0] == 403
    status, _, reply = client.ask("POST", "/api/edit", body, **changed)
    assert status == 403 and "error" in json.loads(reply)
    assert client.get("/api/images/0")["points"] == []


def test_changes_need_an_origin_and_json(client: Client) -> None:
    body = {"row": 0, "revision": 0, "what": "add", "y": 1, "x": 1}
    assert client.ask("POST", "/api/edit", body, Origin=None)[0] == 403
    for kind in (None, "text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
        assert client.ask("POST", "/api/edit", body, Content_Type=kind)[0] == 415
    for method in ("PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "HEAD"):
        assert client.ask(method, "/api/edit")[0] == 501
    assert client.get("/api/images/0")["points"] == []


TRAVERSALS = ("../p.csv", "..%2fp.csv", "%2e%2e/p.csv", "..\\p.csv", "/etc/passwd", "....//p.csv", "p.csv%00", "0/../0")


@pytest.mark.parametrize("name", TRAVERSALS)
def test_no_parameter_is_a_path(client: Client, name: str, root: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    for path in (f"/static/{name}", f"/{name}", f"/api/images/{name}", f"/api/images/{name}/pixels",
                 f"/api/images/0/{name}", f"/api/doubts/{name}", f"/api/images/0/points/{name}"):  # fmt: skip
        status, _, body = client.ask("GET", path)
        assert status == 404 and b"image,y,x" not in body and b"root:" not in body, path
    for body in ({"row": name}, {"row": 0, "revision": 0, "what": name}, {"out": name}, {"folder": name}):
        for path in ("/api/edit", "/api/preview", "/api/undo", "/api/export"):
            assert client.ask("POST", path, body)[0] == 400
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before
    assert client.get("/api/export") == {"state": "none"}


BAD_BODIES = (
    b"", b"{", b"[]", b"7", b"null", b'"x"', b"\xff\xfe", b"NaN", b'{"row": NaN}', b"[" * 60000, b'{"a":' * 9000,
    b'{"row": 1e999}', b'{"row": ' + b"9" * 5000 + b"}", b'{"row": true, "revision": 0, "what": "add"}',
    b'{"row": 0, "revision": 0, "what": "add", "y": 1.5, "x": 1}', b'{"row": 0.0, "revision": 0, "what": "add"}',
    b'{"row": 0, "revision": 0, "what": "add", "y": 1, "x": 1, "session": 1}',
    b'{"row": 0, "revision": [], "what": {}}',
    b'{"row": -1, "revision": 0, "what": "add", "y": 1, "x": 1}', b'{"number": null}',
)  # fmt: skip


@pytest.mark.parametrize("path", ["/api/edit", "/api/preview", "/api/undo", "/api/redo", "/api/export"])
def test_malformed_json_is_refused(client: Client, path: str) -> None:
    for body in BAD_BODIES:
        status, _, reply = client.ask("POST", path, body)
        assert status == 400 and json.loads(reply)["error"], (body[:40], reply)
    assert client.get("/api/images/0")["points"] == [] and not client.session.history.steps


def head(client: Client, path: str, *more: str, method: str = "POST") -> bytes:
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in client.headers.items()), *more]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


def test_bodies_of_a_gigabyte_are_never_read(client: Client) -> None:
    started = time.monotonic()
    for more, status in (
        (("Content-Length: 1073741824",), b"413"), (("Content-Length: 65537",), b"413"),
        (("Content-Length: 99999999999999999999999999",), b"413"), (("Content-Length: -1",), b"411"),
        (("Content-Length: ²",), b"411"), (("Transfer-Encoding: chunked",), b"411"), ((), b"411"),
    ):  # fmt: skip
        assert client.raw(head(client, "/api/edit", *more)).split()[1] == status, more
    with socket.create_connection((client.host, client.port), timeout=20) as connection:
        connection.sendall(head(client, "/api/edit", "Content-Length: 1073741824"))
        sent = 0
        with pytest.raises(OSError):  # closed by the server
            while sent < 2**30:
                sent += connection.send(bytes(2**16))
        assert sent < 2**25
    assert client.raw(head(client, "/api/images", "Content-Length: 1073741824", method="GET")).split()[1] == b"400"
    assert client.get("/api/images/0")["points"] == [] and time.monotonic() - started < 20


def test_broken_requests_leave_the_server_alive(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.Handler, "timeout", 0.3)
    for data in (
        b"\r\n\r\n", b"GET\r\n\r\n", b"GET /\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"\0" * 1000, b"A" * 100_000,
        b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 200 + b"\r\n", b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"GET http://[ HTTP/1.1\r\nHost: x\r\n\r\n", head(client, "/api/edit", "Content-Length: 50") + b"{",
        b"GET / HTTP/1.1\r\n" + b"X: " + b"y" * 70_000 + b"\r\n\r\n",
    ):  # fmt: skip
        answer = client.raw(data)
        assert not answer or b" 200 " not in answer.partition(b"\r\n")[0], data[:40]
    assert Client(client.address).get("/api/images/0")


@pytest.mark.parametrize("port", [-5, 70000])
def test_no_port_is_one_line(client: Client, port: int) -> None:
    refused(lambda: server.serve(client.session, port).__enter__(), f"port {port}: expected 0")


def test_a_thousand_connections(client: Client) -> None:
    """Those that only wait give way to one that asks; threads stay few."""
    threads = threading.active_count()
    waiting = []
    try:
        for number in range(1000):
            connection = socket.create_connection((client.host, client.port), timeout=20)
            if number % 3 == 1:
                connection.sendall(b"GET / HTTP/1.1\r\nHost: ")
            if number % 3 == 2:
                connection.sendall(head(client, "/api/images"))  # answered, and kept open
            waiting.append(connection)
        started = time.monotonic()
        other = Client(client.address)
        assert other.edit(0, "add", y=3, x=4)["points"] and time.monotonic() - started < 5
        assert threading.active_count() <= threads + server.MAX_CONNECTIONS + 4
    finally:
        for connection in waiting:
            connection.close()
    assert Client(client.address).get("/api/images/0")["points"]


def test_many_ask_at_once(client: Client) -> None:
    """Each change is made once, in some order; whoever was late is told."""
    made: list[int] = []

    def work(number: int) -> None:
        mine = Client(client.address)
        for step in range(4):
            while True:
                revision = mine.get("/api/images/5")["revision"]
                place = {"y": number, "x": step, "row": 5, "revision": revision, "what": "add"}
                status = mine.ask("POST", "/api/edit", place)[0]
                made.append(status)
                if status == 200:
                    break
                assert status == 409

    workers = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    points = client.get("/api/images/5")["points"]
    assert {(point["y"], point["x"]) for point in points} == set(itertools.product(range(8), range(4)))
    assert made.count(200) == 32


def test_an_answer_that_fails_is_one_line(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client.session.masks, "make", lambda *_: 1 / 0)
    found = client.edit(0, "add", 500, y=9, x=9)
    assert found["error"] == "ZeroDivisionError: division by zero"


# ---- the command


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True], ids=["folder", "store"])
def test_the_command_from_start_to_end(packed: bool, root: Path, tmp_path: Path) -> None:
    images = root
    if packed:
        images = tmp_path / "t.h5"
        pack_folder(root, images)
    command = ["review", "--images", images, "--points", "masks_centroid", "--save", tmp_path / "p.csv", "--extent", 8]
    words = list(map(str, [sys.executable, "-u", "-m", "hmg_gpu", *command, "--no-browser"]))
    for begun in (False, True):
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        # Whoever started the tests may ignore Ctrl-C, and a child would, too.
        process = subprocess.Popen(words, **streams, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
        try:
            first = process.stdout.readline()
            count = 6 if packed else 8
            assert first.startswith(f"{count} images, {count + begun} points, saved in {tmp_path / 'p.csv'}")
            assert ("goes on where it was left, 1 steps can be undone" in first) == begun
            client = Client(read_until(process, lambda line: re.search(r"open (\S+)", line)))
            if not begun:
                client.edit(0, "add", y=3, x=4)
            client.post("/api/export", {})
            while (found := client.get("/api/export"))["state"] == "running":
                time.sleep(0.05)
            assert found["state"] == "done" and found["changes"] == 1, found
            process.send_signal(signal.SIGINT)
            assert process.wait(20) == 130 and "written are whole" in process.stderr.read()
        finally:
            process.kill()
            process.wait()
            process.stdout.close()
            process.stderr.close()
    assert run(*shlex.split(found["command"])[1:-2], "--out", tmp_path / "again", "--device", "cpu") == 0
    pictures = list((tmp_path / "again").glob("*.png"))
    assert len(pictures) == count
    assert all(path.read_bytes() == (tmp_path / "p_masks" / path.name).read_bytes() for path in pictures)


# ---- kill -9


def killed(root: Path, save: Path, wait: float, clicks: int) -> tuple[list[tuple[int, int]], tuple[int, int] | None]:
    """A server in a process of its own, killed while somebody clicks: the clicks it answered, the one it did not."""
    read, write = os.pipe()
    process = os.fork()
    if not process:
        with served(root, save) as client:
            os.write(write, f"{client.port} {client.token}\n".encode())
            threading.Event().wait()
    os.close(write)
    try:
        with os.fdopen(read) as handle:
            port, token = handle.readline().split()
        client = Client(f"http://127.0.0.1:{port}/?token={token}")
        taken = {(point["y"], point["x"]) for point in client.get("/api/images/1")["points"]}
        free = (place for place in itertools.product(range(24), range(24)) if place not in taken)
        timer = threading.Timer(wait, os.kill, (process, signal.SIGKILL))
        answered: list[tuple[int, int]] = []
        place = None
        for _ in range(clicks):
            if len(answered) == 2:
                timer.start()  # it falls anywhere between two clicks or within one
            place = next(free)
            try:
                client.edit(1, "add", y=place[0], x=place[1])
            except (OSError, http.client.HTTPException):  # gone
                break
            answered.append(place)
            place = None
        timer.join()
        return answered, place
    finally:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)


@pytest.mark.parametrize("times", [5, pytest.param(50, marks=pytest.mark.slow)])
def test_kill_9_between_two_clicks(times: int, root: Path, tmp_path: Path, rng: np.random.Generator) -> None:
    save = tmp_path / "out" / "p.csv"
    known: set[tuple[int, int]] = set()
    interrupted = 0
    for _ in range(times):
        answered, open_click = killed(root, save, float(rng.uniform(0, 0.05)), 30)
        known |= set(answered)
        text = save.read_text()
        assert text.startswith("image,y,x,extent\n") and text.endswith("\n")
        assert list(extents(save, text)) == []
        rows = read_rows(save).get("test1", [])
        assert len(text.splitlines()) == 1 + len(rows)  # whole, whenever it was
        with served(root, save) as client:
            points = {(point["y"], point["x"]) for point in client.get("/api/images/1")["points"]}
        assert known <= points <= known | {open_click}, "an answered click was lost"
        assert {row[:2] for row in read_rows(save)["test1"]} == points
        known = points
        interrupted += open_click is not None
        for path in save.parent.glob(".*.part*"):
            path.unlink()
        if len(known) > 400:
            save.unlink()
            (save.with_suffix(".review") / "journal.jsonl").unlink()
            known = set()
    assert interrupted > times // 3
