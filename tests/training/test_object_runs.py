"""Runs whose folder is on an object store: killed, resumed, exported, and equal to the bit to an undisturbed one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from run_specs import MakeSpec
from s3_gate import Gate, s3_server

from maps_ray.run_copies import fetched
from maps_ray.run_storage import RunStorage
from maps_ray.spec import RunSpec, SpecError, dump, load_spec
from maps_ray.tracking.client import RUN_KEY
from maps_ray.training.train import TrainResult, train

BUCKET = "runs"
LENGTH = {"max_steps": 18, "checkpoint_every": 3}


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[Gate, Any]]:
    # Before Ray starts: its workers inherit the environment.
    with s3_server(BUCKET) as found:
        yield found


@pytest.fixture
def gate(server: tuple[Gate, Any]) -> Gate:
    server[0].open()
    return server[0]


@pytest.fixture(scope="module")
def cluster(server: tuple[Gate, Any], frame_cache: None) -> Iterator[None]:
    from maps_ray.spec import ClusterSpec
    from maps_ray.training.cluster import ray_cluster

    with ray_cluster(ClusterSpec()):
        yield


@pytest.fixture(scope="module")
def expected(cluster: None, make_spec: MakeSpec) -> TrainResult:
    """On local storage, with nothing in its way."""
    return train(make_spec("undisturbed", training=LENGTH), progress=False)


@pytest.fixture
def make(make_spec: MakeSpec, tmp_path: Path) -> Callable[..., RunSpec]:
    """Specs of runs on the object store; each test has a scratch of its own, as another node has."""

    def made(name: str, scratch: str = "scratch", **cluster: Any) -> RunSpec:
        places = {"storage": f"s3://{BUCKET}/folder", "scratch": tmp_path / scratch}
        return make_spec(name, training=LENGTH, cluster={**places, **cluster})

    return made


@pytest.mark.slow
def test_a_run_with_a_killed_worker_under_faults(
    expected: TrainResult, make: Callable[..., RunSpec], gate: Gate, tmp_path: Path
) -> None:
    spec = make("faults")
    gate.faults, gate.slow, gate.slow_s = 0.1, 0.1, 0.2
    killer = threading.Thread(target=_kill_a_worker, args=(6, spec))
    killer.start()
    result = train(spec, progress=False)
    killer.join()
    assert result.status == "finished" and result.start_step >= 3
    assert gate.answered["SlowDown"] and gate.answered["InternalError"] and gate.answered["slow"]
    gate.open()
    assert_same(spec, expected, tmp_path / "other")
    storage = RunStorage(spec.run_place)
    manifests = [name for name in storage.files("checkpoints") if name.endswith("manifest.json")]
    assert manifests == ["step-00000015/manifest.json", "step-00000018/manifest.json"]
    for name in manifests:
        folder = name.partition("/")[0]
        files = json.loads(storage.read(f"checkpoints/{name}"))["files"]
        assert storage.files(f"checkpoints/{folder}").items() >= files.items() and len(files) == 4
        # Nothing of killed attempts is left.
        assert set(storage.files(f"checkpoints/{folder}")) == {*files, "manifest.json"}
    # What was on its way has left the scratch, and so has the run, which is finished.
    assert not spec.run_dir.exists() and list((tmp_path / "scratch/work").iterdir()) == []
    assert _steps_in_mlflow(tmp_path / "scratch") == list(range(1, 19))


@pytest.mark.slow
def test_a_killed_driver_goes_on_from_another_node(
    expected: TrainResult, make: Callable[..., RunSpec], gate: Gate, tmp_path: Path
) -> None:
    spec = make("killed", scratch="lost")
    driver = _start(spec, tmp_path)
    _wait_for_checkpoint(spec, 6)
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    spec = make("killed", scratch="other")
    with pytest.raises(SpecError, match="s3://runs/folder/killed exists already; continue that run with --resume"):
        train(spec, progress=False)
    gate.faults = 0.05
    result = train(spec, resume=True, progress=False)
    gate.open()
    assert result.start_step >= 6 and result.run_dir == "s3://runs/folder/killed"
    assert_same(spec, expected, tmp_path / "third")
    assert _steps_in_mlflow(tmp_path / "other") == list(range(1, 19))
    assert train(spec, resume=True, progress=False).step == 18


def assert_same(spec: RunSpec, expected: TrainResult, scratch: Path) -> None:
    """The same weights as an undisturbed run on local storage, and the same action errors."""
    folder = fetched(spec.run_place, scratch)
    files = sorted(path.name for path in Path(str(expected.final)).glob("*.safetensors"))
    assert len(files) == 3
    for name in files:
        assert (folder / "final" / name).read_bytes() == Path(str(expected.final), name).read_bytes(), name
    records = [json.loads((Path(where) / "evaluation.json").read_text()) for where in (folder, expected.run_dir)]
    assert records[0] == records[1]


def _steps_in_mlflow(scratch: Path) -> list[int]:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{scratch}/s3/{BUCKET}/folder/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("maps_ray").experiment_id])
    assert run.data.tags[RUN_KEY] and run.info.status == "FINISHED"
    return [metric.step for metric in client.get_metric_history(run.info.run_id, "train/loss")]


def _start(spec: RunSpec, tmp_path: Path, **environment: str) -> subprocess.Popen[str]:
    """A driver in a process of its own."""
    (tmp_path / f"{spec.name}.yaml").write_text(dump(spec))
    assert load_spec(tmp_path / f"{spec.name}.yaml") == spec
    return subprocess.Popen(
        [sys.executable, "-m", "maps_ray.cli", "train", str(tmp_path / f"{spec.name}.yaml")],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={k: v for k, v in os.environ.items() if not k.startswith("RAY_AUTH")} | environment,
    )


def _wait_for_checkpoint(spec: RunSpec, step: int, timeout_s: float = 280) -> None:
    storage, deadline = RunStorage(spec.run_place), time.monotonic() + timeout_s
    while not any(int(n[5:13]) >= step and n.endswith("manifest.json") for n in storage.files("checkpoints")):
        assert time.monotonic() < deadline, f"no checkpoint of step {step} in {timeout_s} s"
        time.sleep(0.2)


def _kill_a_worker(at_step: int, spec: RunSpec) -> None:
    _wait_for_checkpoint(spec, at_step)
    workers = [p for p in psutil.Process().children(recursive=True) if "ray::" in " ".join(p.cmdline())]
    workers = [p for p in workers if "TrainWorker" in " ".join(p.cmdline())]
    workers[-1].kill()
