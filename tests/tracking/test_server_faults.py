"""A real MLflow server that is killed in mid-run, or down from the start."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from maps_ray.tracking import Tracker, replay


def _assert_never_waited(durations: list[float]) -> None:
    """Not for the network: a busy machine may still take the processor away from a call now and then."""
    durations = sorted(durations)
    assert durations[int(0.99 * len(durations))] < 0.05, durations[-10:]
    assert durations[-1] < 1.0


def _create(run_dir: Path, uri: str) -> Tracker:
    return Tracker.create(run_dir, uri=uri, experiment="server", run_name="run", params={"lr": 0.1})


def _train(tracker: Tracker, steps: range) -> list[float]:
    """Logs `steps` at 5 ms each; returns how long each call took, in seconds."""
    durations = []
    for step in steps:
        start = time.perf_counter()
        tracker.metrics(step, {"train/loss": 1.0 / (step + 1), "drift/siglip": float(step)})
        durations.append(time.perf_counter() - start)
        time.sleep(0.005)
    return durations


def test_server_killed_in_mid_run(tmp_path: Path, server: Any, mlflow: Any) -> None:
    tracker = _create(tmp_path / "run", server.uri)
    durations = _train(tracker, range(100))
    run_id = mlflow.wait_until(lambda: tracker.cursor.run_id)
    mlflow.wait_until(lambda: mlflow.points(server.uri, run_id, "train/loss"))
    server.kill()
    durations += _train(tracker, range(100, 300))
    mlflow.wait_until(lambda: tracker.cursor.error)
    server.start()
    durations += _train(tracker, range(300, 400))
    tracker.text("name: run\n", "spec.yaml")
    assert tracker.finish("FINISHED", wait_s=60), (tmp_path / "run/tracking/shipper.log").read_text()
    assert mlflow.points(server.uri, run_id, "train/loss") == [(step, 1.0 / (step + 1)) for step in range(400)]
    assert mlflow.points(server.uri, run_id, "drift/siglip") == [(step, float(step)) for step in range(400)]
    assert mlflow.client(server.uri).get_run(run_id).info.status == "FINISHED"
    assert [file.path for file in mlflow.client(server.uri).list_artifacts(run_id)] == ["environment.json", "spec.yaml"]
    _assert_never_waited(durations)


def test_server_down_from_the_start_then_replay(tmp_path: Path, server: Any, mlflow: Any) -> None:
    server.kill()
    start = time.perf_counter()
    tracker = _create(tmp_path / "run", server.uri)
    assert time.perf_counter() - start < 2
    _assert_never_waited(_train(tracker, range(100)))
    start = time.perf_counter()
    assert not tracker.finish("FAILED", wait_s=60)
    assert time.perf_counter() - start < 45
    assert tracker.cursor.error is not None and "refused" in tracker.cursor.error
    assert tracker._shipper is not None
    tracker._shipper.kill()
    tracker._shipper.wait()
    summary = replay(tmp_path / "run")
    assert not summary.complete and server.uri in str(summary)

    server.start()
    summary = replay(tmp_path / "run")
    assert summary.complete and summary.counts.shipped == 202
    run_id = summary.runs[0].run_id
    assert run_id is not None
    assert mlflow.points(server.uri, run_id, "train/loss") == [(step, 1.0 / (step + 1)) for step in range(100)]
    assert mlflow.client(server.uri).get_run(run_id).info.status == "FAILED"
