"""Rollouts in a run: when they happen, what they leave, and how they go on after a stop and after a loss."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import toy_suite
from ray import cloudpickle
from run_specs import MakeSpec
from toy_suite import worker_with_toys

from maps_ray.spec import RunSpec
from maps_ray.sweeps.objectives import evaluations
from maps_ray.tracking.spool import read_history
from maps_ray.training.run_faults import TrainingError
from maps_ray.training.train import train

SUCCESS, SWAPPED = "rollout/toy/success", "rollout/toy_swap/success"


@pytest.fixture
def toys(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Runs roll out in the toy suites from now on; returns the file that names each episode that was begun."""

    # Workers cannot import what lies among the tests.
    cloudpickle.register_pickle_by_value(toy_suite)

    def install(step_s: float = 0.0) -> Path:
        monkeypatch.setattr("maps_ray.training.worker.train_worker", worker_with_toys(tmp_path / "log", step_s))
        return tmp_path / "log"

    yield install
    cloudpickle.unregister_pickle_by_value(toy_suite)


def rolled(make_spec: MakeSpec, name: str, **rollouts: Any) -> RunSpec:
    chosen = {"suites": ["toy", "toy_swap"], "episodes": 2, "every": 4, "workers": 2, **rollouts}
    evaluation = {"every": 2, "batch_size": 4, "max_samples": 4, "rollouts": chosen}
    training = {"checkpoint_every": 100}
    return make_spec(name, evaluation=evaluation, training=training)


def begun(log: Path) -> list[str]:
    return sorted(line.rpartition(" ")[0] for line in log.read_text().splitlines())


def ended(spec: RunSpec, step: int) -> int:
    path = spec.run_dir / "rollouts" / f"step-{step:08d}" / "episodes.jsonl"
    return path.read_text().count('"episode"') if path.exists() else 0


def when(condition: Callable[[], bool], action: Callable[[], Any], timeout_s: float = 400) -> threading.Thread:
    def watch() -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            if time.monotonic() > deadline:
                return
            time.sleep(0.02)
        action()

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


def test_a_run_is_rolled_out_at_its_steps_and_at_the_end(
    ray_session: None, make_spec: MakeSpec, toys: Callable[..., Path]
) -> None:
    log = toys()
    spec = rolled(make_spec, "rolled")
    result = train(spec, progress=False)
    assert result.status == "finished" and result.metrics[SUCCESS] == result.metrics[SWAPPED] == 0.5
    history = read_history(spec.run_dir)
    assert history.metrics[SUCCESS] == [(4, 0.5), (6, 0.5)]
    assert history.metrics["rollout/ood/success"] == [(4, 0.5), (6, 0.5)]
    assert history.metrics["rollout/toy/grasp"] == [(4, 1.0), (6, 1.0)]
    # What a sweep's searcher and scheduler read.
    found = evaluations(spec.run_dir)
    assert [(step, values.get(SUCCESS)) for step, values in found] == [(2, None), (4, 0.5), (6, 0.5)]
    assert all("eval/ood/action_l1" in values for _, values in found)
    each = [f"{suite} {task} {state}" for suite in ("toy", "toy_swap") for task in (0, 1) for state in (0, 1)]
    # Once more at the start, where the length of the robot's state is looked up.
    assert set(begun(log)) == set(each) and len(begun(log)) == 2 * (len(each) + 1)
    folder = spec.run_dir / "rollouts" / "step-00000004"
    assert not (folder / "checkpoint").exists() and ended(spec, 4) == ended(spec, 6) == 8
    kept = {str(path) for path in history.artifacts}
    assert "rollouts/step-00000006/evaluation.json" in kept
    assert sum(name.endswith(".mp4") for name in kept) == 2 * 4
    # Once for the rollouts, although no step is a multiple of checkpoint_every.
    assert (spec.run_dir / "checkpoints" / "step-00000004").is_dir()


@pytest.mark.slow
def test_a_stop_ends_the_rollouts_and_a_resumed_run_goes_on(
    ray_session: None, make_spec: MakeSpec, toys: Callable[..., Path]
) -> None:
    log = toys(step_s=0.3)
    spec = rolled(make_spec, "halted", episodes=3, suites=["toy"], workers=1)
    # As Ctrl-C does: the driver hands it to the workers.
    watcher = when(lambda: ended(spec, 4) >= 4, lambda: os.kill(os.getpid(), signal.SIGINT))
    stopped = train(spec, progress=False)
    watcher.join()
    # The episode of the second task takes five seconds: it is not waited for.
    assert stopped.status == "stopped" and stopped.step == 4
    done = ended(spec, 4)
    assert 4 <= done < 6 and [step for step, _ in evaluations(spec.run_dir)] == [2, 4]
    assert SUCCESS not in evaluations(spec.run_dir)[-1][1]
    before = len(begun(log))
    log = toys()
    resumed = train(spec, resume=True, progress=False)
    assert resumed.status == "finished" and resumed.start_step == 4 and ended(spec, 4) == ended(spec, 6) == 6
    # Those that were left, with a look at the robot's state, and all of the last step's.
    assert len(begun(log)) - before == (6 - done + 1) + (6 + 1)
    assert read_history(spec.run_dir).metrics[SUCCESS] == [(4, 0.5), (6, 0.5)]
    again = train(spec, resume=True, progress=False)
    assert again == resumed


def is_worker(process: psutil.Process) -> bool:
    try:
        return "RayTrainWorker" in " ".join(process.cmdline())
    except psutil.Error:
        return False


@pytest.mark.slow
def test_a_worker_lost_in_the_last_rollouts_repeats_none(
    ray_session: None, make_spec: MakeSpec, toys: Callable[..., Path]
) -> None:
    log = toys(step_s=0.05)
    spec = rolled(make_spec, "lost", every=0, episodes=3, suites=["toy"], workers=1)

    def kill() -> None:
        workers = [child for child in psutil.Process().children(recursive=True) if is_worker(child)]
        workers[0].kill()

    watcher = when(lambda: ended(spec, 6) >= 4, kill)
    result = train(spec, progress=False)
    watcher.join()
    assert result.status == "finished" and result.start_step == 6 and result.metrics[SUCCESS] == 0.5
    assert ended(spec, 6) == 6
    # At most the one that was lost ran twice, and the look at the robot's state.
    assert 6 + 1 < len(begun(log)) <= 6 + 1 + 2


@pytest.mark.slow
def test_rollouts_that_cannot_be_run_fail_the_run_with_their_reason(
    ray_session: None, make_spec: MakeSpec, toys: Callable[..., Path]
) -> None:
    toys()
    spec = rolled(make_spec, "beyond", episodes=7)
    with pytest.raises(TrainingError, match=r"(?s)the rollouts after step 4 failed: .*has 6 initial states.*--resume"):
        train(spec, progress=False)
    assert json.loads((spec.run_dir / "evaluation.json").read_text())[-1]["step"] == 4


def beside(make_spec: MakeSpec, name: str, when: str) -> RunSpec:
    """One worker on one of two CPUs: half of the other for the policy, half for a simulator."""
    asked = {"policy": {"cpus": 0.5}, "simulator": {"cpus": 0.5}, "placement": "trainer"}
    chosen = {"suites": ["toy"], "episodes": 2, "every": 4, "workers": 1, "when": when, "resources": asked}
    evaluation = {"every": 2, "batch_size": 4, "max_samples": 4, "rollouts": chosen}
    training = {"checkpoint_every": 2, "max_steps": 6}
    return make_spec(name, evaluation=evaluation, training=training, cluster={"workers": 1})


def assert_rolled_out(spec: RunSpec) -> None:
    assert read_history(spec.run_dir).metrics[SUCCESS] == [(4, 0.5), (6, 0.5)]
    assert [values.get(SUCCESS) for _, values in evaluations(spec.run_dir)] == [None, 0.5, 0.5]
    assert ended(spec, 4) == ended(spec, 6) == 4
    assert not list((spec.run_dir / "rollouts").glob("*/*checkpoint*"))


@pytest.mark.slow
def test_training_goes_on_while_rollouts_run_beside_it(
    ray_session: None, make_spec: MakeSpec, toys: Callable[..., Path]
) -> None:
    toys(step_s=0.2)
    spec = beside(make_spec, "beside", "asynchronous")
    meanwhile: list[int] = []
    watcher = when(lambda: (spec.run_dir / "final").is_dir(), lambda: meanwhile.append(ended(spec, 4)))
    result = train(spec, progress=False)
    watcher.join()
    # The second task takes 16 steps of 0.2 s, twice.
    assert meanwhile[0] < 4
    assert result.status == "finished" and result.step == 6 and result.metrics[SUCCESS] == 0.5
    assert_rolled_out(spec)


@pytest.mark.slow
def test_rollouts_beside_training_survive_a_loss_and_a_stop(
    ray_session: None, make_spec: MakeSpec, toys: Callable[..., Path]
) -> None:
    toys(step_s=0.1)
    for when_they_run in ("asynchronous", "after_training"):
        spec = beside(make_spec, f"lost-{when_they_run}", when_they_run)

        def kill() -> None:
            next(child for child in psutil.Process().children(recursive=True) if is_worker(child)).kill()

        watcher = when(lambda spec=spec: ended(spec, 4) >= 2, kill)
        stopper = when(lambda spec=spec: ended(spec, 6) >= 1, lambda: os.kill(os.getpid(), signal.SIGINT))
        stopped = train(spec, progress=False)
        watcher.join()
        stopper.join()
        assert stopped.status == "stopped" and ended(spec, 4) == 4
        assert train(spec, resume=True, progress=False).status == "finished"
        assert_rolled_out(spec)
