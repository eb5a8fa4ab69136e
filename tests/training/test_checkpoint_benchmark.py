"""The benchmark of checkpoints, which stands in for an engine by hand: it follows what a snapshot looks at."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_a_small_model_is_measured(tmp_path):
    command = [sys.executable, "benchmarks/checkpoint.py", "--parameters", "2e5", "--rounds", "2", "--processes", "1"]
    done = subprocess.run(
        [*command, "--folder", str(tmp_path)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "stall / write: " in done.stdout
