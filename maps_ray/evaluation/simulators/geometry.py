"""Shapes and places in a MuJoCo scene: an object's points, its footprint, and where things appear in an image."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

_VISUAL_GROUP = 1


@dataclass(frozen=True)
class Rectangle:
    """An axis-aligned rectangle on the table, in metres."""

    low: Array
    """Smallest x and y, shape (2,)."""
    high: Array
    """Largest x and y, shape (2,)."""

    @classmethod
    def around(cls, points: Array, margin: float = 0.0) -> Rectangle:
        """The rectangle around points of shape (n, 2 or more), grown by `margin` on each side."""
        return cls(points[:, :2].min(axis=0) - margin, points[:, :2].max(axis=0) + margin)

    def overlaps(self, other: Rectangle) -> bool:
        return bool(np.all(self.low < other.high) and np.all(other.low < self.high))


def bodies_of(model: Any, root: str) -> list[int]:
    """Ids of a body and of everything that hangs on it."""
    first = model.body_name2id(root)
    members = {first}
    for body in range(first + 1, model.nbody):  # MuJoCo numbers children after their parents
        if int(model.body_parentid[body]) in members:
            members.add(body)
    return sorted(members)


def geoms_of(model: Any, root: str) -> list[int]:
    """Ids of all geoms of a body and of everything that hangs on it."""
    members = set(bodies_of(model, root))
    return [geom for geom in range(model.ngeom) if int(model.geom_bodyid[geom]) in members]


def world_points(sim: Any, root: str, *, collision: bool = True) -> Array:
    """Points that span an object's shape, in world coordinates, shape (n, 3).

    Mesh geoms give their vertices, all others the corners of their bounding box.

    Args:
        sim: robosuite's simulation, with positions up to date (`sim.forward()`).
        root: name of the object's root body.
        collision: take the geoms that collide, and those that are only seen where none collides.
    """
    model, data = sim.model, sim.data
    mesh_type = importlib.import_module("mujoco").mjtGeom.mjGEOM_MESH
    geoms = geoms_of(model, root)
    solid = [geom for geom in geoms if model.geom_group[geom] != _VISUAL_GROUP and model.geom_contype[geom]]
    clouds = []
    for geom in solid if collision and solid else geoms:
        if model.geom_type[geom] == mesh_type:
            mesh = model.geom_dataid[geom]
            start = model.mesh_vertadr[mesh]
            points = model.mesh_vert[start : start + model.mesh_vertnum[mesh]].astype(np.float64)
        else:
            # `geom_aabb` is the centre and half size of the bounding box in the geom's own frame.
            centre, half = model.geom_aabb[geom][:3], model.geom_aabb[geom][3:]
            signs = np.array([(x, y, z) for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)])
            points = centre + signs * half
        clouds.append(points @ data.geom_xmat[geom].reshape(3, 3).T + data.geom_xpos[geom])
    return np.concatenate(clouds)


def project(sim: Any, camera: str, point: Array) -> tuple[float, float] | None:
    """Where a world point appears in a camera's image, in the orientation turned by 180 degrees.

    Args:
        sim: robosuite's simulation.
        camera: LIBERO's camera name.
        point: world position in m, shape (3,).

    Returns:
        (x, y) as fractions of the image's width and height from its upper left corner, outside [0, 1] when the point
        lies outside the image; None when it lies behind the camera.
    """
    identity = sim.model.camera_name2id(camera)
    local = sim.data.cam_xmat[identity].reshape(3, 3).T @ (point - sim.data.cam_xpos[identity])
    depth = -local[2]
    if depth <= 0:
        return None
    scale = 2 * depth * np.tan(np.deg2rad(sim.model.cam_fovy[identity]) / 2)
    # The camera's x axis points right and y up; the stored image is mirrored left to right.
    return float(0.5 - local[0] / scale), float(0.5 - local[1] / scale)
