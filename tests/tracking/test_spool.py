"""The spool alone: no MLflow process or database is involved."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from maps_ray.spec import SpecError
from maps_ray.tracking import Tracker, flatten, read_history, resolve_uri, ui_command
from maps_ray.tracking.spool import Cursor, Owner, Segment, Spool
from maps_ray.tracking.store import artifact_location, free_port


def create(run_dir: Path, **options: object) -> Tracker:
    arguments = {"uri": "sqlite:///unused.db", "experiment": "spool", "run_name": run_dir.name, "ship": False}
    return Tracker.create(run_dir, **{**arguments, **options})  # type: ignore[arg-type]


def test_import_leaves_mlflow_alone() -> None:
    code = "import maps_ray.tracking, sys; assert not {'mlflow', 'torch'} & set(sys.modules), 'slow import'"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_resumed_run_keeps_its_identity_and_the_first_value_of_each_step(tmp_path: Path) -> None:
    first = create(tmp_path / "run", params={"training": {"max_steps": 6}})
    for step in range(1, 5):
        first.metrics(step, {"train/loss": 1.0 / step, "train/samples_per_second": 50.0})
    key = first.spool.identity().run_key
    second = create(tmp_path / "run", params={"training": {"max_steps": 8}})
    for step in range(3, 7):
        second.metrics(step, {"train/loss": 1.0 / step, "train/samples_per_second": 70.0})
    history = read_history(tmp_path / "run")
    assert second.spool.identity().run_key == key
    assert history.metrics["train/loss"] == [(step, 1.0 / step) for step in range(1, 7)]
    assert [value for _, value in history.metrics["train/samples_per_second"]] == [50.0] * 4 + [70.0] * 2
    assert history.params == {"training.max_steps": "6"}


def test_another_process_appends_to_the_same_run(tmp_path: Path) -> None:
    create(tmp_path / "run")
    code = f"from maps_ray.tracking import Tracker; Tracker.open({str(tmp_path / 'run')!r}).metrics(7, {{'a': 2}})"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert read_history(tmp_path / "run").metrics == {"a": [(7, 2.0)]}


def test_open_needs_a_run(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no tracked run"):
        Tracker.open(tmp_path)


def test_threads_never_interleave(tmp_path: Path) -> None:
    tracker = create(tmp_path / "run")
    threads = [
        threading.Thread(target=lambda name=name: [tracker.metrics(step, {name: step}) for step in range(300)])
        for name in "abcd"
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = [(step, float(step)) for step in range(300)]
    assert read_history(tmp_path / "run").metrics == {name: expected for name in "abcd"}


def test_a_line_cut_off_costs_that_record_only(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    segment = Segment(spool)
    segment.write({"kind": "metrics", "step": 1})
    with open(segment.path, "a") as file:
        file.write('{"kind": "met')
    records = [record for _, _, record in spool.read()]
    assert records == [{"kind": "metrics", "step": 1}]
    segment._torn = True
    segment.write({"kind": "metrics", "step": 2})
    records = [record for _, _, record in spool.read()]
    assert records == [{"kind": "metrics", "step": 1}, '{"kind": "met', {"kind": "metrics", "step": 2}]


def test_full_disk_warns_and_the_run_goes_on(tmp_path: Path) -> None:
    tracker = create(tmp_path / "run")
    tracker._segment.close()
    tracker._segment.path = Path("/dev/full")
    with pytest.warns(RuntimeWarning, match="No space left"):
        tracker.metrics(1, {"a": 1.0})
    assert tracker._segment.lost == 1


def test_a_loss_of_power_leaves_a_run_that_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a run is found by is on disk before it takes its name; a cursor that the loss emptied begins anew."""
    synced = []
    monkeypatch.setattr("maps_ray.files.sync", lambda path: synced.append(path.name.split(".")[1]))
    create(tmp_path / "sweep")
    spool = create(tmp_path / "trial", parent=tmp_path / "sweep").spool
    assert synced[:2] == ["run", "owner"] and len(synced) == 5, "identity and owner of both, and the child"
    spool.write_cursor(Cursor(uri="sqlite:///unused.db", run_id="1", offsets={"a.jsonl": 9}))
    assert spool.cursor().run_id == "1"
    (spool.folder / "cursor.json").write_text("")
    assert spool.cursor() == Cursor(uri="sqlite:///unused.db")


def test_reading_goes_on_where_it_stopped(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    segment = Segment(spool)
    segment.write({"n": 1})
    offsets = {name: offset for name, offset, _ in spool.read()}
    segment.write({"n": 2})
    assert [record for _, _, record in spool.read(offsets)] == [{"n": 2}]


def test_nan_and_infinity_survive(tmp_path: Path) -> None:
    tracker = create(tmp_path / "run")
    tracker.metrics(1, {"nan": math.nan, "inf": -math.inf})
    metrics = read_history(tmp_path / "run").metrics
    assert math.isnan(metrics["nan"][0][1]) and metrics["inf"] == [(1, -math.inf)]


def test_artifacts_are_copied_when_they_are_recorded(tmp_path: Path) -> None:
    tracker = create(tmp_path / "run")
    source = tmp_path / "table.txt"
    source.write_text("before")
    tracker.artifact(source, "tables")
    source.write_text("after")
    tracker.text("name: run\n", "spec.yaml")
    kept = {path: file.read_text() for path, file in read_history(tmp_path / "run").artifacts.items()}
    assert json.loads(kept.pop("environment.json"))["python"]
    assert kept == {"tables/table.txt": "before", "spec.yaml": "name: run\n"}
    with pytest.raises(FileNotFoundError, match="no such file to record"):
        tracker.artifact(tmp_path / "absent.txt")


def test_status_and_times(tmp_path: Path) -> None:
    tracker = create(tmp_path / "run")
    assert read_history(tmp_path / "run").status == "RUNNING"
    assert not tracker.finish("FAILED", wait_s=0)
    history = read_history(tmp_path / "run")
    assert history.status == "FAILED"
    assert history.end_time is not None and history.end_time >= history.identity.start_time
    create(tmp_path / "run")
    assert read_history(tmp_path / "run").status == "RUNNING"


def test_a_run_that_goes_on_where_the_clock_is_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time_ns()
    monkeypatch.setattr(time, "time_ns", lambda: now + 600 * 10**9)
    create(tmp_path / "run").finish("KILLED", wait_s=0)
    monkeypatch.setattr(time, "time_ns", lambda: now)
    tracker = create(tmp_path / "run")
    assert tracker.spool.status()[1] == read_history(tmp_path / "run").status == "RUNNING"
    tracker.finish("FINISHED", wait_s=0)
    assert tracker.spool.status()[1] == read_history(tmp_path / "run").status == "FINISHED"


def test_logging_a_step_takes_well_under_a_millisecond(tmp_path: Path) -> None:
    tracker = create(tmp_path / "run")
    values = {f"drift/module{i}": 0.5 for i in range(12)}
    start = time.perf_counter()
    for step in range(1000):
        tracker.metrics(step, values)
    assert (time.perf_counter() - start) / 1000 < 0.001


def test_owner_is_told_from_a_later_process_of_the_same_id() -> None:
    me = Owner.this_process()
    assert not me.is_dead()
    assert Owner(me.host, me.pid, me.started - 100).is_dead()
    assert not Owner("another-host", 1, 0.0).is_dead()


def test_flatten() -> None:
    nested = {"name": "a", "training": {"betas": [0.9, 0.999], "lr": 1e-4}, "data": {"splits": {"ood": None}}}
    assert flatten(nested) == {
        "name": "a",
        "training.betas": "[0.9, 0.999]",
        "training.lr": "0.0001",
        "data.splits.ood": "null",
    }


def test_uris(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolve_uri(None, "runs") == f"sqlite:///{tmp_path}/runs/mlflow.db"
    assert resolve_uri("sqlite:///a.db", "runs") == f"sqlite:///{tmp_path}/a.db"
    assert resolve_uri(f"sqlite:///{tmp_path}/a.db", "runs") == f"sqlite:///{tmp_path}/a.db"
    assert resolve_uri("http://mlflow:5000/", "runs") == "http://mlflow:5000"
    assert artifact_location(f"sqlite:///{tmp_path}/a.db") == f"file://{tmp_path}/mlartifacts"
    assert artifact_location("http://mlflow:5000") is None


@pytest.mark.parametrize("uri", ["mlruns", "/data/mlruns", "file:///data/mlruns", "./mlruns"])
def test_folders_are_refused_with_the_remedy(uri: str) -> None:
    with pytest.raises(SpecError, match=r"tracking\.uri.*no longer records into a plain folder; use http"):
        resolve_uri(uri, "runs")


@pytest.mark.parametrize("uri", ["ftp://host", "http://", "sqlite:///"])
def test_other_stores_are_refused(uri: str) -> None:
    with pytest.raises(SpecError, match=r"tracking\.uri.*not a store"):
        resolve_uri(uri, "runs")


@pytest.mark.parametrize(
    ("path", "said"), [(":memory:", "goes with its process"), ("", "is a folder: name a file in it")]
)
def test_databases_that_are_no_file(tmp_path: Path, path: str, said: str) -> None:
    with pytest.raises(SpecError, match=f"tracking.uri = .*{said}"):
        resolve_uri(f"sqlite:///{tmp_path / path}", tmp_path)


def test_an_identity_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    create(tmp_path / "run")
    (tmp_path / "run/tracking/run.json").write_text("")
    with pytest.raises(SpecError, match=r"run\.json = .*cannot be read .*bring it back as it was"):
        create(tmp_path / "run")


def test_ui_command_avoids_a_port_in_use(tmp_path: Path) -> None:
    import socket

    uri = f"sqlite:///{tmp_path}/my runs/mlflow.db"
    with socket.socket() as busy:
        port = free_port(5000)
        busy.bind(("127.0.0.1", port))
        busy.listen()
        command = ui_command(uri)
    assert f"--port {free_port(port + 1)} " in command
    assert command.endswith(f"--backend-store-uri '{uri}'")
    assert ui_command("http://mlflow:5000") == "http://mlflow:5000"


def test_parent_must_be_in_the_same_store(tmp_path: Path) -> None:
    create(tmp_path / "sweep")
    with pytest.raises(ValueError, match="same store"):
        create(tmp_path / "trial", uri="http://elsewhere", parent=tmp_path / "sweep")


def test_spool_files_hold_plain_json(tmp_path: Path) -> None:
    create(tmp_path / "run")
    for file in (tmp_path / "run" / "tracking").glob("*.json"):
        json.loads(file.read_text())
    assert os.listdir(tmp_path / "run") == ["tracking"]
