"""Puts an object in or on something.

It reads positions and shapes from the simulator: takes the object where the gripper fits (or at its rim), lifts it
above whatever stands in the way, carries it straight to its goal, lowers and releases it.
"""

from __future__ import annotations

import numpy as np

from maps_ray.evaluation.experts.motions import CLEARANCE, CLOSED, OPEN, Actions, Arm, Grasp, NoPlan, candidates
from maps_ray.evaluation.simulators.geometry import ArmCopy, Array

_TALL = 0.09  # m below the grip
_STRETCHING = 40.0  # rad of turning the hand that one metre less of reach is worth
_LIFTS = ((0, 0.08, 0.16, 0.22), (0, 0.08), (0, 0.04))
"""Heights in m above a grasp at which the arm must be able to be and touch nothing: the first that leave a choice.

The whole way up matters where something hangs over the object; far from the base the arm cannot rise so high.
"""
_BESIDE = 0.015  # m between a rising object and what hangs beside it
_ROOM = 0.05  # m that it needs above it to be shifted to the side
_FARTHEST_OUT, _OUT_LIFT = 0.24, 0.02  # m to the side and up before an object that is hung over rises
_ATTEMPTS = 3
_ELSEWHERE = 0.02  # m from a grasp that failed to the next
_SLIPPED = 0.06  # m that a held object may move in the hand
_GRASP_STEPS, _RELEASE_STEPS, _SETTLE_STEPS = 9, 5, 15


class _Lost(NoPlan):
    """The object is no longer in the hand."""


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
        """None for a region of the table."""
        self._failed: list[Array] = []
        """Where the object was taken and slipped out of the hand."""

    def actions(self) -> Actions:
        """The whole way; starts again from where the object is when it was lost.

        Raises:
            NoPlan: no reachable grasp is free of collisions, or the arm gets stuck.
        """
        for attempt in range(1, _ATTEMPTS + 1):
            grasp, rotation = self._choose_grasp()
            try:
                yield from self._attempt(grasp, rotation)
            except _Lost:
                if attempt == _ATTEMPTS:
                    raise
            except NoPlan:
                if attempt == _ATTEMPTS:
                    raise
                yield from self._arm.go_home()
            if self._holds():
                return

    def _attempt(self, grasp: Grasp, rotation: Array) -> Actions:
        arm = self._arm
        top = arm.points(self._object)[:, 2].max()
        hover = max(arm.random.uniform(0.05, 0.08), top - grasp.position[2] + 0.02)
        above = grasp.position + np.array([0, 0, hover])
        yield from arm.travel(above, rotation, OPEN)
        yield from arm.move(above, rotation, OPEN, tolerance=0.012)
        yield from arm.move(grasp.position, rotation, OPEN, tolerance=0.006, noise=0)
        yield from arm.hold(_GRASP_STEPS, rotation, CLOSED)

        out = self._way_out()
        if out.any():
            yield from arm.move(arm.position + out, rotation, CLOSED, tolerance=0.012)
        self._failed.append(grasp.position)
        yield from self._carry(arm.travel(self._above_goal(drop=False), rotation, CLOSED, held=self._object))
        yield from self._carry(arm.move(self._above_goal(drop=False), rotation, CLOSED, tolerance=0.012))
        yield from arm.move(self._above_goal(drop=True), rotation, CLOSED, tolerance=0.01, noise=0)
        self._failed.clear()
        yield from arm.hold(_RELEASE_STEPS, rotation, OPEN)
        for _ in range(_SETTLE_STEPS):
            if self._holds():
                return
            # What sticks to one finger is freed by moving that finger away from it.
            shift = self._off_centre() if arm.touches(self._object) else np.array([0, 0, 0.03])
            yield arm.action(arm.position + shift, rotation, OPEN)

    def _carry(self, movement: Actions) -> Actions:
        """A movement with the object in the hand.

        Raises:
            NoPlan: the object slipped out.
        """
        held = self._arm.place_of(self._object) - self._arm.position
        for action in movement:
            if np.linalg.norm(self._arm.place_of(self._object) - self._arm.position - held) > _SLIPPED:
                raise _Lost(f"{self._arm.simulator.task.name}: {self._object} slipped out of the hand")
            yield action

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
            if not any(np.linalg.norm(grasp.position - place) < _ELSEWHERE for place in self._failed)
            for turn, rotation in self._arm.turns_to(grasp.yaw)
        ]
        options.sort(key=lambda option: option[0])
        for lifts in _LIFTS if self._way_out().any() else _LIFTS[1:]:
            ways = [np.array([0, 0, lift]) for lift in lifts]
            for _, grasp, rotation in options:
                if all(copy.can_reach(grasp.position + way, rotation) for way in (*ways, shift)):
                    return grasp, rotation
        raise self._arm.fail(f"no grasp of {self._object} is reachable and free of collisions")

    def _way_out(self) -> Array:
        """The least shift to where nothing hangs over the object, such as an open drawer; zero where it can rise.

        What is close above, like the top of a cabinet over its drawer, leaves no room to shift the object below it.
        """
        points = self._arm.points(self._object)
        low, high = points.min(axis=0) - _BESIDE, points.max(axis=0) + _BESIDE
        lows, highs = self._arm.boxes(without=self._object)
        above = lows[:, 2] > points[:, 2].max() + _ROOM
        lows, highs = lows[above, :2], highs[above, :2]
        for distance in np.arange(0, _FARTHEST_OUT, 0.02):
            for angle in np.linspace(0, 2 * np.pi, 8, endpoint=False):
                way = distance * np.array([np.cos(angle), np.sin(angle)])
                if not np.any(np.all((low[:2] + way < highs) & (lows < high[:2] + way), axis=1)):
                    return np.array([*way, _OUT_LIFT]) if distance else np.zeros(3)
        raise self._arm.fail(f"{self._object} cannot be lifted: something hangs over it")

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

    def _holds(self) -> bool:
        return self._arm.holds(self._relation, self._object, self._goal)

    def _off_centre(self) -> Array:
        """From the grip to the middle of the object along the way that the fingers slide."""
        slide = self._arm.rotation[:, 0]
        along = (self._arm.points(self._object) - self._arm.position) @ slide
        return slide * float(along.min() + along.max()) / 2

    def _top_of_goal(self) -> float:
        if self._destination is None:
            return float(self._arm.place_of(self._goal)[2])
        return float(self._arm.points(self._destination)[:, 2].max())
