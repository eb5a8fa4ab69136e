"""What every adapter keeps of its suite, whatever its simulator."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from maps_ray.evaluation.simulators.base import Suite, Task
from maps_ray.evaluation.simulators.checks import checked_cameras
from maps_ray.evaluation.simulators.suites import suite_of


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

    @property
    def suite(self) -> Suite:
        return self._about

    @property
    def tasks(self) -> Sequence[Task]:
        return self._tasks

    @property
    def over(self) -> bool:
        """Whether the episode can succeed no more, so that nothing needs to be simulated."""
        return False

    @property
    def cameras(self) -> tuple[str, ...]:
        return self._cameras
