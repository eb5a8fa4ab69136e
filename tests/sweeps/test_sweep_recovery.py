"""Sweeps that are stopped, killed or cut off from MLflow end like undisturbed ones; nothing is left behind."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import psutil
import pytest

from maps_ray.spec.sweep_spec import load_sweep
from maps_ray.sweeps.driver import run_sweep
from maps_ray.sweeps.journal import Journal
from maps_ray.sweeps.plan import make_plan
from maps_ray.sweeps.schedules import Plan
from maps_ray.sweeps.sweep_report import write_sweep_report
from maps_ray.tracking import replay
from maps_ray.tracking.spool import read_history
from maps_ray.training.progress import read_progress

STEPS = 12
RUN = {
    "evaluation": {"every": 4, "batch_size": 4, "max_samples": 4},
    "training": {"max_steps": STEPS, "checkpoint_every": 4},
}
FIELDS = {"budget": {"trials": 5}, "baselines": ["l2_sp"], "max_concurrent": 2}


@pytest.fixture
def sweep(make_sweep: Callable[..., Path]) -> Callable[..., tuple[Path, Plan]]:
    def make(name: str, run: dict | None = None, **fields) -> tuple[Path, Plan]:
        path = make_sweep(run={**RUN, **(run or {})}, name=name, **{**FIELDS, **fields})
        kept = path.with_name(f"{name}.yaml")
        kept.write_text(path.read_text())
        return kept, make_plan(load_sweep(kept))

    return make


def start(path: Path, *arguments: str) -> subprocess.Popen[str]:
    """A driver in a session of its own, as in a terminal."""
    code = "from maps_ray.cli import main; main()"
    return subprocess.Popen(
        [sys.executable, "-c", code, "sweep", str(path), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={k: v for k, v in os.environ.items() if not k.startswith("RAY_AUTH")},
    )


def outcome(plan: Plan) -> dict[str, tuple]:
    """Trial -> what it came to."""
    return {e.trial: (e.status, e.step, e.values) for e in Journal(plan.folder).ended.values()}


def wait_for(condition: Callable[[], bool], timeout_s: float, every_s: float = 0.1) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s} s"
        time.sleep(every_s)


def assert_complete(plan: Plan, expected: dict[str, tuple]) -> None:
    """The same trials with the same values, each ended once, and every step of each recorded."""
    assert outcome(plan) == expected
    lines = [json.loads(line) for line in (plan.folder / "journal.jsonl").read_text().splitlines()]
    ended = [line["ended"]["trial"] for line in lines if line["kind"] == "ended"]
    assert len(ended) == len(set(ended))
    for trial in expected:
        history = read_history(plan.folder / "trials" / trial)
        assert history.status == "FINISHED"
        assert [step for step, _ in history.metrics["train/loss"]] == list(range(1, STEPS + 1))


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_a_driver_killed_at_three_moments_loses_nothing(sweep) -> None:
    path, undisturbed = sweep("undisturbed")
    done = start(path)
    text, _ = done.communicate(timeout=600)
    assert done.returncode == 0, text
    expected = outcome(undisturbed)
    assert len(expected) == 6 and {status for status, _, _ in expected.values()} == {"finished"}

    path, plan = sweep("killed")
    source = random.Random(7)
    for part in range(3):
        driver = start(path, *(["--resume", str(plan.folder)] if part else []))
        # After the first trials of this part have begun, at any moment of their course.
        before = len(Journal(plan.folder).ended) if part else 0
        wait_for(partial(_more_ended, plan, before, driver), 600)
        # A trial that was complete when its driver was killed ends before there are workers again.
        wait_for(lambda pid=driver.pid: bool(_workers(pid)), 300)
        time.sleep(source.uniform(0, 2.5))
        workers = _training_processes(driver.pid)
        os.kill(driver.pid, signal.SIGKILL)
        driver.communicate()
        # Ray's own agents stay for a minute; nothing that writes into a trial's folder does.
        wait_for(partial(_all_gone, workers), 10)
    last = start(path, "--resume", str(plan.folder))
    text, _ = last.communicate(timeout=600)
    assert last.returncode == 0, text
    assert_complete(plan, expected)


def _more_ended(plan: Plan, before: int, driver: subprocess.Popen[str]) -> bool:
    assert driver.poll() is None, driver.communicate()[0]
    return len(Journal(plan.folder).ended) > before


def _training_processes(driver: int) -> list[int]:
    found = [process.pid for process in _workers(driver)]
    assert found
    return found


def _all_gone(pids: list[int]) -> bool:
    return not any(psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in pids)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_ctrl_c_leaves_a_sweep_that_goes_on(sweep) -> None:
    path, plan = sweep("interrupted", max_concurrent=1)
    driver = start(path)
    wait_for(lambda: (plan.folder / "journal.jsonl").exists() and len(Journal(plan.folder).ended) >= 1, 600)
    time.sleep(1)
    os.killpg(driver.pid, signal.SIGINT)
    text, _ = driver.communicate(timeout=180)
    assert driver.returncode == 130, text
    assert f"continue with: maps-ray sweep --resume {plan.folder}" in text
    assert read_history(plan.folder).status == "KILLED"
    last = start(path, "--resume", str(plan.folder))
    text, _ = last.communicate(timeout=600)
    assert last.returncode == 0, text
    assert len(outcome(plan)) == 6
    assert_complete(plan, outcome(plan))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_thirty_short_trials_with_asha_leave_nothing(ray_session, sweep) -> None:
    import ray
    from ray.util import placement_group_table

    fields = {"scheduler": {"name": "asha", "reduction_factor": 2}, "searcher": "tpe", "budget": {"trials": 30}}
    before = {process.pid for process in psutil.Process().children(recursive=True)}
    _, plan = sweep("asha", baselines=[], **fields)
    result = run_sweep(plan, show=False)
    statuses = [status for status, _, _ in outcome(plan).values()]
    assert result.trials == 30 and statuses.count("stopped early") > 5 and statuses.count("failed") == 0
    assert [g for g in placement_group_table().values() if g["state"] != "REMOVED"] == []
    cpus = ray.cluster_resources()["CPU"]
    wait_for(lambda: ray.available_resources().get("CPU") == cpus, 10)

    def left() -> list[psutil.Process]:
        return [process for kind in ("RayTrain", "TrainController") for process in _workers(kind=kind)
                if process.pid not in before]  # fmt: skip

    wait_for(lambda: not left(), 30)
    for trial, (status, step, _) in outcome(plan).items():
        history = read_history(plan.folder / "trials" / trial)
        assert history.status == ("FINISHED" if status == "finished" else "KILLED")
        if status == "stopped early":
            assert step < STEPS and history.tags["maps_ray.ended"].startswith("stopped early by asha")


@pytest.mark.slow
def test_mlflow_down_from_the_start_costs_nothing_but_the_page(ray_session, make_sweep) -> None:
    run = {**RUN, "tracking": {"uri": "http://127.0.0.1:9"}}
    plan = make_plan(load_sweep(make_sweep(run=run, budget={"trials": 2})))
    result = run_sweep(plan, show=False)
    assert result.status == "finished" and result.trials == 2
    for trial in outcome(plan):
        history = read_history(plan.folder / "trials" / trial)
        assert [step for step, _ in history.metrics["train/loss"]] == list(range(1, STEPS + 1))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_mlflow_down_in_the_middle_loses_no_metric(ray_session, make_sweep, server, mlflow) -> None:
    run = {**RUN, "tracking": {"uri": server.uri}}
    plan = make_plan(load_sweep(make_sweep(run=run, budget={"trials": 3}, max_concurrent=1)))
    went_down = threading.Event()

    def take_down() -> None:
        """From the middle of the second trial to the end of the third."""
        trials = plan.folder / "trials"
        wait_for(lambda: any(read_progress(path).get("step", 0) >= 2 for path in trials.glob("*-001")), 300)
        server.kill()
        went_down.set()
        wait_for(lambda: any(trials.glob("*-002/result.json")), 300)
        server.start()

    breaker = threading.Thread(target=take_down, daemon=True)
    breaker.start()
    assert run_sweep(plan, show=False).status == "finished"
    breaker.join(120)
    assert went_down.is_set() and not breaker.is_alive()
    assert replay(plan.folder).complete
    names = {e.trial for e in Journal(plan.folder).ended.values()}
    assert len(names) == 3
    client = mlflow.client(server.uri)
    experiment = client.get_experiment_by_name(plan.base.tracking.experiment)
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert set(runs) == names | {plan.spec.name}
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    for name in names:
        points = mlflow.points(server.uri, runs[name].info.run_id, "train/loss")
        assert points == read_history(plan.folder / "trials" / name).metrics["train/loss"]
        assert [step for step, _ in points] == list(range(1, STEPS + 1))


@pytest.mark.slow
def test_a_trial_that_diverges_fails_and_the_others_go_on(ray_session, make_sweep, tmp_path) -> None:
    (tmp_path / "space.yaml").write_text("lambda_max: {values: [0.5, 1.0]}")
    run = {**RUN, "training": {**RUN["training"], "learning_rate": 1e30, "clip_norm": 0, "schedule": "constant"}}
    fields = {"searcher": "grid", "known_strengths": [], "budget": {"trials": 2}, "max_concurrent": 1}
    plan = make_plan(load_sweep(make_sweep(run=run, space=[str(tmp_path / "space.yaml")], **fields)))
    result = run_sweep(plan, show=False)
    assert result.status == "finished" and [status for status, _, _ in outcome(plan).values()] == ["failed"] * 2
    for ended in Journal(plan.folder).ended.values():
        history = read_history(plan.folder / "trials" / ended.trial)
        assert history.status == "FAILED" and "Try a lower training.learning_rate" in ended.error
        assert history.tags["maps_ray.ended"].startswith("failed: ")
    # Tune says so too, and did not try them again.
    assert result.grid.num_errors == 2 and "Try a lower training.learning_rate" in str(result.grid.errors[0])
    assert "Try a lower" in write_sweep_report(plan.folder).read_text()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_worker_killed_in_start_up_training_or_evaluation_costs_a_trial_nothing(ray_session, sweep) -> None:
    fields = {"budget": {"trials": 3}, "baselines": [], "max_concurrent": 1}
    # Evaluations that last long enough to be met.
    run = {"evaluation": {"every": 4, "batch_size": 1, "max_samples": 40}}
    _, undisturbed = sweep("calm", run=run, **fields)
    run_sweep(undisturbed, show=False)
    _, plan = sweep("hit", run=run, **fields)
    killed: list[str] = []

    def met(trial: str, phase: str) -> bool:
        found = [read_progress(path) for path in (plan.folder / "trials").glob(f"*-{trial}")]
        return any(progress.get("phase", "").startswith(phase) for progress in found)

    def kill() -> None:
        # Its process is there before it has said that it began.
        wait_for(lambda: bool(_workers()), 200)
        _kill(killed, "start-up")
        for trial, phase in (("001", "training"), ("002", "evaluating")):
            wait_for(lambda trial=trial: met(trial, ""), 200)
            group = _workers()
            wait_for(partial(met, trial, phase), 200, every_s=0.01)
            _kill(killed, phase, group)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    assert run_sweep(plan, show=False).status == "finished"
    assert killed == ["start-up", "training", "evaluating"]
    assert_complete(plan, outcome(undisturbed))


def _workers(driver: int | None = None, kind: str = "RayTrainWorker") -> list[psutil.Process]:
    found = []
    for process in psutil.Process(driver).children(recursive=True):
        # Some end meanwhile.
        with suppress(psutil.NoSuchProcess):
            if kind in " ".join(process.cmdline()):
                found.append(process)
    return found


def _kill(killed: list[str], when: str, group: list[psutil.Process] | None = None) -> None:
    for process in _workers() if group is None else group:
        process.kill()
        killed.append(when)
