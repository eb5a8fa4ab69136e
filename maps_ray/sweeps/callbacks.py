"""What is recorded while Tune runs a sweep: journal, MLflow parent and children, nodes over time; and what is shown."""

from __future__ import annotations

import importlib
import signal
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.experiment import Trial as TuneTrial

from maps_ray.spec import Problem, SpecError
from maps_ray.sweeps.folder import append_line, plan_of, write_ended
from maps_ray.sweeps.journal import Ended, Journal, Status
from maps_ray.sweeps.objectives import cost, evaluations, newest_values
from maps_ray.sweeps.plan import Plan, fields_of, trial_spec
from maps_ray.sweeps.view import View
from maps_ray.tracking import Tracker
from maps_ray.training.run_faults import TrainingError
from maps_ray.training.run_folder import read_json
from maps_ray.training.train import StopOnSignal, begin

_MLFLOW = {"finished": "FINISHED", "stopped early": "KILLED", "failed": "FAILED"}


def load_callback(name: str) -> tune.Callback:
    """An instance of `module:Class`.

    Raises:
        SpecError: it cannot be imported or made, or is no callback of Ray Tune.
    """
    module, _, attribute = name.partition(":")
    # A job's own modules lie in its working directory, which a console script does not search.
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        made = getattr(importlib.import_module(module), attribute)()
    except Exception as error:
        raise SpecError([Problem("callbacks", name, f"cannot be made, as module:Class: {error!r}")]) from None
    if not isinstance(made, tune.Callback):
        raise SpecError([Problem("callbacks", name, "is no ray.tune.Callback")])
    return made


class Recorder(tune.Callback):
    """Records a sweep. A copy that Tune has stored knows its folder only; `attach` gives it what a driver has."""

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder)
        self._stop: StopOnSignal | None = None
        self._view: View | None = None
        self._trackers: dict[str, Tracker] = {}
        self._began: dict[str, float] = {}
        self._lost = 0
        self._timeline: dict[str, int] = {}
        self._looked = 0.0

    def attach(self, stop: StopOnSignal, view: View) -> None:
        self._stop, self._view = stop, view

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": str(self._folder)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["folder"])  # type: ignore[misc]

    def worker_hours(self) -> float:
        """Of all trials so far, the running ones included."""
        seconds = sum(ended.seconds for ended in self._journal.ended.values())
        seconds += sum(time.time() - began for began in self._began.values())
        return seconds * self._plan.base.cluster.most_workers / 3600

    def on_step_begin(self, iteration: int, trials: list[TuneTrial], **info: Any) -> None:
        if self._stop is not None and self._stop.requested.is_set():
            # What Tune itself listens to: it saves its state, lets the trials end, and returns.
            signal.raise_signal(signal.SIGUSR1)

    def on_step_end(self, iteration: int, trials: list[TuneTrial], **info: Any) -> None:
        # A sweep whose time is up ends its trials without a word. Those of an interrupted one end later, to go on.
        for trial in trials if self._began else ():
            if trial.status == TuneTrial.TERMINATED and _name(trial) in self._began:
                self.on_trial_complete(iteration, trials, trial)
        if time.monotonic() - self._looked < 0.5:
            return
        self._looked = time.monotonic()
        self._sample(trials)
        if self._view is not None:
            running = [(_name(t), (t.last_result or {}).get("step")) for t in trials if t.status == TuneTrial.RUNNING]
            self._view.show(self._journal, running)

    def on_trial_start(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        facts, name = trial.config["trial"], _name(trial)
        if name in self._journal.ended:
            return
        fields = fields_of(trial.config, self._plan.space)
        spec = trial_spec(self._plan.base, self._folder, name, facts["seed"], fields)
        spec.run_dir.mkdir(parents=True, exist_ok=True)
        finished = read_json(spec.run_dir / "result.json")
        if not (finished and finished["status"] == "finished"):
            (spec.run_dir / "result.json").unlink(missing_ok=True)
            (spec.run_dir / "error.txt").unlink(missing_ok=True)
        self._trackers[name] = begin(
            spec,
            params={**self._plan.resolved(fields).params(), "source": facts["source"], "schedule": facts["schedule"]},
            tags={"maps_ray.kind": "trial", "maps_ray.sweep": self._plan.spec.name},
            parent=self._folder,
        )
        self._began.setdefault(name, time.time())

    def on_trial_result(
        self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, result: dict[str, Any], **info: Any
    ) -> None:
        if result.get("status") == "failed":
            # Its next step raises: what diverged would diverge again.
            trial.max_failures = 0

    def on_trial_complete(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        result = trial.last_result or {}
        status = result.get("status", "running")
        error = result.get("error")
        self._end(trial, "stopped early" if status == "running" else status, int(result.get("step", 0)), error)
        self._lost = 0

    def on_trial_error(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        result = trial.last_result or {}
        if result.get("status") == "failed":
            self._end(trial, "failed", int(result["step"]), result["error"])
            self._lost = 0
            return
        error = trial.get_error()
        message = _last_line(error)
        path = self._folder / "trials" / _name(trial)
        path.mkdir(parents=True, exist_ok=True)
        (path / "error.txt").write_text(str(error))
        step = max([step for step, _ in evaluations(path)], default=0)
        self._end(trial, "failed", step, message)
        self._lost += 1
        cluster = self._plan.base.cluster
        if self._lost > cluster.max_failures:
            raise TrainingError(
                f"{self._plan.spec.name} was given up: {self._lost} trials were lost in a row, at last by {message}; "
                "continue with --resume"
            )

    def close(self, status: Any, trials: int, ship_s: float) -> None:
        """Says of what was left running that it was; and of the sweep, how it ended."""
        for tracker in self._trackers.values():
            tracker.finish("KILLED", 0)
        Tracker.open(self._folder).finish(status, ship_s)
        self._sample([])
        if self._view is not None:
            self._view.show(self._journal, [])

    def _end(self, trial: TuneTrial, status: Status, step: int, error: str | None) -> None:
        name = _name(trial)
        path = self._folder / "trials" / name
        tracker = self._trackers.pop(name, None) or Tracker.open(path)
        if name not in self._journal.ended:
            seconds = round(time.time() - self._began.pop(name, time.time()), 3)
            facts = trial.config["trial"]
            seed = facts["seed"] - self._plan.base.training.seed
            ended = Ended(name, facts["schedule"], seed, status, step, newest_values(path), seconds, error)
            write_ended(path, ended)
            self._journal.end(ended)
            self._count(ended)
        self._began.pop(name, None)
        if status == "stopped early":
            how = self._plan.spec.scheduler.name if self._plan.spec.scheduler.name != "none" else "time_budget_s"
            tracker.tags({"maps_ray.ended": f"stopped early by {how}, step {step}"})
        elif status == "failed":
            tracker.tags({"maps_ray.ended": f"failed: {error}"})
        tracker.finish(_MLFLOW[status], 0)  # type: ignore[arg-type]

    def _count(self, ended: Ended) -> None:
        done = self._journal.ended.values()
        complete = [e.values for e in done if e.status == "finished"]
        names = [name for name in self._plan.spec.objectives if all(name in values for values in complete)]
        best = {f"best/{n}": min((v[n] for v in complete), key=partial(cost, n)) for n in names if complete}
        Tracker.open(self._folder).metrics(len(done), {**best, "sweep/worker_hours": self.worker_hours()})
        if self._view is not None:
            self._view.ended(ended)

    def _sample(self, trials: list[TuneTrial]) -> None:
        """A line in the timeline when nodes or trials have changed."""
        import ray

        waiting = (TuneTrial.PENDING, TuneTrial.PAUSED)
        now = {
            "nodes": sum(node["Alive"] for node in ray.nodes()),
            "running": sum(trial.status == TuneTrial.RUNNING for trial in trials),
            "pending": sum(trial.status in waiting for trial in trials),
        }
        if now != self._timeline:
            self._timeline = now
            append_line(self._folder / "timeline.jsonl", {"time": time.time(), **now})

    @property
    def _plan(self) -> Plan:
        return plan_of(self._folder)

    @property
    def _journal(self) -> Journal:
        return Journal.of(self._folder)


def _name(trial: TuneTrial) -> str:
    return str(trial.config["trial"]["name"])


def _last_line(error: BaseException | None) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
