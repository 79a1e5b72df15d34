"""The order of the package's floors: what may import what, and how much one folder may hold."""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# From the ground up. A module may import from its own folder and from lower floors; folders of one floor are apart.
FLOORS = (
    ("common",),
    ("plain", "data"),
    ("kernels",),
    ("models",),
    ("masks",),
    ("updater", "deployment"),
    ("evaluation",),
    ("training", "review"),
    ("commands",),
    ("__main__", "train", "eval"),
)
HEIGHT = {folder: height for height, floor in enumerate(FLOORS) for folder in floor}
FACE = "hmg_gpu"  # may import from every floor; no floor may import from it
MOST = 14  # entries of a folder

# ---- reading the sources --------------------------------------------------------------------------------------------


def read_modules() -> dict[str, Path]:
    """Every module by the name that it is imported by; a package by its own name."""
    result = {name: ROOT / f"{name}.py" for name in ("train", "eval")}
    for path in (ROOT / "hmg_gpu").rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        result[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    for path in (ROOT / "kernels").glob("*.py"):
        result[f"hmg_gpu.kernels.{path.stem}"] = path
    return result


MODULES = read_modules()


def imported(text: str, module: str, known: dict[str, Path]) -> Iterator[str]:
    """The known modules that a source imports anywhere, inside functions and for types alone included."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                is_package = known[module].name == "__init__.py"
                parts = module.split(".")
                above = parts[: len(parts) - node.level + is_package]
                base = ".".join([*above, *([base] if base else [])])
            names = [f"{base}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("import_module", "importlib.import_module"):
            names = [argument.value for argument in node.args[:1] if isinstance(argument, ast.Constant)]
        else:
            continue
        for name in names:
            found = name if name in known else name.rpartition(".")[0]  # a module, or a name out of one
            if found in known and found != module:
                yield found


GRAPH = {name: sorted(set(imported(path.read_text("utf-8"), name, MODULES))) for name, path in MODULES.items()}


def folder_of(module: str) -> str:
    """The part of the package that a module belongs to."""
    return module.removeprefix("hmg_gpu.").split(".")[0]


def allowed(module: str, other: str) -> bool:
    """Whether the first module may import the second."""
    if module == FACE:
        return True
    if other == FACE:
        return module in ("train", "eval")
    here, there = folder_of(module), folder_of(other)
    return here == there or HEIGHT[there] < HEIGHT[here]


def circles(graph: dict[str, list[str]]) -> list[list[str]]:
    """Groups of modules that all reach one another (Tarjan's strongly connected components)."""
    order: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    result: list[list[str]] = []

    def visit(name: str) -> None:
        order[name] = lowest[name] = len(order)
        stack.append(name)
        for other in graph[name]:
            if other not in order:
                visit(other)
                lowest[name] = min(lowest[name], lowest[other])
            elif other in stack:
                lowest[name] = min(lowest[name], order[other])
        if lowest[name] == order[name]:
            at = stack.index(name)
            group = stack[at:]
            del stack[at:]
            if len(group) > 1:
                result.append(sorted(group))

    for name in graph:
        if name not in order:
            visit(name)
    return result


# ---- the order ------------------------------------------------------------------------------------------------------


def test_every_module_has_a_floor() -> None:
    assert len(MODULES) > 60
    assert {folder_of(name) for name in MODULES if name != FACE} == set(HEIGHT)


def test_imports_go_down() -> None:
    wrong = [f"{name} -> {other}" for name, others in GRAPH.items() for other in others if not allowed(name, other)]
    assert not wrong, "\n".join(wrong)


def test_no_import_circle() -> None:
    found = [" <-> ".join(group) for group in circles(GRAPH)]
    assert not found, "\n".join(found)


def test_kernels_know_the_plain_path_alone() -> None:
    used = {
        folder_of(other) for name, others in GRAPH.items() if name.startswith("hmg_gpu.kernels") for other in others
    }
    assert used <= {"common", "plain", "kernels"} and "plain" in used


def test_folders_are_small() -> None:
    folders = [path for path in (ROOT / "hmg_gpu").rglob("*") if path.is_dir() and path.name != "__pycache__"]
    sizes = {
        str(folder.relative_to(ROOT)): sum(entry.name != "__pycache__" for entry in folder.iterdir())
        for folder in (ROOT / "hmg_gpu", *folders)
    }
    assert {folder: size for folder, size in sizes.items() if size > MOST} == {}


def test_every_folder_is_packaged() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]["packages"]
    found = (path.parent.relative_to(ROOT) for path in (ROOT / "hmg_gpu").rglob("__init__.py"))
    assert sorted(listed) == sorted(".".join(path.parts) for path in found)
    static = {path.parent for path in (ROOT / "hmg_gpu").rglob("*") if path.suffix in (".js", ".css", ".html")}
    data = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]["package-data"]
    assert [str(path.relative_to(ROOT / "hmg_gpu" / "review")) + "/*" for path in static] == data["hmg_gpu.review"]
    with_sources = {path.parent for path in (ROOT / "hmg_gpu").rglob("*.py")}
    assert [str(folder) for folder in with_sources if not (folder / "__init__.py").is_file()] == []


# ---- the reader itself ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("import hmg_gpu.data.store as store", ["hmg_gpu.data.store"]),
        ("from hmg_gpu.data import store, load_folder", ["hmg_gpu.data.store", "hmg_gpu.data"]),
        ("def f():\n    from hmg_gpu.data.store import write_store", ["hmg_gpu.data.store"]),
        ("if TYPE_CHECKING:\n    from hmg_gpu import MaskUpdater", ["hmg_gpu"]),
        ("from . import store", ["hmg_gpu.data.store"]),
        ("from .store import write_store", ["hmg_gpu.data.store"]),
        ("from ..common import errors", ["hmg_gpu.common.errors"]),
        ("importlib.import_module('hmg_gpu.data.store')", ["hmg_gpu.data.store"]),
        ("import torch, os.path\nfrom numpy import array", []),
    ],
)
def test_imports_are_found(text: str, expected: list[str]) -> None:
    assert list(imported(text, "hmg_gpu.data.images", MODULES)) == expected
    assert list(imported("from . import store", "hmg_gpu.data", MODULES)) == ["hmg_gpu.data.store"]


def test_what_is_allowed_and_what_is_a_circle() -> None:
    assert allowed("hmg_gpu.masks.pmg", "hmg_gpu.masks.update") and allowed(
        "hmg_gpu.masks.pmg", "hmg_gpu.common.errors"
    )
    assert not allowed("hmg_gpu.common.errors", "hmg_gpu.masks.pmg")
    assert not allowed("hmg_gpu.data.images", "hmg_gpu.plain.pmg")
    assert not allowed("hmg_gpu.masks.pmg", "hmg_gpu") and allowed("train", "hmg_gpu")
    assert circles({"a": ["b"], "b": ["c"], "c": ["a"], "d": ["a"]}) == [["a", "b", "c"]]
    assert circles({"a": ["b", "c"], "b": ["c"], "c": []}) == []
