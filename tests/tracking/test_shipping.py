"""Spool to MLflow on a sqlite store: what arrives, once, with the right status."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from maps_ray.tracking import Tracker, replay


def create(run_dir: Path, uri: str, **options: object) -> Tracker:
    arguments = {"uri": uri, "experiment": "shipping", "run_name": run_dir.name, "ship": False}
    return Tracker.create(run_dir, **{**arguments, **options})  # type: ignore[arg-type]


def test_shipper_records_a_whole_run(tmp_path: Path, database: str, mlflow: Any) -> None:
    from matplotlib.figure import Figure

    params = {"training": {"learning_rate": 1e-4}, "note": "x" * 7000}
    tracker = create(tmp_path / "run", database, params=params, tags={"order": "DSPL"}, ship=True)
    for step in range(1, 2501):
        tracker.metrics(step, {"train/loss": 1.0 / step})
    figure = Figure()
    figure.subplots().plot([1, 2])
    tracker.figure(figure, "plots/loss.png")
    tracker.text("name: run\n", "spec.yaml")
    assert tracker.finish("FINISHED", wait_s=60), (tmp_path / "run/tracking/shipper.log").read_text()
    run_id = tracker.cursor.run_id
    run = mlflow.client(database).get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "run"
    assert run.data.params["training.learning_rate"] == "0.0001"
    assert len(run.data.params["note"]) == 6000
    assert run.data.tags["order"] == "DSPL"
    assert mlflow.points(database, run_id, "train/loss") == [(step, 1.0 / step) for step in range(1, 2501)]
    store = Path(database.removeprefix("sqlite:///")).parent / "mlartifacts" / run_id / "artifacts"
    assert (store / "spec.yaml").read_text() == "name: run\n"
    assert (store / "plots" / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_replay_twice_gives_the_same_history(tmp_path: Path, database: str, mlflow: Any) -> None:
    tracker = create(tmp_path / "run", database, params={"a": 1})
    for step in range(50):
        tracker.metrics(step, {"loss": 0.1 * step, "rate": 1.0})
    first = replay(tmp_path / "run")
    assert first.complete and (first.counts.shipped, first.counts.already_there) == (102, 0)
    run_id = first.runs[0].run_id
    assert run_id is not None
    again = replay(tmp_path / "run")
    assert again.runs[0].run_id == run_id
    assert (again.counts.shipped, again.counts.already_there) == (0, 102)
    # Without its cursor everything is sent again: the run is found by its key, and MLflow keeps one of each value.
    (tmp_path / "run/tracking/cursor.json").unlink()
    assert replay(tmp_path / "run").runs[0].run_id == run_id
    assert mlflow.points(database, run_id, "loss") == [(step, 0.1 * step) for step in range(50)]


def test_resumed_run_shows_each_step_once(tmp_path: Path, database: str, mlflow: Any) -> None:
    tracker = create(tmp_path / "run", database, params={"training": {"max_steps": 20}})
    for step in range(12):
        tracker.metrics(step, {"loss": float(step), "speed": 50.0})
    assert not tracker.finish("FAILED", wait_s=0)
    run_id = replay(tmp_path / "run").runs[0].run_id
    assert run_id is not None and mlflow.client(database).get_run(run_id).info.status == "FAILED"
    tracker = create(tmp_path / "run", database, params={"training": {"max_steps": 30}})
    for step in range(8, 20):
        tracker.metrics(step, {"loss": float(step), "speed": 60.0})
    summary = replay(tmp_path / "run")
    assert summary.runs[0].run_id == run_id
    run = mlflow.client(database).get_run(run_id)
    assert run.info.status == "RUNNING"
    assert run.data.params["training.max_steps"] == "20"
    assert run.data.tags["resumed.training.max_steps"] == "30"
    assert mlflow.points(database, run_id, "loss") == [(step, float(step)) for step in range(20)]
    assert [step for step, _ in mlflow.points(database, run_id, "speed")] == list(range(20))
    tracker.finish("FINISHED", wait_s=0)
    assert replay(tmp_path / "run").complete
    assert mlflow.client(database).get_run(run_id).info.status == "FINISHED"


def test_refused_records_stand_aside_and_the_rest_arrives(tmp_path: Path, database: str, mlflow: Any) -> None:
    tracker = create(tmp_path / "run", database)
    for step in range(40):
        tracker.metrics(step, {"loss": float(step), "bad|name": 1.0} if step == 17 else {"loss": float(step)})
    tracker.metrics(40, {"k" * 300: 1.0, "nan": math.nan, "inf": math.inf})
    tracker.tags({"t" * 300: "too long", "good": "yes"})
    summary = replay(tmp_path / "run")
    assert summary.complete and summary.counts.quarantined == 3
    run = summary.runs[0]
    assert run.run_id is not None and run.quarantine is not None
    reasons = [json.loads(line)["reason"] for line in run.quarantine.read_text().splitlines()]
    assert len(reasons) == 3 and any("bad|name" in reason for reason in reasons)
    assert mlflow.points(database, run.run_id, "loss") == [(step, float(step)) for step in range(40)]
    assert math.isnan(mlflow.points(database, run.run_id, "nan")[0][1])
    assert mlflow.client(database).get_run(run.run_id).data.tags["good"] == "yes"
    assert "3 refused" in str(summary)
    assert replay(tmp_path / "run").counts.quarantined == 0


def test_deleted_run_keeps_its_records_in_the_spool(tmp_path: Path, database: str, mlflow: Any) -> None:
    tracker = create(tmp_path / "run", database)
    tracker.metrics(1, {"loss": 1.0})
    run_id = replay(tmp_path / "run").runs[0].run_id
    assert run_id is not None
    mlflow.client(database).delete_run(run_id)
    tracker.metrics(2, {"loss": 2.0})
    summary = replay(tmp_path / "run")
    assert not summary.complete and "mlflow runs restore" in str(summary.runs[0].error)
    mlflow.client(database).restore_run(run_id)
    assert replay(tmp_path / "run").complete
    assert mlflow.points(database, run_id, "loss") == [(1, 1.0), (2, 2.0)]


def test_parent_ships_its_children(tmp_path: Path, database: str, mlflow: Any) -> None:
    sweep = create(tmp_path / "sweep", database, ship=True)
    trials = [create(tmp_path / f"trial{i}", database, parent=tmp_path / "sweep", ship=True) for i in range(2)]
    for index, trial in enumerate(trials):
        trial.metrics(1, {"objective": float(index)})
        trial.finish("FINISHED" if index == 0 else "KILLED", wait_s=0)
    assert sweep.finish("FINISHED", wait_s=60)
    parent_id = sweep.cursor.run_id
    for index, status in enumerate(["FINISHED", "KILLED"]):
        run = mlflow.client(database).get_run(trials[index].cursor.run_id)
        assert run.info.status == status
        assert run.data.tags["mlflow.parentRunId"] == parent_id
        assert run.data.metrics == {"objective": float(index)}


_TRAINER = """
import sys, time
from maps_ray.tracking import Tracker
run_dir, uri, ship = sys.argv[1:]
tracker = Tracker.create(run_dir, uri=uri, experiment="shipping", run_name="killed", ship=ship == "1")
for step in range(100000):
    tracker.metrics(step, {"loss": float(step)})
    print(step, flush=True)
    time.sleep(0.002)
"""


def _train_and_kill(run_dir: Path, uri: str, ship: bool, steps: int) -> int:
    """Runs a trainer until it has printed `steps`, kills it with -9; returns the last step it surely logged."""
    arguments = [sys.executable, "-c", _TRAINER, str(run_dir), uri, str(int(ship))]
    trainer = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)
    assert trainer.stdout is not None
    last = -1
    for line in trainer.stdout:
        last = int(line)
        if last >= steps:
            os.kill(trainer.pid, signal.SIGKILL)
            break
    last = max([last, *(int(line) for line in trainer.stdout.read().split())])
    trainer.wait()
    return last


def test_shipper_outlives_a_killed_trainer_and_tells_the_truth(tmp_path: Path, database: str, mlflow: Any) -> None:
    last = _train_and_kill(tmp_path / "run", database, ship=True, steps=300)
    tracker = Tracker.open(tmp_path / "run")
    mlflow.wait_until(lambda: tracker.cursor.status == "KILLED")
    run_id = tracker.cursor.run_id
    assert run_id is not None
    steps = [step for step, _ in mlflow.points(database, run_id, "loss")]
    assert steps == list(range(len(steps))) and len(steps) >= last + 1
    run = mlflow.client(database).get_run(run_id)
    assert run.info.status == "KILLED" and "ended without saying how" in run.data.tags["maps_ray.ended"]


def test_killed_shipper_is_started_again_at_the_end(tmp_path: Path, database: str, mlflow: Any) -> None:
    tracker = create(tmp_path / "run", database, ship=True)
    tracker.metrics(1, {"loss": 1.0})
    run_id = mlflow.wait_until(lambda: tracker.cursor.run_id)
    assert tracker._shipper is not None
    tracker._shipper.kill()
    tracker.metrics(2, {"loss": 2.0})
    assert tracker.finish("FINISHED", wait_s=60)
    assert mlflow.points(database, run_id, "loss") == [(1, 1.0), (2, 2.0)]


def test_replay_after_trainer_and_shipper_died(tmp_path: Path, database: str, mlflow: Any) -> None:
    last = _train_and_kill(tmp_path / "run", database, ship=False, steps=300)
    summary = replay(tmp_path)
    assert summary.complete and summary.runs[0].status == "KILLED"
    run_id = summary.runs[0].run_id
    assert run_id is not None
    steps = [step for step, _ in mlflow.points(database, run_id, "loss")]
    assert steps == list(range(len(steps))) and len(steps) >= last + 1


def test_replay_needs_a_run(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no tracked run"):
        replay(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        replay(tmp_path / "absent")
