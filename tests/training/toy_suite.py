"""A suite without physics, and workers that roll out in it: a sum of actions, two tasks, six initial states each."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maps_ray.evaluation.simulators import Observation, Suite, Task

SUITE = Suite("toy", "toy", max_steps=16, base="toy")
OTHER = Suite("toy_swap", "toy", max_steps=16, base="toy", change="position")
SENTENCES = ("pick up the red bowl", "open the drawer")


@dataclass
class Toy:
    """The first task is done when anything has moved, the second never."""

    suite: Suite
    log: Path
    step_s: float
    cameras: tuple[str, ...] = ("image", "wrist_image")
    action_dim: int = 7
    _task: int = 0
    _state: NDArray[Any] = field(default_factory=lambda: np.zeros(7))

    @property
    def tasks(self) -> Sequence[Task]:
        return [Task(self.suite.name, i, f"task {i}", sentence, 6) for i, sentence in enumerate(SENTENCES)]

    def reset(self, task: int, initial_state: int) -> None:
        with self.log.open("a") as file:
            file.write(f"{self.suite.name} {task} {initial_state} {os.getpid()}\n")
        self._task, self._start = task, np.full(7, float(initial_state))
        self._state = self._start.copy()

    def observe(self) -> Observation:
        random = np.random.default_rng(int(abs(self._state).sum() * 1000))
        images = {name: random.integers(0, 256, (32, 32, 3), np.uint8) for name in self.cameras}
        proprio = np.append(self._state, 0).astype(np.float32)
        return Observation(images, proprio, SENTENCES[self._task])

    def step(self, chunk: NDArray[np.floating]) -> int:
        for count, action in enumerate(chunk, 1):
            time.sleep(self.step_s)
            self._state = self._state + action
            if self.success:
                return count
        return len(chunk)

    @property
    def success(self) -> bool:
        return self._task == 0 and not np.array_equal(self._state, self._start)

    def sub_goals(self) -> Mapping[str, bool]:
        return {"grasp": not np.array_equal(self._state, self._start), "place": self.success}

    def close(self) -> None:
        pass


def toy_suite(name: str) -> Suite:
    return {"toy": SUITE, "toy_swap": OTHER}[name]


def open_toy(log: Path, step_s: float, name: str, **_: Any) -> Toy:
    return Toy(toy_suite(name), log, step_s)


def worker_with_toys(log: Path, step_s: float = 0.0) -> Callable[[dict[str, Any]], None]:
    """What Ray Train calls on every worker: the real one, with the toy suites in place of the simulators."""

    def train_worker(config: dict[str, Any]) -> None:
        from maps_ray.evaluation.rollouts import Simulators, evaluate
        from maps_ray.training import rollouts, worker

        toys = Simulators(toy_suite, partial(open_toy, log, step_s))
        rollouts.evaluate = partial(evaluate, simulators=toys)
        worker.train_worker(config)

    return train_worker
