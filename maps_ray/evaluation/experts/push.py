"""Pushes an object over the table to a region."""

from __future__ import annotations

import numpy as np

from maps_ray.evaluation.experts.motions import CLOSED, Actions, Arm, pointing_down
from maps_ray.evaluation.simulators.geometry import Array

_BEHIND = 0.03  # m between the object's edge and the fingers before they push
_ABOVE = 0.012  # m of the grip above what the object stands on
_AHEAD = 0.04  # m that the target of the grip runs ahead of it
_MOST_STEPS = 150


class Push:
    """A flat object's way over the table.

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
            NoPlan: the object does not get to the region.
        """
        arm = self._arm
        rotation = self._choose_rotation()
        start = self._contact() - _BEHIND * self._direction()
        yield from arm.travel(start, rotation, CLOSED)
        yield from arm.move(start, rotation, CLOSED, tolerance=0.01)
        for _ in range(_MOST_STEPS):
            if arm.simulator.success:
                return
            yield arm.action(self._contact() + _AHEAD * self._direction(), rotation, CLOSED)
        raise arm.fail(f"{self._object} does not get to {self._region}")

    def _direction(self) -> Array:
        way = self._arm.place_of(self._region) - self._arm.place_of(self._object)
        way[2] = 0
        return way / max(float(np.linalg.norm(way)), 1e-6)

    def _contact(self) -> Array:
        """The point of the object's edge behind its middle, at the height at which the fingers push."""
        points, middle = self._arm.points(self._object), self._arm.place_of(self._object)
        radius = float(np.linalg.norm(points[:, :2] - middle[:2], axis=1).max())
        contact = middle - radius * self._direction()
        contact[2] = points[:, 2].min() + _ABOVE
        return contact

    def _choose_rotation(self) -> Array:
        """The hand turned so that both fingers push side by side."""
        direction = self._direction()
        across = np.arctan2(direction[0], -direction[1])
        fingers = np.arctan2(self._arm.rotation[1, 0], self._arm.rotation[0, 0])
        turn = (across - fingers + np.pi / 2) % np.pi - np.pi / 2
        return pointing_down(fingers + turn)
