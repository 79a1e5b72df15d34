"""tests/mutations.py itself: its bugs can be planted, and what it reports can be believed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests import mutations
from tests.mutations import BUGS, ROOT, Bug


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_each_bug_can_be_planted(bug: Bug, tmp_path: Path) -> None:
    try:
        place = mutations.find(bug, ROOT)
        assert mutations.modules(bug, ROOT)
    except ValueError as error:
        pytest.fail(str(error), pytrace=False)
    copy = Path(shutil.copy(place.path, tmp_path))
    mutations.plant(bug, place._replace(path=copy))
    planted = copy.read_text(encoding="utf-8")
    assert planted != place.path.read_text(encoding="utf-8")
    compile(planted, str(place.path), "exec")


SUM = Bug("sum", "x + x", "x + 1", "test_module.py")


@pytest.fixture
def small_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout of one module and one test."""
    root = tmp_path / "checkout"
    (root / "kernels").mkdir(parents=True)
    (root / "tests").mkdir()
    (root / "kernels" / "module.py").write_text("def double(x):\n    return x + x\n")
    (root / "tests" / "test_module.py").write_text(
        "from kernels import module\n\n\ndef test_double():\n    assert module.double(3) == 6\n"
    )
    monkeypatch.setattr(mutations, "ROOT", root)
    return root


@pytest.mark.slow
def test_caught_survived_and_stale(small_checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(mutations, "BUGS", (SUM, SUM._replace(name="twin", new="2 * x")))
    assert mutations.main([]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "kernels/module.py: sum: caught by tests/test_module.py::test_double",
        "kernels/module.py: twin: SURVIVED tests/test_module.py",
        "1 of 2 planted bugs caught; without them the same tests pass",
    ]


@pytest.mark.slow
def test_a_test_that_fails_anyway_catches_nothing(
    small_checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    (small_checkout / "tests" / "test_module.py").write_text("def test_always():\n    raise AssertionError\n")
    monkeypatch.setattr(mutations, "BUGS", (SUM,))
    assert mutations.main(["sum"]) == 1
    assert "test_always fails without a bug as well" in capsys.readouterr().err


def test_a_place_that_is_not_found_once_is_named(small_checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(mutations, "BUGS", (SUM._replace(old="x"),))
    assert mutations.main([]) == 1
    said = capsys.readouterr().err
    assert "sum: expected the code once, found it 2 times" in said and "kernels/module.py:2" in said
    monkeypatch.setattr(mutations, "BUGS", (SUM._replace(within="triple"),))
    assert mutations.main([]) == 1
    said = capsys.readouterr().err
    assert "once in triple(), found it 0 times (it stands at kernels/module.py:2)" in said
    monkeypatch.setattr(mutations, "BUGS", (SUM._replace(tests="test_nothing.py"),))
    assert mutations.main([]) == 1
    assert "expected one test_nothing.py under tests/, found 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text",
    [
        "def twice(x):\n    return (  # moved, renamed and wrapped\n        x +\n        x\n    )\n",
        "class Café:\n    é = 'é'; double = lambda x: x+x  # é\n",
    ],
)
def test_code_is_found_by_its_meaning(text: str, tmp_path: Path) -> None:
    (tmp_path / "hmg_gpu" / "deep").mkdir(parents=True)
    file = tmp_path / "hmg_gpu" / "deep" / "renamed.py"
    file.write_text(text, encoding="utf-8")
    mutations.plant(SUM, mutations.find(SUM, tmp_path))
    planted = file.read_text(encoding="utf-8")
    assert "(x + 1)" in planted and "x+x" not in planted
    compile(planted, "renamed.py", "exec")


def test_a_statement_is_replaced_whole(tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "a.py").write_text("def f(x):\n    x[0] = (\n        1\n    )\n    return x\n")
    bug = Bug("one", "x[0] = 1", "x[1] = 2", "test_a.py")
    mutations.plant(bug, mutations.find(bug, tmp_path))
    assert (tmp_path / "kernels" / "a.py").read_text() == "def f(x):\n    x[1] = 2\n    return x\n"
