"""Labelled pictures of LIBERO scenes in which nothing stands where a task would put it.

A scene takes a task's objects, table and look; its movable objects are put at random places on the table, its
fixtures are shifted and some of their drawers and doors opened, and the gripper is sent to a random place above the
table. No physics is stepped, so one scene costs about as much as its pictures. Images are turned by 180 degrees as
everywhere (see `maps_ray.evaluation.simulators.libero`), and labels are in the same orientation.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maps_ray.evaluation.simulators.geometry import ArmCopy, Array, geoms_of, world_points
from maps_ray.evaluation.simulators.libero import CAMERAS, LiberoSimulator
from maps_ray.evaluation.simulators.libero_stages import human_name

# Where objects go, in metres from the middle of the workspace; the part of the table that both cameras and arm reach.
_TABLE_LOW, _TABLE_HIGH = np.array([-0.25, -0.32]), np.array([0.22, 0.32])
_GRIPPER_LOW, _GRIPPER_HIGH = np.array([-0.22, -0.30, 0.03]), np.array([0.18, 0.30, 0.36])
_FIXTURE_SHIFT = 0.04
_LEAVE_OUT, _OPEN_JOINT, _WRIST_VIEW = 0.2, 0.3, 0.25
_FURTHEST_JOINT_OPENING = 0.16
_SMALLEST_VISIBLE = 12  # pixels in a 128 x 128 image; fewer cannot be told apart by eye
_OUT_OF_SIGHT = np.array([0.0, 0.0, -20.0])


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


@dataclass(frozen=True)
class SeenObject:
    """One object as a picture shows it. Image coordinates are fractions in [0, 1] from the upper left corner."""

    name: str
    category: str
    box: tuple[float, float, float, float]
    """Left, top, right, bottom of the pixels that show it."""
    centre: tuple[float, float]
    """Mean (x, y) of the pixels that show it."""
    area: float
    """Part of the image that shows it."""
    position: tuple[float, float, float]
    """World position in m."""


@dataclass(frozen=True)
class Scene:
    """One picture and what is in it."""

    image: NDArray[np.uint8]
    """RGB, shape (size, size, 3)."""
    camera: str
    suite: str
    task: str
    objects: tuple[SeenObject, ...]
    """Objects of which enough can be seen."""
    gripper: tuple[float, float] | None
    """(x, y) of the point between the finger tips; None when it lies outside the image or behind the camera."""
    gripper_position: tuple[float, float, float]
    """World position in m of the point between the finger tips."""

    def annotation(self) -> dict[str, object]:
        """Everything but the image, as plain data."""
        return {key: value for key, value in asdict(self).items() if key != "image"}


def render_scenes(simulator: LiberoSimulator, task: int, count: int, seed: int) -> Iterator[Scene]:
    """Makes `count` pictures of random arrangements of one task's objects.

    Args:
        simulator: suite to take the task from; its loaded state is changed.
        task: index of the task.
        count: number of pictures; every scene gives an agent view, some give a wrist view as well.
        seed: the same seed gives the same pictures.
    """
    random = np.random.default_rng(seed)
    simulator.reset(task, int(random.integers(simulator.tasks[task].initial_states)))
    stage = _Stage(simulator)
    made = 0
    while made < count:
        stage.arrange(random)
        cameras = ("image", "wrist_image") if random.random() < _WRIST_VIEW else ("image",)
        for camera in cameras[: count - made]:
            yield stage.photograph(camera)
            made += 1


class _Stage:
    """A loaded task whose objects can be moved at will."""

    def __init__(self, simulator: LiberoSimulator) -> None:
        self._simulator = simulator
        self._env = simulator.env
        self._sim = self._env.sim
        model = self._sim.model
        self._origin = np.asarray(self._env.workspace_offset, dtype=np.float64)
        self._movable = {name: thing.root_body for name, thing in self._env.objects_dict.items()}
        self._fixtures = {
            name: thing.root_body
            for name, thing in self._env.fixtures_dict.items()
            if not name.endswith(("table", "floor"))
        }
        self._categories = {
            name: thing.category_name
            for things in (self._env.objects_dict, self._env.fixtures_dict)
            for name, thing in things.items()
        }
        self._qpos = self._sim.data.qpos.copy()
        self._body_pos = model.body_pos.copy()
        # Points relative to each movable object's body, as it stands in the initial state.
        self._shapes = {
            name: world_points(self._sim, root) - self._sim.data.get_body_xpos(root)
            for name, root in self._movable.items()
        }
        self._table = min(
            float(self._shapes[name][:, 2].min() + self._sim.data.get_body_xpos(root)[2])
            for name, root in self._movable.items()
        )
        self._owner = np.full(model.ngeom + 1, "", dtype=object)  # the last entry is read for geom -1, the background
        for name, root in {**self._movable, **self._fixtures}.items():
            self._owner[geoms_of(model, root)] = name
        self._arm = ArmCopy(self._env)

    def arrange(self, random: np.random.Generator) -> None:
        """Draws a new arrangement of fixtures, objects and robot."""
        self._sim.data.qpos[:] = self._qpos
        self._sim.data.qvel[:] = 0
        taken = self._shift_fixtures(random)
        names = list(self._movable)
        random.shuffle(names)
        for name in names:
            place = None if random.random() < _LEAVE_OUT else self._place(name, taken, random)
            if place is None:
                self._set_pose(name, _OUT_OF_SIGHT, 0.0)
            else:
                taken.append(place)
        self._pose_robot(random)

    def photograph(self, camera: str) -> Scene:
        """Renders the arrangement and labels what can be seen."""
        image = self._simulator.render(camera)
        owners = self._owner[self._simulator.geoms_shown(camera)]
        site = self._env.robots[0].eef_site_id
        grip = np.array(self._sim.data.site_xpos[site])
        seen = project(self._sim, CAMERAS[camera], grip)
        if seen is not None and not all(0 <= value <= 1 for value in seen):
            seen = None
        task = self._simulator.task
        objects = tuple(thing for thing in map(lambda name: self._seen(name, owners), self._categories) if thing)
        return Scene(image, camera, task.suite, task.name, objects, seen, (grip[0], grip[1], grip[2]))

    def _seen(self, name: str, owners: NDArray[np.object_]) -> SeenObject | None:
        rows, columns = np.nonzero(owners == name)
        height, width = owners.shape
        if len(rows) < _SMALLEST_VISIBLE * height * width / 128**2:
            return None
        root = {**self._movable, **self._fixtures}[name]
        x, y, z = (float(value) for value in self._sim.data.get_body_xpos(root))
        return SeenObject(
            name=human_name(self._categories[name]),
            category=self._categories[name],
            box=(columns.min() / width, rows.min() / height, (columns.max() + 1) / width, (rows.max() + 1) / height),
            centre=((columns.mean() + 0.5) / width, (rows.mean() + 0.5) / height),
            area=len(rows) / (height * width),
            position=(x, y, z),
        )

    def _shift_fixtures(self, random: np.random.Generator) -> list[Rectangle]:
        model, data = self._sim.model, self._sim.data
        model.body_pos[:] = self._body_pos
        for name, root in self._fixtures.items():
            model.body_pos[model.body_name2id(root)][:2] += random.uniform(-_FIXTURE_SHIFT, _FIXTURE_SHIFT, size=2)
            for joint in self._env.fixtures_dict[name].joints:
                if random.random() < _OPEN_JOINT:
                    low, high = model.jnt_range[model.joint_name2id(joint)]
                    data.qpos[model.get_joint_qpos_addr(joint)] = random.uniform(
                        max(low, -_FURTHEST_JOINT_OPENING), min(high, _FURTHEST_JOINT_OPENING)
                    )
        self._sim.forward()
        return [Rectangle.around(world_points(self._sim, root), 0.01) for root in self._fixtures.values()]

    def _place(self, name: str, taken: list[Rectangle], random: np.random.Generator) -> Rectangle | None:
        for _ in range(30):
            yaw = random.uniform(-np.pi, np.pi)
            spot = self._origin[:2] + random.uniform(_TABLE_LOW, _TABLE_HIGH)
            turn = np.array([[np.cos(yaw), -np.sin(yaw)], [np.sin(yaw), np.cos(yaw)]])
            place = Rectangle.around(self._shapes[name][:, :2] @ turn.T + spot, 0.005)
            if not any(place.overlaps(other) for other in taken):
                height = self._table - self._shapes[name][:, 2].min()
                self._set_pose(name, np.array([*spot, height]), yaw)
                return place
        return None

    def _set_pose(self, name: str, position: Array, yaw: float) -> None:
        """Moves an object, turned about the vertical from how it stands in the initial state."""
        mujoco = importlib.import_module("mujoco")
        start, _ = self._sim.model.get_joint_qpos_addr(self._env.objects_dict[name].joints[-1])
        turned = np.zeros(4)
        mujoco.mju_mulQuat(
            turned, np.array([np.cos(yaw / 2), 0, 0, np.sin(yaw / 2)]), self._qpos[start + 3 : start + 7]
        )
        self._sim.data.qpos[start : start + 3] = position
        self._sim.data.qpos[start + 3 : start + 7] = turned

    def _pose_robot(self, random: np.random.Generator) -> None:
        """Sends the gripper to a random place, pointing down; the initial pose stays where ten draws all collide."""
        self._sim.forward()
        down = np.array(self._sim.data.site_xmat[self._env.robots[0].eef_site_id]).reshape(3, 3)
        for _ in range(10):
            target = np.append(self._origin[:2], self._table) + random.uniform(_GRIPPER_LOW, _GRIPPER_HIGH)
            yaw, opening = random.uniform(-0.7, 0.7), random.uniform(0.002, 0.04)
            turn = np.array([[np.cos(yaw), -np.sin(yaw), 0], [np.sin(yaw), np.cos(yaw), 0], [0, 0, 1]])
            if self._arm.can_reach(target, turn @ down, opening):
                self._sim.data.qpos[:] = self._arm.qpos
                self._sim.forward()
                return


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
