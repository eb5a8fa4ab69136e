"""Hands episodes to environments, and replaces those that die, hang or grow too large."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

from maps_ray.evaluation.rollouts.environment import Fault, Finished
from maps_ray.evaluation.rollouts.faults import RolloutError
from maps_ray.evaluation.rollouts.plan import Episode, Queue, TaskKey

ATTEMPTS = 3
"""How often an episode is tried whose worker is lost."""

_POLL_S = 0.5


@dataclass(frozen=True)
class Limits:
    """When a worker is given up."""

    silence_s: float = 300.0
    """Without news: for a reset, or for a chunk with the policy's answer."""
    start_s: float = 600.0
    """Until its process runs; a cluster may have to find room for it first."""
    rss_bytes: int = 5 * 2**30
    """A simulator keeps the meshes of every task it has loaded: beyond this the worker is replaced by a fresh one."""


@dataclass
class _Worker:
    actor: Any
    loaded: TaskKey | None = None
    episode: Episode | None = None
    news: Any = None
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
        limits: when a worker is given up.
        keep_frames: whether an episode's frames are of use; asked when it is handed out.
        first: an environment that runs already.
    """

    def __init__(
        self,
        start: Callable[[], Any],
        workers: int,
        queue: Queue,
        limits: Limits,
        keep_frames: Callable[[Episode], bool],
        first: Any = None,
    ) -> None:
        self._start = start
        self._queue = queue
        self._limits = limits
        self._keep_frames = keep_frames
        self._lost: Counter[Episode] = Counter()
        self._workers = [_Worker(first if number == 0 and first is not None else start()) for number in range(workers)]

    def results(self, meanwhile: Callable[[], None] = lambda: None) -> Generator[Finished, None, None]:
        """Finished episodes, in the order in which they end.

        Args:
            meanwhile: called about twice a second; an exception that it raises ends the work.

        Raises:
            RolloutError: a fault of the policy, or an episode whose worker was lost `ATTEMPTS` times.
        """
        import ray

        try:
            self._hand_out()
            while busy := {worker.news: worker for worker in self._workers if worker.episode is not None}:
                ray.wait(list(busy), num_returns=1, timeout=_POLL_S)
                # Whatever else has come meanwhile: a busy worker must not keep the others from being heard.
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
            for worker in self._workers:
                _kill(worker.actor)

    def _hand_out(self) -> None:
        for worker in self._workers:
            if worker.episode is not None:
                continue
            busy = {other.loaded for other in self._workers if other is not worker and other.loaded is not None}
            episode = self._queue.take(worker.loaded, busy)
            if episode is None:
                # Its task may be finished by others, should one of them be lost.
                worker.loaded = None
                continue
            worker.episode, worker.loaded, worker.heard = episode, episode.key, time.monotonic()
            worker.news = worker.actor.run.options(num_returns="streaming").remote(episode, self._keep_frames(episode))

    def _hear(self, worker: _Worker) -> Finished | None:
        import ray

        episode = worker.episode
        assert episode is not None
        try:
            said = ray.get(next(worker.news))
        except StopIteration:
            self._lose(worker, "it ended without a result")
            return None
        except ray.exceptions.RayError as error:
            self._lose(worker, _reason(error))
            return None
        worker.heard, worker.started = time.monotonic(), True
        if isinstance(said, Fault):
            raise RolloutError(f"{episode}: {said.message}")
        if said is None:
            return None
        finished: Finished = said
        worker.episode, worker.news = None, None
        if finished.rss > self._limits.rss_bytes:
            self._replace(worker)
        return finished

    def _give_up_silent(self) -> None:
        for worker in self._workers:
            limit = self._limits.silence_s if worker.started else self._limits.start_s
            if worker.episode is not None and time.monotonic() - worker.heard > limit:
                self._lose(worker, f"no news for {limit:g} s")

    def _lose(self, worker: _Worker, reason: str) -> None:
        episode = worker.episode
        assert episode is not None
        self._lost[episode] += 1
        if self._lost[episode] >= ATTEMPTS:
            raise RolloutError(
                f"{episode}: given up after {ATTEMPTS} attempts, the last one lost its worker: {reason}. Finished "
                "episodes are kept: the same command goes on with the others"
            )
        self._queue.give_back(episode)
        worker.episode, worker.news = None, None
        self._replace(worker)

    def _replace(self, worker: _Worker) -> None:
        _kill(worker.actor)
        worker.actor, worker.loaded, worker.started = self._start(), None, False


def _kill(actor: Any) -> None:
    import ray

    with contextlib.suppress(Exception):
        ray.kill(actor)


def _reason(error: Exception) -> str:
    """The line of Ray's account that says what happened, and the remedy where memory ended."""
    text = str(error)
    if type(error).__name__ == "OutOfMemoryError" or "OOM" in text or "out of memory" in text.lower():
        return "its machine ran out of memory: use fewer workers"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
