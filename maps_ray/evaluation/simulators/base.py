"""What a simulator offers to whoever collects demonstrations or rolls out a policy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class SimulatorMissing(RuntimeError):
    """A simulator, or a library that it needs, is not installed; the message names the remedy."""


@dataclass(frozen=True)
class Task:
    """One task of a suite."""

    suite: str
    index: int
    """Position in the suite's published order."""
    name: str
    sentence: str
    """The instruction that a policy is given."""
    initial_states: int
    """How many recorded initial states the suite has for this task."""


@dataclass(frozen=True)
class Observation:
    """What a policy sees at one moment."""

    images: dict[str, NDArray[np.uint8]]
    """Camera name to an RGB image, uint8, shape (height, width, 3), in the orientation that training uses."""
    proprio: NDArray[np.float32]
    """Robot state, shape (8,): end-effector position in m (3), axis-angle in rad (3), finger positions in m (2)."""
    sentence: str


class Simulator(Protocol):
    """A suite of tasks with one of them loaded. Equal calls after `reset` give equal states, in any process."""

    @property
    def tasks(self) -> Sequence[Task]:
        """The suite's tasks, in its published order."""

    def reset(self, task: int, initial_state: int) -> None:
        """Loads a task and puts it into one of its recorded initial states.

        Raises:
            ValueError: no such task or initial state.
        """

    def observe(self) -> Observation:
        """Renders the cameras and reads the robot's state; the only call that renders."""

    def step(self, action: NDArray[np.floating]) -> bool:
        """Applies one action, shape (7,), in the simulator's own convention; returns `success`.

        Raises:
            ValueError: wrong shape, or a value that is not finite.
        """

    @property
    def success(self) -> bool:
        """Whether the task's goal holds now."""

    def close(self) -> None:
        """Frees the simulator; safe to call twice."""
