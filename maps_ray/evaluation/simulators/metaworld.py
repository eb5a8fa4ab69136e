"""Metaworld (Yu et al. 2019, arXiv:1910.10897), version 3, behind the simulator interface.

Images are upright. Metaworld's `corner2` camera hangs upside down, so its images are turned by 180 degrees.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from maps_ray.evaluation.simulators import metaworld_small as small
from maps_ray.evaluation.simulators.adapter import NOTHING_LOADED, Adapter, checked_chunk, checked_indices
from maps_ray.evaluation.simulators.base import Change, Observation, SimulatorMissing, Task
from maps_ray.evaluation.simulators.opengl import choose_backend

if TYPE_CHECKING:
    from metaworld.sawyer_xyz_env import SawyerXYZEnv
    from mujoco import Renderer


_SENTENCES = {
    "assembly": "put the ring on the peg",
    "basketball": "put the ball in the basket",
    "bin-picking": "move the block from one bin to the other",
    "box-close": "put the lid on the box",
    "button-press": "push the button",
    "button-press-topdown": "press the button from above",
    "button-press-topdown-wall": "reach over the wall and press the button from above",
    "button-press-wall": "reach around the wall and push the button",
    "coffee-button": "push the button of the coffee machine",
    "coffee-pull": "pull the mug away from the coffee machine",
    "coffee-push": "push the mug under the coffee machine",
    "dial-turn": "turn the dial",
    "disassemble": "take the ring off the peg",
    "door-close": "close the door",
    "door-lock": "lock the door",
    "door-open": "open the door",
    "door-unlock": "unlock the door",
    "drawer-close": "close the drawer",
    "drawer-open": "open the drawer",
    "faucet-close": "turn the faucet off",
    "faucet-open": "turn the faucet on",
    "hammer": "drive the nail in with the hammer",
    "hand-insert": "put the gripper into the hole",
    "handle-press": "press the handle down",
    "handle-press-side": "press the handle down from the side",
    "handle-pull": "pull the handle up",
    "handle-pull-side": "pull the handle up from the side",
    "lever-pull": "pull the lever up",
    "peg-insert-side": "insert the peg into the hole from the side",
    "peg-unplug-side": "pull the peg out of the hole",
    "pick-out-of-hole": "pick the puck out of the hole and bring it to the goal",
    "pick-place": "pick up the puck and bring it to the goal",
    "pick-place-wall": "pick up the puck and bring it over the wall to the goal",
    "plate-slide": "slide the plate into the net",
    "plate-slide-back": "slide the plate out of the net",
    "plate-slide-back-side": "slide the plate out of the net sideways",
    "plate-slide-side": "slide the plate into the net sideways",
    "push": "push the puck to the goal",
    "push-back": "pull the puck back to the goal",
    "push-wall": "push the puck around the wall to the goal",
    "reach": "reach the goal",
    "reach-wall": "reach the goal behind the wall",
    "shelf-place": "put the block on the shelf",
    "soccer": "kick the ball into the net",
    "stick-pull": "pull the thermos with the stick",
    "stick-push": "push the thermos with the stick",
    "sweep": "sweep the block off the table",
    "sweep-into": "sweep the block into the hole",
    "window-close": "close the window",
    "window-open": "open the window",
}


def sentence_of(task: str) -> str:
    """The instruction of a task, for instance `open the drawer` for `drawer-open-v3`."""
    name = task.rpartition("-v")[0] or task
    return _SENTENCES.get(name, name.replace("-", " "))


CAMERAS = {"image": "corner2", "wrist_image": "gripperPOV"}
"""Camera name in data sets to Metaworld's camera name."""
INITIAL_STATES = 50
"""How many seeds a task offers; the benchmark draws as many goals for each of its tasks."""

_TABLES = {
    "metaworld_mt10": ("MT10_V3", None),
    "metaworld_mt50": ("MT50_V3", None),
    "metaworld_ml45": ("ML45_V3", "train"),
    "metaworld_ml45_test": ("ML45_V3", "test"),
}


class MetaworldSimulator(Adapter):
    """A suite of Metaworld. Initial state i is the reset of seed i, which places the objects and the goal.

    Actions are the hand's motion in x, y, z and the gripper's effort, each in [-1, 1]; the gripper closes with positive
    values. The state is the hand's position in m (3) and the gripper's opening (1), 0 closed and 1 open.

    Args:
        suite: name of a suite whose simulator is `metaworld`; those of `metaworld_small` place and show things anew.
        image_size: side of the square images in pixels.
        cameras: names out of `CAMERAS` (small world: `image`), rendered by `observe` in this order; None renders all.

    Raises:
        SimulatorMissing: the `metaworld` extra or an OpenGL library is not installed.
        ValueError: unknown suite or camera.
    """

    def __init__(self, suite: str, *, image_size: int = 128, cameras: Sequence[str] | None = None) -> None:
        self._change = small.change_of(suite)
        known = CAMERAS if self._change is None else ("image",)
        super().__init__("metaworld", suite, known, cameras, image_size)
        self._table = environment_table()
        if self._change is not None:
            names, states = small.tasks_of(self._change), small.INITIAL_STATES
        else:
            name, part = _TABLES[suite]
            table = getattr(self._table, name)
            names, states = table if part is None else table[part], INITIAL_STATES
        self._tasks = [Task(suite, index, task, sentence_of(task), states) for index, task in enumerate(names)]
        self._state = 0
        self._env: SawyerXYZEnv | None = None
        self._renderer: Renderer | None = None
        self._stage: small.Stage | None = None
        self._success = False

    @property
    def action_dim(self) -> int:
        return 4

    @property
    def env(self) -> SawyerXYZEnv:
        """The loaded Metaworld environment.

        Raises:
            RuntimeError: nothing is loaded yet.
        """
        if self._env is None:
            raise RuntimeError(NOTHING_LOADED)
        return self._env

    def reset(self, task: int, initial_state: int) -> None:
        checked_indices(self._tasks, task, initial_state)
        if task != self._loaded:
            self.close()
            # Metaworld's own scripted policies read the goal from the observation.
            self._env = self._table.ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE[f"{self._tasks[task].name}-goal-observable"](
                seed=0
            )
            self.env.max_path_length = sys.maxsize  # whoever rolls out counts the steps
            self._loaded = task
        self._state = initial_state
        # Metaworld's `_get_state_rand_vec` returns the last vector where it is frozen, and else draws one, from the
        # seed below only where it is told so.
        self.env.seeded_rand_vec, self.env._freeze_rand_vec = True, self._change is not None
        if self._change is not None:
            space = self.env._random_reset_space
            name = self._tasks[task].name
            self.env._last_rand_vec = small.place(name, initial_state, space.low, space.high, self._change)
        self.env.seed(initial_state)
        self.env.reset()
        self._success = False

    def observe(self) -> Observation:
        env = self.env
        task = self.task
        if self._change is not None:
            return self._observe_small(task, self._change)
        if self._renderer is None:
            self._renderer = importlib.import_module("mujoco").Renderer(env.model, self._image_size, self._image_size)
        images = {}
        for camera in self._cameras:
            self._renderer.update_scene(env.data, camera=CAMERAS[camera])
            frame = self._renderer.render()
            images[camera] = np.ascontiguousarray(frame[::-1, ::-1] if CAMERAS[camera] == "corner2" else frame)
        return Observation(images=images, proprio=self.proprio(), sentence=task.sentence)

    def _observe_small(self, task: Task, change: Change) -> Observation:
        stage = self.stage
        stage.dress(small.appearance(task.name, self._state, change))
        images = {camera: stage.render() for camera in self._cameras}
        sentence = task.sentence
        if change == "language":
            sentence = small.sentence(task.name, self._state, sentence)
        return Observation(images=images, proprio=self.proprio(), sentence=sentence)

    @property
    def stage(self) -> small.Stage:
        """What renders the loaded task of the small world."""
        if self._stage is None:
            self._stage = small.Stage(self.env, self._image_size)
        return self._stage

    def proprio(self) -> NDArray[np.float32]:
        """The robot's state as in `Observation.proprio`, without rendering; shape (4,)."""
        state: NDArray[np.float32] = self.env._get_curr_obs_combined_no_goal()[:4].astype(np.float32)
        return state

    def step(self, chunk: NDArray[np.floating]) -> int:
        chunk = checked_chunk(chunk, self.action_dim)
        env = self.env
        for count, action in enumerate(chunk, 1):
            *_, info = env.step(action)
            self._success = bool(info["success"])
            if self._success:
                return count
        return len(chunk)

    @property
    def success(self) -> bool:
        return self._success

    def sub_goals(self) -> Mapping[str, bool]:
        """Empty: what Metaworld reports beside success means another thing in each task."""
        return {}

    def close(self) -> None:
        for renderer in (self._renderer, self._stage):
            if renderer is not None:
                renderer.close()
        if self._env is not None:
            self._env.close()
        self._renderer, self._stage, self._env, self._loaded = None, None, None, None


def environment_table() -> ModuleType:
    """The module `metaworld.env_dict`, with an OpenGL library that renders without a display; EGL is preferred."""
    choose_backend("Metaworld", ("egl", "osmesa"))
    try:
        return importlib.import_module("metaworld.env_dict")
    except ImportError as error:
        raise SimulatorMissing(
            f"the Metaworld simulator cannot be imported ({error}): run `pip install maps_ray[metaworld]` in an "
            "environment of its own, because it pins another MuJoCo than maps_ray[libero]"
        ) from error
