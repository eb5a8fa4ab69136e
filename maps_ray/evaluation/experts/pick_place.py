"""Puts an object in or on something.

It reads positions and shapes from the simulator: takes the object where the gripper fits (or at its rim), lifts it
above whatever stands in the way, carries it straight to its goal, lowers and releases it.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from maps_ray.evaluation.experts.grasps import Grasp, candidates
from maps_ray.evaluation.experts.motions import CLEARANCE, CLOSED, OPEN, Actions, Arm, pointing_down
from maps_ray.evaluation.simulators.geometry import Array
from maps_ray.evaluation.simulators.kinematics import ArmCopy

_TALL = 0.09  # m below the grip
_STRETCHING = 40.0  # rad of turning the hand that one metre less of reach is worth
_GRASP_STEPS, _RELEASE_STEPS, _SETTLE_STEPS = 9, 5, 15


class PickPlace:
    """One object's way to its goal.

    Args:
        arm: of the loaded task.
        relation: `in` or `on`: where the object shall be of the goal.
        name: the object.
        goal: an object, a fixture or a region.
    """

    def __init__(self, arm: Arm, relation: str, name: str, goal: str) -> None:
        self._arm, self._relation, self._object, self._goal = arm, relation, name, goal
        site = arm.env.object_sites_dict.get(goal)
        self._destination = goal if site is None else site.parent_name

    def actions(self) -> Actions:
        """The whole way.

        Raises:
            NoPlan: no reachable grasp is free of collisions, or the arm gets stuck.
        """
        arm = self._arm
        grasp, rotation = self._choose_grasp()
        top = arm.points(self._object)[:, 2].max()
        hover = max(arm.random.uniform(0.05, 0.08), top - grasp.position[2] + 0.02)
        above = grasp.position + np.array([0, 0, hover])
        yield from arm.travel(above, rotation, OPEN)
        yield from arm.move(above, rotation, OPEN, tolerance=0.012)
        yield from arm.move(grasp.position, rotation, OPEN, tolerance=0.006, noise=0)
        yield from arm.hold(_GRASP_STEPS, rotation, CLOSED)

        yield from arm.travel(self._above_goal(drop=False), rotation, CLOSED, held=self._object)
        yield from arm.move(self._above_goal(drop=False), rotation, CLOSED, tolerance=0.012)
        yield from arm.move(self._above_goal(drop=True), rotation, CLOSED, tolerance=0.01, noise=0)
        yield from arm.hold(_RELEASE_STEPS, rotation, OPEN)
        for _ in range(_SETTLE_STEPS):
            if arm.simulator.success:
                return
            yield arm.action(arm.position + np.array([0, 0, 0.03]), rotation, OPEN)

    def _choose_grasp(self) -> tuple[Grasp, Array]:
        """Of the grasps that the arm reaches without touching anything, one that turns and stretches it least."""
        points = self._arm.points(self._object)
        middle = self._arm.place_of(self._object)[:2]
        copy = ArmCopy(self._arm.env)
        # From the object to its goal, with the object's lowest point above the goal's highest.
        shift = np.array([*(self._arm.place_of(self._goal)[:2] - middle), 0])
        shift[2] = self._top_of_goal() - points[:, 2].min() + CLEARANCE
        base = self._arm.env.robots[0].base_pos[:2]

        def stretch(grasp: Grasp) -> float:
            """The longer of the distances from the base to the grip at the object and at the goal, in m."""
            return max(float(np.linalg.norm(grasp.position[:2] + way - base)) for way in (np.zeros(2), shift[:2]))

        options = [
            (abs(turn) + _STRETCHING * stretch(grasp) + self._arm.random.uniform(0, 0.2), grasp, rotation)
            for grasp in candidates(points, middle)
            for turn, rotation in self._turns(grasp)
        ]
        for _, grasp, rotation in sorted(options, key=lambda option: option[0]):
            lift = np.array([0, 0, 0.08])
            if all(copy.can_reach(grasp.position + way, rotation) for way in (np.zeros(3), lift, shift)):
                return grasp, rotation
        raise self._arm.fail(f"no grasp of {self._object} is reachable and free of collisions")

    def _turns(self, grasp: Grasp) -> Iterator[tuple[float, Array]]:
        """The hand's rotations for a grasp, with the turn from the present one, in rad."""
        current = self._arm.rotation
        fingers = np.arctan2(current[1, 0], current[0, 0])
        turn = (grasp.yaw - fingers + np.pi / 2) % np.pi - np.pi / 2
        for choice in (turn, turn - np.sign(turn) * np.pi):
            if abs(choice) < 1.9:
                yield choice, pointing_down(fingers + choice)

    def _above_goal(self, *, drop: bool) -> Array:
        """Where the grip must be for the object to be above its goal, or, with `drop`, where it is let go."""
        grip, points = self._arm.position, self._arm.points(self._object)
        middle, goal = self._arm.place_of(self._object), self._arm.place_of(self._goal)
        top = self._top_of_goal()
        hanging = grip[2] - points[:, 2].min()
        lowest = top + (0.004 if drop else CLEARANCE)
        if drop and self._relation == "in" and hanging > _TALL:
            # Let go above the rim, a tall thing falls over and leans on it.
            lowest = top + CLEARANCE - hanging
        return np.array([*(grip[:2] + goal[:2] - middle[:2]), grip[2] + lowest - points[:, 2].min()])

    def _top_of_goal(self) -> float:
        return float(self._arm.points(self._destination)[:, 2].max())
