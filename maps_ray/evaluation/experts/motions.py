"""Movements of the arm that all scripted experts share, and where its gripper can take hold of an object.

Actions are closed-loop OSC_POSE deltas, so that noise added to them is corrected, and recorded together with its
correction. Every movement is a generator of actions: step the simulator with each before asking for the next.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from maps_ray.evaluation.simulators.geometry import Array, geoms_of, rotation_error, world_points
from maps_ray.evaluation.simulators.libero import LiberoSimulator

WIDEST = 0.072
"""Width in m that the Panda's fingers (0.08 m apart when open) take with a margin for errors in position."""

_ANGLES = 24
_PALM_DEPTH = 0.024  # from the point between the tips up to where the palm would touch
_TIP_CLEARANCE = 0.012  # the lowest that the point between the tips may come above what the object stands on
_RIM_DEPTH = 0.018
_RIM_CLEARANCE = 0.018  # likewise at a rim, where one tip comes down onto the inside


@dataclass(frozen=True)
class Grasp:
    """A grip pose with the gripper pointing down."""

    position: Array
    """Point between the finger tips, world coordinates in m, shape (3,)."""
    yaw: float
    """Direction in which the fingers slide, in rad from the world's x axis; yaw and yaw + pi are the same grasp."""


def candidates(points: Array, inward: Array) -> Iterator[Grasp]:
    """Grasps of an object, unordered: across it where it is narrow enough, at its rim otherwise.

    Args:
        points: the object's shape in world coordinates, shape (n, 3).
        inward: a point, shape (2,), that rims are gripped around: the object's middle.
    """
    bottom, top = points[:, 2].min(), points[:, 2].max()
    height = max(bottom + _TIP_CLEARANCE, min((bottom + top) / 2, top - 0.01), top - _PALM_DEPTH)
    across = list(_across(points, height))
    yield from across or _rim(points, inward, max(top - _RIM_DEPTH, bottom + _RIM_CLEARANCE))


def _across(points: Array, height: float) -> Iterator[Grasp]:
    for yaw in np.linspace(0, np.pi, _ANGLES, endpoint=False):
        direction = np.array([np.cos(yaw), np.sin(yaw)])
        along = points[:, :2] @ direction
        if along.max() - along.min() > WIDEST:
            continue
        side = points[:, :2] @ np.array([-direction[1], direction[0]])
        middle = (along.max() + along.min()) / 2 * direction
        middle = middle + (side.max() + side.min()) / 2 * np.array([-direction[1], direction[0]])
        yield Grasp(np.array([*middle, height]), float(yaw))


def _rim(points: Array, middle: Array, height: float) -> Iterator[Grasp]:
    rim = points[points[:, 2] > points[:, 2].max() - 0.012]
    offsets = rim[:, :2] - middle
    radius = float(np.quantile(np.linalg.norm(offsets, axis=1), 0.9))
    for yaw in np.linspace(0, 2 * np.pi, _ANGLES, endpoint=False):
        edge = middle + (radius - 0.004) * np.array([np.cos(yaw), np.sin(yaw)])
        yield Grasp(np.array([*edge, height]), float(yaw))


Actions = Iterator[NDArray[np.float32]]
"""In LIBERO's convention: shape (7,), in [-1, 1]."""

OPEN, CLOSED = -1.0, 1.0
"""The gripper's command."""
CLEARANCE = 0.03
"""Distance in m kept from what stands in the way."""

# OSC_POSE: an action of 1 asks for 0.05 m or 0.5 rad from the present pose.
_METRES, _RADIANS = 0.05, 0.5
_GAIN = 2.0
_HALF_HAND = 0.1
_MOST_STEPS = 70  # of one movement
_RISE = 0.12  # m
_MOST_TURN = 1.9  # rad
_TURNED = 0.06  # rad that a finished turn may be off


class NoPlan(RuntimeError):
    """The expert finds no way to solve the task from this state."""


class Arm:
    """The arm of the task that a LIBERO simulator has loaded. Poses are those of the grip site, between the tips.

    Args:
        simulator: with a task reset.
        random: source of the noise.
        noise: standard deviation of the noise added to the translation part of the actions while the arm travels.
    """

    def __init__(self, simulator: LiberoSimulator, random: np.random.Generator, noise: float = 0.08) -> None:
        self.simulator, self.random, self.noise = simulator, random, noise
        self.env, self._sim = simulator.env, simulator.env.sim
        self._home = (self.position, self.rotation)

    @property
    def position(self) -> Array:
        """In m, shape (3,)."""
        return np.array(self._sim.data.site_xpos[self.env.robots[0].eef_site_id])

    @property
    def rotation(self) -> Array:
        """The grip's axes in columns, shape (3, 3): the fingers slide along x and point along z."""
        return np.array(self._sim.data.site_xmat[self.env.robots[0].eef_site_id]).reshape(3, 3)

    def points(self, name: str) -> Array:
        """Points that span an object's or a fixture's shape, in m, shape (n, 3)."""
        return world_points(self._sim, self.env.get_object(name).root_body)

    def place_of(self, name: str) -> Array:
        """Where LIBERO says that an object, a fixture or a region is, in m, shape (3,)."""
        if name in self.env.object_sites_dict:
            return np.array(self._sim.data.get_site_xpos(name))
        return np.array(self._sim.data.body_xpos[self.env.obj_body_id[name]])

    def boxes(self, without: str) -> tuple[Array, Array]:
        """Bounding boxes of the solid parts of all that stands on the table.

        Args:
            without: an object to leave out.

        Returns:
            Lowest and highest corners in m, each of shape (n, 3).
        """
        model, data = self._sim.model, self._sim.data
        lows, highs = [], []
        for name in self.env.obj_body_id:
            if name == without or name.endswith(("table", "floor")):
                continue
            for geom in geoms_of(model, self.env.get_object(name).root_body):
                if model.geom_contype[geom]:
                    turn = data.geom_xmat[geom].reshape(3, 3)
                    middle = turn @ model.geom_aabb[geom][:3] + data.geom_xpos[geom]
                    half = np.abs(turn) @ model.geom_aabb[geom][3:]
                    lows.append(middle - half)
                    highs.append(middle + half)
        return np.array(lows).reshape(-1, 3), np.array(highs).reshape(-1, 3)

    def holds(self, *goal: str) -> bool:
        """Whether one part of a task's parsed goal holds now, for instance `("on", "plate_1", "flat_stove_1")`."""
        return bool(self.env._eval_predicate(goal))

    def touches(self, name: str) -> bool:
        """Whether the gripper touches an object."""
        return bool(self.env.check_contact(self.env.robots[0].gripper, self.env.get_object(name)))

    def turns_to(self, yaw: float) -> Iterator[tuple[float, Array]]:
        """The rotations of a hand that points down and slides its fingers at `yaw`, with the turn to each in rad."""
        current = self.rotation
        fingers = np.arctan2(current[1, 0], current[0, 0])
        turn = (yaw - fingers + np.pi / 2) % np.pi - np.pi / 2
        for choice in (turn, turn - np.sign(turn) * np.pi):
            if abs(choice) < _MOST_TURN:
                yield choice, pointing_down(fingers + choice)

    def fail(self, reason: str) -> NoPlan:
        """The error to raise, with the task's name."""
        return NoPlan(f"{self.simulator.task.name}: {reason}")

    def travel(self, target: Array, rotation: Array, gripper: float, held: str | None = None) -> Actions:
        """Moves over everything between here and `target`, to above `target`.

        Args:
            target: in m, shape (3,).
            rotation: to turn to on the way, shape (3, 3).
            gripper: `OPEN` or `CLOSED`.
            held: the object in the gripper.
        """
        start = self.position
        hanging = 0.02 if held is None else start[2] - self.points(held)[:, 2].min()
        height = max(target[2], self._highest_between(start, target, held) + hanging + CLEARANCE)
        if start[2] < height - 0.03:
            yield from self.move(np.array([start[0], start[1], height]), rotation, gripper, tolerance=0.03)
        yield from self.move(np.array([target[0], target[1], height]), rotation, gripper, tolerance=0.03)

    def move(
        self, target: Array, rotation: Array, gripper: float, tolerance: float, noise: float | None = None
    ) -> Actions:
        """Moves straight to `target`.

        Args:
            target: in m, shape (3,).
            rotation: to turn to on the way, shape (3, 3).
            gripper: `OPEN` or `CLOSED`.
            tolerance: distance in m that is near enough.
            noise: instead of the arm's own.

        Raises:
            NoPlan: the arm gets stuck.
        """
        for _ in range(_MOST_STEPS):
            if np.linalg.norm(target - self.position) < tolerance:
                return
            yield self.action(target, rotation, gripper, self.noise if noise is None else noise)
        raise self.fail(f"the arm does not get to {np.round(target, 3).tolist()}")

    def turn(self, rotation: Array, gripper: float) -> Actions:
        """Turns the hand where it is.

        Raises:
            NoPlan: the arm gets stuck.
        """
        position = self.position
        for _ in range(_MOST_STEPS):
            if np.linalg.norm(rotation_error(rotation, self.rotation)) < _TURNED:
                return
            yield self.action(position, rotation, gripper)
        raise self.fail("the hand does not turn as it should")

    def go_home(self) -> Actions:
        """Takes the empty hand back to where it started: first straight up, then over everything."""
        position, rotation = self._home
        up = self.position + np.array([0, 0, _RISE])
        yield from self.move(up, self.rotation, OPEN, tolerance=0.03)
        yield from self.travel(position, rotation, OPEN)
        yield from self.move(position, rotation, OPEN, tolerance=0.03)
        yield from self.turn(rotation, OPEN)

    def hold(self, steps: int, rotation: Array, gripper: float) -> Actions:
        """Stays where it is, to close or open the gripper."""
        position = self.position
        for _ in range(steps):
            yield self.action(position, rotation, gripper, 0)

    def action(self, target: Array, rotation: Array, gripper: float, noise: float = 0) -> NDArray[np.float32]:
        """One action towards a pose."""
        shift: Array = _GAIN * (target - self.position) / _METRES
        # A movement that is too long for one action keeps its direction.
        shift = shift / max(1.0, float(np.max(np.abs(shift))))
        turn = np.clip(_GAIN * rotation_error(rotation, self.rotation) / _RADIANS, -0.5, 0.5)
        shift = np.clip(shift + self.random.normal(0, noise, size=3), -1, 1) if noise else shift
        return np.array([*shift, *turn, gripper], dtype=np.float32)

    def _highest_between(self, start: Array, end: Array, held: str | None) -> float:
        """The highest point in m of all that stands within a hand's breadth of the straight way."""
        way = end[:2] - start[:2]
        highest = -np.inf
        for name in self.env.obj_body_id:
            if name == held or name.endswith(("table", "floor")):
                continue
            points = self.points(name)
            part = np.clip((points[:, :2] - start[:2]) @ way / max(float(way @ way), 1e-9), 0, 1)
            near = np.linalg.norm(points[:, :2] - start[:2] - part[:, None] * way, axis=1) < _HALF_HAND
            highest = max(highest, points[near, 2].max(initial=-np.inf))
        return float(highest)


def pointing(direction: Array, sliding: Array) -> Array:
    """The grip's rotation, shape (3, 3), with the fingers pointing along one unit vector and sliding along another."""
    return np.column_stack([sliding, np.cross(direction, sliding), direction])


def pointing_down(yaw: float) -> Array:
    """The grip's rotation with the fingers pointing down and sliding at `yaw` rad from the world's x axis."""
    return pointing(np.array([0, 0, -1.0]), np.array([np.cos(yaw), np.sin(yaw), 0]))
