"""A lost worker and an interrupted run end with the same weights, bit for bit, as an undisturbed run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from run_specs import LONG, MakeSpec, long_run
from safetensors import safe_open

from maps_ray.spec import RunSpec, dump
from maps_ray.training.progress import read_progress
from maps_ray.training.run_faults import TrainingError
from maps_ray.training.train import TrainResult, train

Undisturbed = Callable[..., TrainResult]


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "rivals"), [(2, False), (3, True)])
def test_a_killed_worker_recovers_bit_equal(
    stage: int, rivals: bool, undisturbed: Undisturbed, make_spec: MakeSpec
) -> None:
    expected = undisturbed(rivals=rivals, zero_stage=stage)
    spec = make_spec("killed", **long_run(rivals, zero_stage=stage))
    killed: list[int] = []
    killer = threading.Thread(target=lambda: killed.append(_kill_a_worker(spec, at_step=16)))
    killer.start()
    recovered = train(spec, progress=False)
    killer.join()
    assert not psutil.pid_exists(killed[0])
    assert expected.start_step == 0
    assert recovered.start_step >= 10 and recovered.status == "finished"
    assert_same_run(recovered, expected)


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("stage", "rivals"), [(2, False), pytest.param(3, True, marks=pytest.mark.slow)])
def test_a_killed_worker_then_ctrl_c_then_resume_is_bit_equal(
    stage: int, rivals: bool, undisturbed: Undisturbed, make_spec: MakeSpec, tmp_path: Path
) -> None:
    spec = make_spec("interrupted", **long_run(rivals, zero_stage=stage))
    (tmp_path / "spec.yaml").write_text(dump(spec))
    code = "import sys; from maps_ray.spec import load_spec; from maps_ray.training.train import train; "
    code += f"print(train(load_spec({str(tmp_path / 'spec.yaml')!r})).status)"
    # A session of its own, so that the signal reaches the whole group as Ctrl-C in a terminal does.
    driver = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={k: v for k, v in os.environ.items() if not k.startswith("RAY_AUTH")},
    )
    killed = _kill_a_worker(spec, at_step=16)
    # The progress of the killed group stays in sight until the next one has begun.
    _wait_for_step(spec, 36)
    os.killpg(driver.pid, signal.SIGINT)
    out, err = driver.communicate(timeout=60)
    assert driver.returncode == 0, err
    assert not psutil.pid_exists(killed)
    assert out.splitlines()[-1] == "stopped"
    assert f"continue with: maps-ray train {spec.run_dir / 'spec.yaml'} --resume" in out
    stopped = json.loads((spec.run_dir / "result.json").read_text())
    assert stopped["status"] == "stopped" and 36 <= stopped["step"] < 60 and stopped["start_step"] >= 10
    resumed = train(spec, resume=True, progress=False)
    assert resumed.start_step == stopped["step"]
    assert_same_run(resumed, undisturbed(rivals=rivals, zero_stage=stage))
    if not rivals:
        return
    last = max((Path(resumed.run_dir) / "checkpoints").iterdir())
    with safe_open(last / "rank-00000.safetensors", framework="pt") as file:
        kinds = {key.partition("/")[0] for key in file.keys()}  # noqa: SIM118
    assert "average" in kinds
    assert resumed.metrics["radius/dinov2"] > 0 and 0 <= resumed.metrics["strength/dinov2"] <= 1


def assert_same_run(one: TrainResult, other: TrainResult) -> None:
    """The same weights, and the same action errors on every split."""
    files = sorted(path.name for path in Path(str(other.final)).glob("*.safetensors"))
    assert len(files) == 3
    for name in files:
        assert Path(str(one.final), name).read_bytes() == Path(str(other.final), name).read_bytes(), name
    records = [json.loads((Path(run.run_dir) / "evaluation.json").read_text()) for run in (one, other)]
    assert records[0] == records[1]
    assert records[0][-1]["splits"].keys() == {"held_out", "ood"}


def _wait_for_step(spec: RunSpec, step: int, timeout_s: float = 240) -> None:
    deadline = time.monotonic() + timeout_s
    while read_progress(spec.run_dir).get("step", 0) < step:
        assert time.monotonic() < deadline, f"step {step} was not reached in {timeout_s} s"
        time.sleep(0.02)


def _kill_a_worker(spec: RunSpec, at_step: int) -> int:
    _wait_for_step(spec, at_step)
    workers = [process for process in psutil.Process().children(recursive=True) if _is_worker(process)]
    assert len(workers) == spec.cluster.workers
    workers[-1].kill()
    return workers[-1].pid


@pytest.mark.slow
def test_a_run_that_loses_too_many_workers_is_given_up_and_can_go_on(
    undisturbed: Undisturbed, make_spec: MakeSpec
) -> None:
    spec = make_spec("given-up", training=LONG, cluster={"max_failures": 0})
    killer = threading.Thread(target=_kill_a_worker, args=(spec, 12))
    killer.start()
    with pytest.raises(TrainingError, match=r"given up after 0 restarts: .*last complete checkpoint is .*; continue"):
        train(spec, progress=False)
    killer.join()
    assert (spec.run_dir / "error.txt").stat().st_size > 0
    assert_same_run(train(spec, resume=True, progress=False), undisturbed(zero_stage=2))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_sigterm_to_a_worker_makes_a_checkpoint_first(undisturbed: Undisturbed, make_spec: MakeSpec) -> None:
    # Nothing but the notice makes a checkpoint before the end.
    spec = make_spec("told", training={**LONG, "checkpoint_every": 1000})
    killer = threading.Thread(target=lambda: (_wait_for_step(spec, 16), _workers()[-1].terminate()))
    killer.start()
    result = train(spec, progress=False)
    killer.join()
    assert 16 <= result.start_step < LONG["max_steps"] and result.status == "finished"
    assert_same_run(result, undisturbed(zero_stage=2))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_workers_killed_while_they_start_are_losses_like_others(undisturbed: Undisturbed, make_spec: MakeSpec) -> None:
    spec = make_spec("cold", training=LONG, cluster={"max_failures": 3})
    killed: set[int] = set()
    killer = threading.Thread(target=_kill_starting_workers, args=(2, killed))
    killer.start()
    result = train(spec, progress=False)
    killer.join()
    assert len(killed) == 2 and result.start_step == 0
    assert_same_run(result, undisturbed(zero_stage=2))
    spec = make_spec("never", training=LONG, cluster={"max_failures": 1})
    over = threading.Event()
    # Each group that starts, and not two: once a run went on after two kills in its first moments.
    killer = threading.Thread(target=_kill_starting_workers, args=(20, killed, over))
    killer.start()
    said = r"given up after 1 restart: the workers were lost 2 times without a new checkpoint \(2 while starting\)"
    with pytest.raises(TrainingError, match=said):
        train(spec, progress=False)
    over.set()
    killer.join()


def _kill_starting_workers(count: int, killed: set[int], over: threading.Event | None = None) -> None:
    """Kills one worker of each of the next groups as soon as its process is there, until it is over."""
    over = over or threading.Event()
    deadline = time.monotonic() + 400
    before = {p.pid for p in psutil.Process().children(recursive=True) if _is_worker(p)}
    for _ in range(count):
        while not (found := [p for p in _workers() if p.pid not in before]):
            assert time.monotonic() < deadline
            if over.wait(0.01):
                return
        found[0].kill()
        killed.add(found[0].pid)
        # The rest of this group ends with it.
        before |= {p.pid for p in found}
        while any(p.pid in before for p in _workers()):
            assert time.monotonic() < deadline
            if over.wait(0.01):
                return


def _workers() -> list[psutil.Process]:
    return [process for process in psutil.Process().children(recursive=True) if _is_worker(process)]


def _is_worker(process: psutil.Process) -> bool:
    try:
        return "RayTrainWorker" in " ".join(process.cmdline())
    except psutil.Error:
        return False
