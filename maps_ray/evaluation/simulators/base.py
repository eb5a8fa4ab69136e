"""What a simulator offers to whoever collects demonstrations or rolls out a policy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

Change = Literal[
    "none", "position", "language", "look", "task", "distractor",
    "camera", "robot", "layout", "light", "background", "noise", "object", "category",
]  # fmt: skip
"""What a suite changes against the suite whose demonstrations a policy was trained on."""


class SimulatorMissing(RuntimeError):
    """A simulator, or a library that it needs, is not installed; the message names the remedy."""


@dataclass(frozen=True)
class Suite:
    """One suite of tasks, as far as it is known without its simulator."""

    name: str
    simulator: str
    """Which adapter runs it: `libero`, `libero_plus`, `metaworld`, `maniskill`, `calvin`."""
    max_steps: int
    """Actions after which the published evaluation gives an episode up."""
    base: str
    """The suite that it perturbs; its own name when it perturbs none."""
    change: Change = "none"
    overlapping: bool = False
    """Three requests at the start of a round of ten actions, averaged, as `play` does it; else chunks are open loop."""
    instruction_steps: int | None = None
    """Actions for each instruction of a chain; None for a suite without chains."""


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
    """How many initial states there are: recorded ones, or seeds."""
    level: int | None = None
    """Its published difficulty, 1 the lowest; None where there is none, or none is known here."""
    missing: str | None = None
    """Which files the task needs that are not here, and where to put them; None for a task that runs."""


@dataclass(frozen=True)
class Observation:
    """What a policy sees at one moment."""

    images: dict[str, NDArray[np.uint8]]
    """Camera name to an RGB image, uint8, shape (height, width, 3), in the orientation that training uses."""
    proprio: NDArray[np.float32]
    """Robot state as the adapter's data sets store it; LIBERO: shape (8,), end-effector position in m (3), axis-angle
    in rad (3), finger positions in m (2)."""
    sentence: str


class Simulator(Protocol):
    """A suite of tasks with one of them loaded. Equal calls after `reset` give equal states, in any process."""

    @property
    def suite(self) -> Suite:
        """What is simulated."""

    @property
    def tasks(self) -> Sequence[Task]:
        """The suite's tasks, in its published order."""

    @property
    def cameras(self) -> tuple[str, ...]:
        """Names of the images that `observe` gives, primary first."""

    @property
    def action_dim(self) -> int:
        """Length of an action."""

    def reset(self, task: int, initial_state: int) -> None:
        """Loads a task, puts it into one of its initial states and lets it settle as the published evaluation does.

        Raises:
            ValueError: no such task or initial state.
            SimulatorMissing: files of the task are missing.
        """

    def observe(self) -> Observation:
        """Renders the cameras and reads the robot's state; the only call that renders."""

    def step(self, chunk: NDArray[np.floating]) -> int:
        """Applies actions one after another until the goal holds or the chunk ends.

        Args:
            chunk: (n, action_dim), in the simulator's own convention.

        Returns:
            How many actions were applied.

        Raises:
            ValueError: another shape, or a value that is not finite; nothing was applied then.
        """

    @property
    def success(self) -> bool:
        """Whether the task's goal holds now."""

    def sub_goals(self) -> Mapping[str, bool]:
        """Which parts of the task were reached since `reset`, in their order, such as grasp, carry, place.

        Empty where the simulator does not tell.
        """

    def close(self) -> None:
        """Frees the simulator; safe to call twice."""
