"""What demonstrations of each simulator hold, which expert makes them, and which experts a task's goal asks for."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maps_ray.evaluation.experts.drawer import Drawer
from maps_ray.evaluation.experts.knob import Knob
from maps_ray.evaluation.experts.motions import Actions, Arm, NoPlan
from maps_ray.evaluation.experts.pick_place import PickPlace
from maps_ray.evaluation.experts.push import Push, is_flat
from maps_ray.evaluation.simulators import open_simulator, suite
from maps_ray.evaluation.simulators.base import Simulator
from maps_ray.evaluation.simulators.libero import LiberoSimulator
from maps_ray.evaluation.simulators.metaworld import MetaworldSimulator


def solve_goal(arm: Arm) -> Actions:
    """The actions that bring about the goal of the loaded task.

    Raises:
        NoPlan: no expert knows a part of the goal, or an expert finds no way.
    """
    for relation, *names in arm.env.parsed_problem["goal_state"]:
        if relation == "open":
            yield from Drawer(arm, *names).open()
        elif relation == "turnon":
            yield from Knob(arm, *names).turn_on()
        elif relation in ("in", "on"):
            yield from _place(arm, relation, *names)
        else:
            raise arm.fail(f"no expert knows the goal ({relation} {' '.join(names)})")


def _place(arm: Arm, relation: str, name: str, goal: str) -> Actions:
    site = arm.env.object_sites_dict.get(goal)
    if site is not None and site.parent_name is None and is_flat(arm.points(name)):
        yield from Push(arm, name, goal).actions()
        return
    if relation == "in" and site is not None and site.joints:
        drawer = Drawer(arm, goal)
        if not drawer.is_open:
            yield from drawer.open()
            yield from arm.go_home()
    yield from PickPlace(arm, relation, name, goal).actions()


Drive = Callable[[Any, np.random.Generator], Iterator[NDArray[np.float32]]]
"""(a simulator after its reset, source of the noise) -> actions; the simulator is stepped with each before the next."""

_METAWORLD_NOISE = 0.15


@dataclass(frozen=True)
class Recording:
    """The features of a data set, and who acts."""

    fps: int
    """The simulator's control steps per second."""
    robot: str
    cameras: tuple[str, ...]
    state_names: tuple[str, ...]
    """As `Observation.proprio`."""
    action_names: tuple[str, ...]
    drive: Drive


def recording(suite_name: str) -> Recording:
    """What demonstrations of a suite hold.

    Raises:
        ValueError: unknown suite, or one whose simulator has no expert.
    """
    simulator = suite(suite_name).simulator
    if simulator not in _RECORDINGS:
        raise ValueError(f"no scripted expert for {suite_name}: experts exist for suites of {', '.join(_RECORDINGS)}")
    return _RECORDINGS[simulator]


def open_recorded(suite_name: str, image_size: int = 128) -> Simulator:
    """The suite's simulator with the cameras that are recorded.

    Raises:
        ValueError: unknown suite, or one without an expert.
        SimulatorMissing: it is not installed.
    """
    return open_simulator(suite_name, image_size=image_size, cameras=recording(suite_name).cameras)


def _drive_libero(simulator: LiberoSimulator, random: np.random.Generator) -> Iterator[NDArray[np.float32]]:
    return solve_goal(Arm(simulator, random))


def _drive_metaworld(simulator: MetaworldSimulator, random: np.random.Generator) -> Iterator[NDArray[np.float32]]:
    """Metaworld's own policy, with noise that it corrects, until the goal holds.

    Raises:
        NoPlan: Metaworld has no policy for the task.
    """
    policies = importlib.import_module("metaworld.policies")
    name = "".join(part.capitalize() for part in simulator.task.name.split("-"))
    policy = getattr(policies, f"Sawyer{name}Policy", None)
    if policy is None:
        raise NoPlan(f"{simulator.task.name}: Metaworld brings no policy for it")
    policy = policy()
    while not simulator.success:
        action = np.asarray(policy.get_action(simulator.env._get_obs()), np.float64)
        # The gripper stays as it is wanted: noise there would only say that it does not matter.
        action[:3] = np.clip(action[:3], -1, 1) + random.normal(0, _METAWORLD_NOISE, 3)
        yield np.clip(action, -1, 1).astype(np.float32)


_RECORDINGS = {
    "libero": Recording(
        # `control_freq` of LIBERO's environments.
        20,
        "panda",
        ("image", "wrist_image"),
        ("x", "y", "z", "axis_angle_x", "axis_angle_y", "axis_angle_z", "finger_left", "finger_right"),
        ("x", "y", "z", "axis_angle_x", "axis_angle_y", "axis_angle_z", "gripper"),
        _drive_libero,
    ),
    "metaworld": Recording(
        # Metaworld's `render_fps`: five frames of 2.5 ms for each action.
        80,
        "sawyer",
        ("image",),
        ("x", "y", "z", "opening"),
        ("x", "y", "z", "gripper"),
        _drive_metaworld,
    ),
}
