"""This node's copy of a run on an object store: the next driver, on this node or another one, begins with all of it."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from s3_gate import s3_server

from maps_ray import run_storage
from maps_ray.run_storage import RunStorage, StorageError, storage_problems
from maps_ray.spec import ClusterSpec, ModelSpec, RunSpec, SpecError, parse
from maps_ray.tracking.spool import read_history
from maps_ray.tracking.store import database_file, resolve_uri
from maps_ray.tracking.tracker import Tracker
from maps_ray.training.mirror import Mirror
from maps_ray.training.shelf import ObjectShelf
from maps_ray.training.train import train


@pytest.fixture(scope="module", autouse=True)
def server() -> Iterator[Any]:
    with s3_server("runs") as (_, client):
        yield client


def on_node(name: str, tmp_path: Path) -> RunSpec:
    cluster = ClusterSpec.model_validate({"storage": "s3://runs/all", "scratch": tmp_path / name})
    raw = {"name": "run", "model": ModelSpec(checkpoint=tmp_path), "data": {"path": str(tmp_path)}, "cluster": cluster}
    return parse(RunSpec, raw)


def begin(spec: RunSpec) -> Tracker:
    uri = resolve_uri(None, spec.cluster.local_storage)
    return Tracker.create(spec.run_dir, uri=uri, experiment="e", run_name="run", ship=False)


def test_another_node_begins_with_the_copy(tmp_path: Path) -> None:
    one = on_node("one", tmp_path)
    mirror = Mirror.of(one)
    one.run_dir.mkdir(parents=True)
    assert not mirror.has("spec.yaml")
    (one.run_dir / "spec.yaml").write_text("name: run")
    (one.run_dir / "claims.json").write_text("a fetched copy, and old")
    tracker = begin(one)
    tracker.metrics(1, {"loss": 1.0})
    database = database_file(resolve_uri(None, one.cluster.local_storage))
    assert database is not None
    with closing(sqlite3.connect(database)) as connection:
        connection.execute("create table known (value)")
        connection.execute("insert into known values (7)")
        connection.commit()
        mirror.push_all()
        mirror.push_records()
    names = RunStorage(one.run_place).files()
    assert "spec.yaml" in names and "tracking/run.json" in names and "tracking/mlflow.db" in names
    assert not {"claims.json", "lock", "tracking/cursor.json", "tracking/owner.json"} & set(names)
    # What came after the copy is lost with the node; a file of the store's alone comes along.
    tracker.metrics(2, {"loss": 2.0})
    RunStorage(one.run_place).write("evaluation.json", b"[]")

    other = on_node("other", tmp_path)
    # An earlier run of that name was here.
    other.run_dir.mkdir(parents=True)
    (other.run_dir / "result.json").write_text("{}")
    begin(other).metrics(99, {"loss": 99.0})
    Mirror.of(other).pull(other)
    assert (other.run_dir / "evaluation.json").read_text() == "[]" and not (other.run_dir / "result.json").exists()
    assert read_history(other.run_dir).metrics == {"loss": [(1, 1.0)]}
    restored = database_file(resolve_uri(None, other.cluster.local_storage))
    assert restored is not None
    with closing(sqlite3.connect(restored)) as connection:
        assert connection.execute("select value from known").fetchall() == [(7,)]

    # On its own node the run has more than the copy, and keeps it.
    RunStorage(one.run_place).remove("evaluation.json")
    (one.run_dir / "evaluation.json").write_text("of a step that was lost")
    mirror.pull(one)
    assert read_history(one.run_dir).metrics == {"loss": [(1, 1.0), (2, 2.0)]}
    assert not (one.run_dir / "evaluation.json").exists()
    mirror.remove()
    assert not one.run_dir.exists()


def test_a_folder_has_no_mirror(tmp_path: Path) -> None:
    mirror = Mirror(tmp_path, None)
    (tmp_path / "spec.yaml").write_text("x")
    mirror.begin()
    mirror.push_all()
    mirror.push_records()
    mirror.remove()
    assert mirror.has("spec.yaml") and not mirror.has("result.json")


def test_a_full_scratch_is_named(tmp_path: Path, small_disk: Path) -> None:
    """By a worker that makes a checkpoint or goes on from one, and by a driver that begins with MLflow's database."""
    storage = RunStorage("s3://runs/full/run")
    on_disk = ObjectShelf(storage, small_disk / "work")

    def write(folder: Path) -> list[Path]:
        path = folder / "rank-00000.safetensors"
        path.write_bytes(bytes(2 * 2**20))
        return [path]

    said = (
        rf"part of the checkpoint of step 4: no room in {small_disk}/work, where 1.0 MiB are free: .*MAPS_RAY_SCRATCH"
    )
    with pytest.raises(StorageError, match=said):
        on_disk.put(4, "a", write)
    assert list((small_disk / "work").iterdir()) == [] and storage.files() == {}
    sizes = ObjectShelf(storage, tmp_path / "work").put(4, "a", write)
    (name,) = sizes
    on_disk.commit(4, "a", {"format": 1, "step": 4, "files": sizes})
    with on_disk.open("step-00000004") as path_of, pytest.raises(StorageError, match=r"no room in .* it takes 2.0 MiB"):
        path_of(name)
    storage.write("tracking/mlflow.db", bytes(900 * 2**10))
    cluster = ClusterSpec.model_validate({"storage": "s3://runs/full", "scratch": small_disk})
    spec = on_node("one", tmp_path).model_copy(update={"cluster": cluster})
    with pytest.raises(
        StorageError, match=rf"MLflow's database: no room in {small_disk}/s3/runs/full, .* it takes 0.9"
    ):
        Mirror.of(spec).pull(spec)
    assert not (small_disk / "s3/runs/full/mlflow.db").exists()


@pytest.mark.parametrize("resume", [False, True])
def test_a_dead_store_is_named_before_a_run_begins(
    resume: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_storage, "ASK_S", 2)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    spec, began = on_node("one", tmp_path), time.monotonic()
    with pytest.raises(SpecError) as refused:
        train(spec, resume)
    assert time.monotonic() - began < 15
    (problem,) = refused.value.problems
    (as_the_command_says,) = storage_problems(spec.cluster)
    assert problem.field == "cluster.storage" and "the object store fails after" in problem.message
    assert problem.message.split(" (")[-1] == as_the_command_says.message.split(" (")[-1]
    assert not spec.run_dir.exists()
