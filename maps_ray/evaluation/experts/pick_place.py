"""A scripted expert for tasks of the kind "put this in or on that".

It reads positions and shapes from the simulator: takes the object where the gripper fits (or at its rim), lifts it
above whatever stands in the way, carries it straight to its goal, lowers and releases it. Actions are closed-loop
OSC_POSE deltas, so that noise added to them is corrected, and recorded together with its correction.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from maps_ray.evaluation.experts.grasps import Grasp, candidates
from maps_ray.evaluation.simulators.geometry import Array, world_points
from maps_ray.evaluation.simulators.kinematics import ArmCopy, rotation_error
from maps_ray.evaluation.simulators.libero import LiberoSimulator

_OPEN, _CLOSE = -1.0, 1.0
# OSC_POSE: an action of 1 asks for 0.05 m or 0.5 rad from the present pose.
_METRES, _RADIANS = 0.05, 0.5
_GAIN = 2.0
_CLEARANCE = 0.03
_HALF_HAND = 0.1
_TALL = 0.09  # m below the grip
_STRETCHING = 40.0  # rad of turning the hand that one metre less of reach is worth
_GRASP_STEPS, _RELEASE_STEPS, _SETTLE_STEPS = 9, 5, 15
_MOST_STEPS = 70  # of one movement


class NoPlan(RuntimeError):
    """The expert finds no way to solve the task from this state."""


class PickPlaceExpert:
    """Solves the loaded task of a LIBERO simulator.

    Args:
        simulator: with a task reset; its goal must be one object in or on one other.
        random: source of the noise.
        noise: standard deviation of the noise added to the translation part of the actions while the arm travels.

    Raises:
        NoPlan: the task's goal is of another kind.
    """

    def __init__(self, simulator: LiberoSimulator, random: np.random.Generator, noise: float = 0.08) -> None:
        self._simulator, self._random, self._noise = simulator, random, noise
        self._env, self._sim = simulator.env, simulator.env.sim
        goals = self._env.parsed_problem["goal_state"]
        if len(goals) != 1 or goals[0][0] not in ("in", "on") or goals[0][1] not in self._env.objects_dict:
            raise NoPlan(f"{simulator.task.name}: the goal {goals} is not one object in or on another")
        self._relation, self._object, self._goal = goals[0]
        site = self._env.object_sites_dict.get(self._goal)
        self._destination = site.parent_name if site is not None else self._goal

    def actions(self) -> Iterator[NDArray[np.float32]]:
        """Actions in LIBERO's convention, shape (7,), in [-1, 1]; step the simulator with each before the next.

        Raises:
            NoPlan: no reachable grasp is free of collisions, or the arm gets stuck.
        """
        grasp, rotation = self._choose_grasp()
        top = self._points(self._object)[:, 2].max()
        hover = max(self._random.uniform(0.05, 0.08), top - grasp.position[2] + 0.02)
        above = grasp.position + np.array([0, 0, hover])
        yield from self._travel(above, rotation, _OPEN)
        yield from self._move(above, rotation, _OPEN, tolerance=0.012)
        yield from self._move(grasp.position, rotation, _OPEN, tolerance=0.006, noise=0)
        yield from self._hold(_GRASP_STEPS, rotation, _CLOSE)

        place = self._place_above_goal(drop=False)
        yield from self._travel(place, rotation, _CLOSE)
        yield from self._move(self._place_above_goal(drop=False), rotation, _CLOSE, tolerance=0.012)
        yield from self._move(self._place_above_goal(drop=True), rotation, _CLOSE, tolerance=0.01, noise=0)
        yield from self._hold(_RELEASE_STEPS, rotation, _OPEN)
        for _ in range(_SETTLE_STEPS):
            if self._simulator.success:
                return
            yield from self._step(self._grip_position() + np.array([0, 0, 0.03]), rotation, _OPEN, 0)

    def _choose_grasp(self) -> tuple[Grasp, Array]:
        """Of the grasps that the arm reaches without touching anything, one that turns and stretches it least."""
        points = self._points(self._object)
        middle = np.array(self._sim.data.body_xpos[self._env.obj_body_id[self._object]][:2])
        arm = ArmCopy(self._env)
        # From the object to its goal, with the object's lowest point above the goal's highest.
        shift = np.array([*(self._goal_position()[:2] - middle), 0])
        shift[2] = self._points(self._destination)[:, 2].max() - points[:, 2].min() + _CLEARANCE
        base = self._env.robots[0].base_pos[:2]

        def stretch(grasp: Grasp) -> float:
            """The longer of the distances from the base to the grip at the object and at the goal, in m."""
            return max(float(np.linalg.norm(grasp.position[:2] + way - base)) for way in (np.zeros(2), shift[:2]))

        options = [
            (abs(turn) + _STRETCHING * stretch(grasp) + self._random.uniform(0, 0.2), grasp, rotation)
            for grasp in candidates(points, middle)
            for turn, rotation in self._turns(grasp)
        ]
        for _, grasp, rotation in sorted(options, key=lambda option: option[0]):
            lift = np.array([0, 0, 0.08])
            if all(arm.can_reach(grasp.position + way, rotation) for way in (np.zeros(3), lift, shift)):
                return grasp, rotation
        raise NoPlan(f"{self._simulator.task.name}: no grasp of {self._object} is reachable and free of collisions")

    def _turns(self, grasp: Grasp) -> Iterator[tuple[float, Array]]:
        """The hand's rotations for a grasp, with the turn from the present one, in rad."""
        current = self._grip_rotation()
        fingers = np.arctan2(current[1, 0], current[0, 0])
        turn = (grasp.yaw - fingers + np.pi / 2) % np.pi - np.pi / 2
        for choice in (turn, turn - np.sign(turn) * np.pi):
            if abs(choice) < 1.9:
                yield choice, _pointing_down(fingers + choice)

    def _place_above_goal(self, *, drop: bool) -> Array:
        """Where the grip must be for the object to be above its goal, or, with `drop`, where it is let go."""
        grip, points = self._grip_position(), self._points(self._object)
        middle = self._sim.data.body_xpos[self._env.obj_body_id[self._object]]
        goal = self._goal_position()
        top = self._points(self._destination)[:, 2].max()
        hanging = grip[2] - points[:, 2].min()
        lowest = top + (0.004 if drop else _CLEARANCE)
        if drop and self._relation == "in" and hanging > _TALL:
            # Let go above the rim, a tall thing falls over and leans on it.
            lowest = top + _CLEARANCE - hanging
        return np.array([*(grip[:2] + goal[:2] - middle[:2]), grip[2] + lowest - points[:, 2].min()])

    def _goal_position(self) -> Array:
        if self._goal in self._env.object_sites_dict:
            return np.array(self._sim.data.get_site_xpos(self._goal))
        return np.array(self._sim.data.body_xpos[self._env.obj_body_id[self._goal]])

    def _travel(self, target: Array, rotation: Array, gripper: float) -> Iterator[NDArray[np.float32]]:
        """Moves over everything between here and `target`, to above `target`."""
        start = self._grip_position()
        hanging = start[2] - self._points(self._object)[:, 2].min() if gripper == _CLOSE else 0.02
        height = max(target[2], self._highest_between(start, target) + hanging + _CLEARANCE)
        if start[2] < height - 0.03:
            yield from self._move(np.array([start[0], start[1], height]), rotation, gripper, tolerance=0.03)
        yield from self._move(np.array([target[0], target[1], height]), rotation, gripper, tolerance=0.03)

    def _highest_between(self, start: Array, end: Array) -> float:
        """The highest point in m of all that stands within a hand's breadth of the straight way."""
        way = end[:2] - start[:2]
        highest = -np.inf
        for name in self._env.obj_body_id:
            if name == self._object or name.endswith(("table", "floor")):
                continue
            points = self._points(name)
            part = np.clip((points[:, :2] - start[:2]) @ way / max(float(way @ way), 1e-9), 0, 1)
            near = np.linalg.norm(points[:, :2] - start[:2] - part[:, None] * way, axis=1) < _HALF_HAND
            highest = max(highest, points[near, 2].max(initial=-np.inf))
        return float(highest)

    def _move(
        self, target: Array, rotation: Array, gripper: float, tolerance: float, noise: float | None = None
    ) -> Iterator[NDArray[np.float32]]:
        for _ in range(_MOST_STEPS):
            shift = target - self._grip_position()
            if np.linalg.norm(shift) < tolerance:
                return
            yield from self._step(target, rotation, gripper, self._noise if noise is None else noise)
        raise NoPlan(f"{self._simulator.task.name}: the arm does not get to {np.round(target, 3).tolist()}")

    def _hold(self, steps: int, rotation: Array, gripper: float) -> Iterator[NDArray[np.float32]]:
        position = self._grip_position()
        for _ in range(steps):
            yield from self._step(position, rotation, gripper, 0)

    def _step(self, target: Array, rotation: Array, gripper: float, noise: float) -> Iterator[NDArray[np.float32]]:
        shift: Array = _GAIN * (target - self._grip_position()) / _METRES
        # A movement that is too long for one action keeps its direction.
        shift = shift / max(1.0, float(np.max(np.abs(shift))))
        turn = np.clip(_GAIN * rotation_error(rotation, self._grip_rotation()) / _RADIANS, -0.5, 0.5)
        shift = np.clip(shift + self._random.normal(0, noise, size=3), -1, 1) if noise else shift
        yield np.array([*shift, *turn, gripper], dtype=np.float32)

    def _points(self, name: str) -> Array:
        return world_points(self._sim, self._env.get_object(name).root_body)

    def _grip_position(self) -> Array:
        return np.array(self._sim.data.site_xpos[self._env.robots[0].eef_site_id])

    def _grip_rotation(self) -> Array:
        return np.array(self._sim.data.site_xmat[self._env.robots[0].eef_site_id]).reshape(3, 3)


def _pointing_down(yaw: float) -> Array:
    """The grip site's rotation with its z axis down and its x axis, along which the fingers slide, at `yaw`."""
    x = np.array([np.cos(yaw), np.sin(yaw), 0])
    z = np.array([0, 0, -1.0])
    return np.column_stack([x, np.cross(z, x), z])
