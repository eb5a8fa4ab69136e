"""Tests marked `sim` run where LIBERO can be imported and can render."""

from __future__ import annotations

import subprocess
import sys
from functools import cache

import pytest

_TRY = """
from maps_ray.evaluation.simulators.libero import import_libero
import_libero()
import mujoco
mujoco.GLContext(64, 64).make_current()
"""


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("sim") and (fault := _simulator_fault()):
        pytest.skip(fault)


@cache
def _simulator_fault() -> str | None:
    """Why LIBERO does not run here; None when it does. Tried in a process of its own: it may crash."""
    done = subprocess.run([sys.executable, "-c", _TRY], capture_output=True, text=True, timeout=120, check=False)
    lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
    return None if done.returncode == 0 else f"LIBERO does not run here: {lines[-1]}"
