"""Ray Train in a thread of its own: the caller's thread stays free for signals and for what it shows."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from maps_ray.training.cluster import Capacity


class Fit(threading.Thread):
    """One group of workers that call a function; Ray Train starts them again when one is lost."""

    def __init__(
        self,
        function: Callable[[dict[str, Any]], None],
        config: dict[str, Any],
        need: Capacity,
        storage: Path,
        max_failures: int,
        start_timeout_s: float,
    ) -> None:
        """
        Args:
            function: what every worker calls, with `config` and `gpu`, whether it has a GPU.
            config: plain data.
            need: workers and their resources.
            storage: folder for what Ray Train itself writes.
            max_failures: losses of workers survived.
            start_timeout_s: how long workers may wait for room.
        """
        super().__init__(name="ray-train", daemon=True)
        self._function = function
        self._config = config
        self._need = need
        self._storage = storage
        self._max_failures = max_failures
        self._start_timeout_s = start_timeout_s
        self.error: Exception | None = None
        """Why the workers were given up; known when the thread has ended."""

    def run(self) -> None:
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer

        from maps_ray.training.launchers import RaysRanks

        gpu = self._need.gpus_per_worker > 0
        trainer = TorchTrainer(
            self._function,
            train_loop_config={**self._config, "gpu": gpu},
            torch_config=RaysRanks(),
            scaling_config=ScalingConfig(
                num_workers=self._need.workers, use_gpu=gpu, resources_per_worker=self._need.bundle
            ),
            run_config=RunConfig(
                name="ray",
                storage_path=str(self._storage),
                # After a node loss the workers may have to wait for a new node: once, for start_timeout_s.
                failure_config=FailureConfig(max_failures=self._max_failures, controller_failure_limit=0),
            ),
        )
        try:
            with ray_train_environment(self._start_timeout_s):
                trainer.fit()
        except Exception as error:
            self.error = error


@contextmanager
def ray_train_environment(start_timeout_s: float) -> Iterator[None]:
    """Ray Train's settings, where the user has not set them, for as long as the context lasts."""
    values = {
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(start_timeout_s),
        # How soon a lost worker is noticed, and how long a report holds a worker up.
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    }
    added = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)
