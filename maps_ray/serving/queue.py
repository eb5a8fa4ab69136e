"""Chunks of actions -> one action for each step of a robot that does not wait. No Ray, no torch."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


class ActionQueue:
    """What one robot executes, step by step, while new chunks are computed.

    A chunk that was asked for at step s says what to do at steps s, s + 1, ...; when it comes in at a later step, its
    first actions are past and are left out. Without ensembling the newest chunk counts. With it a step's action is the
    mean over all chunks that cover the step, weighted exp(-ensemble * i), i = 0 the oldest (Zhao et al. 2023, ACT,
    arXiv:2304.13705).

    Args:
        execute_steps: steps after which the next chunk is asked for. As many as a chunk has means that the robot waits
            for each; fewer leave time to compute the next one.
        ensemble: the decay of the weights, 0.01 in ACT; None takes the newest chunk alone.
    """

    def __init__(self, execute_steps: int, ensemble: float | None = None) -> None:
        self._every = execute_steps
        self._ensemble = ensemble
        self._chunks: list[tuple[int, NDArray[np.float32]]] = []
        self._asked: int | None = None
        self.step = 0
        """How many actions were taken."""

    @property
    def due(self) -> bool:
        """Whether a chunk should be asked for with the observation of this step."""
        return self._asked is None or self.step - self._asked >= self._every or not self.ready

    @property
    def ready(self) -> bool:
        """Whether there is an action for this step."""
        return bool(self._covering())

    def ask(self) -> int:
        """Notes that a chunk is asked for; returns its first step, for `add`."""
        self._asked = self.step
        return self.step

    def add(self, start: int, chunk: NDArray[np.float32]) -> None:
        """Takes a chunk (n, action_dim) whose first action is for step `start`."""
        self._chunks.append((start, chunk))

    def take(self) -> NDArray[np.float32]:
        """The action of this step, (action_dim,); the next one is due then.

        Raises:
            LookupError: no chunk covers this step.
        """
        covering = self._covering()
        if not covering:
            raise LookupError(f"no chunk has an action for step {self.step}")
        self._chunks = covering
        actions = np.stack([chunk[self.step - start] for start, chunk in covering])
        self.step += 1
        if self._ensemble is None:
            return np.asarray(actions[-1])
        weights = np.exp(-self._ensemble * np.arange(len(actions)))
        return np.asarray((weights / weights.sum()) @ actions, np.float32)

    def _covering(self) -> list[tuple[int, NDArray[np.float32]]]:
        return [(start, chunk) for start, chunk in self._chunks if start <= self.step < start + len(chunk)]


def queue_fault(execute_steps: int | None, ensemble: float | None, chunk: int | None) -> tuple[str, object, str] | None:
    """The first option of a queue that cannot be, as option, value and remedy; `chunk` None leaves its length open."""
    if execute_steps is None:
        if ensemble is not None:
            return "ensemble", ensemble, "needs execute_steps: without a queue there is nothing to average"
        return None
    if execute_steps < 1 or (chunk is not None and execute_steps > chunk):
        most = "at least 1" if chunk is None else f"1 to {chunk}, the actions of a chunk"
        return "execute_steps", execute_steps, f"must be {most}"
    if ensemble is not None and not (np.isfinite(ensemble) and ensemble >= 0):
        return "ensemble", ensemble, "must be 0 or more"
    return None
