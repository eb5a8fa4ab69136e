"""Actions on their way to a robot: limits on every answer, and one action for each step. No Ray, no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


class UnsafeActions(ValueError):
    """The policy's actions leave the limits; the robot gets none of them."""


@dataclass(frozen=True)
class Limits:
    """Limits on a policy's actions, whose first three dimensions change the hand's position.

    Actions beyond them are refused, not cut: a policy that asks for what it must not do has lost its way, and the
    operator should see it.
    """

    max_step: tuple[float, ...] = ()
    """One number: the longest change of position by one action. As many as an action has: each dimension's largest
    absolute value. In the actions' own units; empty for no limit."""
    workspace: tuple[float, ...] = ()
    """x from, x to, y from, y to, z from, z to, in m, in the frame of the observed position; empty for no limit."""
    metres_per_unit: float = 1.0
    """How far an action of 1.0 moves the hand; 0.05 for the controller of LIBERO's data."""

    def fault(self, action_dim: int | None = None) -> tuple[str, object, str] | None:
        """The first limit that cannot be, as option, value and remedy; `action_dim` None leaves the length open."""
        if not np.isfinite(self.max_step).all() or any(step <= 0 for step in self.max_step):
            return "--max-step", _text(self.max_step), "must be above 0"
        if action_dim is not None and len(self.max_step) not in (0, 1, action_dim):
            return "--max-step", _text(self.max_step), f"must be one number or {action_dim}, one for each dimension"
        box = np.reshape(self.workspace, (-1, 2)) if len(self.workspace) == 6 else None
        if self.workspace and (box is None or not np.isfinite(box).all() or (box[:, 0] >= box[:, 1]).any()):
            return "--workspace", _text(self.workspace), "must be x0,x1,y0,y1,z0,z1 in m, each from less to more"
        if not np.isfinite(self.metres_per_unit) or self.metres_per_unit <= 0:
            return "--metres-per-unit", self.metres_per_unit, "must be above 0"
        if self.workspace and action_dim is not None and action_dim < 3:
            return (
                "--workspace",
                _text(self.workspace),
                f"needs actions that move a hand, these have {action_dim}",
            )
        return None

    def check(self, actions: NDArray[np.floating], position: NDArray[np.float64] | None) -> None:
        """Looks at actions that are executed one after another.

        Args:
            actions: (n, action_dim).
            position: of the hand before them, (3,) in m.

        Raises:
            UnsafeActions: one of them is too large, or leads out of the workspace, or the position is not known.
        """
        if len(self.max_step) == 1:
            lengths = np.linalg.norm(actions[:, :3], axis=1)
            if (lengths > self.max_step[0]).any():
                at = int(np.argmax(lengths > self.max_step[0]))
                raise UnsafeActions(
                    f"unsafe: action {at} moves by {lengths[at]:.4g}, more than the largest step {self.max_step[0]:g}"
                )
        elif self.max_step:
            beyond = np.abs(actions) > np.asarray(self.max_step)
            if beyond.any():
                at, dimension = (int(index) for index in np.argwhere(beyond)[0])
                raise UnsafeActions(
                    f"unsafe: action {at} has {actions[at, dimension]:.4g} in dimension {dimension}, more than the "
                    f"largest step {self.max_step[dimension]:g}"
                )
        if self.workspace:
            self._check_workspace(actions, position)

    def _check_workspace(self, actions: NDArray[np.floating], position: NDArray[np.float64] | None) -> None:
        if position is None or position.shape != (3,) or not np.isfinite(position).all():
            raise UnsafeActions(
                "the workspace can't be checked: the observation must say the hand's position, in the first three "
                "values of its state or in `observation/cartesian_position`"
            )
        moves = self.metres_per_unit * np.cumsum(actions[:, :3].astype(np.float64), axis=0)
        path = np.concatenate([position[None], position + moves])
        low, high = np.reshape(self.workspace, (3, 2)).T
        outside = (path < low) | (path > high)
        if outside.any():
            at, axis = (int(index) for index in np.argwhere(outside)[0])
            where = "the hand stands at" if at == 0 else f"action {at - 1} leads to"
            raise UnsafeActions(
                f"unsafe: {where} {'xyz'[axis]} = {path[at, axis]:.4g} m, outside the workspace "
                f"{low[axis]:g}..{high[axis]:g} m"
            )


def _text(values: Sequence[float]) -> str:
    return ",".join(f"{value:g}" for value in values)


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
