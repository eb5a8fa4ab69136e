"""A sweep from its plan to its last trial: Ray Tune runs it, and is given what a trial is and what comes next."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from maps_ray.spec.sweep_spec import MUTATING, PAUSING
from maps_ray.sweeps.folder import begin_folder, drop_copies
from maps_ray.sweeps.journal import Journal
from maps_ray.sweeps.plan import Plan
from maps_ray.sweeps.schedules import TRIED
from maps_ray.tracking import Tracker, replay
from maps_ray.training.cluster import Capacity, capacity, most_groups, ray_cluster, refuse_shared_sqlite
from maps_ray.training.preflight import prepare_data
from maps_ray.training.run_folder import locked
from maps_ray.training.train import StopOnSignal

TUNE_FOLDER = "tune"
_SHIP_S = 30.0
# Where the driver of a cluster sits: a node that is lost takes no trial actor with it, only workers.
_HEAD = "node:__internal_head__"
_ENVIRONMENT = {
    # Events are rare and state is small: what Tune has not stored when its driver is killed is asked for again.
    "TUNE_GLOBAL_CHECKPOINT_S": "1",
    # Steps without the objective have no cost; signals are ours.
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_WARN_THRESHOLD_S": "10",
    # What is shown is ours, and what is logged beside it is ours and files for `ResultGrid`.
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
}


@dataclass(frozen=True)
class SweepResult:
    """How a sweep ended."""

    status: Literal["finished", "stopped"]
    """`stopped`: interrupted, to be continued with `--resume`."""
    folder: Path
    trials: int
    """Trials that have ended, baselines and repeats included."""

    @property
    def grid(self) -> Any:
        """Ray Tune's `ResultGrid`."""
        from maps_ray.sweeps import results

        return results(str(self.folder))


def run_sweep(plan: Plan, resume: bool = False, show: bool = True) -> SweepResult:
    """Runs a sweep, or continues the one in its folder; a finished one is not run again.

    Raises:
        SpecError: the folder holds a sweep and `resume` is false, or one of another spec.
        TrainingError: the cluster can never hold a trial's workers, or keeps losing them.
    """
    begin_folder(plan, resume)
    Journal.forget(plan.folder)
    with ExitStack() as stack:
        stack.enter_context(locked(plan.folder))
        stop = stack.enter_context(StopOnSignal())
        stack.enter_context(ray_cluster(plan.base.cluster))
        # Ray takes SIGTERM for itself when it connects.
        stop.install()
        refuse_shared_sqlite(plan.base)
        # Once, in tasks on the cluster; else the first trials would each do it, and the others wait for their locks.
        prepare_data(plan.base)
        Tracker.create(
            plan.folder,
            uri=plan.tracking_uri,
            experiment=plan.base.tracking.experiment,
            run_name=plan.spec.name,
            params={"sweep": plan.spec.model_dump(mode="json")},
            tags={"maps_ray.kind": "sweep"},
            credentials=plan.base.tracking.credentials,
        )
        stack.enter_context(_environment())
        return _run(plan, stop, show)


def _run(plan: Plan, stop: StopOnSignal, show: bool) -> SweepResult:
    from maps_ray.sweeps.callbacks import Recorder
    from maps_ray.sweeps.search import SweepSearch
    from maps_ray.sweeps.view import View

    need = capacity(plan.base.cluster)
    most = _most_at_once(plan, need)
    os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(min(most, 200))
    journal = Journal.of(plan.folder)
    with View(plan, show) as view:
        tuner = _tuner(plan, most)
        inside = tuner._local_tuner
        recorder = next(c for c in inside._run_config.callbacks if isinstance(c, Recorder))
        search = inside._tune_config.search_alg
        assert isinstance(search, SweepSearch)
        recorder.attach(stop, view)
        search.attach(lambda running: running < _room(most, need, running), recorder.worker_hours)
        try:
            tuner.fit()
        except BaseException as error:
            recorder.close("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED", len(journal.ended), 0)
            raise
        stopped = stop.requested.is_set()
        recorder.close("KILLED" if stopped else "FINISHED", len(journal.ended), _SHIP_S)
    if not stopped:
        drop_copies(plan.folder)
        replay(plan.folder)
    return SweepResult("stopped" if stopped else "finished", plan.folder, len(journal.ended))


def _tuner(plan: Plan, most: int) -> Any:
    """A new experiment, or the one in the sweep's folder. What Tune has stored of it may be older than the journal, or
    end with fewer samples than are asked for now: then trials are asked for again, and answer from their folders."""
    from ray import tune
    from ray.tune.logger import CSVLoggerCallback, JsonLoggerCallback

    from maps_ray.sweeps.callbacks import Recorder, load_callback
    from maps_ray.sweeps.scheduler import make_scheduler
    from maps_ray.sweeps.search import SweepSearch
    from maps_ray.sweeps.trial import SweepTrial

    path = plan.folder / TUNE_FOLDER
    # They say where a trial stands, in a few bytes; another one may begin from an early one.
    kept = None if plan.spec.scheduler.name in MUTATING else 4
    # Tune counts these, not processors: those belong to the workers, whose placement groups wait for room or nodes.
    share = max(1, 9000 // most) / 10000 if plan.spec.scheduler.name in PAUSING else 0.0001
    trainable = tune.with_resources(SweepTrial, tune.PlacementGroupFactory([{_HEAD: share}]))
    if _restorable(path):
        tuner = tune.Tuner.restore(str(path), trainable=trainable, resume_unfinished=True)
        if not _wants_more(plan, tuner):
            return tuner
    return tune.Tuner(
        trainable,
        tune_config=tune.TuneConfig(
            search_alg=SweepSearch(str(plan.folder)),
            scheduler=make_scheduler(plan),
            num_samples=-1,
            time_budget_s=plan.spec.time_budget_s,
            reuse_actors=True,
            trial_name_creator=_trial_name,
            trial_dirname_creator=_trial_name,
        ),
        run_config=tune.RunConfig(
            name=TUNE_FOLDER,
            storage_path=str(plan.folder),
            callbacks=[
                *(JsonLoggerCallback(), CSVLoggerCallback()),
                *(Recorder(str(plan.folder)), *map(load_callback, plan.spec.callbacks)),
            ],
            failure_config=tune.FailureConfig(max_failures=plan.base.cluster.max_failures),
            checkpoint_config=tune.CheckpointConfig(checkpoint_frequency=1, num_to_keep=kept),
            verbose=0,
        ),
    )


def _trial_name(trial: Any) -> str:
    return str(trial.config["trial"]["name"])


def _restorable(path: Path) -> bool:
    from ray import tune

    if not tune.Tuner.can_restore(str(path)):
        return False
    states = sorted(path.glob("experiment_state-*.json"))
    try:
        # Killed before its first trial, or while this was written: the journal has all that is needed.
        return bool(states) and bool(json.loads(states[-1].read_text())["trial_data"])
    except (ValueError, KeyError):
        return False


def _wants_more(plan: Plan, tuner: Any) -> bool:
    """Whether a sweep that Tune holds for complete has room for more now."""
    journal = Journal.of(plan.folder)
    trials = {name for s in journal.schedules.values() if s.same_as is None for name in plan.names(s)}
    limits = {"searched": plan.spec.num_samples} if plan.spec.space else {}
    limits |= {"merged": plan.spec.merge.num_samples} if plan.spec.merge else {}
    tried = [s for s in journal.schedules.values() if s.same_as is None]
    counts = {"searched": sum(s.source in TRIED for s in tried)}
    counts["merged"] = sum(s.source == "merged" and s.point is not None for s in tried)
    more = any(limit is None or counts[source] < limit for source, limit in limits.items())
    return trials <= journal.ended.keys() and more


def _most_at_once(plan: Plan, need: Capacity) -> int:
    wanted, cluster = plan.spec.max_concurrent or sys.maxsize, plan.base.cluster
    joined = cluster.address is not None or "RAY_ADDRESS" in os.environ
    if cluster.autoscaling or (plan.spec.max_concurrent and joined):
        return wanted
    return min(wanted, most_groups(need))


def _room(most: int, need: Capacity, running: int) -> int:
    """How many trials may run. On a cluster of unknown reach, as many as have their workers, and as many again: what
    they ask for makes the autoscaler add nodes."""
    if most < sys.maxsize:
        return most
    from ray.util import placement_group_table

    placed = [
        group
        for group in placement_group_table().values()
        if group["state"] == "CREATED" and list(group["bundles"].values()) == [need.bundle] * need.workers
    ]
    return 2 * max(1, min(len(placed), running))


@contextmanager
def _environment() -> Iterator[None]:
    """Tune's settings, where the user has not set them; and its handler of SIGUSR1 for no longer than the sweep."""
    added = {name: value for name, value in _ENVIRONMENT.items() if name not in os.environ}
    os.environ.update(added)
    main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGUSR1) if main else None
    try:
        yield
    finally:
        for name in (*added, "TUNE_MAX_PENDING_TRIALS_PG"):
            os.environ.pop(name, None)
        if main:
            signal.signal(signal.SIGUSR1, before)
