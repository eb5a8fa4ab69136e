"""Opens a drawer: takes hold of its handle and pulls along the way that the drawer slides."""

from __future__ import annotations

from itertools import product

import numpy as np

from maps_ray.evaluation.experts.motions import CLOSED, OPEN, Actions, Arm, NoPlan, pointing
from maps_ray.evaluation.simulators.geometry import ArmCopy, Array

_TILTS = np.deg2rad([80, 70, 90, 60, 50, 40, 30])  # of the hand, from pointing down to pointing into the drawer
_ROLLS = np.deg2rad([0, 20, -20, 35, -35])  # around the fingers: open, they hardly fit between neighbouring handles
_BACK_OFF = 0.08  # m before and after the grip
_ENOUGH_MARGIN = 0.4  # rad of a joint from its limit
_ROLL_COST = 0.1  # rad of that margin that a rad of roll is worth
_ATTEMPTS = 3  # to take hold of the handle
_GRASP_STEPS, _PULL_STEPS, _RELEASE_STEPS = 9, 60, 5
_PULL = 0.04  # m that the target of the grip runs ahead of it


class Drawer:
    """A drawer of a cabinet.

    Args:
        arm: of the loaded task.
        region: the region inside the drawer.
    """

    def __init__(self, arm: Arm, region: str) -> None:
        self._arm, self._region = arm, region
        joints = arm.env.object_sites_dict[region].joints
        if not joints:
            raise arm.fail(f"{region} is no drawer")
        model = arm.env.sim.model
        self._joint = model.joint_name2id(joints[0])
        self._body = int(model.jnt_bodyid[self._joint])

    @property
    def is_open(self) -> bool:
        return bool(self._arm.env.object_states_dict[self._region].is_open())

    def open(self) -> Actions:
        """Pulls until the drawer counts as open, and lets go.

        Raises:
            NoPlan: the handle cannot be reached, or the drawer does not follow.
        """
        arm, outwards = self._arm, self._outwards()
        for attempt, rotation in enumerate(self._rotations(), 1):
            try:
                yield from self._take_hold(rotation)
                break
            except NoPlan:
                if attempt == _ATTEMPTS:
                    raise
                yield from arm.go_home()
        else:
            raise arm.fail(f"no grasp of the handle of {self._region} is reachable and free of collisions")
        for _ in range(_PULL_STEPS):
            if self.is_open:
                break
            yield arm.action(self._handle() + _PULL * outwards, rotation, CLOSED)
        else:
            raise arm.fail(f"{self._region} does not open")
        if not arm.simulator.success:
            yield from arm.hold(_RELEASE_STEPS, rotation, OPEN)
            yield from arm.move(self._handle() + _BACK_OFF * outwards, rotation, OPEN, tolerance=0.02)

    def _take_hold(self, rotation: Array) -> Actions:
        arm = self._arm
        start = self._handle() + _BACK_OFF * self._outwards()
        yield from arm.travel(start, rotation, OPEN)
        yield from arm.move(start, rotation, OPEN, tolerance=0.012)
        yield from arm.turn(rotation, OPEN)
        yield from arm.move(self._handle(), rotation, OPEN, tolerance=0.008, noise=0)
        yield from arm.hold(_GRASP_STEPS, rotation, CLOSED)

    def _outwards(self) -> Array:
        """The direction in which it opens, a unit vector."""
        model = self._arm.env.sim.model
        low, high = model.jnt_range[self._joint]
        return np.array(self._arm.env.sim.data.xaxis[self._joint]) * (1 if high > -low else -1)

    def _handle(self) -> Array:
        """The middle of the handle's bar: of the drawer's parts the one that sticks out farthest."""
        model, data = self._arm.env.sim.model, self._arm.env.sim.data
        geoms = np.flatnonzero((model.geom_bodyid == self._body) & (model.geom_contype > 0))
        middles = np.array(
            [data.geom_xmat[geom].reshape(3, 3) @ model.geom_aabb[geom][:3] + data.geom_xpos[geom] for geom in geoms]
        )
        return np.array(middles[np.argmax(middles @ self._outwards())])

    def _rotations(self) -> list[Array]:
        """Of the hand at the handle, as far as the arm reaches them and touches nothing.

        First come those that keep the joints farthest from their limits, where the controller would get stuck.
        """
        copy, outwards, handle = ArmCopy(self._arm.env), self._outwards(), self._handle()
        across = np.cross(outwards, [0, 0, 1])
        rotations = []
        for roll, tilt in product(_ROLLS, _TILTS):
            direction = -np.sin(tilt) * outwards - np.array([0, 0, np.cos(tilt)])
            sliding = np.cos(roll) * np.cross(direction, across) + np.sin(roll) * across
            for rotation in (pointing(direction, sliding), pointing(direction, -sliding)):
                margins = []
                for way in (_BACK_OFF, 0.0):
                    if copy.can_reach(handle + way * outwards, rotation):
                        margins.append(copy.joint_margin())
                if len(margins) == 2:
                    rotations.append((min(*margins, _ENOUGH_MARGIN) - _ROLL_COST * abs(roll), rotation))
        return [rotation for _, rotation in sorted(rotations, key=lambda option: -option[0])]
