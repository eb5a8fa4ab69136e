"""Runs and a sweep under random kills, as `benchmarks/chaos.py` does it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_twenty_kills_lose_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/chaos.py", "--kills", "20", "--seed", "0"]
    done = subprocess.run(
        [*command, "--json", str(tmp_path / "chaos.json")], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads((tmp_path / "chaos.json").read_text())
    assert len(found["kills"]) == 20 and found["faults"] == [] and len({k["victim"] for k in found["kills"]}) >= 3
