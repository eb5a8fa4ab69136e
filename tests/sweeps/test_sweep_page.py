"""A sweep in MLflow's own pages, read by a real browser."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest

from maps_ray.sweeps.schedules import Plan
from maps_ray.tracking import replay
from maps_ray.tracking.store import free_port

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture
def page(written_sweep: Plan, tmp_path: Path) -> Iterator[str]:
    """Address of a server that shows the sweep."""
    assert replay(written_sweep.folder).complete
    port = free_port(21000)
    options = ["--workers", "1", "--port", str(port), "--backend-store-uri", written_sweep.tracking_uri]
    with open(tmp_path / "server.log", "wb") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "server", *options],
            env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 90
        while True:
            try:
                urllib.request.urlopen(f"{address}/health", timeout=1).close()
                break
            except OSError:
                assert time.monotonic() < deadline, (tmp_path / "server.log").read_text()[-2000:]
                time.sleep(0.2)
        yield address
    finally:
        os.killpg(server.pid, 15)
        server.wait()


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="needs chromium")
def test_the_parallel_coordinates_show_every_module(page: str, written_sweep: Plan, tmp_path: Path) -> None:
    client = mlflow.MlflowClient(page)
    runs = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    parent = next(run for run in runs if run.info.run_name == "swept")
    trials = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert len(trials) == 8
    chosen = urllib.parse.quote(json.dumps([run.info.run_id for run in trials]))
    experiment = urllib.parse.quote(json.dumps([trials[0].info.experiment_id]))
    address = f"{page}/#/compare-runs?runs={chosen}&experiments={experiment}"
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}", "--window-size=1400,1000"]
    shown = subprocess.run(
        [str(BROWSER), *options, "--virtual-time-budget=30000", "--dump-dom", address],
        capture_output=True,
        text=True,
        timeout=200,
        check=True,
    ).stdout
    assert "Comparing 8 Runs" in shown and "Parallel Coordinates Plot" in shown
    plot = shown[shown.index("parcoords") :]
    # The axes that MLflow chooses by itself: strengths of modules, unabridged.
    assert "lambda_dinov2" in plot and "DSPEL-001-s0" in shown
