"""One group of workers that a sweep's driver gives trials to, one after the other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from maps_ray.spec import ClusterSpec
from maps_ray.sweeps.lane_worker import train_lane
from maps_ray.sweeps.plan import Trial
from maps_ray.training.cluster import Capacity
from maps_ray.training.fit import Fit
from maps_ray.training.mailbox import open_mailbox


class Lane:
    """A TorchTrainer whose workers stay from trial to trial."""

    def __init__(self, folder: Path, need: Capacity, cluster: ClusterSpec) -> None:
        folder.mkdir(parents=True)
        self.trial: Trial | None = None
        self.mailbox = open_mailbox()
        self._fit = Fit(
            train_lane,
            {},
            need,
            folder,
            max_failures=cluster.max_failures,
            start_timeout_s=cluster.start_timeout_s,
            collective_timeout_s=cluster.collective_timeout_s,
            mailbox=self.mailbox,
        )
        self._fit.start()

    @property
    def state(self) -> dict[str, Any]:
        """What its workers said last, as `Mailbox.state` gives it."""
        import ray

        return dict(ray.get(self.mailbox.state.remote()))

    @property
    def alive(self) -> bool:
        return self._fit.is_alive()

    @property
    def error(self) -> Exception | None:
        """Why its workers were given up."""
        return self._fit.error

    def give(self, trial: Trial) -> None:
        """Starts a trial."""
        import ray

        self.trial = trial
        ray.get(self.mailbox.give.remote({"name": trial.name, "spec": trial.spec.model_dump(mode="json")}))

    def join(self, timeout_s: float) -> bool:
        """Waits for the workers' end; returns whether they have ended."""
        self._fit.join(timeout_s)
        return not self._fit.is_alive()
