"""CALVIN (Mees et al. 2022, arXiv:2112.03227), the long-horizon evaluation in scene D of policies trained on A, B, C.

Written against the public interfaces of `calvin_env` and `calvin_agent`, which no package registry carries. What needs
them was not run by this project's tests: loading, stepping, rendering and the task oracle. Only the handling of the
chain of instructions and of a missing installation was.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from maps_ray.evaluation.simulators.adapter import NOTHING_LOADED, Adapter, checked_chunk, checked_indices
from maps_ray.evaluation.simulators.base import Observation, SimulatorMissing, Task
from maps_ray.evaluation.simulators.calvin_sequences import Chains

if TYPE_CHECKING:
    from calvin_env.envs.play_table_env import PlayTableSimEnv
    from calvin_env.envs.tasks import Tasks

CAMERAS = {"image": "rgb_static", "wrist_image": "rgb_gripper"}
"""Camera name in data sets to CALVIN's name."""
SEQUENCES = 1000
"""Chains of the published evaluation."""
DATA_SET = "CALVIN_DATASET"
"""Environment variable with the folder of the data set `task_ABC_D`, whose `validation` describes scene D."""


class Chain:
    """Instructions that must be carried out one after another, each within a limit of steps; the first miss ends it.

    Args:
        instructions: CALVIN's task names, such as `open_drawer`, in their order.
        limit: steps for each of them.
    """

    def __init__(self, instructions: Sequence[str], limit: int) -> None:
        self._instructions = tuple(instructions)
        self._limit = limit
        self._done = 0
        self._steps = 0

    @property
    def current(self) -> str:
        """The instruction to carry out now; the last one when all are done."""
        return self._instructions[min(self._done, len(self._instructions) - 1)]

    @property
    def complete(self) -> bool:
        """Whether all instructions were carried out."""
        return self._done == len(self._instructions)

    @property
    def missed(self) -> bool:
        """Whether an instruction ran out of steps."""
        return not self.complete and self._steps >= self._limit

    def advance(self, carried_out: bool) -> bool:
        """Counts a step; true when it carried out the current instruction, so that the next one begins."""
        if self.complete or self.missed:
            return False
        self._steps += 1
        if carried_out:
            self._done += 1
            self._steps = 0
        return carried_out

    def reached(self) -> dict[str, bool]:
        """`1 of 5` and so on to whether that many instructions were carried out, as CALVIN reports them."""
        length = len(self._instructions)
        return {f"{number} of {length}": number <= self._done for number in range(1, length + 1)}


class CalvinSimulator(Adapter):
    """The evaluation on chains of five instructions; one task, whose initial states are the published chains.

    `observe` gives the sentence of the instruction that is due, `step` ends a chunk when that one is carried out, and
    `success` means that all five are. After an instruction was missed the episode is over. Actions are CALVIN's
    relative ones, scaled to [-1, 1]: position (3), Euler angles (3), gripper (above 0 open, else closed). The state is
    CALVIN's `robot_obs` (15).

    Args:
        suite: `calvin_abc_d` with 360 steps for an instruction, or `calvin_abc_d_overlapping` with 800 and three
            overlapping requests a round, as the authors of MAPS run it.
        image_size: side of the square images in pixels; CALVIN's are scaled to it.
        cameras: names out of `CAMERAS`, rendered by `observe` in this order; None renders all.

    Raises:
        SimulatorMissing: CALVIN or its data set is missing.
        ValueError: unknown suite or camera.
    """

    def __init__(self, suite: str, *, image_size: int = 200, cameras: Sequence[str] | None = None) -> None:
        super().__init__("calvin", suite, CAMERAS, cameras, image_size)
        self._modules = _import_calvin()
        self._scene = _scene_folder()
        self._tasks = [Task(suite, 0, "chain of five", "carry out five instructions in a row", SEQUENCES)]
        self._sequences = Chains(SEQUENCES)
        self._env: PlayTableSimEnv | None = None
        self._oracle: Tasks
        self._sentences: Mapping[str, Sequence[str]] = {}
        self._start: object = None
        self._chain: Chain | None = None

    @property
    def action_dim(self) -> int:
        return 7

    def reset(self, task: int, initial_state: int) -> None:
        checked_indices(self._tasks, task, initial_state)
        if self._env is None:
            self._load()
        condition, instructions = self._sequences[initial_state]
        robot, scene = self._modules["calvin_agent.evaluation.utils"].get_env_state_for_initial_condition(condition)
        self._world.reset(robot_obs=robot, scene_obs=scene)
        self._start = self._world.get_info()
        assert self.suite.instruction_steps is not None
        self._chain = Chain(instructions, self.suite.instruction_steps)

    def observe(self) -> Observation:
        chain = self._running
        frames, _ = self._world.get_camera_obs()
        size = (self._image_size, self._image_size)
        images = {
            camera: np.array(Image.fromarray(frames[CAMERAS[camera]]).resize(size, Image.Resampling.LANCZOS))
            for camera in self._cameras
        }
        state = np.asarray(self._world.get_state_obs()["robot_obs"], dtype=np.float32)
        # The first of its sentences, as the published evaluation takes it (`evaluate_policy.rollout`).
        return Observation(images=images, proprio=state, sentence=str(self._sentences[chain.current][0]))

    def step(self, chunk: NDArray[np.floating]) -> int:
        chunk = checked_chunk(chunk, self.action_dim)
        chain = self._running
        world = self._world
        cameras, world.cameras = world.cameras, []  # CALVIN's step renders whatever cameras there are
        try:
            for count, action in enumerate(chunk, 1):
                gripper = 1.0 if action[-1] > 0 else -1.0
                *_, info = world.step(np.append(action[:-1], gripper))
                if chain.advance(bool(self._oracle.get_task_info_for_set(self._start, info, {chain.current}))):
                    # An instruction is judged by what changed since it began (`evaluate_policy.rollout`).
                    self._start = info
                    return count
        finally:
            world.cameras = cameras
        return len(chunk)

    @property
    def success(self) -> bool:
        return self._chain is not None and self._chain.complete

    @property
    def over(self) -> bool:
        return self._chain is not None and self._chain.missed

    def sub_goals(self) -> Mapping[str, bool]:
        """See `Chain.reached`; how many hold is CALVIN's length of a chain."""
        return self._running.reached()

    def close(self) -> None:
        if self._env is not None:
            self._env.close()
        self._env, self._chain = None, None

    @property
    def _running(self) -> Chain:
        if self._chain is None:
            raise RuntimeError(NOTHING_LOADED)
        return self._chain

    @property
    def _world(self) -> PlayTableSimEnv:
        if self._env is None:
            raise RuntimeError(NOTHING_LOADED)
        return self._env

    def _load(self) -> None:
        omegaconf = self._modules["omegaconf"].OmegaConf
        settings = Path(str(self._modules["calvin_agent"].__file__)).parents[1] / "conf"
        tasks = omegaconf.load(settings / "callbacks/rollout/tasks/new_playtable_tasks.yaml")
        self._oracle = self._modules["hydra"].utils.instantiate(tasks)
        self._sentences = omegaconf.load(settings / "annotations/new_playtable_validation.yaml")
        self._env = self._modules["calvin_env.envs.play_table_env"].get_env(self._scene, show_gui=False)


def _import_calvin() -> dict[str, ModuleType]:
    names = (
        "omegaconf",
        "hydra",
        "calvin_agent",
        "calvin_agent.evaluation.utils",
        "calvin_env.envs.play_table_env",
    )
    try:
        return {name: importlib.import_module(name) for name in names}
    except ImportError as error:
        raise SimulatorMissing(
            f"the CALVIN simulator cannot be imported ({error}): it has no package; run "
            "`git clone --recurse-submodules https://github.com/mees/calvin` and, in the clone, "
            "`pip install -e calvin_env -e calvin_models`"
        ) from error


def _scene_folder() -> Path:
    folder = Path(os.environ.get(DATA_SET, "")) / "validation"
    if DATA_SET not in os.environ or not (folder / ".hydra" / "merged_config.yaml").is_file():
        raise SimulatorMissing(
            f"CALVIN's scene is described by its data set: set {DATA_SET} to the folder of task_ABC_D, "
            f"which must have validation/.hydra/merged_config.yaml (now {os.environ.get(DATA_SET, 'not set')!r})"
        )
    return folder
