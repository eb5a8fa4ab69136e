"""Turns a stove on: takes hold of its knob and turns the hand."""

from __future__ import annotations

import numpy as np

from maps_ray.evaluation.experts.motions import CLOSED, OPEN, Actions, Arm, pointing_down
from maps_ray.evaluation.simulators.geometry import ArmCopy, Array, rotation_error

_HOVER = 0.06  # m above the grip
_DEPTH = 0.015  # m of the grip below the knob's top
_TURN = 1.2  # rad that the hand turns at most
_AHEAD = 0.4  # rad that the target of the hand runs ahead of it
_GRASP_STEPS, _TURN_STEPS, _RELEASE_STEPS = 9, 60, 5


class Knob:
    """The knob of a stove.

    Args:
        arm: of the loaded task.
        stove: a fixture with one hinge that points up.
    """

    def __init__(self, arm: Arm, stove: str) -> None:
        self._arm, self._stove = arm, stove
        joints = arm.env.get_object(stove).joints
        if len(joints) != 1:
            raise arm.fail(f"{stove} has no knob")
        model = arm.env.sim.model
        joint = model.joint_name2id(joints[0])
        low, high = model.jnt_range[joint]
        self._sense = 1 if high > -low else -1
        self._body = int(model.jnt_bodyid[joint])
        self._joint = joint

    def turn_on(self) -> Actions:
        """Turns the knob until the stove is on.

        Raises:
            NoPlan: the knob cannot be reached, or does not follow.
        """
        arm = self._arm
        grip, yaw = self._choose_grasp()
        rotation = pointing_down(yaw)
        above = grip + np.array([0, 0, _HOVER])
        yield from arm.travel(above, rotation, OPEN)
        yield from arm.move(above, rotation, OPEN, tolerance=0.012)
        yield from arm.turn(rotation, OPEN)
        yield from arm.move(grip, rotation, OPEN, tolerance=0.008, noise=0)
        yield from arm.hold(_GRASP_STEPS, rotation, CLOSED)
        start = arm.rotation
        for _ in range(_TURN_STEPS):
            if arm.env.object_states_dict[self._stove].turn_on():
                break
            turned = float(rotation_error(arm.rotation, start)[2]) * self._sense
            turn = min(turned + _AHEAD, _TURN) * self._sense
            yield arm.action(grip, _turned(start, turn), CLOSED)
        else:
            raise arm.fail(f"the knob of {self._stove} does not turn")
        if not arm.simulator.success:
            yield from arm.hold(_RELEASE_STEPS, arm.rotation, OPEN)
            yield from arm.move(arm.position + np.array([0, 0, _HOVER]), arm.rotation, OPEN, tolerance=0.02)

    def _choose_grasp(self) -> tuple[Array, float]:
        """The grip's place and the yaw of the fingers across the knob's bar."""
        model, data = self._arm.env.sim.model, self._arm.env.sim.data
        geoms = np.flatnonzero((model.geom_bodyid == self._body) & (model.geom_contype > 0))
        clouds = []
        for geom in geoms:
            centre, half = model.geom_aabb[geom][:3], model.geom_aabb[geom][3:]
            signs = np.array([(x, y, z) for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)])
            clouds.append((centre + signs * half) @ data.geom_xmat[geom].reshape(3, 3).T + data.geom_xpos[geom])
        points = np.concatenate(clouds)
        top = points[:, 2].max()
        bar = points[points[:, 2] > top - 0.012]
        middle = (bar.min(axis=0) + bar.max(axis=0)) / 2
        angles = np.linspace(0, np.pi, 36, endpoint=False)
        widths = [np.ptp(bar[:, :2] @ np.array([np.cos(angle), np.sin(angle)])) for angle in angles]
        yaw = float(angles[int(np.argmin(widths))])
        grip = np.array([middle[0], middle[1], top - _DEPTH])
        fingers = np.arctan2(self._arm.rotation[1, 0], self._arm.rotation[0, 0])
        copy = ArmCopy(self._arm.env)
        choices = sorted((yaw + turn for turn in (-np.pi, 0, np.pi)), key=lambda choice: abs(choice - fingers))
        for choice in choices:
            if all(
                copy.can_reach(grip + np.array([0, 0, lift]), pointing_down(choice + turn * self._sense))
                for lift, turn in ((0, 0), (_HOVER, 0))
            ):
                return grip, choice
        raise self._arm.fail(f"the knob of {self._stove} is out of reach")


def _turned(rotation: Array, angle: float) -> Array:
    """A rotation turned around the world's vertical."""
    cosine, sine = np.cos(angle), np.sin(angle)
    return np.array([[cosine, -sine, 0], [sine, cosine, 0], [0, 0, 1]]) @ rotation
