"""Hands episodes to environments, and replaces those that die, hang or grow too large."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from maps_ray.evaluation.rollouts.environment import Fault, Finished
from maps_ray.evaluation.rollouts.plan import Episode, Queue, RolloutError, TaskKey

if TYPE_CHECKING:
    from ray import ObjectRefGenerator
    from ray.actor import ActorHandle

ATTEMPTS = 3
"""How often an episode is tried whose simulator is lost."""

_POLL_S = 0.5


@dataclass(frozen=True)
class Limits:
    """When a simulator is given up."""

    silence_s: float = 300.0
    """Without news: for a reset, or for a chunk with the policy's answer."""
    start_s: float = 600.0
    """Until its process runs; a cluster may have to find room for it first."""
    rss_bytes: int = 5 * 2**30
    """A simulator keeps the meshes of every task it has loaded: beyond this a fresh one replaces it."""


@dataclass
class _Simulator:
    actor: ActorHandle
    loaded: TaskKey | None = None
    episode: Episode | None = None
    news: ObjectRefGenerator | None = None
    """Generator of what `Environment.run` yields."""
    heard: float = 0.0
    started: bool = False
    """Whether its process has said anything yet."""


class Pool:
    """Environments at work. `results` gives each episode of the queue once, or raises.

    Args:
        start: makes an environment actor.
        workers: how many at a time.
        queue: what to run.
        limits: when a simulator is given up.
        keep_frames: whether an episode's frames are of use; asked when it is handed out.
        first: an environment that runs already.
    """

    def __init__(
        self,
        start: Callable[[], ActorHandle],
        workers: int,
        queue: Queue,
        limits: Limits,
        keep_frames: Callable[[Episode], bool],
        first: ActorHandle | None = None,
    ) -> None:
        self._start = start
        self._queue = queue
        self._limits = limits
        self._keep_frames = keep_frames
        self._lost: Counter[Episode] = Counter()
        self._simulators = [
            _Simulator(first if number == 0 and first is not None else start()) for number in range(workers)
        ]

    def results(self, meanwhile: Callable[[], None] = lambda: None) -> Generator[Finished, None, None]:
        """Finished episodes, in the order in which they end.

        Args:
            meanwhile: called about twice a second; an exception that it raises ends the work.

        Raises:
            RolloutError: a fault of the policy, or an episode whose simulator was lost `ATTEMPTS` times.
        """
        import ray

        try:
            self._hand_out()
            while busy := {
                simulator.news: simulator for simulator in self._simulators if simulator.episode is not None
            }:
                ray.wait(list(busy), num_returns=1, timeout=_POLL_S)
                # Whatever else has come meanwhile: a busy simulator must not keep the others from being heard.
                ready, _ = ray.wait(list(busy), num_returns=len(busy), timeout=0)
                for news in ready:
                    finished = self._hear(busy[news])
                    if finished is not None:
                        self._hand_out()
                        yield finished
                self._give_up_silent()
                self._hand_out()
                meanwhile()
        finally:
            for simulator in self._simulators:
                _kill(simulator.actor)

    def _hand_out(self) -> None:
        for simulator in self._simulators:
            if simulator.episode is not None:
                continue
            busy = {other.loaded for other in self._simulators if other is not simulator and other.loaded is not None}
            episode = self._queue.take(simulator.loaded, busy)
            if episode is None:
                # Its task may be finished by others, should one of them be lost.
                simulator.loaded = None
                continue
            simulator.episode, simulator.loaded, simulator.heard = episode, episode.key, time.monotonic()
            # A stream, so that each replan is heard: one that is slow is told from one that hangs.
            simulator.news = simulator.actor.run.options(num_returns="streaming").remote(
                episode, self._keep_frames(episode)
            )

    def _hear(self, simulator: _Simulator) -> Finished | None:
        import ray

        episode = simulator.episode
        assert episode is not None and simulator.news is not None
        try:
            said = ray.get(next(simulator.news))
        except StopIteration:
            self._lose(simulator, "it ended without a result")
            return None
        except ray.exceptions.RayError as error:
            self._lose(simulator, _reason(error))
            return None
        simulator.heard, simulator.started = time.monotonic(), True
        if isinstance(said, Fault):
            raise RolloutError(f"{episode}: {said.message}")
        if said is None:
            return None
        finished: Finished = said
        simulator.episode, simulator.news = None, None
        if finished.rss > self._limits.rss_bytes:
            self._replace(simulator)
        return finished

    def _give_up_silent(self) -> None:
        for simulator in self._simulators:
            limit = self._limits.silence_s if simulator.started else self._limits.start_s
            if simulator.episode is not None and time.monotonic() - simulator.heard > limit:
                self._lose(simulator, f"no news for {limit:g} s")

    def _lose(self, simulator: _Simulator, reason: str) -> None:
        episode = simulator.episode
        assert episode is not None
        self._lost[episode] += 1
        if self._lost[episode] >= ATTEMPTS:
            raise RolloutError(
                f"{episode}: given up after {ATTEMPTS} attempts, the last one lost its simulator: {reason}. Finished "
                "episodes are kept: the same command goes on with the others"
            )
        self._queue.give_back(episode)
        simulator.episode, simulator.news = None, None
        self._replace(simulator)

    def _replace(self, simulator: _Simulator) -> None:
        _kill(simulator.actor)
        simulator.actor, simulator.loaded, simulator.started = self._start(), None, False


def _kill(actor: ActorHandle) -> None:
    import ray

    with contextlib.suppress(Exception):
        ray.kill(actor)


def _reason(error: Exception) -> str:
    """The line of Ray's account that says what happened, and the remedy where memory ended."""
    text = str(error)
    if type(error).__name__ == "OutOfMemoryError" or "OOM" in text or "out of memory" in text.lower():
        return "its machine ran out of memory: use fewer --workers"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
