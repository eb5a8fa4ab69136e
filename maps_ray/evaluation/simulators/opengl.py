"""Finds an OpenGL library that renders without a display; where there are two, a probe says which is faster."""

from __future__ import annotations

import ctypes.util
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from maps_ray.evaluation.simulators.base import SimulatorMissing
from maps_ray.files import write_json

_BACKENDS = {"osmesa": ("OSMesa", "libosmesa6"), "egl": ("EGL", "libegl1")}
_FRAMES = 5
_TIMEOUT_S = 120
_GAIN = 1.25
# What two renderers may differ by and show the same: half a level of 255 on average, an edge's pixels more.
_MEAN_LEVELS = 0.5
_EDGE_SHARE, _EDGE_LEVELS = 0.01, 32

# A lit, shadowed, textured scene; prints the seconds of one frame and the last frame.
_PROBE = """
import sys, time
import mujoco, numpy
scene = '<mujoco><asset><texture name="t" type="2d" builtin="checker" width="256" height="256" rgb1=".2 .3 .4" '\\
    'rgb2=".7 .6 .5"/><material name="m" texture="t" texrepeat="8 8" reflectance=".1"/></asset><worldbody>'\\
    '<light pos="0 0 3" dir="0.2 0.1 -1"/><geom type="plane" size="2 2 .1" material="m"/>'\\
    '<geom type="sphere" pos="0 0 .4" size=".3" rgba=".8 .2 .2 1"/>'\\
    '<geom type="box" pos=".6 .3 .2" euler="0 0 30" size=".2 .2 .2" rgba=".2 .7 .3 1"/>'\\
    '<camera name="c" pos="0 -2 1.5" xyaxes="1 0 0 0 .6 .8"/></worldbody></mujoco>'
model = mujoco.MjModel.from_xml_string(scene)
data = mujoco.MjData(model)
mujoco.mj_forward(model, data)
renderer = mujoco.Renderer(model, 256, 256)
renderer.update_scene(data, camera="c")
renderer.render()
began = time.perf_counter()
for _ in range(int(sys.argv[1])):
    frame = renderer.render()
print((time.perf_counter() - began) / int(sys.argv[1]))
print(frame.tobytes().hex())
"""


@dataclass(frozen=True)
class Probe:
    """One renderer, tried in a process of its own."""

    seconds: float
    """Of a frame of 256 x 256 pixels."""
    frame: NDArray[np.uint8]


def choose_backend(simulator: str, order: Sequence[str], *, probe: bool = True) -> None:
    """Sets `MUJOCO_GL` and `PYOPENGL_PLATFORM`, before MuJoCo is imported. `MUJOCO_GL` is kept when it is set.

    Where several libraries are installed, the fastest that renders the first one's picture is taken, see `fastest`.

    Args:
        simulator: what the message calls it.
        order: which of `osmesa` (CPU) and `egl` to take, the preferred one first.
        probe: look which is faster; else the first that is installed is taken.

    Raises:
        SimulatorMissing: the library is not installed; the message names its package.
    """
    backend = os.environ.get("MUJOCO_GL", "").lower()
    if not backend:
        installed = [name for name in order if ctypes.util.find_library(_BACKENDS[name][0])]
        # MuJoCo takes its library when it is imported: after that a choice comes too late.
        several = probe and len(installed) > 1 and "mujoco" not in sys.modules
        backend = _remembered(installed) if several else (installed or order)[0]
    if backend not in _BACKENDS:
        return
    library, package = _BACKENDS[backend]
    if ctypes.util.find_library(library) is None:
        raise SimulatorMissing(
            f"{simulator} renders through the {library} library (MUJOCO_GL={backend}), which is not installed: "
            f"run `apt-get install {package}`"
        )
    os.environ["MUJOCO_GL"] = backend
    os.environ["PYOPENGL_PLATFORM"] = backend


def fastest(probes: Mapping[str, Probe | None]) -> str:
    """The fastest renderer whose picture is the first working one's, so that results do not depend on the machine.

    Another than the first must be a quarter faster: a busy machine makes a probe waver by less.

    Args:
        probes: name -> what it gave, None where it does not work; the reference first.

    Returns:
        the first name where none works.
    """
    working = {name: probe for name, probe in probes.items() if probe is not None}
    if not working:
        return next(iter(probes))
    reference = next(iter(working.values())).frame
    same = {name: probe.seconds for name, probe in working.items() if same_picture(probe.frame, reference)}
    first, best = next(iter(same)), min(same, key=lambda name: same[name])
    return best if same[best] * _GAIN < same[first] else first


def same_picture(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> bool:
    """Whether two frames show the same, but for rounding and the smoothing of edges."""
    if one.shape != other.shape:
        return False
    levels = np.abs(one.astype(np.int16) - other)
    edges = float((levels > _EDGE_LEVELS).mean())
    return float(levels.mean()) <= _MEAN_LEVELS and edges <= _EDGE_SHARE


def try_backend(name: str) -> Probe | None:
    """Renders a small scene with one library, in a process of its own; None where it fails."""
    environment = {**os.environ, "MUJOCO_GL": name, "PYOPENGL_PLATFORM": name}
    command = [sys.executable, "-c", _PROBE, str(_FRAMES)]
    with suppress(OSError, ValueError, subprocess.TimeoutExpired):
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
        if done.returncode == 0:
            # Graphics libraries may have printed before.
            seconds, frame = done.stdout.split()[-2:]
            return Probe(float(seconds), np.frombuffer(bytes.fromhex(frame), np.uint8).reshape(256, 256, 3))
    return None


def _remembered(names: Sequence[str]) -> str:
    """The probe's choice, kept in a file: processes of one machine must render alike, and a probe takes seconds."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or tempfile.gettempdir())
    with suppress(RuntimeError):  # this user has no home
        cache = cache if os.environ.get("XDG_CACHE_HOME") else Path.home() / ".cache"
    # By machine: several may share a home folder.
    path = cache / "maps_ray" / f"opengl-{platform.node()}-{'-'.join(names)}.json"
    with suppress(OSError, ValueError, KeyError, TypeError):
        chosen = json.loads(path.read_text())["backend"]
        if chosen in names:
            return str(chosen)
    probes = {name: try_backend(name) for name in names}
    chosen = fastest(probes)
    measured = {name: None if probe is None else round(probe.seconds, 5) for name, probe in probes.items()}
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"backend": chosen, "seconds_a_frame": measured}, durable=False, shared=True)
    return chosen
