"""Which episodes an evaluation consists of, and who runs which next."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Collection, Iterable
from dataclasses import dataclass

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
