"""bench.gpu_check keeps what it has when a check hangs, crashes, ends early, says nothing or talks nonsense."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench import gpu_check
from bench.gpu_check import CHECKS, ROOT, Check

# A module of checks that need no GPU; each ends in its own way.
FAKE = """
import os, signal, subprocess, sys, time
name, result = sys.argv[1], sys.argv[sys.argv.index("--result") + 1]
def hang():
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])  # holds stdout open
    print("before", flush=True)
    time.sleep(600)
def deaf():
    signal.signal(signal.SIGABRT, signal.SIG_IGN)
    time.sleep(600)
def write(text):
    with open(result, "w") as file:
        file.write(text)
def machine(): write('{"device": "A Test Device"}')
def good(): write('{"figure": 7}')
def crash(): os.kill(os.getpid(), signal.SIGSEGV)
def early(): sys.exit(3)
def fail(): print("a line", flush=True); raise RuntimeError("replay 3 differs from eager")
def silent(): pass
def garbage(): write("{'not': json")
def absent(): write('{"device": null}')
def broken(): raise RuntimeError("driver and library differ")
globals()[name]()
"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "fake_checks.py").write_text(FAKE)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    return "fake_checks"


def test_every_way_to_end_costs_its_own_result_alone(fake: str, tmp_path: Path) -> None:
    names = ("crash", "hang", "deaf", "early", "fail", "silent", "garbage", "good")
    checks = tuple(Check(name, 6 if name in ("hang", "deaf") else 60, fake) for name in names)
    path, report = tmp_path / "results" / "found.json", {"machine": {}, "checks": {}}
    gpu_check.run_all(checks, report, path, "cuda", 400)
    found = json.loads(path.read_text())["checks"]
    states = {name: one["state"] for name, one in found.items()}
    assert states == {
        "crash": "crashed: SIGSEGV",
        "hang": "hung: ended after 6 s",
        "good": "passed",
        "deaf": "hung: ended after 6 s",
        "early": "failed: exit code 3",
        "fail": "failed: exit code 1",
        "silent": "no result: it ended with exit code 0 and wrote nothing",
        "garbage": states["garbage"],
    }
    assert states["garbage"].startswith("no result: what it wrote is no JSON (")
    assert found["good"]["result"] == {"figure": 7}
    assert "replay 3 differs" in found["fail"]["stderr"] and found["fail"]["stdout"] == "a line"
    assert "in hang" in found["hang"]["stderr"] and "before" in found["hang"]["stdout"]  # where it hangs
    assert "Segmentation fault" in found["crash"]["stderr"] and "in crash" in found["crash"]["stderr"]
    assert all(one["seconds"] > 0 and "returncode" in one for one in found.values())
    assert not _running("time.sleep(600)")


def _running(words: str) -> list[str]:
    """Command lines of processes of this test that hold the words."""
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            text = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if words in text and str(os.getpid()) != path.parent.name:
            lines.append(text)
    return lines


def test_results_are_written_after_each_check_and_the_budget_ends_the_run(
    fake: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[int] = []
    plain = gpu_check.write
    monkeypatch.setattr(gpu_check, "write", lambda path, report: (plain(path, report), written.append(
        len(json.loads(path.read_text())["checks"]))))  # fmt: skip
    report = {"machine": {}, "checks": {}}
    checks = (Check("good", 60, fake), Check("hang", 600, fake), Check("crash", 60, fake))
    start = time.monotonic()
    gpu_check.run_all(checks, report, tmp_path / "found.json", "cuda", 20)
    assert time.monotonic() - start < 20 + 2 * gpu_check.GRACE + 10
    assert written == [1, 2, 3]
    assert report["checks"]["hang"]["state"].startswith("hung: ended after")
    assert report["checks"]["crash"]["state"] == "not run: the budget of 20 s is spent"


@pytest.mark.parametrize(("kind", "code"), [("machine", 1), ("absent", 0), ("broken", 1)])
def test_the_command(kind: str, code: int, fake: str, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(gpu_check, "CHECKS", (Check("good", 60, fake), Check("fail", 60, fake)))
    plain = gpu_check.run_check
    monkeypatch.setattr(
        gpu_check, "run_check",
        lambda check, *rest: plain(Check(kind, 60, fake) if check.name == "machine" else check, *rest),
    )  # fmt: skip
    path = tmp_path / "found.json"
    assert gpu_check.main(["--json", str(path)]) == code
    shown = capsys.readouterr()
    if kind == "absent":
        assert shown.out.startswith("no GPU here") and not path.exists()
        return
    found = json.loads(path.read_text())
    if kind == "broken":
        assert list(found["checks"]) == ["machine"] and "driver and library differ" in shown.err
    else:
        assert [one["state"] for one in found["checks"].values()] == ["passed", "passed", "failed: exit code 1"]
        assert found["machine"] == {"device": "A Test Device"} and str(path) in shown.out


def test_the_parent_imports_no_library_of_a_gpu() -> None:
    code = (
        "import sys, bench.gpu_check; print([n for n in ('torch', 'triton', 'numpy', 'hmg_gpu') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_check_is_a_function_and_short_enough() -> None:
    for check in CHECKS:
        tree = ast.parse((ROOT / f"{check.module.replace('.', '/')}.py").read_text("utf-8"))
        functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert [argument.arg for argument in functions[check.name].args.args] == ["device"]
        assert check.seconds <= 120
    assert CHECKS[0].name == "smoke" and len({check.name for check in CHECKS}) == len(CHECKS)


@pytest.mark.slow
def test_every_check_is_rehearsed_on_the_cpu(tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    done = subprocess.run(
        [sys.executable, "-m", "bench.gpu_check", "--rehearse", "--json", str(path), "--budget", "2000"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    checks = json.loads(path.read_text())["checks"]
    assert {name: one["state"] for name, one in checks.items() if one["state"] != "passed"} == {}, done.stderr
    assert list(checks) == ["machine", *(check.name for check in CHECKS)] and done.returncode == 0
