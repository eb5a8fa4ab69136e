"""Sweeps on an object store: a driver lost with its disk, two drivers on one sweep, copies, reports by address."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from s3_gate import Gate, s3_server

import maps_ray.sweeps
from maps_ray.run_copies import fetched
from maps_ray.run_storage import RunStorage
from maps_ray.spec import SpecError
from maps_ray.spec.sweep_spec import load_sweep
from maps_ray.sweeps.callbacks import Recorder, View
from maps_ray.sweeps.command import load_plan, spec_of_trial, write_report_of
from maps_ray.sweeps.driver import leave, run_sweep
from maps_ray.sweeps.folder import Sweep, begin_folder, find_sweep
from maps_ray.sweeps.journal import Ended, Journal
from maps_ray.sweeps.plan import make_plan
from maps_ray.sweeps.record import read_sweep
from maps_ray.sweeps.schedules import Plan, facts_of, trial_spec
from maps_ray.sweeps.search import SweepSearch
from maps_ray.sweeps.trial import SweepTrial
from maps_ray.tracking import Tracker
from maps_ray.tracking.spool import Spool, read_history
from maps_ray.training.mirror import Mirror
from maps_ray.training.run_faults import OvertakenError
from maps_ray.training.run_folder import EvaluationRecord
from maps_ray.training.shelf import ObjectShelf
from maps_ray.training.train import StopOnSignal, begin, take_over

BUCKET, OOD = "sweeps", "eval/ood/action_l1"
STEPS = 8
RUN = {
    "evaluation": {"every": 4, "batch_size": 4, "max_samples": 4},
    "training": {"max_steps": STEPS, "checkpoint_every": 2},
}
Make = Callable[..., Plan]


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[Gate, Any]]:
    # Before Ray starts: its workers inherit the environment.
    with s3_server(BUCKET) as found:
        yield found


@pytest.fixture
def make(server: tuple[Gate, Any], make_sweep: Callable[..., Path], tmp_path: Path) -> Make:
    """Plans of sweeps on the object store; a scratch of another name is another node's."""
    server[0].open()

    def made(scratch: str | None = "scratch", run: dict[str, Any] | None = None, **fields: Any) -> Plan:
        places = {"storage": f"s3://{BUCKET}/{tmp_path.name}", "scratch": scratch and tmp_path / scratch, "workers": 1}
        fields = {"num_samples": 2, "baselines": ["l2_sp"], "max_concurrent": 1, **fields}
        return make_plan(load_sweep(make_sweep(run={**RUN, **(run or {}), "cluster": places}, **fields)))

    return made


def end(sweep: Sweep, number: int, value: float) -> str:
    """A trial as it is when it has ended."""
    plan = sweep.plan
    schedule = plan.known()[number]
    sweep.journal.decide(schedule)
    (name,) = plan.names(schedule)
    spec = trial_spec(plan.base, plan.folder, name, 0, schedule.proximity)
    spec.run_dir.mkdir(parents=True)
    tracker = begin(spec, params=plan.resolved(schedule.proximity).params(), parent=plan.folder)
    tracker.metrics(STEPS, {OOD: value})
    tracker.finish("FINISHED", 0)
    EvaluationRecord(spec.run_dir).add(STEPS, {"ood": {"action_l1": value}})
    mirror = Mirror.of(spec)
    mirror.push_all()
    mirror.push_records()
    sweep.journal.end(Ended(name, schedule.number, 0, "finished", STEPS, {OOD: value}, 1.0))
    sweep.mirror.push_records()
    return name


def begun(plan: Plan) -> Sweep:
    sweep = begin_folder(plan, resume=False)
    sweep.take_over()
    Tracker.create(plan.folder, uri=plan.tracking_uri, experiment="e", run_name="swept", ship=False)
    return sweep


def test_a_driver_on_another_node_has_all_that_was_decided(make: Make, tmp_path: Path) -> None:
    plan = make()
    sweep = begun(plan)
    names = [end(sweep, number, value) for number, value in enumerate((0.4, 0.3))]
    sweep.write("scheduler.pkl", b"what it knows")
    with pytest.raises(SpecError, match=rf"s3://{BUCKET}/.*/swept exists already; continue that sweep with --resume"):
        begin_folder(plan, resume=False)
    shutil.rmtree(tmp_path / "scratch")

    address = plan.base.run_place
    other, resumed = load_plan(None, (), address, False)
    assert resumed and other.spec.known_strengths == plan.spec.known_strengths and other.base.run_place == address
    other = make(scratch="other")
    taken = begin_folder(other, resume=True)
    assert str(tmp_path / "other") in str(taken.folder)
    assert list(taken.journal.ended) == names and taken.journal.ended[names[1]].values == {OOD: 0.3}
    assert (taken.folder / "scheduler.pkl").read_bytes() == b"what it knows"
    assert read_history(taken.trial_dir(names[0])).metrics[OOD] == [(STEPS, 0.4)]
    # Its records go with those of the sweep as it is here.
    Tracker.create(other.folder, uri=other.tracking_uri, experiment="e", run_name="swept", ship=False)
    taken.adopt()
    child = Spool(taken.trial_dir(names[0])).identity()
    assert (child.parent, child.uri) == (str(taken.folder), other.tracking_uri)
    assert {spool.run_dir for spool in Spool(taken.folder).children()} == {taken.trial_dir(n).resolve() for n in names}
    # A change of what is computed is named, as in a folder.
    with pytest.raises(SpecError, match="seed = 3: the sweep was started with 0"):
        begin_folder(make(scratch="other", seed=3), resume=True)


def test_a_trials_actor_may_have_another_scratch_than_the_driver(
    make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MAPS_RAY_SCRATCH", str(tmp_path / "driver"))
    sweep = begun(make(scratch=None))
    plan, folder, uri = sweep.plan, sweep.folder, sweep.plan.tracking_uri
    config = SweepSearch(sweep).suggest("0")
    name = facts_of(config)["name"]
    sweep.trial_dir(name).mkdir(parents=True)
    EvaluationRecord(sweep.trial_dir(name)).add(4, {"ood": {"action_l1": 0.5}})
    # Ray's environment, not the driver's; Ray's folder for temporary files may be another one too.
    monkeypatch.setenv("MAPS_RAY_SCRATCH", str(tmp_path / "actor"))
    trial = SweepTrial.__new__(SweepTrial)
    storage = RunStorage(plan.base.run_place)
    storage.upload(sweep.trial_dir(name) / "evaluation.json", f"trials/{name}/evaluation.json")
    trial.setup(config, str(folder))
    trial._time_total = 1.0
    assert trial.step()["step"] == 4
    trial._record({"status": "finished", "step": STEPS, "start_step": 0, "metrics": {}})
    assert trial.step() == {"step": STEPS, "cost": 0.5, OOD: 0.5, "status": "finished", "done": True}
    # The driver finds it in its own folder, and the store has it; its database is the driver's.
    assert json.loads((sweep.trial_dir(name) / "result.json").read_text())["status"] == "finished"
    assert storage.exists(f"trials/{name}/result.json") and trial._spec.tracking.uri == uri
    assert uri.endswith(f"{tmp_path}/driver/s3/{BUCKET}/{tmp_path.name}/mlflow.db")
    # Workers, which may be on any node, have a scratch of their own; the actor has put nothing into its.
    assert trial._spec.run_dir.is_relative_to(tmp_path / "actor") and not (tmp_path / "actor").exists()


def test_the_younger_of_two_drivers_has_the_sweep(make: Make) -> None:
    older = begun(make())
    end(older, 0, 0.4)
    older.require()
    younger = begin_folder(make(scratch="other"), resume=True)
    younger.take_over()
    younger.require()
    with pytest.raises(OvertakenError, match="belongs to another driver: process") as caught:
        older.require()
    # It says nothing more of it.
    kept = RunStorage(older.plan.base.run_place).files()
    recorder = Recorder()
    recorder.attach(older, Tracker.open(older.folder), StopOnSignal(), View(older.plan, shown=False))
    recorder.close("FAILED", 0, caught.value)
    assert read_history(older.folder).status == "RUNNING"
    assert RunStorage(older.plan.base.run_place).files() == kept


def test_a_copied_checkpoint_counts_for_the_trial_that_goes_on_from_it(make: Make) -> None:
    fields = {"scheduler": "pbt", "known_strengths": [], "num_samples": 4, "baselines": []}
    sweep = begun(make(run={"training": {**RUN["training"], "schedule": "constant"}}, **fields))
    storage, search = RunStorage(sweep.plan.base.run_place), SweepSearch(sweep)
    one, two = (SweepTrial.__new__(SweepTrial) for _ in range(2))
    for number, trial in enumerate((one, two)):
        trial.setup(search.suggest(str(number)), str(sweep.folder))
        trial._spec.run_dir.mkdir(parents=True, exist_ok=True)
    source, target = f"trials/{one._spec.name}", f"trials/{two._spec.name}"
    for step in (2, 4, 6):
        name = f"step-{step:08d}"
        manifest = {"format": 1, "step": step, "files": {"rank-00000.safetensors-a": 3}, "claim": "of the other"}
        storage.write(f"{source}/checkpoints/{name}/rank-00000.safetensors-a", b"abc")
        storage.write(f"{source}/checkpoints/{name}/manifest.json", json.dumps(manifest).encode())
        kept = one._keep(name)
        storage.write(f"{target}/checkpoints/{name}/manifest.json", b"its own")
        EvaluationRecord(two._spec.run_dir).add(step, {"ood": {"action_l1": 0.5}})
    # The last one, and the one before, which others may still be given.
    kept_steps = [sweep.copies.has(f"{source}/kept/step-{step:08d}") for step in (2, 4, 6)]
    assert kept == f"{source}/kept/step-00000006" and kept_steps == [False, True, True]
    two.load_checkpoint({"name": one._spec.name, "seen": 4, "kept": f"{source}/kept/step-00000004"})
    shelf = ObjectShelf(storage.inside(target), two._spec.run_dir, two._fence)
    assert shelf.complete() == ["step-00000004"]
    found = set(storage.files(f"{target}/checkpoints"))
    assert found == {"step-00000004/manifest.json", "step-00000004/rank-00000.safetensors-a"}
    assert [entry["step"] for entry in json.loads(storage.read(f"{target}/evaluation.json"))] == [2, 4]
    # A driver after this one takes it for the trial's own; to the source it is what it was.
    later = take_over(Mirror(two._spec.run_dir, storage.inside(target)))
    assert ObjectShelf(storage.inside(target), two._spec.run_dir, later).complete() == ["step-00000004"]
    sweep.copies.prune(f"{source}/kept")
    assert storage.files(f"{source}/kept") == {} and len(storage.files(f"{source}/checkpoints")) == 6


def test_the_drivers_copy_goes_when_the_sweep_has_finished(
    make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = make()
    sweep = begun(plan)
    name = end(sweep, 0, 0.4)
    # MLflow has refused a record: it stays where the message says that it is.
    refused = Spool(sweep.trial_dir(name)).quarantine
    refused.write_text('{"record": {}, "error": "refused"}\n')
    leave(plan)
    assert read_history(sweep.trial_dir(name)).metrics[OOD] == [(STEPS, 0.4)]
    assert re.search(rf"its copy in {plan.folder} stays; `maps-ray sweep --resume s3://", capsys.readouterr().err)
    refused.unlink()
    leave(plan)
    assert not plan.folder.exists() and "stays" not in capsys.readouterr().err
    assert Path(plan.tracking_uri.removeprefix("sqlite:///")).is_file()
    # The store has all of it, a copy of MLflow's database among the records.
    folder = fetched(plan.base.run_place, tmp_path / "reader")
    assert list(Journal(folder).ended) == [name] and read_history(folder / "trials" / name).status == "FINISHED"
    with sqlite3.connect(folder / "tracking" / "mlflow.db") as copy:
        assert {run for (run,) in copy.execute("select name from runs")} == {"swept", name}
    copy.close()


def test_a_report_of_an_address(make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MAPS_RAY_SCRATCH", str(tmp_path / "reader"))
    plan = make()
    sweep = begun(plan)
    for number, value in enumerate((0.4, 0.3)):
        end(sweep, number, value)
    storage = RunStorage(plan.base.run_place)
    storage.write("trials/l2_sp/final/model.safetensors", b"large")
    written = write_report_of(plan.base.run_place, "json")
    assert written == f"{plan.base.run_place}/report.json"
    found = json.loads(storage.read("report.json"))
    assert [schedule["label"] for schedule in found["schedules"]] == ["DSPEL-000", "l2_sp"]
    record = read_sweep(find_sweep(plan.base.run_place))
    assert record.place == plan.base.run_place and record.folder.is_relative_to(tmp_path / "reader")
    assert not list((tmp_path / "reader").rglob("*.safetensors"))
    alone = spec_of_trial(f"{plan.base.run_place}/DSPEL-000")
    assert alone.run_place == f"s3://{BUCKET}/{tmp_path.name}/swept-DSPEL-000" and alone.proximity.lambda_max == 1.0
    with pytest.raises(SpecError, match="no trial has begun: s3://"):
        maps_ray.sweeps.results(plan.base.run_place)


@pytest.fixture(scope="module")
def cluster(server: tuple[Gate, Any], frame_cache: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    from maps_ray.spec import ClusterSpec
    from maps_ray.training.cluster import ray_cluster

    with pytest.MonkeyPatch.context() as patch:
        # What actors and workers have as scratch, whatever a driver's environment says later.
        patch.setenv("MAPS_RAY_SCRATCH", str(tmp_path_factory.mktemp("nodes")))
        with ray_cluster(ClusterSpec()):
            yield


def outcome(folder: Path) -> dict[str, tuple]:
    return {e.trial: (e.status, e.step, e.values) for e in Journal(folder).ended.values()}


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_sweep_whose_driver_is_lost_with_its_disk(
    cluster: None, make: Make, make_sweep: Callable[..., Path], tmp_path: Path, server: tuple[Gate, Any]
) -> None:
    merge = {"weights": {"dinov2": {"values": [0.5, 1.0]}}, "num_samples": 2}
    fields = {"num_samples": 3, "searcher": "optuna", "merge": merge}
    make(scratch="lost", **fields)
    driver = subprocess.Popen(
        [sys.executable, "-m", "maps_ray.cli", "sweep", str(tmp_path / "sweep.yaml")],
        stdout=(tmp_path / "said").open("w"),
        stderr=subprocess.STDOUT,
        start_new_session=True,
        env={k: v for k, v in os.environ.items() if not k.startswith("RAY_A")},
    )
    plan = make(scratch="other", **fields)
    storage = RunStorage(plan.base.run_place)

    def in_the_second_trial() -> bool:
        assert driver.poll() is None, (tmp_path / "said").read_text()
        return any(name.startswith("l2_sp/checkpoints") and "manifest" in name for name in storage.files("trials"))

    deadline = time.monotonic() + 500
    while not in_the_second_trial():
        assert time.monotonic() < deadline, (tmp_path / "said").read_text()
        time.sleep(0.3)
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    shutil.rmtree(tmp_path / "lost", ignore_errors=True)
    first = json.loads(storage.read("trials/DSPEL-000/result.json"))

    server[0].faults = 0.03
    result = run_sweep(plan, resume=True, show=False)
    server[0].open()
    assert result.status == "finished" and result.place == f"s3://{BUCKET}/{tmp_path.name}/swept"
    # All of it is on the store, and nothing of it here any more but MLflow's database.
    assert not plan.folder.exists()
    # What had ended was not run again, what had not went on from its checkpoint.
    assert json.loads(storage.read("trials/DSPEL-000/result.json")) == first
    assert json.loads(storage.read("trials/l2_sp/result.json"))["start_step"] >= 2
    folder = fetched(result.place, tmp_path / "third", without="final|tune")
    assert len(maps_ray.sweeps.results(result.place)) == len(outcome(folder))

    local = {"cluster": {"workers": 1, "storage": tmp_path / "runs", "start_timeout_s": 180}}
    undisturbed = make_plan(
        load_sweep(make_sweep(run={**RUN, **local}, baselines=["l2_sp"], max_concurrent=1, **fields))
    )
    run_sweep(undisturbed, show=False)
    expected = outcome(undisturbed.folder)
    assert len(expected) == 6 and outcome(folder) == expected
    for name in expected:
        history = read_history(folder / "trials" / name)
        assert history.status == "FINISHED"
        if not name.startswith("merged"):
            assert [step for step, _ in history.metrics["train/loss"]] == list(range(1, STEPS + 1))
    # Merged weights are nowhere, trained ones on the store, and each trial stands in MLflow under the sweep.
    assert not any("final/" in name for name in storage.files("trials") if name.startswith("merged"))
    assert storage.exists("trials/l2_sp/final/config.json")
    from mlflow.tracking import MlflowClient

    client = MlflowClient(plan.tracking_uri)
    runs = client.search_runs([client.get_experiment_by_name("maps_ray").experiment_id])
    assert {run.info.run_name for run in runs} == {"swept", *expected}
    assert {run.info.status for run in runs} == {"FINISHED"}


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_population_copies_its_checkpoints_within_the_store(
    cluster: None, make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run = {
        "evaluation": {"every": 2, "batch_size": 4, "max_samples": 4},
        "training": {"max_steps": STEPS, "checkpoint_every": STEPS, "schedule": "constant"},
    }
    scheduler = {"name": "pbt", "options": {"quantile_fraction": 0.5}}
    fields = {"scheduler": scheduler, "searcher": "random", "known_strengths": [], "num_samples": 4, "baselines": []}
    monkeypatch.setenv("MAPS_RAY_SCRATCH", str(tmp_path / "driver"))
    plan = make(scratch=None, run=run, max_concurrent=None, **fields)
    result = run_sweep(plan, show=False)
    assert not plan.folder.exists()
    journal, storage = Journal(fetched(result.place, tmp_path / "third")), RunStorage(result.place)
    assert result.status == "finished" and len(journal.ended) == 4
    assert {(ended.status, ended.step) for ended in journal.ended.values()} == {("finished", STEPS)}
    assert journal.changes
    for change in {change.trial: change for change in journal.changes}.values():
        found = json.loads(storage.read(f"trials/{change.trial}/result.json"))
        assert change.source != change.trial and found["start_step"] >= change.step
        spec = storage.read(f"trials/{change.trial}/spec.yaml").decode()
        assert f"lambda_max: {change.proximity['lambda_max']}" in spec
    # Copies are gone with the sweep's end, checkpoints and trained weights are not.
    assert not any("/kept/" in name or "/given/" in name for name in storage.files("trials"))
    assert storage.exists(f"trials/{journal.changes[0].trial}/final/config.json")
    monkeypatch.setenv("MAPS_RAY_SCRATCH", str(tmp_path / "reader"))
    write_report_of(result.place, "json")
    told = json.loads(storage.read("report.json"))["changes"]
    assert [(change["trial"], change["step"]) for change in told] == [(c.trial, c.step) for c in journal.changes]
