"""Commands that are given a run, a checkpoint or a spec by its address on an object store."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from run_specs import MakeSpec
from s3_gate import s3_server
from safetensors.torch import load_file
from small_policy import write_finished_run
from typer.testing import CliRunner, Result

from maps_ray.cli import app
from maps_ray.evaluation.rollouts.command import _put_back
from maps_ray.metrics import SAMPLES_PER_SECOND
from maps_ray.run_copies import address_of, fetched
from maps_ray.run_storage import RunStorage
from maps_ray.spec import SpecError
from maps_ray.tracking import Tracker

RANGE = {"q01": [-1.0] * 8, "q99": [1.0] * 8, "min": [-2.0] * 8, "max": [2.0] * 8}
STATISTICS = {"demos": {"action": {name: values[:7] for name, values in RANGE.items()}, "proprio": RANGE}}
BUCKET = "runs"


@dataclass(frozen=True)
class Finished:
    """A finished run: in a folder, and the same on the store."""

    folder: Path
    address: str
    base: str
    """Address of what it started from."""
    database: str


@pytest.fixture(scope="module")
def run(make_spec: MakeSpec, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Finished]:
    spec, database = make_spec("tiny"), f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"
    write_finished_run(spec, base, step=6, statistics=STATISTICS)
    tracker = Tracker.create(spec.run_dir, uri=database, experiment="e", run_name="tiny", ship=False)
    for step in range(1, 7):
        tracker.metrics(step, {SAMPLES_PER_SECOND: 10.0})
    with s3_server(BUCKET):
        storage = RunStorage(f"s3://{BUCKET}/folder/tiny")
        RunStorage(f"s3://{BUCKET}/folder").upload_folder(spec.run_dir, "tiny")
        storage.write("checkpoints/step-00000006/rank-00000.safetensors-a", b"large")
        RunStorage(f"s3://{BUCKET}").upload_folder(base, "base")
        yield Finished(spec.run_dir, storage.address, f"s3://{BUCKET}/base", database)


@pytest.fixture(autouse=True)
def scratch(run: Finished, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("MAPS_RAY_SCRATCH", str(tmp_path / "scratch"))
    return tmp_path / "scratch"


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def left(scratch: Path) -> list[str]:
    """What lies in the scratch."""
    return sorted(path.relative_to(scratch).as_posix() for path in scratch.rglob("*") if path.is_file())


def test_merged_and_exported(run: Finished, scratch: Path, tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    assert call("merge", run.folder, "--weights", "dinov2=0.5", "--out", here).exit_code == 0
    done = call("merge", run.address, "--base", run.base, "--weights", "dinov2=0.5", "--out", there)
    assert done.exit_code == 0, done.exception
    for name, tensor in load_file(here / "model.safetensors").items():
        assert torch.equal(load_file(there / "model.safetensors")[name], tensor), name
    exported = {}
    for source, out in ((run.folder, "a"), (run.address, "b"), (f"{run.address}/final/", "c")):
        done = call("export", source, "--format", "openvla-oft", "--out", tmp_path / out)
        assert done.exit_code == 0, done.exception
        exported[out] = {path.name: path.read_bytes() for path in (tmp_path / out).rglob("*") if path.is_file()}
    assert exported["a"] == exported["b"] == exported["c"] and "config.json" in exported["a"]
    # The copies have gone with the commands.
    assert left(scratch) == []


def test_what_is_wrong_is_said_of_the_address(run: Finished, scratch: Path, tmp_path: Path) -> None:
    done = call("merge", f"{run.address}/final", "--lines", "0,1", "--out", tmp_path / "out")
    assert isinstance(done.exception, SpecError)
    assert str(done.exception) == f"RUN = '{run.address}/final': no folder of a run: it has no spec.yaml"
    done = call("export", run.address, "--format", "minivla", "--out", tmp_path / "out")
    assert f"{run.address}/final cannot be written as" in str(done.exception) or "no format" in str(done.exception)
    done = call("serve", f"{run.base}/none")
    assert str(done.exception) == (
        f"CHECKPOINT = '{run.base}/none': nothing is there: no object begins with {run.base}/none/"
    )
    assert left(scratch) == [] and not (tmp_path / "out").exists()


def test_specs_and_records(run: Finished, scratch: Path, tmp_path: Path) -> None:
    spec = f"{run.address}/spec.yaml"
    said = [call("strengths", place, "--json") for place in (run.folder / "spec.yaml", spec)]
    assert said[0].exit_code == 0 and said[0].stdout == said[1].stdout
    assert call("check", spec).exit_code == 0
    planned = call("plan", spec, "--device", "h100-80", "--measured", run.address, "--json")
    assert planned.exit_code == 0, planned.exception
    assert f"the pace is that of {run.address}" in planned.stdout
    # For their records no weights are fetched.
    assert left(scratch / "fetched") == [
        *(f"s3/{BUCKET}/folder/tiny/{name}" for name in ("base.json", "inputs.json", "spec.yaml")),
        *(name for name in left(scratch / "fetched") if "/tracking/" in name),
    ]
    replayed = call("track", "replay", run.address)
    assert replayed.exit_code == 0 and "tiny: " in replayed.stdout, replayed.exception
    from mlflow.tracking import MlflowClient

    client = MlflowClient(run.database)
    (found,) = client.search_runs([client.get_experiment_by_name("e").experiment_id])
    assert found.data.metrics[SAMPLES_PER_SECOND] == 10.0


def test_rollouts_lie_beside_the_run(run: Finished, scratch: Path) -> None:
    """What `evaluate` does before and after it plays: it goes on from what any machine has put there."""
    folder = fetched(run.address)
    assert (folder / "final" / "config.json").is_file() and not (folder / "checkpoints").exists()
    out = folder / "rollouts" / "0123abcd"
    assert address_of(out) == f"{run.address}/rollouts/0123abcd" and address_of(run.folder) is None
    for name, text in (("episodes.jsonl", "one\n"), ("videos/a.mp4", "a video"), ("tracking/run.json", "its own")):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(text)
    assert _put_back(out) == f"{run.address}/rollouts/0123abcd"
    storage = RunStorage(run.address)
    assert set(storage.files("rollouts")) == {"0123abcd/episodes.jsonl", "0123abcd/videos/a.mp4"}
    # Interrupted here, further on there, and the other way round.
    (out / "episodes.jsonl").write_text("one\ntwo\n")
    assert (fetched(run.address) / "rollouts/0123abcd/episodes.jsonl").read_text() == "one\ntwo\n"
    storage.write("rollouts/0123abcd/episodes.jsonl", b"one\ntwo\nthree\n")
    assert (fetched(run.address) / "rollouts/0123abcd/episodes.jsonl").read_text() == "one\ntwo\nthree\n"
    shutil.rmtree(scratch)
    assert (fetched(run.address) / "rollouts/0123abcd/videos/a.mp4").read_text() == "a video"
    storage.remove_folder("rollouts")


@pytest.mark.slow
def test_an_evaluation_that_is_stopped_goes_on_on_another_machine(run: Finished, scratch: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "maps_ray.cli",
        "evaluate",
        run.address,
        "--suite",
        "libero_object",
        "--tasks",
        "0",
    ]
    command += ["--episodes", "3", "--max-steps", "24", "--workers", "1", "--json"]
    name, storage = "episodes.jsonl", RunStorage(f"{run.address}/rollouts")
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=tmp_path)
    deadline = time.monotonic() + 200
    while not any('"episode"' in path.read_text() for path in scratch.rglob(name)):
        assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.wait(120) == 130, (tmp_path / "log").read_text()
    (place,) = [path for path in storage.files() if path.endswith(name)]
    first = storage.read(place)
    assert 1 <= first.count(b'"episode"') < 3
    elsewhere = {**os.environ, "MAPS_RAY_SCRATCH": str(tmp_path / "elsewhere")}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=elsewhere, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["out"] == f"{storage.address}/{place.split('/')[0]}"
    whole = storage.read(place)
    assert whole.startswith(first) and whole.count(b'"episode"') == 3
    storage.remove_folder("")


@pytest.mark.parametrize(
    "arguments",
    [
        ["merge", "runs/tiny", "--lines", "0,1", "--out", "s3://runs/out"],
        ["export", "runs/tiny", "--format", "openvla-oft", "--out", "s3://runs/out"],
        ["evaluate", "runs/tiny", "--suite", "libero_object", "--out", "gs://runs/out"],
        ["collect", "--suite", "libero_object", "--out", "s3://runs/out"],
        ["data", "convert", "demos", "--out", "s3://runs/out"],
        ["init", "s3://runs/spec.yaml"],
        ["sweep", "s3://runs/sweep.yaml"],
    ],
)
def test_what_must_lie_on_this_machine_says_so(arguments: list[str], scratch: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    done = call(*arguments)
    address = next(argument for argument in arguments if "://" in argument)
    assert done.exit_code == 2
    assert f"{address} is an address, and this is read or written on this machine: give a path" in done.output
    assert "(aws s3 cp, gcloud storage cp)" in done.output and not Path("s3:").exists() and left(scratch) == []


def test_a_local_file_may_be_given_as_one(run: Finished) -> None:
    said = call("strengths", f"file://{run.folder}/spec.yaml", "--json")
    assert said.exit_code == 0 and json.loads(said.stdout)
