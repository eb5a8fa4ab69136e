"""A suite without physics: a point that actions push, three tasks, and faults on demand.

`Reach` implements the simulator interface; environments run it in their own processes like any simulator.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import ray.cloudpickle
from numpy.typing import NDArray

from maps_ray.evaluation.rollouts import Simulators
from maps_ray.evaluation.simulators import Observation, SimulatorMissing, Suite, Task
from maps_ray.spec import nearest

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

MAX_STEPS = 20
SUITES = {
    "reach": Suite("reach", "toy", MAX_STEPS, "reach"),
    "reach_swap": Suite("reach_swap", "toy", MAX_STEPS, "reach", "position"),
    "elsewhere": Suite("elsewhere", "toy", MAX_STEPS, "elsewhere"),
    "flat": Suite("flat", "toy", MAX_STEPS, "flat"),
}
SENTENCES = ("pick up the red bowl", "pick up the bowl", "the red bowl pick up the red bowl")
STATES = 6


class Reach:
    """The point starts where the initial state says, and shall get further than the task's distance from there."""

    def __init__(self, name: str, image_size: int, cameras: Sequence[str], faults: Path) -> None:
        if name == "elsewhere":
            raise SimulatorMissing("the toy is not installed here: run `pip install toy`")
        known = ("image", "wrist_image")
        for camera in cameras:
            if camera not in known:
                raise ValueError(f"unknown camera {camera!r}: {nearest(camera, known)}")
        self.suite = SUITES[name]
        self.tasks = [Task(name, index, f"task {index}", text, STATES) for index, text in enumerate(SENTENCES)]
        self.cameras = tuple(cameras)
        self.action_dim = 6 if name == "flat" else 7
        self._size, self._faults = image_size, faults
        self._ballast = b""

    def reset(self, task: int, initial_state: int) -> None:
        self._task = task
        self._start = np.random.default_rng([task, initial_state]).normal(size=7) * 0.1
        self._point = self._start.copy()
        with (self._faults / "resets").open("a") as file:
            file.write(f"{task} {initial_state} {os.getpid()}\n")
        if self._due("kill", task, initial_state):
            os.kill(os.getpid(), signal.SIGKILL)
        if self._due("hang", task, initial_state):
            time.sleep(3600)
        if self._due("raise", task, initial_state):
            raise RuntimeError("the renderer was lost")
        if self._due("grow", task, initial_state):
            self._ballast = os.urandom(2**20) * 700

    def _due(self, fault: str, task: int, initial_state: int) -> bool:
        """Whether a fault is asked for; a file of that name holds how often."""
        path = self._faults / f"{fault}-{task}-{initial_state}"
        if not path.exists() or (left := int(path.read_text())) == 0:
            return False
        path.write_text(str(left - 1))
        return True

    def observe(self) -> Observation:
        random = np.random.default_rng(np.abs(self._point * 1e6).astype(np.int64))
        images = {name: random.integers(0, 256, (self._size, self._size, 3), np.uint8) for name in self.cameras}
        return Observation(images, np.append(self._point, self._task).astype(np.float32), SENTENCES[self._task])

    def step(self, chunk: NDArray[np.floating]) -> int:
        for count, action in enumerate(chunk, 1):
            self._point[: action.size] += action
            if self.success:
                return count
        return len(chunk)

    @property
    def success(self) -> bool:
        return self._moved() > (0.5, 4.0, 1e9)[self._task]

    def sub_goals(self) -> dict[str, bool]:
        return {"start": self._moved() > 0.1, "half": self._moved() > 2}

    def _moved(self) -> float:
        return float(np.abs(self._point[:6] - self._start[:6]).sum())

    def close(self) -> None:
        pass


def find_suite(name: str) -> Suite:
    if name not in SUITES:
        raise ValueError(f"unknown suite {name!r}: {nearest(name, SUITES)}")
    return SUITES[name]


def toys(faults: Path) -> Simulators:
    """The suites above; `faults` is a folder where files ask for faults, and where resets are noted."""
    faults.mkdir(parents=True, exist_ok=True)
    return Simulators(suite=find_suite, open=partial(_open, faults=faults))


def _open(name: str, *, image_size: int, cameras: Sequence[str], faults: Path) -> Any:
    return Reach(name, image_size, cameras, faults)
