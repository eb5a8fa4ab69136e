"""What of a spec's rollouts cannot be done is named before Ray starts, without a simulator."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from run_specs import MakeSpec

from maps_ray.spec import RunSpec, SpecError, dump, load_spec
from maps_ray.training import rollout_checks
from maps_ray.training.preflight import check


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with every simulator."""
    monkeypatch.setattr(rollout_checks, "find_spec", lambda name: object())
    monkeypatch.setattr("ctypes.util.find_library", lambda name: f"lib{name}.so")


def rolled(make_spec: MakeSpec, every: int = 2, **fields: Any) -> RunSpec:
    rollouts = {"suites": ["libero_object", "libero_object_swap"], **fields}
    return make_spec(evaluation={"every": every, "rollouts": rollouts})


def faults(spec: RunSpec) -> str:
    with pytest.raises(SpecError) as caught:
        check(spec)
    return str(caught.value)


def test_rollouts_that_can_be_run(make_spec: MakeSpec, installed: None) -> None:
    before = dict(os.environ)
    check(rolled(make_spec, every=2, **{"tasks": [0, 9]}))
    check(make_spec(evaluation={"every": 2, "rollouts": {"suites": ["libero_90"], "every": 4, "tasks": [89]}}))
    assert dict(os.environ) == before


def test_the_bundled_example(installed: None) -> None:
    check(load_spec(Path(__file__).parents[2] / "jobs" / "tiny_rollouts.yaml"))


def test_rollouts_beside_training_need_room(
    make_spec: MakeSpec, installed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("maps_ray.machine.cpus", lambda: 4)
    with pytest.raises(SpecError, match=r"rollouts beside training need room of their own: give resources\.policy\."):
        rolled(make_spec, when="asynchronous")
    asked = {"policy": {"cpus": 1}, "simulator": {"cpus": 1}}
    check(rolled(make_spec, when="asynchronous", workers=1, resources=asked))
    message = faults(rolled(make_spec, when="asynchronous", workers=2, resources=asked))
    assert "evaluation.rollouts.resources = 3" in message
    assert "the policy takes 1 cpus, 2 simulators 1 each and the workers 2, but this machine has 4" in message
    monkeypatch.setattr("maps_ray.machine.gpus", lambda: 0)
    for when in ("blocking", "after_training"):
        message = faults(rolled(make_spec, when=when, resources={"policy": {"gpus": 1}}))
        assert "evaluation.rollouts.resources = 1" in message and "but this machine has 0" in message
        assert "or for nothing: training waits for them" in message
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    check(rolled(make_spec, when="asynchronous", workers=2, resources=asked))


def test_an_unknown_suite(make_spec: MakeSpec, installed: None) -> None:
    message = faults(rolled(make_spec, suites=["libero_objects"]))
    assert message.startswith("evaluation.rollouts.suites = 'libero_objects': no such suite; did you mean 'libero_obj")


def test_a_simulator_that_is_not_installed(
    make_spec: MakeSpec, installed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rollout_checks, "find_spec", lambda name: None if name == "robosuite" else object())
    message = faults(rolled(make_spec))
    assert "robosuite cannot be imported: run `pip install 'maps_ray[libero]'`, on every node" in message
    assert message.count("robosuite") == 1


def test_an_opengl_library_that_is_missing(
    make_spec: MakeSpec, installed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    monkeypatch.setattr("ctypes.util.find_library", lambda name: None)
    assert "which is not installed: run `apt-get install libosmesa6`" in faults(rolled(make_spec))


def test_a_policy_that_does_not_fit(make_spec: MakeSpec, installed: None) -> None:
    message = faults(rolled(make_spec, suites=["metaworld_mt10"]))
    assert "its actions have 7 dimensions, those of Metaworld have 4" in message
    problems = rollout_checks.rollout_problems(rolled(make_spec), {"action_dim": 7, "proprio_dim": 9})
    assert [problem.message for problem in problems] == ["its robot states have 9 dimensions, those of LIBERO have 8"]


def test_a_camera_that_the_simulator_lacks(make_spec: MakeSpec, installed: None) -> None:
    spec = make_spec(data={"cameras": ["front"]}, evaluation={"rollouts": {"suites": ["libero_goal"]}})
    message = faults(spec)
    assert "data.cameras = 'front': LIBERO has no such camera; allowed: image, wrist_image" in message, message


@pytest.mark.parametrize(
    ("offline", "every", "message"),
    [
        (4, 6, "evaluation.rollouts.every = 6: must be a multiple of evaluation.every (4), such as 8"),
        (
            0,
            4,
            "evaluation.rollouts.every = 4: rollouts follow an evaluation, and evaluation.every = 0 evaluates after",
        ),
    ],
)
def test_rollouts_between_evaluations(
    make_spec: MakeSpec, installed: None, offline: int, every: int, message: str
) -> None:
    spec = make_spec(evaluation={"every": offline, "rollouts": {"suites": ["libero_object"], "every": every}})
    assert message in faults(spec)


def test_a_task_that_does_not_exist(make_spec: MakeSpec, installed: None) -> None:
    message = faults(rolled(make_spec, tasks=[3, 10]))
    assert "evaluation.rollouts.tasks = 10: libero_object has 10 tasks, 0 to 9" in message and "= 3" not in message


def test_more_episodes_than_initial_states(make_spec: MakeSpec, installed: None) -> None:
    check(rolled(make_spec, episodes=50))
    message = faults(rolled(make_spec, episodes=51))
    assert message == (
        "evaluation.rollouts.episodes = 51: each task of LIBERO has 50 initial states, one for each episode"
    )


def test_tasks_and_suites_are_named_once(make_spec: MakeSpec) -> None:
    with pytest.raises(SpecError, match="suite named twice: libero_goal"):
        rolled(make_spec, suites=["libero_goal", "libero_goal"])
    with pytest.raises(SpecError, match="task named twice: 2"):
        rolled(make_spec, tasks=[2, 2])


def test_the_check_imports_no_simulator(make_spec: MakeSpec, tmp_path: Path) -> None:
    (tmp_path / "spec.yaml").write_text(dump(rolled(make_spec)))
    code = (
        "import sys; from maps_ray.spec import load_spec, SpecError; from maps_ray.training.preflight import check\n"
        "try: check(load_spec(sys.argv[1]))\n"
        "except SpecError as error: assert all(p.field == 'evaluation.rollouts.suites' for p in error.problems)\n"
        "print({'torch', 'ray', 'libero', 'robosuite', 'mujoco'} & set(sys.modules))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "spec.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
