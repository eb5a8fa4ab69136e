"""What every adapter asks of its caller's arguments."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from maps_ray.evaluation.simulators.base import SimulatorMissing, Task
from maps_ray.spec import nearest


def checked_cameras(cameras: Sequence[str] | None, known: Iterable[str]) -> tuple[str, ...]:
    """The cameras to render; None means all that are known.

    Raises:
        ValueError: an unknown camera; the message names the nearest one and all others.
    """
    known = tuple(known)
    for camera in cameras or ():
        if camera not in known:
            raise ValueError(f"unknown camera {camera!r}: {nearest(camera, known)}")
    return known if cameras is None else tuple(cameras)


def checked_indices(tasks: Sequence[Task], task: int, initial_state: int) -> None:
    """Checks that a task and an initial state exist.

    Raises:
        ValueError: they do not; the message names the suite or the task and what it has.
        SimulatorMissing: files of the task are missing.
    """
    if not 0 <= task < len(tasks):
        raise ValueError(f"{tasks[0].suite} has tasks 0..{len(tasks) - 1}, not {task}")
    missing = tasks[task].missing
    if missing is not None:
        raise SimulatorMissing(f"{tasks[task].suite}, task {task}: {missing}")
    states = tasks[task].initial_states
    if not 0 <= initial_state < states:
        raise ValueError(f"{tasks[task].name} has initial states 0..{states - 1}, not {initial_state}")


def checked_chunk(chunk: NDArray[np.floating], action_dim: int) -> NDArray[np.floating]:
    """Actions as an array of shape (n, action_dim).

    Raises:
        ValueError: another shape, or a value that is not finite.
    """
    chunk = np.asarray(chunk)
    if chunk.ndim != 2 or chunk.shape[1] != action_dim:
        raise ValueError(f"actions must have the shape (n, {action_dim}), not {chunk.shape}")
    if not np.isfinite(chunk).all():
        raise ValueError(f"actions must be {action_dim} finite numbers each; got {chunk}")
    return chunk
