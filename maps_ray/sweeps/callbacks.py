"""What is recorded while Tune runs a sweep: journal, MLflow parent and children, nodes over time; and what is shown."""

from __future__ import annotations

import importlib
import os
import shutil
import signal
import sys
import time
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path

from ray import tune
from ray.tune.experiment import Trial as TuneTrial
from rich.box import SIMPLE
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from maps_ray.files import append_line, read_json
from maps_ray.run_storage import StorageError
from maps_ray.spec import Problem, SpecError
from maps_ray.sweeps.folder import Sweep
from maps_ray.sweeps.journal import Ended, Journal, Status
from maps_ray.sweeps.objectives import cost, evaluations, known_values
from maps_ray.sweeps.schedules import Plan, facts_of, fields_of, trial_spec
from maps_ray.tracking import Tracker
from maps_ray.tracking.spool import Spool
from maps_ray.tracking.tracker import Status as RunStatus
from maps_ray.training.mirror import Mirror
from maps_ray.training.run_faults import OvertakenError, TrainingError
from maps_ray.training.run_folder import INPUTS_FILE
from maps_ray.training.train import StopOnSignal, begin

# Ended trials in the table.
_BEST = 8
# MLflow has no state for what a scheduler ended; the tag `maps_ray.ended` says so.
_MLFLOW: dict[Status, RunStatus] = {"finished": "FINISHED", "stopped early": "KILLED", "failed": "FAILED"}


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
    """Records a sweep. A copy that Tune has stored knows nothing; `attach` gives it what a driver has."""

    def __init__(self) -> None:
        self._sweep: Sweep
        self._tracker: Tracker
        self._stop: StopOnSignal | None = None
        self._view: View | None = None
        self._trackers: dict[str, Tracker] = {}
        self._mirrors: dict[str, Mirror] = {}
        self._began: dict[str, float] = {}
        self._lost = 0
        self._timeline: dict[str, int] = {}
        self._looked = 0.0

    def attach(self, sweep: Sweep, tracker: Tracker, stop: StopOnSignal, view: View) -> None:
        self._sweep, self._tracker, self._stop, self._view = sweep, tracker, stop, view

    def __getstate__(self) -> dict[str, object]:
        return {}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__init__()  # type: ignore[misc]

    def worker_hours(self) -> float:
        """Of all trials so far, the running ones included."""
        seconds = sum(ended.seconds for ended in self._sweep.journal.ended.values())
        seconds += sum(time.time() - began for began in self._began.values())
        return seconds * self._sweep.plan.base.cluster.most_workers / 3600

    def on_step_begin(self, iteration: int, trials: list[TuneTrial], **info: object) -> None:
        if self._stop is not None and self._stop.requested.is_set():
            # What Tune itself listens to: it saves its state, lets the trials end, and returns.
            signal.raise_signal(signal.SIGUSR1)

    def on_step_end(self, iteration: int, trials: list[TuneTrial], **info: object) -> None:
        # A sweep whose time is up ends its trials without a word. Those of an interrupted one end later, to go on.
        for trial in trials if self._began else ():
            if trial.status == TuneTrial.TERMINATED and _name(trial) in self._began:
                self.on_trial_complete(iteration, trials, trial)
        if time.monotonic() - self._looked < 0.5:
            return
        self._looked = time.monotonic()
        _leave_lost_directory(self._sweep.folder)
        self._sample(trials)
        if self._view is not None:
            running = [(_name(t), (t.last_result or {}).get("step")) for t in trials if t.status == TuneTrial.RUNNING]
            self._view.show(self._sweep.journal, running)

    def on_trial_start(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: object) -> None:
        facts, name, plan = facts_of(trial.config), _name(trial), self._sweep.plan
        # Asked for once more by Tune, whose state is older: its actor answers from the journal (`SweepTrial.step`).
        if name in self._sweep.journal.ended:
            return
        self._sweep.require()
        fields = fields_of(trial.config, plan.space)
        spec = trial_spec(plan.base, plan.folder, name, facts["seed"], fields)
        spec.run_dir.mkdir(parents=True, exist_ok=True)
        known, inputs = spec.run_dir / INPUTS_FILE, self._sweep.folder / INPUTS_FILE
        if inputs.is_file() and not known.is_file():
            # All trials have the sweep's, which need not be looked at again.
            shutil.copyfile(inputs, known)
        finished = read_json(spec.run_dir / "result.json")
        if not (finished and finished["status"] == "finished"):
            # Of an attempt that was interrupted: who looks would take them for this one's end.
            (spec.run_dir / "result.json").unlink(missing_ok=True)
            (spec.run_dir / "error.txt").unlink(missing_ok=True)
        self._trackers[name] = begin(
            spec,
            params={**plan.resolved(fields).params(), "source": facts["source"], "schedule": facts["schedule"]},
            tags={"maps_ray.kind": "trial", "maps_ray.sweep": plan.spec.name},
            parent=plan.folder,
        )
        mirror = self._mirrors.setdefault(name, Mirror.of(spec))
        mirror.push_all()
        # Removes them there, where they are not here any more.
        mirror.push("result.json", "error.txt")
        mirror.push_records()
        self._began.setdefault(name, time.time())

    def on_trial_result(
        self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, result: dict[str, object], **info: object
    ) -> None:
        if result.get("status") == "failed":
            # Its next step raises: what diverged would diverge again.
            trial.max_failures = 0

    def on_trial_complete(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: object) -> None:
        result = trial.last_result or {}
        status = result.get("status", "running")
        error = result.get("error")
        self._end(trial, "stopped early" if status == "running" else status, int(result.get("step", 0)), error)
        self._lost = 0

    def on_trial_error(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: object) -> None:
        result = trial.last_result or {}
        if result.get("status") == "failed":
            # Its training failed, not what it ran on: that says nothing of the cluster.
            self._end(trial, "failed", int(result["step"]), result["error"])
            self._lost = 0
            return
        # Tune itself looks for it on the storage, where it may come later.
        noted = Path(trial.error_file or "")
        error = noted.read_text() if noted.is_file() else str(trial.get_error() or "lost, and Tune has noted no error")
        message = _last_line(error)
        path = self._sweep.trial_dir(_name(trial))
        path.mkdir(parents=True, exist_ok=True)
        (path / "error.txt").write_text(error)
        step = max([step for step, _ in evaluations(path)], default=0)
        self._end(trial, "failed", step, message)
        self._lost += 1
        cluster = self._sweep.plan.base.cluster
        if self._lost > cluster.max_failures:
            raise TrainingError(
                f"{self._sweep.plan.spec.name} was given up: {self._lost} trials were lost in a row, at last by "
                f"{message}; continue with --resume"
            )

    def on_experiment_end(self, trials: list[TuneTrial], **info: object) -> None:
        _leave_lost_directory(self._sweep.folder)

    def close(self, status: RunStatus, ship_s: float, error: BaseException | None = None) -> None:
        """Says of what was left running that it was; and of the sweep, how it ended, unless it is another driver's."""
        if isinstance(error, OvertakenError):
            for tracker in (*self._trackers.values(), self._tracker):
                tracker.leave()
            return
        for tracker in self._trackers.values():
            # Not waited for: the sweep's own shipper sends these, and the sweep's `finish` waits for it.
            tracker.finish("KILLED", 0)
        self._tracker.finish(status, ship_s)
        self._sample([])
        # A store that has failed is no reason to say nothing of it.
        with suppress(StorageError) if error is not None else nullcontext():
            for name in self._trackers:
                self._mirrors[name].push_records()
            self._push()
        if self._view is not None:
            self._view.show(self._sweep.journal, [])

    def _end(self, trial: TuneTrial, status: Status, step: int, error: str | None) -> None:
        name, sweep = _name(trial), self._sweep
        sweep.require()
        path, facts = sweep.trial_dir(name), facts_of(trial.config)
        seconds = round(time.time() - self._began.pop(name, time.time()), 3)
        scheduler = sweep.plan.spec.scheduler.name
        by = scheduler if scheduler != "none" else "time_budget_s"
        words = {"stopped early": f"stopped early by {by}, step {step}", "failed": f"failed: {error}"}
        tracker = self._trackers.pop(name, None)
        # None is there where its actor was lost before the trial began.
        if tracker is not None or Spool(path).exists:
            tracker = tracker or Tracker.open(path)
            tracker.tags({"maps_ray.ended": words[status]} if status in words else {})
            tracker.finish(_MLFLOW[status], 0)
        if mirror := self._mirrors.pop(name, None):
            mirror.push("error.txt")
            mirror.push_records()
        if name not in sweep.journal.ended:
            seed = facts["seed"] - sweep.plan.base.training.seed
            ended = Ended(
                name, facts["schedule"], seed, status, step, known_values(path, trial.last_result or {}), seconds, error
            )
            sweep.journal.end(ended)
            self._count(ended)
            self._push()

    def _push(self) -> None:
        self._sweep.mirror.push("timeline.jsonl")
        self._sweep.mirror.push_records()

    def _count(self, ended: Ended) -> None:
        done = self._sweep.journal.ended.values()
        complete = [e.values for e in done if e.status == "finished"]
        names = [name for name in self._sweep.plan.spec.objectives if all(name in values for values in complete)]
        best = {f"best/{n}": min((v[n] for v in complete), key=partial(cost, n)) for n in names if complete}
        self._tracker.metrics(len(done), {**best, "sweep/worker_hours": self.worker_hours()})
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
            append_line(self._sweep.folder / "timeline.jsonl", {"time": time.time(), **now})


def _leave_lost_directory(folder: Path) -> None:
    """Ray may remove a job's working directory with a node that is lost, and Tune needs one to read its own files."""
    try:
        os.getcwd()
    except FileNotFoundError:
        os.chdir(folder)


def _name(trial: TuneTrial) -> str:
    return facts_of(trial.config)["name"]


def _last_line(error: str) -> str:
    return next((line.strip() for line in reversed(error.splitlines()) if line.strip()), "an error without a word")


class View:
    """The sweep in the terminal: a table of running trials and the best ended ones that stands still, or in a log a
    line for each trial."""

    def __init__(self, plan: Plan, shown: bool) -> None:
        self._plan = plan
        console = Console(stderr=True)
        self._plain = shown and (not console.is_terminal or console.is_dumb_terminal)
        self._live = Live(console=console, auto_refresh=False) if shown and not self._plain else None

    def __enter__(self) -> View:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            with suppress(OSError):
                self._live.stop()

    def show(self, journal: Journal, running: list[tuple[str, int | None]]) -> None:
        """Draws the table again; `running` are names of trials and the steps of their last evaluations."""
        if self._live is not None:
            # A terminal that has gone, or a log on a full disk, ends no sweep.
            with suppress(OSError):
                self._live.update(Group(*self._lines(journal, running)), refresh=True)

    def ended(self, ended: Ended) -> None:
        """A trial has ended: a line where there is no table."""
        if self._plain:
            names = [name for name in self._plan.spec.objectives if name in ended.values]
            values = "  ".join(f"{name} {ended.values[name]:.4f}" for name in names)
            error = f"  {ended.error}" if ended.error else ""
            line = f"{ended.trial}: {ended.status} at step {ended.step}  {values}  {ended.seconds:.0f} s{error}"
            with suppress(OSError):
                print(line, file=sys.stderr, flush=True)

    def _lines(self, journal: Journal, running: list[tuple[str, int | None]]) -> list[Text | Table]:
        spec, steps = self._plan.spec, self._plan.base.training.max_steps
        table = Table("trial", "", *spec.objectives, title=spec.name, title_justify="left", box=SIMPLE)
        first = spec.objectives[0]
        complete = [ended for ended in journal.ended.values() if first in ended.values]
        for ended in sorted(complete, key=lambda e: (e.status != "finished", cost(first, e.values[first])))[:_BEST]:
            values = [f"{ended.values[name]:.4f}" if name in ended.values else "" for name in spec.objectives]
            table.add_row(ended.trial, f"{ended.status}, step {ended.step}", *values)
        lines: list[Text | Table] = [table]
        lines += [Text(f"{name}  " + (f"step {step}/{steps}" if step else "begun")) for name, step in running]
        most = f" of at most {(spec.num_samples + len(spec.baselines)) * spec.seeds}" if spec.num_samples else ""
        lines.append(Text(f"{len(journal.ended)}{most} ended, {len(running)} running", style="dim"))
        return lines
