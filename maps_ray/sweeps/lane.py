"""One group of workers that a sweep's driver gives trials to, one after the other."""

from __future__ import annotations

import time
from pathlib import Path

from maps_ray.sweeps.lane_worker import CLOSE_FILE, READY_FILE, TRIAL_FILE, train_lane
from maps_ray.sweeps.plan import Trial
from maps_ray.training.cluster import Capacity
from maps_ray.training.fit import Fit
from maps_ray.training.run_folder import write_json

ASKED_FILE = "asked.json"


class Lane:
    """A TorchTrainer whose workers stay from trial to trial."""

    def __init__(self, folder: Path, need: Capacity, max_failures: int, start_timeout_s: float) -> None:
        folder.mkdir(parents=True)
        self._folder = folder
        write_json(folder / ASKED_FILE, {"time": time.time()})
        self.trial: Trial | None = None
        config = {"folder": str(folder), "max_failures": max_failures}
        # One more than a trial may have: the workers themselves give up a trial that keeps losing them.
        self._fit = Fit(train_lane, config, need, folder, max_failures + 1, start_timeout_s)
        self._fit.start()

    @property
    def ready(self) -> bool:
        """Whether its workers have started."""
        return (self._folder / READY_FILE).exists()

    @property
    def alive(self) -> bool:
        return self._fit.is_alive()

    @property
    def error(self) -> Exception | None:
        """Why its workers were given up."""
        return self._fit.error

    def give(self, trial: Trial) -> None:
        """Starts a trial; its folder holds no outcome yet."""
        self.trial = trial
        spec = trial.spec.model_dump(mode="json")
        write_json(self._folder / TRIAL_FILE, {"run_dir": str(trial.run_dir), "spec": spec})

    def close(self) -> None:
        """Asks the workers to end when they have no trial."""
        (self._folder / CLOSE_FILE).touch()

    def join(self, timeout_s: float) -> bool:
        """Waits for the workers' end; returns whether they have ended."""
        self._fit.join(timeout_s)
        return not self._fit.is_alive()
