"""Shared fixtures: seeds, the real data where it is present, and the rule that present data may not be skipped.

Environment:
    HMG_DATA         folder that holds NUAA-SIRST/ and NUDT-SIRST/ in the LESPS layout
    HMG_CHECKPOINTS  folder that holds the published LESPS weights and conformance.json

Tests that need one of them skip where it is not set. Where both are set (CI), a skipped test fails the run, unless it
is marked `gpu`, `cpu_only` or `browser`. A test that a `-m` expression leaves out is not skipped: it is not part of the
run.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    # Whether a kernel is interpreted is decided when it is decorated, so before any test module imports one.
    os.environ.setdefault("TRITON_INTERPRET", "1")

MAY_SKIP = ("gpu", "cpu_only", "browser")  # what a machine may lack, with or without the data
SKIPPED = pytest.StashKey[list[str]]()


def folder_from(variable: str) -> Path:
    """The folder that an environment variable names, or a skip that says what to set."""
    value = os.environ.get(variable)
    if not value:
        pytest.skip(f"{variable} is not set")
    folder = Path(value)
    if not folder.is_dir():
        pytest.fail(f"{variable} is set to {value}, which is not a folder")
    return folder


@pytest.fixture(scope="session")
def data_root() -> Path:
    return folder_from("HMG_DATA")


@pytest.fixture(scope="session")
def checkpoint_root() -> Path:
    return folder_from("HMG_CHECKPOINTS")


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


# ---- markers and skips ----------------------------------------------------------------------------------------------


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs a CUDA device, skipped without one")
    config.addinivalue_line("markers", "cpu_only: needs Triton's interpreter, skipped where there is a CUDA device")
    config.addinivalue_line("markers", "browser: needs Chromium and chromedriver, skipped without them")
    config.addinivalue_line("markers", "slow: left out by default")
    config.stash[SKIPPED] = []
    torch.set_num_threads(1)  # tests work on small tensors: threads that wait for each other only slow them down


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if item.get_closest_marker("cpu_only") and torch.cuda.is_available():
        pytest.skip("nothing is interpreted where there is a CUDA device")


def skips_are_failures() -> bool:
    return bool(os.environ.get("HMG_DATA")) and bool(os.environ.get("HMG_CHECKPOINTS"))


def skip_line(where: str, report: pytest.TestReport | pytest.CollectReport) -> str:
    reason = report.longrepr[-1] if isinstance(report.longrepr, tuple) else report.longrepr
    return f"{where}: {reason}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item):
    report = yield
    may_skip = hasattr(report, "wasxfail") or any(map(item.get_closest_marker, MAY_SKIP))
    if report.skipped and not may_skip:
        item.config.stash[SKIPPED].append(skip_line(item.nodeid, report))
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector):
    report = yield
    if report.skipped:  # a whole module, by importorskip
        collector.config.stash[SKIPPED].append(skip_line(collector.nodeid, report))
    return report


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node) -> None:
    """A worker of pytest-xdist has ended: what it skipped counts here."""
    stash = node.config.stash
    stash[SKIPPED] = list(dict.fromkeys([*stash[SKIPPED], *getattr(node, "workeroutput", {}).get("skipped", ())]))


def pytest_sessionfinish(session: pytest.Session) -> None:
    skipped = session.config.stash[SKIPPED]
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["skipped"] = skipped
    elif skips_are_failures() and skipped and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    if skips_are_failures() and config.stash[SKIPPED]:
        terminalreporter.section("skipped although HMG_DATA and HMG_CHECKPOINTS are set: the run fails", red=True)
        for line in config.stash[SKIPPED]:
            terminalreporter.line(line)
