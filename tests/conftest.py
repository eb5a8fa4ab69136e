"""Tests marked `sim` run where LIBERO can be imported and can render; a test that fails is named at once."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Generator, Iterator
from functools import cache
from pathlib import Path

import pytest

# A shell starts what runs in the background with Ctrl-C ignored, and every process that a test starts would inherit it.
signal.signal(signal.SIGINT, signal.default_int_handler)

_TRY = """
from maps_ray.evaluation.simulators.libero import import_libero
import_libero()
import mujoco
mujoco.GLContext(64, 64).make_current()
"""


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("sim") and (fault := _simulator_fault()):
        pytest.skip(fault)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A suite that is cut off, as by a time limit, has said by then what failed, why, and after how long."""
    report = yield
    if report.failed:
        crash = getattr(report.longrepr, "reprcrash", None)
        lines = (crash.message if crash else str(report.longrepr)).splitlines() or [""]
        reporter = item.config.pluginmanager.get_plugin("terminalreporter")
        reporter.write_line(f"\nFAILED {report.nodeid} ({report.when}, {report.duration:.0f} s): {lines[0][:300]}")
    return report


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder with a disk of 1 MiB of its own; skips where this user may not mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    try:
        subprocess.run(command, check=True, capture_output=True, timeout=30)
    except (OSError, subprocess.SubprocessError) as error:
        pytest.skip(f"no disk of 1 MiB can be mounted here: {error}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True, timeout=30)


@cache
def _simulator_fault() -> str | None:
    """Why LIBERO does not run here; None when it does. Tried in a process of its own: it may crash."""
    done = subprocess.run([sys.executable, "-c", _TRY], capture_output=True, text=True, timeout=120, check=False)
    lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
    return None if done.returncode == 0 else f"LIBERO does not run here: {lines[-1]}"
