"""Shapes in a MuJoCo scene, and where the arm can go among them.

The bodies, geoms and points of an object; and a copy of the simulated arm that can be posed and tested for collisions
while the simulation itself stands still.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from robosuite.environments.base import MujocoEnv
    from robosuite.utils.binding_utils import MjModel, MjSim


Array = NDArray[np.float64]

# robosuite's convention: geoms of group 0 collide, those of group 1 are seen (`robosuite.models.objects`).
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


_STEPS = 60
_DAMPING = 1e-3
_CLOSE_ENOUGH = (0.004, 0.04)  # m, rad
_JOINT_MARGIN = 0.1  # rad; the controller gets stuck where a joint meets its limit
OPEN = 0.04
"""Distance in m of each of the Panda's fingers from the middle when it is open."""


def rotation_error(wanted: Array, current: Array) -> Array:
    """The rotation vector, in rad and world axes, that takes `current` to `wanted` (both 3 x 3)."""
    mujoco = importlib.import_module("mujoco")
    quaternion, vector = np.zeros(4), np.zeros(3)
    mujoco.mju_mat2Quat(quaternion, (wanted @ current.T).ravel())
    mujoco.mju_quat2Vel(vector, quaternion, 1.0)
    return vector


class ArmCopy:
    """Answers where the arm of a robosuite environment can go. Poses are those of the grip site, between the tips."""

    def __init__(self, env: MujocoEnv) -> None:
        mujoco = importlib.import_module("mujoco")
        self._mujoco = mujoco
        self._sim, self._robot = env.sim, env.robots[0]
        self._model = env.sim.model._model
        self._data = mujoco.MjData(self._model)
        self._site = self._robot.eef_site_id
        self._limits = self._model.jnt_range[self._robot._ref_joint_indexes] + [_JOINT_MARGIN, -_JOINT_MARGIN]
        robot_geoms = set(geoms_of(env.sim.model, "robot0_base"))
        self._is_robot = np.array([geom in robot_geoms for geom in range(self._model.ngeom)])

    @property
    def qpos(self) -> Array:
        """Positions of all joints of the scene as `can_reach` left them."""
        return np.array(self._data.qpos)

    def can_reach(self, position: Array, rotation: Array, opening: float = OPEN) -> bool:
        """Whether the arm can take a grip pose and touch nothing.

        Starts from the simulation's present state. Inverse kinematics by damped least squares (Wampler 1986).

        Args:
            position: of the grip site, world coordinates in m, shape (3,).
            rotation: of the grip site, shape (3, 3).
            opening: distance in m of each finger from the middle.
        """
        self._data.qpos[:] = self._sim.data.qpos
        self._data.qpos[self._robot._ref_gripper_joint_pos_indexes] = (opening, -opening)
        return self._solve(position, rotation) and not self._touches()

    def joint_margin(self) -> float:
        """How far, in rad, the joint nearest to a limit is from it, in the pose that `can_reach` found."""
        joints = self._data.qpos[self._robot._ref_joint_pos_indexes]
        return float(np.min(np.minimum(joints - self._limits[:, 0], self._limits[:, 1] - joints)))

    def _solve(self, position: Array, rotation: Array) -> bool:
        joints, columns = self._robot._ref_joint_pos_indexes, self._robot._ref_joint_vel_indexes
        jacobian = np.zeros((6, self._model.nv))
        for _ in range(_STEPS):
            # With `mj_comPos` all that the Jacobian needs; `mj_forward` would also solve for contacts, in each of the
            # steps.
            self._mujoco.mj_kinematics(self._model, self._data)
            self._mujoco.mj_comPos(self._model, self._data)
            shift = position - self._data.site_xpos[self._site]
            turn = rotation_error(rotation, self._data.site_xmat[self._site].reshape(3, 3))
            if np.linalg.norm(shift) < _CLOSE_ENOUGH[0] and np.linalg.norm(turn) < _CLOSE_ENOUGH[1]:
                return True
            self._mujoco.mj_jacSite(self._model, self._data, jacobian[:3], jacobian[3:], self._site)
            arm = jacobian[:, columns]
            error = np.concatenate([shift, turn])
            change = arm.T @ np.linalg.solve(arm @ arm.T + _DAMPING * np.eye(6), error)
            self._data.qpos[joints] = np.clip(self._data.qpos[joints] + change, self._limits[:, 0], self._limits[:, 1])
        return False

    def _touches(self) -> bool:
        self._mujoco.mj_fwdPosition(self._model, self._data)
        contacts = self._data.contact
        return any(
            self._is_robot[first] != self._is_robot[second]
            for first, second in zip(contacts.geom1, contacts.geom2, strict=True)
        )
