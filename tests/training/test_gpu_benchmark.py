"""The one-GPU benchmark, its lines tried on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(out: Path, only: str) -> dict:
    command = [sys.executable, "benchmarks/gpu/run.py", "--out", str(out), "--device", "cpu", "--tiny", "--only", only]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    rows = json.loads((out / "gpu.json").read_text())["rows"]
    assert (out / "gpu.md").read_text().count("\n|") == len(rows) + 2
    return rows


def test_exactness_and_resume_under_each_stage(tmp_path):
    rows = run(tmp_path, "exactness|resume")
    assert len(rows) == 6 and all(row["ok"] for row in rows.values())


@pytest.mark.slow
def test_policies_are_measured(tmp_path):
    rows = run(tmp_path, "batch")
    assert len(rows) == 6
    for row in rows.values():
        assert row["planned GiB"] > 0 and row["samples/s"] > 0 and row["operations"] > 100
