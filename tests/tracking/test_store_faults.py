"""Databases that are locked, experiments that were deleted, servers that throttle, folders with odd names."""

from __future__ import annotations

import http.server
import itertools
import json
import shutil
import sqlite3
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from maps_ray.spec import SpecError
from maps_ray.tracking import Tracker, replay, resolve_uri
from maps_ray.tracking.client import Refused, Unavailable, call, connect
from maps_ray.tracking.feed import Feed


@pytest.fixture
def own_database(database: str, mlflow: Any, tmp_path: Path) -> Path:
    """A migrated database of this test alone."""
    mlflow.client(database).search_experiments(max_results=1)
    (tmp_path / "store").mkdir()
    return Path(shutil.copyfile(database.removeprefix("sqlite:///"), tmp_path / "store" / "mlflow.db"))


def create(run_dir: Path, uri: str, **options: Any) -> Tracker:
    options = {"experiment": "faults", "run_name": run_dir.name, "ship": False, **options}
    return Tracker.create(run_dir, uri=uri, **options)


def test_a_locked_database_is_waited_for(tmp_path: Path, own_database: Path, mlflow: Any) -> None:
    uri = f"sqlite:///{own_database}"
    holder = sqlite3.connect(own_database, isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    tracker = create(tmp_path / "run", uri, ship=True)
    tracker.metrics(1, {"loss": 1.0})
    began = time.monotonic()
    assert not tracker.finish("FINISHED", wait_s=60)
    assert time.monotonic() - began < 40
    missing = str(tracker.missing)
    assert "MLflow has got nothing of this run" in missing and "database is locked" in missing
    assert "sending goes on for some minutes" in missing and f"maps-ray track replay {tmp_path / 'run'}" in missing
    holder.execute("ROLLBACK")
    holder.close()
    mlflow.wait_until(lambda: tracker.cursor.status == "FINISHED")
    assert tracker.missing is None
    assert "Traceback" not in (tmp_path / "run/tracking/shipper.log").read_text()


def test_replay_into_a_locked_database_says_so(tmp_path: Path, own_database: Path) -> None:
    tracker = create(tmp_path / "run", f"sqlite:///{own_database}")
    holder = sqlite3.connect(own_database, isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    summary = replay(tmp_path / "run")
    assert not summary.complete and "database is locked" in str(summary.missing)
    holder.close()
    summary = replay(tmp_path / "run")
    assert summary.complete and summary.missing is None and tracker.missing is None


def test_a_database_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_text("this is no database, but a text of some length" * 40)
    create(tmp_path / "run", f"sqlite:///{tmp_path / 'mlflow.db'}")
    summary = replay(tmp_path / "run")
    assert not summary.complete and "not a database" in str(summary)


def test_a_deleted_experiment_is_told(tmp_path: Path, own_database: Path, mlflow: Any) -> None:
    uri = f"sqlite:///{own_database}"
    client = mlflow.client(uri)
    client.delete_experiment(client.create_experiment("faults"))
    tracker = create(tmp_path / "run", uri)
    assert not replay(tmp_path / "run").complete
    tracker.finish("FINISHED", wait_s=0)
    assert "nothing of this run" in str(tracker.missing) and "mlflow experiments restore" in str(tracker.missing)


def test_artifacts_that_cannot_be_kept_hold_nothing_else_up(tmp_path: Path, own_database: Path, mlflow: Any) -> None:
    uri, blocked = f"sqlite:///{own_database}", tmp_path / "file"
    blocked.write_text("where the experiment has its artifacts nothing can be made")
    client = mlflow.client(uri)
    client.create_experiment("faults", (blocked / "artifacts").as_uri())
    tracker = create(tmp_path / "run", uri)
    child = create(tmp_path / "child", uri, parent=tmp_path / "run")
    tracker.metrics(1, {"loss": 1.0})
    tracker.text("old", "report.html")
    tracker.text("new", "report.html")
    tracker.metrics(2, {"loss": 2.0})
    child.metrics(1, {"loss": 3.0})
    child.finish("FINISHED", wait_s=0)
    tracker._start_shipper()
    mlflow.wait_until(lambda: child.cursor.status, 120)
    tracker.metrics(3, {"loss": 3.0})
    # It does not wait for the artifacts: they have been tried since the end.
    assert not tracker.finish("FINISHED", wait_s=60)
    run_id = str(tracker.cursor.run_id)
    assert mlflow.points(uri, run_id, "loss") == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert mlflow.points(uri, str(child.cursor.run_id), "loss") == [(1, 3.0)]
    assert client.get_run(run_id).info.status == "FINISHED"
    said = str(tracker.missing)
    assert "not got all of this run: artifact environment.json cannot be put where" in said and str(blocked) in said
    assert tracker._shipper is not None
    tracker._shipper.kill()
    tracker._shipper.wait()
    assert not replay(tmp_path / "run").complete
    blocked.unlink()
    assert replay(tmp_path / "run").complete and tracker.missing is None
    assert mlflow.points(uri, run_id, "loss") == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert (blocked / "artifacts" / run_id / "artifacts/report.html").read_text() == "new"
    assert (blocked / "artifacts" / str(child.cursor.run_id) / "artifacts/environment.json").is_file()


def test_a_run_that_was_moved_is_not_recorded_where_it_was(tmp_path: Path) -> None:
    create(tmp_path / "old/run", f"sqlite:///{tmp_path}/old/mlflow.db")
    (tmp_path / "old").rename(tmp_path / "new")
    summary = replay(tmp_path / "new/run", make=False)
    assert not summary.complete and f"no folder {tmp_path}/old: make it, or bring the run back" in str(summary)
    assert not (tmp_path / "old").exists()


def test_a_database_that_was_removed_gets_everything_again(tmp_path: Path, own_database: Path, mlflow: Any) -> None:
    uri, empty = f"sqlite:///{own_database}", own_database.read_bytes()
    tracker = create(tmp_path / "run", uri)
    tracker.metrics(1, {"loss": 1.0})
    tracker.finish("FINISHED", wait_s=0)
    assert replay(tmp_path / "run").counts.shipped > 0
    first = tracker.cursor.run_id
    own_database.write_bytes(empty)
    summary = replay(tmp_path / "run")
    assert summary.complete and summary.counts.shipped > 0 and summary.runs[0].run_id != first
    assert mlflow.points(uri, str(summary.runs[0].run_id), "loss") == [(1, 1.0)]


def test_trials_follow_their_sweep_into_a_renamed_experiment(tmp_path: Path, own_database: Path, mlflow: Any) -> None:
    uri = f"sqlite:///{own_database}"
    sweep = create(tmp_path / "sweep", uri)
    assert replay(tmp_path / "sweep").complete
    client, experiment = mlflow.client(uri), sweep.cursor.experiment_id
    client.rename_experiment(experiment, "kept")
    trial = create(tmp_path / "trial", uri, parent=tmp_path / "sweep")
    assert replay(tmp_path / "sweep").complete
    run = client.get_run(str(trial.cursor.run_id))
    assert run.info.experiment_id == experiment
    assert run.data.tags["mlflow.parentRunId"] == sweep.cursor.run_id
    assert client.get_experiment_by_name("faults") is None


def test_artifacts_of_the_experiment_default_lie_beside_the_database(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    tracker = create(tmp_path / "runs/run", f"sqlite:///{tmp_path}/runs/mlflow.db", experiment="Default")
    assert replay(tmp_path / "runs/run").complete
    assert (tmp_path / f"runs/mlruns/0/{tracker.cursor.run_id}/artifacts/environment.json").is_file()
    assert not list((tmp_path / "here").iterdir())


def test_refused_records_are_told(tmp_path: Path, own_database: Path) -> None:
    tracker = create(tmp_path / "run", f"sqlite:///{own_database}")
    tracker.metrics(1, {"loss": 1.0, "odd|name": 2.0, "x" * 300: 1.0})
    summary = replay(tmp_path / "run")
    assert summary.complete and summary.counts.quarantined == 2
    quarantine = tmp_path / "run/tracking/quarantine.jsonl"
    assert tracker.missing == f"MLflow refused 2 record(s) of this run: reasons in {quarantine}"
    # Also by who did not see them refused.
    assert f"some refused earlier (see {quarantine})" in str(replay(tmp_path / "run").missing)


@pytest.mark.parametrize(
    ("error", "meaning"),
    [(OSError("gone"), Unavailable), (KeyError("x"), Unavailable), (OverflowError("too large"), Refused)],
)
def test_whatever_goes_wrong_has_a_meaning(error: Exception, meaning: type[Exception]) -> None:
    def fail() -> None:
        raise error

    with pytest.raises(meaning):
        call(fail)


def test_a_certificate_that_is_not_trusted_has_its_remedy() -> None:
    def fail() -> None:
        raise OSError("x" * 600 + "[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: self-signed certificate")

    with pytest.raises(Unavailable, match=r"certificate is not trusted .* set MLFLOW_TRACKING_SERVER_CERT_PATH"):
        call(fail)


class Throttling(http.server.BaseHTTPRequestHandler):
    """Passes requests on to MLflow, but for those that it is told to refuse with 429."""

    target = ""
    throttled: Iterator[bool]
    refused = 0

    def answer(self) -> None:
        size = int(self.headers.get("content-length") or 0)
        body = self.rfile.read(size) if size else None
        if next(self.throttled):
            type(self).refused += 1
            code, text = 429, b'{"error_code": "REQUEST_LIMIT_EXCEEDED", "message": "slow down"}'
        else:
            headers = {"Content-Type": "application/json"}
            request = urllib.request.Request(self.target + self.path, data=body, method=self.command, headers=headers)
            try:
                with urllib.request.urlopen(request, timeout=120) as reply:
                    code, text = reply.status, reply.read()
            except urllib.error.HTTPError as error:
                code, text = error.code, error.read()
        self.send_response(code)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    do_GET = do_POST = do_PUT = do_PATCH = answer

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def throttling(server: Any) -> Iterator[str]:
    """Of the server, through something that throttles by `Throttling.throttled`."""
    Throttling.target, Throttling.refused = server.uri, 0
    proxy = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Throttling)
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{proxy.server_address[1]}"
    proxy.shutdown()
    proxy.server_close()


def test_a_throttled_call_is_made_again(tmp_path: Path, throttling: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Some calls are two requests, which must both get through.
    Throttling.throttled = itertools.cycle([True, False, False, False])
    create(tmp_path / "run", throttling).metrics(1, {"loss": 1.0, "odd name (x)|": 2.0})
    summary = replay(tmp_path / "run")
    assert summary.complete and summary.counts.quarantined == 1 and Throttling.refused > 1


def test_progress_is_kept_between_tries(
    tmp_path: Path, throttling: str, server: Any, mlflow: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Every third request is throttled, and no call is made twice: no batch of several parts gets through in one go.
    monkeypatch.setattr("maps_ray.tracking.client._PATIENCE_S", ())
    Throttling.throttled = itertools.repeat(False)
    tracker = create(tmp_path / "run", throttling)
    for step in range(3):
        tracker.metrics(step, {f"m/{number}": number for number in range(700)})
    tracker.metrics(0, {"odd|name": 1.0, "tab\tname": 3.0})
    feed = Feed(connect(throttling), tracker.spool)
    Throttling.throttled = itertools.cycle([False, False, True])
    for _ in range(200):
        try:
            feed.ship()
            break
        except Unavailable:  # throttled, or the machine is busy
            continue
    assert feed.counts.quarantined == 2 and tracker.shipped
    run = mlflow.client(server.uri).get_run(str(feed.cursor.run_id))
    assert len(run.data.metrics) == 700
    assert len(mlflow.points(server.uri, run.info.run_id, "m/699")) == 3


ODD = "it's 100% [a] b#c;d=é&+,!@(x)^`~{y}|<z>\\back"


def test_a_folder_with_an_odd_name(tmp_path: Path, own_database: Path, mlflow: Any) -> None:
    folder = tmp_path / ODD
    own_database.parent.rename(folder)
    uri = resolve_uri(None, folder)
    tracker = create(folder / "run", uri)
    tracker.metrics(1, {"loss": 1.0})
    tracker.text("name: run\n", "deep/spec.yaml")
    assert replay(folder / "run").complete
    run_id = str(tracker.cursor.run_id)
    assert mlflow.points(uri, run_id, "loss") == [(1, 1.0)]
    assert (folder / "mlartifacts" / run_id / "artifacts/deep/spec.yaml").read_text() == "name: run\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == [ODD]


@pytest.mark.parametrize("name", ["a?b", "a%20b", "a%3Fb", "%41"])
def test_a_name_that_mlflow_reads_otherwise(tmp_path: Path, name: str) -> None:
    with pytest.raises(SpecError, match=r"cluster\.storage = .*MLflow reads '.*' in the path of a database"):
        resolve_uri(None, tmp_path / name)
    with pytest.raises(SpecError, match=r"tracking\.uri = .*MLflow reads '.*' in the path of a database"):
        resolve_uri(f"sqlite:///{tmp_path}/{name}/mlflow.db", tmp_path)
    assert resolve_uri("http://mlflow:5000", tmp_path / name) == "http://mlflow:5000"


def test_a_file_of_credentials_reaches_the_client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    class Lock(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append(self.headers.get("Authorization"))
            self.send_response(401)
            self.end_headers()

        do_POST = do_GET

        def log_message(self, *_: Any) -> None:
            pass

    for name in ("USERNAME", "PASSWORD", "TOKEN"):
        monkeypatch.setenv(f"MLFLOW_TRACKING_{name}", "")
        monkeypatch.delenv(f"MLFLOW_TRACKING_{name}")
    server = http.server.HTTPServer(("127.0.0.1", 0), Lock)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    file = tmp_path / "mlflow.env"
    file.write_text("MLFLOW_TRACKING_USERNAME=robot\nMLFLOW_TRACKING_PASSWORD=hunter2-Secret\n")
    file.chmod(0o600)
    tracker = create(tmp_path / "run", f"http://127.0.0.1:{server.server_address[1]}", credentials=file)
    try:
        summary = replay(tmp_path / "run")
    finally:
        server.shutdown()
        server.server_close()
    assert seen[0] == "Basic cm9ib3Q6aHVudGVyMi1TZWNyZXQ="
    assert "MLFLOW_TRACKING_PASSWORD" in str(summary.runs[0].error)
    for path in tracker.spool.folder.rglob("*"):
        assert not path.is_file() or "hunter2" not in path.read_text()
    assert json.loads((tracker.spool.folder / "run.json").read_text())["credentials"] == str(file)
