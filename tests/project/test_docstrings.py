"""Examples in docstrings: they run and give what they say, and every public name has one."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import hmg_gpu

FACES = (
    "hmg_gpu",
    *(f"hmg_gpu.{name}" for name in ("data", "models", "training", "evaluation", "updater", "deployment")),
)
OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def module_names() -> Iterator[str]:
    yield "hmg_gpu"
    for found in pkgutil.walk_packages(hmg_gpu.__path__, "hmg_gpu."):
        if not found.name.endswith("__main__"):  # runs when it is imported
            yield found.name


class Finder(doctest.DocTestFinder):
    """Also finds what is wrapped by a decorator such as torch.no_grad."""

    def _from_module(self, module: ModuleType | None, object: object) -> bool:
        return super()._from_module(module, inspect.unwrap(object))


def examples(module: ModuleType) -> list[doctest.DocTest]:
    return [test for test in Finder(exclude_empty=True).find(module) if test.examples]


@pytest.mark.parametrize("name", list(module_names()))
def test_examples_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    runner = doctest.DocTestRunner(optionflags=OPTIONS, verbose=False)
    said: list[str] = []
    for test in examples(importlib.import_module(name)):
        runner.run(test, out=said.append)
    assert runner.summarize(verbose=False).failed == 0, "".join(said)


def public(name: str) -> Iterator[tuple[str, object]]:
    """The functions and classes that a module offers: those of its ``__all__``, or its own without an underscore."""
    module = importlib.import_module(name)
    own = [key for key, value in vars(module).items() if getattr(value, "__module__", "") == name and key[0] != "_"]
    for key in getattr(module, "__all__", own):
        value = getattr(module, key)
        if inspect.isclass(value) or inspect.isroutine(inspect.unwrap(value)):
            yield f"{name}.{key}", value


def test_every_public_name_has_an_example() -> None:
    """Those of the modules that people import from; an example in a method counts for its class."""
    missing = []
    for face in FACES:
        for name, value in public(face):
            home = f"{value.__module__}.{value.__qualname__}"
            found = [test.name for test in examples(importlib.import_module(value.__module__))]
            if not any(one == home or one.startswith(f"{home}.") for one in found):
                missing.append(name)
    assert not missing, "without an example:\n" + "\n".join(missing)


def test_the_faces_are_not_empty() -> None:
    assert {face: len(list(public(face))) for face in FACES if not list(public(face))} == {}
