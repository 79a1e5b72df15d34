"""Copies of the kernels with one fault each: a barrier taken out, or a plain load and store in place of an atomic."""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

KERNELS = Path(__file__).resolve().parents[2] / "kernels"

# What takes the place of an atomic: the same result where no other lane or program comes between.
PLAIN = """

@triton.jit
def plain_{name}(pointer, value, mask=None):
    old = tl.load(pointer, mask=mask)
    tl.store(pointer, {result}, mask=mask)
    return old
"""
RESULTS = {
    "add": "old + value", "min": "tl.minimum(old, value)", "max": "tl.maximum(old, value)", "or": "old | value",
    "and": "old & value", "xor": "old ^ value", "xchg": "value",
}  # fmt: skip


class Fault(NamedTuple):
    """One call in one file of the kernels."""

    file: str
    line: int
    call: str  # "debug_barrier", "atomic_add", ...
    function: str

    def __str__(self) -> str:
        return f"{self.file}-{self.function}-{self.line}-{self.call}"


def _calls(tree: ast.Module) -> Iterator[tuple[str, ast.Call]]:
    """Barriers and atomics of Triton with the function around each."""
    for function in tree.body:
        for node in ast.walk(function):
            if isinstance(node, ast.Call) and ast.unparse(node.func).startswith(("tl.debug_barrier", "tl.atomic_")):
                yield getattr(function, "name", ""), node


def all_faults() -> list[Fault]:
    """Every barrier and every atomic of the kernels."""
    return [
        Fault(path.stem, call.lineno, ast.unparse(call.func).removeprefix("tl."), function)
        for path in sorted(KERNELS.glob("*.py"))
        for function, call in _calls(ast.parse(path.read_text("utf-8")))
    ]


def plant(fault: Fault, folder: Path) -> dict[str, ModuleType]:
    """The kernels' modules by name, imported from a copy with the fault; ``folder`` is empty and its name unused."""
    package = folder.name
    for path in KERNELS.glob("*.py"):
        text = path.read_text("utf-8")
        if path.stem == fault.file:
            tree = ast.parse(text)
            (call,) = (c for f, c in _calls(tree) if c.lineno == fault.line and f == fault.function)
            kind = fault.call.removeprefix("atomic_")
            if fault.call == "debug_barrier":
                call.func, call.args = ast.parse("tl.static_assert").body[0].value, [ast.Constant(True)]
            else:
                call.func = ast.Name(f"plain_{kind}")
                call.keywords = [keyword for keyword in call.keywords if keyword.arg == "mask"]
            text = ast.unparse(tree)
            if kind in RESULTS:
                text += PLAIN.format(name=kind, result=RESULTS[kind])
        # Ops are registered once in a process: the copy's have names of their own.
        text = text.replace("hmg_gpu.kernels", package).replace("hmg_gpu::", f"{package}::")
        (folder / path.name).write_text(text, "utf-8")
    (folder / "__init__.py").touch()
    sys.path.insert(0, str(folder.parent))
    try:
        importlib.invalidate_caches()
        return {path.stem: importlib.import_module(f"{package}.{path.stem}") for path in KERNELS.glob("*.py")}
    finally:
        sys.path.remove(str(folder.parent))
