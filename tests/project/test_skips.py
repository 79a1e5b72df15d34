"""The rule of conftest.py: with the real data a skipped test fails the run, unless it is marked gpu or browser."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import skips_are_failures

GPU = """
import pytest, torch

@pytest.mark.gpu
def test_on_the_gpu():
    assert torch.cuda.is_available()

@pytest.mark.cpu_only
def test_interpreted(monkeypatch):
    pass

@pytest.mark.browser
def test_in_a_browser():
    pytest.skip("no Chromium")

@pytest.mark.xfail
def test_known_to_fail():
    assert False
"""

SKIPS = """
import pytest

def test_that_skips():
    pytest.skip("this one cannot run")

def test_that_needs_data(data_root):
    pass
"""

MODULE = """
import pytest

pytest.importorskip("no_such_module_anywhere")
"""


WORKERS = pytest.mark.parametrize("workers", ["0", pytest.param("2", marks=pytest.mark.slow)])


def run(folder: Path, *options: str, **files: str) -> subprocess.CompletedProcess[str]:
    """Run a small suite under this project's conftest.py, both variables set to an empty folder."""
    shutil.copy(Path(__file__).parents[1] / "conftest.py", folder)
    for name, text in files.items():
        (folder / f"test_{name}.py").write_text(text)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {"HMG_DATA": str(folder), "HMG_CHECKPOINTS": str(folder), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options]
    command += ["--rootdir", str(folder), str(folder)]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


@WORKERS
def test_with_data_a_skip_fails_the_run(workers: str, tmp_path: Path) -> None:
    result = run(tmp_path, "-n", workers, gpu=GPU, skips=SKIPS, module=MODULE)
    assert result.returncode == pytest.ExitCode.TESTS_FAILED, result.stdout
    assert "skipped although HMG_DATA and HMG_CHECKPOINTS are set" in result.stdout
    assert "test_skips.py::test_that_skips: Skipped: this one cannot run" in result.stdout
    assert result.stdout.count("test_module.py: Skipped: could not import 'no_such_module_anywhere'") == 1
    assert "test_on_the_gpu:" not in result.stdout and "test_in_a_browser:" not in result.stdout
    assert "test_known_to_fail:" not in result.stdout


@WORKERS
def test_with_data_a_gpu_test_may_skip(workers: str, tmp_path: Path) -> None:
    result = run(tmp_path, "-n", workers, gpu=GPU)
    assert result.returncode == pytest.ExitCode.OK, result.stdout


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["0", "2"])
def test_with_data_a_test_may_be_left_out(workers: str, tmp_path: Path) -> None:
    """A slow test that would skip fails the run that it is part of, and no other."""
    slow = "import pytest\n\n@pytest.mark.slow\ndef test_slow():\n    pytest.skip('not here')\n"
    fast = "def test_fast():\n    pass\n"
    result = run(tmp_path, "-n", workers, "-m", "not slow", slow=slow, fast=fast)
    assert result.returncode == pytest.ExitCode.OK, result.stdout
    result = run(tmp_path, "-n", workers, "-m", "slow")
    assert result.returncode == pytest.ExitCode.TESTS_FAILED and "not here" in result.stdout, result.stdout


@pytest.mark.parametrize("missing", ["HMG_DATA", "HMG_CHECKPOINTS"])
def test_without_data_a_skip_is_fine(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    monkeypatch.setenv("HMG_DATA", "somewhere")
    monkeypatch.setenv("HMG_CHECKPOINTS", "somewhere")
    assert skips_are_failures()
    monkeypatch.delenv(missing)
    assert not skips_are_failures()
