"""A copy of the simulated arm that can be posed and tested for collisions while the simulation itself stands still."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

import numpy as np

from maps_ray.evaluation.simulators.geometry import Array, geoms_of

if TYPE_CHECKING:
    from robosuite.environments.base import MujocoEnv

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
