"""Robot simulators behind one small interface; each adapter imports its simulator only when it is built."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from maps_ray.evaluation.simulators.base import Change, Observation, Simulator, SimulatorMissing, Suite, Task
from maps_ray.evaluation.simulators.suites import SUITES, suite

__all__ = [
    "SUITES",
    "Change",
    "Observation",
    "Simulator",
    "SimulatorMissing",
    "Suite",
    "Task",
    "open_simulator",
    "suite",
]

_ADAPTERS = {
    "libero": "LiberoSimulator",
    "libero_plus": "LiberoPlusSimulator",
    "metaworld": "MetaworldSimulator",
    "maniskill": "ManiSkillSimulator",
    "calvin": "CalvinSimulator",
}


def open_simulator(name: str, *, image_size: int = 256, cameras: Sequence[str] | None = None) -> Simulator:
    """Opens a suite with the adapter that runs it.

    Args:
        name: of a suite in `SUITES`.
        image_size: side of the square images in pixels.
        cameras: which images `observe` gives, primary first; None gives all that the adapter has.

    Raises:
        ValueError: unknown suite or camera.
        SimulatorMissing: the simulator is not installed; the message says how to get it.
    """
    adapter = suite(name).simulator
    module = importlib.import_module(f"maps_ray.evaluation.simulators.{adapter}")
    simulator: Simulator = getattr(module, _ADAPTERS[adapter])(name, image_size=image_size, cameras=cameras)
    return simulator
