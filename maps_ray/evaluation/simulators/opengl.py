"""Finds an OpenGL library that renders without a display."""

from __future__ import annotations

import ctypes.util
import os
from collections.abc import Sequence

from maps_ray.evaluation.simulators.base import SimulatorMissing

_BACKENDS = {"osmesa": ("OSMesa", "libosmesa6"), "egl": ("EGL", "libegl1")}


def choose_backend(simulator: str, order: Sequence[str]) -> None:
    """Sets `MUJOCO_GL` and `PYOPENGL_PLATFORM`, before MuJoCo is imported. `MUJOCO_GL` is kept when it is set.

    Args:
        simulator: what the message calls it.
        order: which of `osmesa` (CPU) and `egl` to take, the preferred one first.

    Raises:
        SimulatorMissing: the library is not installed; the message names its package.
    """
    backend = os.environ.get("MUJOCO_GL", "").lower() or next(
        (name for name in order if ctypes.util.find_library(_BACKENDS[name][0])), order[0]
    )
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
