"""What is asked of an evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from maps_ray.devices import device_map_fault
from maps_ray.spec import Problem, SpecError


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
