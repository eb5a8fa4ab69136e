"""What demonstrations of each simulator hold, and which expert makes them."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maps_ray.evaluation.experts.motions import Arm, NoPlan
from maps_ray.evaluation.experts.plan import solve_goal
from maps_ray.evaluation.simulators import open_simulator, suite
from maps_ray.evaluation.simulators.base import Simulator
from maps_ray.evaluation.simulators.libero import LiberoSimulator
from maps_ray.evaluation.simulators.metaworld import MetaworldSimulator

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
        20,
        "panda",
        ("image", "wrist_image"),
        ("x", "y", "z", "axis_angle_x", "axis_angle_y", "axis_angle_z", "finger_left", "finger_right"),
        ("x", "y", "z", "axis_angle_x", "axis_angle_y", "axis_angle_z", "gripper"),
        _drive_libero,
    ),
    "metaworld": Recording(
        80, "sawyer", ("image",), ("x", "y", "z", "opening"), ("x", "y", "z", "gripper"), _drive_metaworld
    ),
}
