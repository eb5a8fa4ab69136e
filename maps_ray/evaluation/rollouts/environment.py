"""A simulator of an evaluation: one Ray actor that keeps it warm, which runs one episode at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from maps_ray.evaluation import simulators
from maps_ray.evaluation.rollouts.plan import Episode, PolicyFault
from maps_ray.evaluation.rollouts.protocol import EpisodeResult, Gripper, play
from maps_ray.evaluation.simulators.base import Observation, Simulator, SimulatorMissing, Suite, Task

if TYPE_CHECKING:
    from ray.actor import ActorHandle


@dataclass(frozen=True)
class Simulators:
    """Where suites and their simulators come from."""

    suite: Callable[[str], Suite] = simulators.suite
    """Name -> suite; ValueError for one that does not exist."""
    open: Callable[..., Simulator] = simulators.open_simulator
    """`open(name, image_size=..., cameras=...)`."""


@dataclass(frozen=True)
class SuiteFacts:
    """What a simulator says of a suite."""

    suite: Suite
    tasks: tuple[Task, ...]
    action_dim: int


@dataclass(frozen=True)
class Conditions:
    """What all episodes of an evaluation have in common."""

    cameras: tuple[str, ...]
    camera_size: int
    use_proprio: bool
    gripper: Gripper
    seed: int
    max_steps: int | None


@dataclass(frozen=True)
class Finished:
    """The last news of an episode."""

    result: EpisodeResult
    rss: int
    """Memory of the actor, in bytes."""


@dataclass(frozen=True)
class Fault:
    """Why an evaluation cannot go on, although the actor lives."""

    message: str


class Environment:
    """Runs episodes; lives in a process of its own.

    Args:
        source: of simulators.
        conditions: of all episodes.
        policy: handle of the `PolicyServer` actor.
    """

    def __init__(self, source: Simulators, conditions: Conditions, policy: ActorHandle) -> None:
        self._source = source
        self._conditions = conditions
        self._policy = policy
        self._simulator: Simulator | None = None
        self._name: str | None = None

    def inspect(self, suites: Sequence[str]) -> list[SuiteFacts] | Fault:
        """Opens each suite and says what it holds; a fault where its simulator cannot be had or has other cameras."""
        facts = []
        for name in suites:
            try:
                simulator = self._open(name)
            except (SimulatorMissing, ValueError) as error:
                return Fault(str(error))
            facts.append(SuiteFacts(simulator.suite, tuple(simulator.tasks), simulator.action_dim))
        return facts

    def proprio_dim(self, episode: Episode) -> int:
        """Length of the robot's state, looked up at the start of an episode."""
        simulator = self._open(episode.suite)
        simulator.reset(episode.task, episode.initial_state)
        return int(simulator.observe().proprio.size)

    def run(self, episode: Episode, keep_frames: bool) -> Iterator[Finished | Fault | None]:
        """One episode: None at once and after each replan, then the result or the fault that ends the evaluation."""
        import psutil

        yield None
        conditions = self._conditions
        simulator = self._open(episode.suite)

        def act(seen: Observation, replan: int) -> NDArray[np.floating]:
            return self._ask(episode, seen, replan)

        limit = conditions.max_steps or simulator.suite.max_steps
        rollout = play(simulator, episode, act, max_steps=limit, gripper=conditions.gripper, keep_frames=keep_frames)
        try:
            while True:
                try:
                    next(rollout)
                except StopIteration as end:
                    yield Finished(end.value, psutil.Process().memory_info().rss)
                    return
                yield None
        except PolicyFault as error:
            yield Fault(str(error))

    def _ask(self, episode: Episode, seen: Observation, replan: int) -> NDArray[np.floating]:
        import ray

        conditions = self._conditions
        images = [seen.images[camera] for camera in conditions.cameras]
        proprio = seen.proprio if conditions.use_proprio else None
        seed = episode.seed(conditions.seed, replan)
        try:
            actions: NDArray[np.float32] = ray.get(self._policy.act.remote(images, seen.sentence, proprio, seed))
        except ValueError as error:
            raise PolicyFault(f"the policy cannot take the observation: {getattr(error, 'cause', error)}") from None
        return actions

    def _open(self, name: str) -> Simulator:
        if self._simulator is None or self._name != name:
            if self._simulator is not None:
                self._simulator.close()
            conditions = self._conditions
            # Before the next one opens: should that fail, the closed one must not be taken for it.
            self._simulator, self._name = None, None
            self._simulator = self._source.open(name, image_size=conditions.camera_size, cameras=conditions.cameras)
            self._name = name
        return self._simulator
