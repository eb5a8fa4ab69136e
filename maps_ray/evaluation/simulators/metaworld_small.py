"""A small world on Metaworld: four easy tasks near one camera, and what each suite changes in them.

A picture of 64 pixels costs 10 ms on a CPU, a tenth of Metaworld's own: shadows and antialiasing are off. The camera
stands near the table, and goal marks are not drawn, so that a picture tells no more than a real one.

Equal initial states of two suites place the task's thing alike, but for `position`; so suites are compared in pairs.
"""

from __future__ import annotations

import importlib
import zlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from maps_ray.evaluation.simulators.base import Change

if TYPE_CHECKING:
    from metaworld.sawyer_xyz_env import SawyerXYZEnv

Random = np.random.Generator
_Part = Literal["shown", "outside", "anywhere"]

TRAINED = ("button-press-topdown-v3", "drawer-close-v3", "handle-press-v3", "window-close-v3")
"""The tasks that demonstrations show."""
UNSEEN = ("button-press-v3", "coffee-button-v3", "handle-press-side-v3")
"""Tasks of the same kind that they do not."""
INITIAL_STATES = 4000
"""How many seeds a task offers."""

PREFIX = "metaworld_small"
CHANGES: tuple[Change, ...] = ("position", "look", "light", "camera", "distractor", "language", "task")
"""What the suites change, one each: `metaworld_small_camera`."""

# Half the width, in m, over which the thing is moved along x, and the parts of it that are shown in distribution and
# under `position`; between the two nothing starts. Metaworld's own ranges are about half as wide.
_HALF_WIDTH = {"window-close-v3": 0.1, "handle-press-side-v3": 0.05}
_USUAL_HALF_WIDTH = 0.2
# Where an episode's middle is, in m, if not where Metaworld has it: there the arm would hide the handle.
_MIDDLE = {"handle-press-side-v3": -0.05}
_SHOWN, _OUTSIDE = 0.6, (0.75, 1.0)

_REWRITTEN = {
    "button-press-topdown-v3": ("push the red button down", "lower the hand onto the button", "get the button pressed"),
    "drawer-close-v3": ("push the drawer in", "the drawer should be shut", "slide the open drawer back"),
    "handle-press-v3": ("push the red handle to the bottom", "lower the handle", "get the handle all the way down"),
    "window-close-v3": ("slide the window to the other side", "the window should be shut", "push the window"),
}

# What is no part of the task: the room and the robot.
_SCENERY = ("world", "tablelink", "RetainingWall", "base", "mocap")
COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.8, 0.1, 0.1),
    "green": (0.1, 0.6, 0.15),
    "blue": (0.1, 0.2, 0.8),
    "yellow": (0.85, 0.8, 0.1),
    "purple": (0.5, 0.1, 0.6),
    "white": (0.95, 0.95, 0.95),
    "black": (0.05, 0.05, 0.05),
}
"""Of the distractors."""
SHAPES = ("ball", "box", "can")


@dataclass(frozen=True)
class Distractor:
    """A coloured body that lies about and touches nothing."""

    colour: str
    shape: str
    place: tuple[float, float]
    """On the table, m."""
    size: float
    """Half its height, m."""

    @property
    def name(self) -> str:
        """For instance `red ball`."""
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True)
class Appearance:
    """What a scene looks like; the defaults are what demonstrations show."""

    azimuth: float = 155.0
    elevation: float = -40.0
    distance: float = 1.0
    """Of the camera from `looked_at`, m."""
    looked_at: tuple[float, float, float] = (0.0, 0.68, 0.12)
    ambient: tuple[float, float, float] | None = None
    """Of the headlight; None leaves it."""
    lamps: tuple[float, float, float] | None = None
    """Factor of the lamps' colour; None leaves them."""
    lit: tuple[bool, ...] | None = None
    """Which lamps are on; None leaves all on."""
    colours: int | None = None
    """Seed of the colours and textures of thing, table, floor and wall; None leaves them."""
    distractors: tuple[Distractor, ...] = ()


def change_of(suite: str) -> Change | None:
    """What a suite of the small world changes; None for a suite of another world."""
    if suite == PREFIX:
        return "none"
    return next((change for change in CHANGES if suite == f"{PREFIX}_{change}"), None)


def tasks_of(change: Change) -> tuple[str, ...]:
    """Metaworld's names of a suite's tasks."""
    return UNSEEN if change == "task" else TRAINED


def sentence(task: str, initial_state: int, usual: str) -> str:
    """One of a task's rewritten sentences; each initial state has its own."""
    return _REWRITTEN[task][initial_state % len(_REWRITTEN[task])] if task in _REWRITTEN else usual


def place(
    task: str, initial_state: int, low: NDArray[np.floating], high: NDArray[np.floating], change: Change
) -> NDArray[np.float64]:
    """Where the thing of a task starts: Metaworld's vector of an initial state, drawn anew.

    Args:
        task: its Metaworld name.
        initial_state: the seed.
        low: Metaworld's own range.
        high: its upper end.
        change: of the suite; `position` starts outside what the others show.
    """
    part: _Part = "outside" if change == "position" else "shown"
    middle = _MIDDLE.get(task, (low[0] + high[0]) / 2)
    return _place(task, _random("place", task, initial_state), low, high, part, middle)


def place_anywhere(
    task: str, random: Random, low: NDArray[np.floating], high: NDArray[np.floating]
) -> NDArray[np.float64]:
    """As `place`, from the whole width around Metaworld's own middle."""
    return _place(task, random, low, high, "anywhere", (low[0] + high[0]) / 2)


def _place(
    task: str, random: Random, low: NDArray[np.floating], high: NDArray[np.floating], part: _Part, middle: float
) -> NDArray[np.float64]:
    vector = random.uniform(low, high)
    if part == "outside":
        share = random.choice([-1, 1]) * random.uniform(*_OUTSIDE)
    else:
        widest = _SHOWN if part == "shown" else 1.0
        share = random.uniform(-widest, widest)
    vector[0] = middle + share * _HALF_WIDTH.get(task, _USUAL_HALF_WIDTH)
    return np.asarray(vector, np.float64)


def appearance(task: str, initial_state: int, change: Change) -> Appearance:
    """What an episode looks like; a function of its arguments alone."""
    random = _random(change, task, initial_state)
    usual = Appearance()
    if change == "camera":
        return _moved_camera(usual, random, 0.5)
    if change == "light":
        return _other_light(usual, random)
    if change == "look":
        return replace(usual, colours=int(random.integers(2**31)))
    if change == "distractor":
        return replace(usual, distractors=_distractors(random, int(random.integers(2, 5))))
    return usual


def any_appearance(random: Random) -> Appearance:
    """All changes together, each in half of the scenes and from none to its full size: what the base is shown."""
    drawn = Appearance()
    if random.random() < 0.7:
        drawn = _moved_camera(drawn, random, 0.0)
    if random.random() < 0.5:
        drawn = _other_light(drawn, random)
    if random.random() < 0.6:
        drawn = replace(drawn, colours=int(random.integers(2**31)))
    return replace(drawn, distractors=_distractors(random, int(random.integers(0, 5))))


def _moved_camera(usual: Appearance, random: Random, least: float) -> Appearance:
    """By `least` to 1 of 25 degrees around, 10 up or down, and 15 % nearer or farther."""

    def part() -> float:
        return float(random.choice([-1, 1]) * random.uniform(least, 1))

    return replace(
        usual,
        azimuth=usual.azimuth + 25 * part(),
        elevation=usual.elevation + 10 * part(),
        distance=usual.distance * (1 + 0.15 * part()),
    )


def _other_light(usual: Appearance, random: Random) -> Appearance:
    """Another brightness and tint, and one or two lamps of three out."""
    tint = random.uniform(0.6, 1.3, 3)
    ambient, lamps = random.choice([0.15, 0.25, 0.7]) * tint, random.choice([0.5, 1.8]) * random.uniform(0.6, 1.3, 3)
    lit = np.ones(3, bool)
    lit[random.permutation(3)[: random.integers(1, 3)]] = False
    return replace(usual, ambient=_triple(ambient), lamps=_triple(lamps), lit=tuple(bool(lamp) for lamp in lit))


def _distractors(random: Random, count: int) -> tuple[Distractor, ...]:
    names = [(colour, shape) for colour in COLOURS for shape in SHAPES]
    distractors: list[Distractor] = []
    for index in random.permutation(len(names))[:count]:
        colour, shape = names[index]
        for _ in range(20):
            x, y = random.uniform((-0.32, 0.45), (0.32, 0.85))
            if all(np.hypot(x - other.place[0], y - other.place[1]) > 0.1 for other in distractors):
                distractors.append(Distractor(colour, shape, (float(x), float(y)), float(random.uniform(0.03, 0.045))))
                break
    return tuple(distractors)


def _triple(values: NDArray[np.floating]) -> tuple[float, float, float]:
    one, two, three = (float(value) for value in values)
    return one, two, three


def _random(purpose: str, task: str, initial_state: int) -> Random:
    # Not `hash`, which each process salts: equal states must look alike in all of them.
    return np.random.default_rng([zlib.crc32(purpose.encode()), zlib.crc32(task.encode()), initial_state])


class Stage:
    """Renders a loaded Metaworld environment in any appearance.

    Args:
        env: the environment; its model's colours and lights are changed.
        image_size: side of the pictures in pixels.
    """

    def __init__(self, env: SawyerXYZEnv, image_size: int) -> None:
        self._mujoco = importlib.import_module("mujoco")
        self._env, self._model = env, env.model
        self._model.vis.quality.offsamples = 0
        self._renderer = self._mujoco.Renderer(self._model, image_size, image_size)
        self._renderer.scene.flags[self._mujoco.mjtRndFlag.mjRND_SHADOW] = 0
        self._renderer.scene.flags[self._mujoco.mjtRndFlag.mjRND_REFLECTION] = 0
        self._options = self._mujoco.MjvOption()
        self._options.sitegroup[:] = 0
        self._usual = [array.copy() for array in self._changed()]
        self._camera = self._mujoco.MjvCamera()
        self.roots = np.array(
            [self._model.body(body).name for body in self._model.body_rootid[self._model.geom_bodyid]]
        )
        """Name of the outermost body of each geom."""
        self.distractors: tuple[Distractor, ...] = ()
        """Of the appearance that is on."""

    def dress(self, look: Appearance) -> None:
        """Puts an appearance on; what an earlier one changed is taken back."""
        model = self._model
        for array, usual in zip(self._changed(), self._usual, strict=True):
            array[:] = usual
        self._camera.type = self._mujoco.mjtCamera.mjCAMERA_FREE
        self._camera.azimuth, self._camera.elevation = look.azimuth, look.elevation
        self._camera.distance, self._camera.lookat[:] = look.distance, look.looked_at
        if look.ambient is not None:
            model.vis.headlight.ambient[:] = look.ambient
        if look.lamps is not None:
            model.light_diffuse[:] *= look.lamps
        if look.lit is not None:
            model.light_active[:] = np.resize(np.array(look.lit), model.nlight)
        if look.colours is not None:
            self._paint(np.random.default_rng(look.colours))
        self.distractors = look.distractors

    def render(self) -> NDArray[np.uint8]:
        """RGB, uint8 (size, size, 3), upright."""
        self._update()
        picture: NDArray[np.uint8] = self._renderer.render().copy()
        return picture

    def owners(self) -> NDArray[np.object_]:
        """(size, size): for each pixel the name of the outermost body, or of the distractor, that it shows."""
        self._renderer.enable_segmentation_rendering()
        try:
            self._update()
            shown = self._renderer.render()
        finally:
            self._renderer.disable_segmentation_rendering()
        names = np.full(shown.shape[:2], "", dtype=object)
        geoms = shown[..., 1] == int(self._mujoco.mjtObj.mjOBJ_GEOM)
        names[geoms] = self.roots[shown[..., 0][geoms]]
        for number, distractor in enumerate(self.distractors):
            names[(shown[..., 1] == int(self._mujoco.mjtObj.mjOBJ_UNKNOWN)) & (shown[..., 0] == number)] = (
                distractor.name
            )
        return names

    def project(self, point: NDArray[np.floating]) -> tuple[float, float] | None:
        """A world point as fractions of the picture from its upper left corner; None behind the camera."""
        eye = self._renderer.scene.camera[0]
        position, forward, up = (np.array(getattr(eye, name), np.float64) for name in ("pos", "forward", "up"))
        offset = np.asarray(point, np.float64) - position
        depth = float(offset @ forward)
        if depth <= 0:
            return None
        scale = np.tan(np.radians(self._model.vis.global_.fovy) / 2) * depth
        return float(0.5 + offset @ np.cross(forward, up) / (2 * scale)), float(0.5 - offset @ up / (2 * scale))

    def close(self) -> None:
        """Frees the graphics context."""
        self._renderer.close()

    @property
    def things(self) -> list[str]:
        """Outermost bodies that belong to the task."""
        return [str(name) for name in dict.fromkeys(self.roots) if name not in _SCENERY]

    def _update(self) -> None:
        self._renderer.update_scene(self._env.data, camera=self._camera, scene_option=self._options)
        scene = self._renderer.scene
        kinds = self._mujoco.mjtGeom
        for number, distractor in enumerate(self.distractors):
            shape = {"ball": kinds.mjGEOM_SPHERE, "box": kinds.mjGEOM_BOX, "can": kinds.mjGEOM_CYLINDER}[
                distractor.shape
            ]
            centre = np.array([*distractor.place, distractor.size])
            geom = scene.geoms[scene.ngeom]
            colour = np.array([*COLOURS[distractor.colour], 1.0], np.float32)
            self._mujoco.mjv_initGeom(geom, shape, np.full(3, distractor.size), centre, np.eye(3).ravel(), colour)
            # Of no kind that the model has: `owners` finds them by that.
            geom.objtype, geom.objid, geom.segid = int(self._mujoco.mjtObj.mjOBJ_UNKNOWN), number, scene.ngeom
            scene.ngeom += 1

    def _changed(self) -> list[NDArray[np.generic]]:
        """What `dress` writes to."""
        model = self._model
        headlight = model.vis.headlight.ambient
        return [model.geom_rgba, model.geom_matid, model.light_diffuse, model.light_active, headlight]

    def _paint(self, random: Random) -> None:
        """A colour for each material of thing, table, floor and wall, and another texture for what has one."""
        model = self._model
        textured = [mat for mat in range(model.nmat) if (model.mat_texid[mat] >= 0).any()]
        own = self._usual[1]
        visible = model.geom_rgba[:, 3] > 0
        robot = np.isin(self.roots, ("base", "mocap"))
        for material in np.unique(own[visible & ~robot]):
            chosen = (own == material) & visible & ~robot
            colour = random.uniform(0.1, 1.0, 3)
            if material in textured:
                model.geom_matid[chosen] = textured[random.integers(len(textured))]
            model.geom_rgba[chosen, :3] = colour
            model.geom_rgba[chosen, 3] = 1
