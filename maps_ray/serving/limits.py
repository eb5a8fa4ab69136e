"""What a robot may be told to do: checked on every answer, before it leaves the server."""

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
