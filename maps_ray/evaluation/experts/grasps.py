"""Where a parallel gripper can take hold of an object, from the object's points."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from maps_ray.evaluation.simulators.geometry import Array

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
