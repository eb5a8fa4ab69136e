"""Robot simulators behind one small interface; each adapter imports its simulator only when it is built."""

from maps_ray.evaluation.simulators.base import Observation, Simulator, SimulatorMissing, Task
from maps_ray.evaluation.simulators.libero import SUITES, LiberoSimulator

__all__ = ["SUITES", "LiberoSimulator", "Observation", "Simulator", "SimulatorMissing", "Task"]
