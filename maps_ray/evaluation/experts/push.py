"""Pushes a flat object, such as a plate, over the table to a region."""

from __future__ import annotations

import numpy as np

from maps_ray.evaluation.experts.motions import CLOSED, OPEN, WIDEST, Actions, Arm, Grasp, candidates
from maps_ray.evaluation.simulators.geometry import ArmCopy, Array

_FLAT = 0.03  # m of height
_HOVER = 0.06  # m above the plate before the fingers come down
_AHEAD = 0.015  # m that the target of the grip runs ahead of it: the rim slips out of a fast hand
_SLIPPED = 0.03  # m
_ATTEMPTS = 4
_GRASP_STEPS, _MOST_STEPS, _RELEASE_STEPS = 9, 150, 5


def is_flat(points: Array) -> bool:
    """Whether an object, given by its points of shape (n, 3), is a plate: too wide for the gripper, and flat."""
    low, high = points.min(axis=0), points.max(axis=0)
    return bool(high[2] - low[2] < _FLAT and min(high[:2] - low[:2]) > WIDEST)


class Push:
    """A plate's way over the table. The fingers hold its rim, so that it does not turn away from them.

    Args:
        arm: of the loaded task.
        name: the object.
        region: of the table.
    """

    def __init__(self, arm: Arm, name: str, region: str) -> None:
        self._arm, self._object, self._region = arm, name, region

    def actions(self) -> Actions:
        """The whole way.

        Raises:
            NoPlan: no place of the rim is in reach, or the object does not get to the region.
        """
        for _ in range(_ATTEMPTS):
            yield from self._attempt()
            if self._holds():
                return
        raise self._arm.fail(f"{self._object} does not get to {self._region}")

    def _attempt(self) -> Actions:
        """Pushes until the goal holds or the plate no longer follows."""
        arm = self._arm
        grasp, rotation = self._choose_grasp()
        above = grasp.position + np.array([0, 0, _HOVER])
        yield from arm.travel(above, rotation, OPEN)
        yield from arm.move(above, rotation, OPEN, tolerance=0.012)
        yield from arm.move(grasp.position, rotation, OPEN, tolerance=0.006, noise=0)
        yield from arm.hold(_GRASP_STEPS, rotation, CLOSED)
        held = arm.place_of(self._object) - arm.position
        for _ in range(_MOST_STEPS):
            slipped = np.linalg.norm(arm.place_of(self._object) - arm.position - held) > _SLIPPED
            if self._holds() or slipped:
                break
            target = arm.position + _AHEAD * self._direction()
            target[2] = grasp.position[2]
            yield arm.action(target, rotation, CLOSED)
        if not self._holds():
            yield from arm.hold(_RELEASE_STEPS, rotation, OPEN)
            yield from arm.move(arm.position + np.array([0, 0, _HOVER]), rotation, OPEN, tolerance=0.02)

    def _holds(self) -> bool:
        return self._arm.holds("on", self._object, self._region)

    def _direction(self) -> Array:
        way = self._arm.place_of(self._region) - self._arm.place_of(self._object)
        way[2] = 0
        return way / max(float(np.linalg.norm(way)), 1e-6)

    def _choose_grasp(self) -> tuple[Grasp, Array]:
        """Of the places of the rim that the arm reaches at both ends of the way, the one that turns the hand least."""
        copy = ArmCopy(self._arm.env)
        middle, goal = self._arm.place_of(self._object), self._arm.place_of(self._region)
        way = np.array([*(goal - middle)[:2], _HOVER])
        options = [
            (abs(turn), grasp, rotation)
            for grasp in candidates(self._arm.points(self._object), middle[:2])
            for turn, rotation in self._arm.turns_to(grasp.yaw)
        ]
        for _, grasp, rotation in sorted(options, key=lambda option: option[0]):
            lift = np.array([0, 0, _HOVER])
            if all(copy.can_reach(grasp.position + shift, rotation) for shift in (np.zeros(3), lift, way)):
                return grasp, rotation
        raise self._arm.fail(f"no place of the rim of {self._object} is reachable and free of collisions")
