"""tests/mutations.py itself: its texts are up to date, and what it reports can be believed."""

from __future__ import annotations

import shutil
from pathlib import Path

import mutations
import pytest
from mutations import BUGS, ROOT, Bug


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_each_bug_can_be_planted(bug: Bug, tmp_path: Path) -> None:
    (tmp_path / bug.file).parent.mkdir(parents=True)
    shutil.copy(ROOT / bug.file, tmp_path / bug.file)
    mutations.plant(bug, tmp_path)
    planted = (tmp_path / bug.file).read_text(encoding="utf-8")
    assert planted != (ROOT / bug.file).read_text(encoding="utf-8")
    compile(planted, bug.file, "exec")
    assert all((ROOT / test).is_file() for test in bug.tests.split())


@pytest.fixture
def small_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout of one module and one test."""
    root = tmp_path / "checkout"
    root.mkdir()
    (root / "module.py").write_text("def double(x):\n    return x + x\n")
    (root / "test_module.py").write_text("import module\n\n\ndef test_double():\n    assert module.double(3) == 6\n")
    monkeypatch.setattr(mutations, "ROOT", root)
    return root


def test_caught_survived_and_stale(small_checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    caught = Bug("sum", "module.py", "x + x", "x + 1", "test_module.py")
    monkeypatch.setattr(mutations, "BUGS", (caught, caught._replace(name="twin", new="2 * x")))
    assert mutations.main([]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "module.py: sum: caught by test_module.py::test_double",
        "module.py: twin: SURVIVED test_module.py",
        "1 of 2 planted bugs caught; without them the same tests pass",
    ]
    monkeypatch.setattr(mutations, "BUGS", (caught._replace(old="x"),))
    assert mutations.main([]) == 1
    assert "sum: expected the text once in module.py, found it 3 times" in capsys.readouterr().err


def test_a_test_that_fails_anyway_catches_nothing(
    small_checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    (small_checkout / "test_module.py").write_text("def test_always():\n    raise AssertionError\n")
    monkeypatch.setattr(mutations, "BUGS", (Bug("sum", "module.py", "x + x", "x + 1", "test_module.py"),))
    assert mutations.main(["sum"]) == 1
    assert "test_always fails without a bug as well" in capsys.readouterr().err
