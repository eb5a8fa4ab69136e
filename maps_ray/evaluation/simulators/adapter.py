"""What every adapter keeps of its suite, and asks of its caller's arguments, whatever its simulator."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from maps_ray.evaluation.simulators.base import SimulatorMissing, Suite, Task
from maps_ray.evaluation.simulators.suites import suite_of
from maps_ray.spec import nearest

NOTHING_LOADED = "no task is loaded: call reset(task, initial_state) first"


class Adapter:
    """The part of the `Simulator` protocol that needs no simulator; a subclass fills `_tasks`.

    Args:
        simulator: that the suite must belong to.
        suite: its name.
        known_cameras: that the simulator can render, primary first.
        cameras: those that are rendered; None means all.
        image_size: side of the square images in pixels.

    Raises:
        ValueError: unknown suite or camera.
    """

    def __init__(
        self, simulator: str, suite: str, known_cameras: Iterable[str], cameras: Sequence[str] | None, image_size: int
    ) -> None:
        self._about = suite_of(simulator, suite)
        self._cameras = checked_cameras(cameras, known_cameras)
        self._image_size = image_size
        self._tasks: list[Task] = []
        self._loaded: int | None = None

    @property
    def suite(self) -> Suite:
        return self._about

    @property
    def tasks(self) -> Sequence[Task]:
        return self._tasks

    @property
    def task(self) -> Task:
        """The loaded task.

        Raises:
            RuntimeError: nothing is loaded yet.
        """
        if self._loaded is None:
            raise RuntimeError(NOTHING_LOADED)
        return self._tasks[self._loaded]

    @property
    def over(self) -> bool:
        """Whether the episode can succeed no more, so that nothing needs to be simulated."""
        return False

    @property
    def cameras(self) -> tuple[str, ...]:
        return self._cameras


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
