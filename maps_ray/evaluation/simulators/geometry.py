"""Shapes in a MuJoCo scene: the bodies, geoms and points of an object."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from robosuite.utils.binding_utils import MjModel, MjSim

Array = NDArray[np.float64]

_VISUAL_GROUP = 1


def bodies_of(model: MjModel, root: str) -> list[int]:
    """Ids of a body and of everything that hangs on it."""
    first = model.body_name2id(root)
    members = {first}
    for body in range(first + 1, model.nbody):  # MuJoCo numbers children after their parents
        if int(model.body_parentid[body]) in members:
            members.add(body)
    return sorted(members)


def geoms_of(model: MjModel, root: str) -> list[int]:
    """Ids of all geoms of a body and of everything that hangs on it."""
    members = set(bodies_of(model, root))
    return [geom for geom in range(model.ngeom) if int(model.geom_bodyid[geom]) in members]


def world_points(sim: MjSim, root: str, *, collision: bool = True) -> Array:
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
