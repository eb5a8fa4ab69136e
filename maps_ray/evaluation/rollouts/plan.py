"""What is asked of an evaluation, which episodes it consists of, who runs which next, and what ends it."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from maps_ray.devices import device_map_fault
from maps_ray.spec import Problem, SpecError


class RolloutError(RuntimeError):
    """An evaluation that cannot be completed; finished episodes are kept, and no rate is computed from a part."""


class Stopped(RuntimeError):
    """The caller asked for the end of an evaluation; finished episodes are kept."""


class PolicyFault(RolloutError):
    """What a policy answers, or asks for, cannot be used in the simulator; trying again would change nothing."""


@dataclass(frozen=True)
class RolloutRequest:
    """Which episodes are run, and how a checkpoint is read where it does not say so itself."""

    suites: tuple[str, ...]
    """Names out of `maps_ray.evaluation.simulators.SUITES`."""
    episodes: int = 20
    """Of each task: so many of its initial states, in order."""
    first_state: int = 0
    """Initial state of the first episode. The published evaluation begins with 0; where demonstrations were made from
    the same file, later ones are new to the policy."""
    tasks: tuple[int, ...] | None = None
    """Indices in each suite; none means all."""
    seed: int = 0
    """Of heads that draw noise. Other policies and the simulators draw nothing."""
    max_steps: int | None = None
    """Actions in an episode at most; none means the suite's published limit."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What the checkpoint does not say: the policy's sizes (`num_images`, `use_proprio`, `chunk`, `head`, ...),
    `dataset`, `normalization` and `images` of `Codec.read`, and `gripper`, `cameras` and `camera_size` of its data."""
    dtype: str = "as trained"
    """Of the weights: `bfloat16`, `float32`, or `as trained`."""
    rows: int | None = None
    """Observations in one forward pass; always the same number, so that an answer depends on its observation alone.
    None means 4 on a GPU and 1 on a CPU, where filling a batch up costs as much as answering it."""
    threads: int = 1
    """Of torch, where the policy runs on a CPU."""
    device_map: str = "auto"
    """Where the weights lie, see `maps_ray.models.device_map`."""

    def check(self) -> None:
        """Raises `SpecError` for what is wrong whatever the simulator."""
        problems = []
        if not self.suites or len(set(self.suites)) < len(self.suites):
            problems.append(Problem("suites", list(self.suites), "name at least one suite, and each once"))
        if self.tasks is not None and (not self.tasks or len(set(self.tasks)) < len(self.tasks)):
            problems.append(Problem("tasks", list(self.tasks), "name at least one task, and each once"))
        for name in ("episodes", "max_steps", "rows", "threads"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                problems.append(Problem(name, value, "must be a whole number, at least 1"))
        for name in ("first_state", "seed"):
            if getattr(self, name) < 0:
                problems.append(Problem(name, getattr(self, name), "must not be negative"))
        if self.dtype not in ("as trained", "bfloat16", "float32"):
            problems.append(Problem("dtype", self.dtype, "must be bfloat16, float32 or as trained"))
        fault = device_map_fault(self.device_map)
        if fault is not None:
            problems.append(Problem("--device-map", self.device_map, fault))
        if problems:
            raise SpecError(problems)


TaskKey = tuple[str, int]
"""Suite and index of a task."""


@dataclass(frozen=True, order=True)
class Episode:
    """One rollout."""

    suite: str
    task: int
    initial_state: int

    @property
    def key(self) -> TaskKey:
        """Its task."""
        return self.suite, self.task

    def __str__(self) -> str:
        return f"{self.suite}, task {self.task}, initial state {self.initial_state}"

    def seed(self, seed: int, replan: int) -> int:
        """Of the noise at one replan: a function of what is simulated, never of the order in which it is."""
        text = f"{seed}/{self.suite}/{self.task}/{self.initial_state}/{replan}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


class Queue:
    """Episodes that are still to be run.

    Loading a task takes seconds and memory, so a simulator keeps its task while that has episodes left, then takes one
    that nobody works on, and shares the one with the most episodes left only when there is no other.
    """

    def __init__(self, episodes: Iterable[Episode]) -> None:
        self._left: dict[TaskKey, deque[Episode]] = {}
        for episode in episodes:
            self._left.setdefault(episode.key, deque()).append(episode)

    def __len__(self) -> int:
        return sum(len(episodes) for episodes in self._left.values())

    def take(self, loaded: TaskKey | None, busy: Collection[TaskKey]) -> Episode | None:
        """The next episode for a simulator.

        Args:
            loaded: the task that the simulator has loaded.
            busy: tasks that other simulators have loaded.

        Returns:
            None when no episode is left.
        """
        waiting = [key for key, episodes in self._left.items() if episodes]
        if not waiting:
            return None
        key = loaded
        if key not in waiting:
            free = [key for key in waiting if key not in busy]
            key = free[0] if free else max(waiting, key=lambda key: len(self._left[key]))
        assert key is not None
        return self._left[key].popleft()

    def give_back(self, episode: Episode) -> None:
        """Puts an episode in front again, whose simulator was lost."""
        self._left[episode.key].appendleft(episode)
