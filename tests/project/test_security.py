"""Nothing in a file runs, is followed or is fetched, and nothing is written but what was asked for."""

from __future__ import annotations

import ast
import json
import os
import pickle
import re
import struct
import sys
import time
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from refusal import refused

from hmg_gpu.commands import main as cli
from hmg_gpu.common.provenance import provenance
from hmg_gpu.data import read_points
from hmg_gpu.models.weights import load_model
from hmg_gpu.review import server
from tests.torture.fuzz import Watch, told

ROOT = Path(__file__).parents[2]
SOURCES = sorted(path for folder in ("hmg_gpu", "kernels") for path in (ROOT / folder).rglob("*.py"))
SOURCES += [ROOT / "train.py", ROOT / "eval.py"]

# ---- the sources ----------------------------------------------------------------------------------------------------

NETWORK = {"socket", "ssl", "http", "ftplib", "smtplib", "asyncio", "requests", "httpx", "aiohttp", "urllib3", "xmlrpc"}
SERVES = {  # the one file that answers, and what it needs for that
    "hmg_gpu/review/server.py": {
        "imports http.cookies.CookieError",
        "imports http.cookies.SimpleCookie",
        "imports http.server.BaseHTTPRequestHandler",
        "imports http.server.ThreadingHTTPServer",
    }
}
UNPICKLERS = {"dill", "joblib", "cloudpickle", "shelve", "marshal", "_pickle"}
RUNS_CODE = {"eval", "exec", "compile", "__import__"}


def imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def faults(text: str) -> list[str]:
    """What a source may not do: the network, unpickling, code from text, XML by a parser that follows entities."""
    tree, found = ast.parse(text), []
    for name in imports(tree):
        first = name.split(".")[0]
        if first in NETWORK | UNPICKLERS or name.startswith(("urllib.request", "torch.hub", "xml.dom", "xml.sax")):
            found.append(f"imports {name}")
        if name.startswith("xml.etree") and name.rpartition(".")[2] not in ("Element", "TreeBuilder"):
            found.append(f"imports {name}")
    for name, call in calls(tree):
        given = {word.arg: ast.unparse(word.value) for word in call.keywords}
        if name in RUNS_CODE or re.fullmatch(r"pickle\.(load|loads|Unpickler)|yaml\..*load|torch\.hub\..*", name):
            found.append(f"calls {name}")
        if name == "torch.load" and given.get("weights_only") != "True":
            found.append("torch.load without weights_only=True")
        if name in ("np.load", "numpy.load") and given.get("allow_pickle", "False") != "False":
            found.append("np.load with pickle")
        if name.endswith(("system", "popen")) or (
            name.startswith("subprocess.") and given.get("shell", "False") != "False"
        ):
            found.append(f"calls {name} by a shell")
    return found


def test_no_source_unpickles_or_reaches_out() -> None:
    assert len(SOURCES) > 30
    found = {str(path.relative_to(ROOT)): set(faults(path.read_text())) for path in SOURCES}
    assert {name: said for name, said in found.items() if said} == SERVES


def test_the_server_listens_to_this_machine_alone() -> None:
    tree = ast.parse((ROOT / "hmg_gpu/review/server.py").read_text())
    (binds,) = [call for name, call in calls(tree) if name == "super().__init__"]
    assert ast.unparse(binds.args[0]) == "(HOST, port)" and server.HOST == "127.0.0.1"
    for path in (ROOT / "hmg_gpu/review/static").iterdir():
        text = path.read_text().replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"\b(https?|wss?):|\beval\b|new Function|//[a-z]+\.[a-z]", text), path.name


@pytest.mark.parametrize(
    "text",
    [
        "import pickle\npickle.load(f)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
        "from urllib.request import urlopen",
        "import socket",
        "from xml.etree.ElementTree import parse",
        "eval(text)",
        "os.system(text)",
        "subprocess.run(text, shell=True)",
    ],
)
def test_the_search_finds_what_it_looks_for(text: str) -> None:
    assert faults(text)


# ---- hostile files --------------------------------------------------------------------------------------------------


class Bomb:
    """Unpickled, it makes a folder."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("form", ["zip", "legacy", "bare pickle", "state dict"])
def test_a_pickle_in_a_checkpoint_is_never_run(form: str, tmp_path: Path) -> None:
    path, target = tmp_path / "weights.pth", tmp_path / "ran"
    content = {"state_dict": {"weight": torch.ones(2), "bomb": Bomb(target)}} if form == "state dict" else Bomb(target)
    if form == "bare pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form != "legacy")
    refused(lambda: load_model(path), "weights.pth", "never run here")
    assert not target.exists()
    pickle.loads(pickle.dumps(Bomb(target)))
    assert target.exists()  # it would have


def test_a_zip_bomb_of_weights_is_never_unpacked(tmp_path: Path) -> None:
    torch.save({"weight": torch.ones(2)}, tmp_path / "small.pth")
    with zipfile.ZipFile(tmp_path / "small.pth") as small, zipfile.ZipFile(tmp_path / "w.pth", "w") as bomb:
        for name in small.namelist():
            packed = name.endswith("data/0")
            bomb.writestr(name, bytes(2**22) if packed else small.read(name), zipfile.ZIP_DEFLATED if packed else 0)
    refused(lambda: load_model(tmp_path / "w.pth"), "w.pth", "data/0 is compressed; write it by torch.save")


def test_billion_laughs(tmp_path: Path) -> None:
    entities = '<!ENTITY e0 "ha">' + "".join(f'<!ENTITY e{i + 1} "{f"&e{i};" * 10}">' for i in range(10))
    path = tmp_path / "a.xml"
    path.write_text(f"<!DOCTYPE annotations [{entities}]><annotations><image name='&e10;'/></annotations>")
    started = time.process_time()
    refused(lambda: read_points(path), "a.xml", "<!DOCTYPE> and entities are refused")
    assert time.process_time() - started < 1


def png(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds next to nothing."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


# ---- commands -------------------------------------------------------------------------------------------------------

WATCH: list[Watch] = []  # an audit hook stays as long as its process, so there is one


@pytest.fixture
def watch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Watch:
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    if not WATCH:
        WATCH.append(Watch(tmp_path / "out"))
    WATCH[0].allowed = os.fspath(tmp_path / "out")
    WATCH[0].take()
    provenance()  # asks git for the commit, once in a process
    return WATCH[0]


def test_the_watch_hears(watch: Watch, tmp_path: Path) -> None:
    with watch:
        (tmp_path / "elsewhere").write_text("x")
        (tmp_path / "made").mkdir()
        (tmp_path / "elsewhere").read_text()
    assert [line.split()[0] for line in watch.take()] == ["open", "os.mkdir"]
    with watch:
        pickle.loads(pickle.dumps(Bomb(tmp_path / "out")))
    assert any(line.startswith("pickle.find_class") for line in watch.take())


@pytest.mark.parametrize("name", ["../../evil", "/tmp/evil", "..\\..\\evil", "a/../../evil", "evil\0.png", "", ".."])
def test_paths_in_annotations_write_nothing_elsewhere(name: str, watch: Watch, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for stem in ("a", "evil"):
        Image.fromarray(np.full((20, 20), 60, np.uint8)).save(tmp_path / "images" / f"{stem}.png")
    images = [{"id": 1, "file_name": name, "height": 20, "width": 20}, {"id": 2, "file_name": "a.png"}]
    annotations = [{"image_id": number, "keypoints": [5, 6, 2]} for number in (1, 2)]
    (tmp_path / "points.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    before = {path for path in tmp_path.rglob("*") if not path.is_relative_to(tmp_path / "out")}
    places = ("--images", tmp_path / "images", "--points", tmp_path / "points.json", "--out", tmp_path / "out")
    with watch:
        told(cli.main, ["masks", *map(str, places), "--coco", "rle", "--device", "cpu", "--threads", "1"])
    assert watch.take() == []
    assert {path for path in tmp_path.rglob("*") if not path.is_relative_to(tmp_path / "out")} == before
    assert {path.name for path in tmp_path.glob("out/*.png")} <= {"a.png", "evil.png"}


def test_an_image_that_claims_ten_gigabytes(watch: Watch, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(png(100_000, 100_000))
    (tmp_path / "points.csv").write_text("image,y,x\na,1,1\n")
    places = ("--images", tmp_path / "images", "--points", tmp_path / "points.csv", "--out", tmp_path / "out")
    with watch:
        assert not told(cli.main, ["masks", *map(str, places), "--device", "cpu"])
    assert watch.take() == [] and not (tmp_path / "out").exists()
