"""A sweep from its plan to its last trial: Ray Tune runs it, and is given what a trial is and what comes next."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from maps_ray.ray_internals import HEAD_RESOURCE, parts_of
from maps_ray.spec.sweep_spec import MUTATING, PAUSING
from maps_ray.sweeps import TUNE_FOLDER, tune_storage
from maps_ray.sweeps.folder import GIVEN, KEPT, Sweep, begin_folder, make_folder
from maps_ray.sweeps.schedules import Plan, facts_of
from maps_ray.tracking import Tracker, replay
from maps_ray.training.cluster import Capacity, capacity, most_groups, ray_cluster, refuse_shared_sqlite
from maps_ray.training.mirror import Mirror
from maps_ray.training.preflight import prepare_data
from maps_ray.training.run_folder import locked
from maps_ray.training.train import StopOnSignal, storage_faults

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem
    from ray.tune import ResultGrid, Tuner
    from ray.tune.experiment import Trial

_SHIP_S = 30.0
_ENVIRONMENT = {
    # Steps without the objective have no cost; signals are ours.
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    # 0.5 s by default: journal and scheduler are written before anything acts on them, on an object store too.
    "TUNE_WARN_THRESHOLD_S": "10",
    # What is shown is ours, and what is logged beside it is ours and files for `ResultGrid`.
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    # A trial's actor stays where `SweepTrial` has put it.
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
}


@dataclass(frozen=True)
class SweepResult:
    """How a sweep ended."""

    status: Literal["finished", "stopped"]
    """`stopped`: interrupted, to be continued with `--resume`."""
    folder: Path
    """On this node; the copy of one on an object store is gone when it has finished."""
    place: str
    """Where others find it: the folder, or its address on an object store."""
    trials: int
    """Trials that have ended, baselines and repeats included."""

    @property
    def grid(self) -> ResultGrid:
        """Its trials as Ray Tune has them."""
        from maps_ray.sweeps import results

        return results(self.place)


def run_sweep(
    plan: Plan, resume: bool = False, show: bool = True, finish: Callable[[Path], object] | None = None
) -> SweepResult:
    """Runs a sweep, or continues the one in its folder; a finished one is not run again.

    Args:
        plan: what is run.
        resume: whether to continue.
        show: a table on the terminal.
        finish: is called with the folder when the sweep has finished, before the copy of one on an object store goes.

    Raises:
        SpecError: the folder holds a sweep and `resume` is false, or one of another spec.
        TrainingError: the cluster can never hold a trial's workers, or keeps losing them.
    """
    with storage_faults(plan.spec.name):
        make_folder(plan, resume)
        with locked(plan.folder):
            result = _on_cluster(plan, resume, show)
            if result.status == "finished":
                if finish is not None:
                    finish(plan.folder)
                # Without Ray: what an actor that ends still writes would bring the folder back.
                leave(plan)
    return result


def leave(plan: Plan) -> None:
    """Sends MLflow what it lacks of a finished sweep; where the sweep lies on an object store, this node's copy then
    goes. It stays where MLflow has not got everything."""
    mirror = Mirror.of(plan.base)
    missing = replay(plan.folder).missing
    mirror.push_records()
    if mirror.storage is None:
        return
    if missing is None:
        mirror.remove()
        return
    again = f"maps-ray sweep --resume {shlex.quote(plan.base.run_place)}"
    print(f"{missing}\nits copy in {plan.folder} stays; `{again}` sends the rest and removes it", file=sys.stderr)


def _on_cluster(plan: Plan, resume: bool, show: bool) -> SweepResult:
    with ExitStack() as stack:
        sweep = begin_folder(plan, resume)
        stop = stack.enter_context(StopOnSignal())
        stack.enter_context(ray_cluster(plan.base.cluster))
        # Ray takes SIGTERM for itself when it connects.
        stop.install()
        refuse_shared_sqlite(plan.base)
        # Once, in tasks on the cluster; else the first trials would each do it, and the others wait for their locks.
        prepare_data(plan.base)
        sweep.take_over()
        tracker = Tracker.create(
            plan.folder,
            uri=plan.tracking_uri,
            experiment=plan.base.tracking.experiment,
            run_name=plan.spec.name,
            params={"sweep": plan.spec.model_dump(mode="json")},
            tags={"maps_ray.kind": "sweep"},
            credentials=plan.base.tracking.credentials,
        )
        sweep.adopt()
        stack.enter_context(_environment(plan))
        return _run(sweep, tracker, stop, show)


def _run(sweep: Sweep, tracker: Tracker, stop: StopOnSignal, show: bool) -> SweepResult:
    from maps_ray.sweeps.callbacks import Recorder, View
    from maps_ray.sweeps.scheduler import Judge
    from maps_ray.sweeps.search import SweepSearch

    plan, journal = sweep.plan, sweep.journal
    need = capacity(plan.base.cluster)
    most = _most_at_once(plan, need)
    # Where a searcher is given Tune lets one trial wait for room, and 200 where none is (`_get_max_pending_trials`).
    os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(min(most, 200))
    with View(plan, show) as view:
        tuner, trials = _tuner(sweep, most)
        callbacks, search, scheduler = parts_of(tuner)
        recorder = next(callback for callback in callbacks if isinstance(callback, Recorder))
        assert isinstance(search, SweepSearch)
        recorder.attach(sweep, tracker, stop, view)
        search.attach(sweep, lambda running: running < _room(most, need, running), recorder.worker_hours, trials)
        if isinstance(scheduler, Judge):
            scheduler.attach(sweep)
        try:
            tuner.fit()
        except BaseException as error:
            recorder.close("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED", 0, error)
            raise
        stopped = stop.requested.is_set()
        recorder.close("KILLED" if stopped else "FINISHED", _SHIP_S)
    if not stopped:
        for name in journal.trials(plan):
            for copies in (KEPT, GIVEN):
                sweep.copies.prune(f"trials/{name}/{copies}")
    status: Literal["finished", "stopped"] = "stopped" if stopped else "finished"
    return SweepResult(status, plan.folder, plan.base.run_place, len(journal.ended))


def _tuner(sweep: Sweep, most: int) -> tuple[Tuner, list[Trial]]:
    """A new experiment, or the one in the sweep's folder; and the trials in it.

    What Tune has stored may be older than the journal, or end with fewer samples than are asked for now: then trials
    are asked for again, and answer from the journal and their folders.
    """
    from ray import tune
    from ray.tune.logger import CSVLoggerCallback, JsonLoggerCallback

    from maps_ray.sweeps.callbacks import Recorder, load_callback
    from maps_ray.sweeps.scheduler import make_scheduler
    from maps_ray.sweeps.search import SweepSearch
    from maps_ray.sweeps.trial import SweepTrial

    plan = sweep.plan
    # They say where a trial stands, in a few bytes; another one may begin from an early one.
    kept = None if plan.spec.scheduler.name in MUTATING else 4
    # Tune counts these, not processors: those belong to the workers, whose placement groups wait for room or nodes.
    # Where trials are set aside they limit those that run (`SweepSearch.suggest`). Ray counts in ten-thousandths.
    share = max(1, 9000 // most) / 10000 if plan.spec.scheduler.name in PAUSING else 0.0001
    trainable = tune.with_resources(
        tune.with_parameters(SweepTrial, folder=str(plan.folder)),
        tune.PlacementGroupFactory([{_trial_actors_node(plan): share}]),
    )
    storage, files = tune_storage(plan.base.run_place)
    path = f"{storage}/{TUNE_FOLDER}"
    if (trials := _stored_trials(path, files)) and not _wants_more(sweep):
        return tune.Tuner.restore(path, trainable, resume_unfinished=True, storage_filesystem=files), trials
    tuner = tune.Tuner(
        trainable,
        tune_config=tune.TuneConfig(
            search_alg=SweepSearch(),
            scheduler=make_scheduler(plan),
            # Without end: the searcher says itself when there is nothing left to begin.
            num_samples=-1,
            time_budget_s=plan.spec.time_budget_s,
            # A trial takes the actor of an ended one over, and with it the group of workers (`trial`).
            reuse_actors=True,
            trial_name_creator=_trial_name,
            trial_dirname_creator=_trial_name,
        ),
        run_config=tune.RunConfig(
            name=TUNE_FOLDER,
            storage_path=storage,
            storage_filesystem=files,
            callbacks=[
                *(JsonLoggerCallback(), CSVLoggerCallback()),
                *(Recorder(), *map(load_callback, plan.spec.callbacks)),
            ],
            failure_config=tune.FailureConfig(max_failures=plan.base.cluster.max_failures),
            # After each result: it says up to where Tune has heard of the trial (`Standing`).
            checkpoint_config=tune.CheckpointConfig(checkpoint_frequency=1, num_to_keep=kept),
            verbose=0,
        ),
    )
    return tuner, []


def _trial_actors_node(plan: Plan) -> str:
    """The resource of the node where trial actors sit: the head, or with the driver's copy of an object store.

    Where the driver of a cluster sits, a node that is lost takes no trial actor with it, only workers.
    """
    if isinstance(plan.base.cluster.storage, Path):
        return HEAD_RESOURCE
    import ray

    here = ray.get_runtime_context().get_node_id()
    node = next(node for node in ray.nodes() if node["NodeID"] == here)
    return HEAD_RESOURCE if HEAD_RESOURCE in node["Resources"] else f"node:{node['NodeManagerAddress']}"


def _trial_name(trial: Trial) -> str:
    return facts_of(trial.config)["name"]


def _stored_trials(path: str, files: FileSystem | None) -> list[Trial]:
    """The trials of a stored experiment; empty where it holds none."""
    from ray import tune
    from ray.tune import ExperimentAnalysis

    if not tune.Tuner.can_restore(path, storage_filesystem=files):
        return []
    try:
        return ExperimentAnalysis(path, storage_filesystem=files).trials or []
    except Exception:
        # Killed before its first trial, or while this was written: the journal has all that is needed.
        return []


def _wants_more(sweep: Sweep) -> bool:
    """Whether a sweep that Tune holds for complete has room for more now."""
    from maps_ray.sweeps.search import SweepSearch

    search, trials = SweepSearch(sweep), sweep.journal.trials(sweep.plan)
    return set(trials) <= sweep.journal.ended.keys() and (search.open("searched") or search.open("merged"))


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
def _environment(plan: Plan) -> Iterator[None]:
    """Tune's settings, where the user has not set them; and its handler of SIGUSR1 for no longer than the sweep."""
    # Events are rare and state is small: what Tune has not stored when its driver is killed is asked for again. On an
    # object store all of it is put there again each time.
    often = "1" if isinstance(plan.base.cluster.storage, Path) else "10"
    values = {"TUNE_GLOBAL_CHECKPOINT_S": often, **_ENVIRONMENT}
    added = {name: value for name, value in values.items() if name not in os.environ}
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
