"""One run from its spec: claim the folder, start or join Ray, run the workers, record how it ended.

The driver does no training itself. It starts the workers through Ray Train, which restarts them from the newest
complete checkpoint when one is lost, shows their progress, and passes Ctrl-C on: the workers make a checkpoint at the
next step and end. All of it travels through a mailbox; files are the record.
"""

from __future__ import annotations

import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Literal

from maps_ray.evaluation.rollouts.checkpoint import fingerprint
from maps_ray.files import read_json, write_json
from maps_ray.models import local_folder
from maps_ray.run_storage import StorageError, storage_problems
from maps_ray.spec import Problem, RunSpec, SpecError
from maps_ray.tracking.store import resolve_uri
from maps_ray.tracking.tracker import Tracker
from maps_ray.training.claims import Fence
from maps_ray.training.cluster import Capacity, capacity, ray_cluster, refuse_shared_sqlite, wait_for_workers
from maps_ray.training.fit import Fit, final_fault
from maps_ray.training.mailbox import MailboxState, Outcome, Records, open_mailbox
from maps_ray.training.mirror import Mirror
from maps_ray.training.preflight import prepare_data, strengths
from maps_ray.training.progress import ProgressBar
from maps_ray.training.run_faults import TrainingError
from maps_ray.training.run_folder import BASE_FILE, claim, global_batch_size, locked, write_spec
from maps_ray.training.shelf import FolderShelf, ObjectShelf, Shelf, newest, step_of

# As `signal.getsignal` gives it.
SignalHandler = Callable[[int, FrameType | None], object] | int | None
# A run that did not finish waits no longer for MLflow; the shipper goes on without it.
_SHIP_S = 5.0
_LOOK_S = 0.25
# Between looks for nodes that have come; only a run that may grow looks.
_ROOM_S = 5.0
# A mailbox that was lost is started again meanwhile.
_ANSWER_S = 30.0


@dataclass(frozen=True)
class TrainResult:
    """How a run ended."""

    status: Literal["finished", "stopped"]
    """`stopped`: interrupted, to be continued with `resume`."""
    step: int
    """Optimizer steps done, and saved."""
    start_step: int
    """Checkpoint that the workers started from the last time: 0 for a run without resume and without losses."""
    run_dir: str
    metrics: dict[str, float]
    """The last value of each metric."""
    final: str | None
    """Folder of the trained weights; None when stopped."""
    seconds: float
    """Wall time of this part of the run, Ray's start included."""
    tracking: str | None = None
    """What MLflow has not got of the run, why, and what to do; None when it has everything."""


def train(spec: RunSpec, resume: bool = False, progress: bool = True) -> TrainResult:
    """Fine-tunes as the spec says.

    Args:
        spec: a spec that `preflight.check` accepted.
        resume: continue the run in `spec.run_dir` from its newest complete checkpoint. A finished run is not run
            again: its result is returned.
        progress: show a progress bar on stderr.

    Returns:
        the result, also written to `<run_dir>/result.json`. After Ctrl-C its status is `stopped`.

    Raises:
        SpecError: the run folder belongs to another run, the spec may not continue it, or an object store cannot be
            written: that is known within seconds, where a run at work would ask for minutes.
        TrainingError: the cluster can never hold the workers or did not within `cluster.start_timeout_s`, the loss is
            not finite, a checkpoint cannot be written, workers were lost more than `cluster.max_failures` times, or
            another driver has taken the run over.
    """
    began = time.monotonic()
    problems = storage_problems(spec.cluster)
    if problems:
        raise SpecError(problems)
    spec = claim(spec, resume)
    run_dir, mirror = spec.run_dir, Mirror.of(spec)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        problem = Problem("cluster.storage", str(spec.cluster.storage), f"cannot be written: {error}")
        raise SpecError([problem]) from None
    with storage_faults(spec.name), locked(run_dir):
        if not resume:
            mirror.begin()
        # A run that finished may be made longer: then `max_steps` is beyond its last step.
        finished = read_json(run_dir / "result.json")
        if finished and finished["status"] == "finished" and finished["step"] >= spec.training.max_steps:
            return TrainResult(**finished)
        for name in ("result.json", "progress.json", "error.txt"):
            (run_dir / name).unlink(missing_ok=True)
        with ExitStack() as stack:
            # Before Ray, which takes seconds to start: Ctrl-C in them is a request to stop as well.
            stop = stack.enter_context(StopOnSignal())
            bar = ProgressBar(run_dir, spec.training.max_steps, spec.name, shown=progress)
            stack.enter_context(bar)
            stack.enter_context(ray_cluster(spec.cluster))
            # Ray takes SIGTERM for itself when it connects.
            stop.install()
            bar.say("waiting for workers")
            need = capacity(spec.cluster)
            wait_for_workers(need, spec.cluster.start_timeout_s, stop.requested.is_set)
            bar.say("indexing the data")
            prepare_data(spec, lambda what, done, total: bar.say(f"{what}: {done} of {total}"))
            refuse_shared_sqlite(spec)
            # Only now: a run that the cluster has no room for leaves nothing to resume.
            fence = take_over(mirror)
            tracker = begin(spec)
            mirror.push_all()
            # Taken away above, and so there: a driver elsewhere would take the run for one that has ended.
            mirror.push("result.json", "error.txt")
            mirror.push_records()
            try:
                outcome = _stopped(mirror) if stop.requested.is_set() else _fit(spec, need, bar, stop, fence)
            except BaseException:
                _fail(mirror, tracker, fence)
                raise
            # The workers may have ended well for a driver that has lost the run since its last checkpoint.
            fence.require()
        return _end(spec, outcome, tracker, began)


@contextmanager
def storage_faults(name: str) -> Iterator[None]:
    """Turns those of an object store into the end of this part of the run or sweep of that name."""
    try:
        yield
    except StorageError as error:
        raise TrainingError(f"{name} has ended: {error}; when that is mended, continue with --resume") from None


def take_over(mirror: Mirror) -> Fence:
    """Takes the run for this driver: another one that still has it stops at its next checkpoint."""
    before = Fence.earlier(mirror.run_dir, mirror.storage)
    last = newest(_shelf(mirror, before))
    return before.claim(step_of(last) if last else 0)


def _shelf(mirror: Mirror, fence: Fence | None = None) -> Shelf:
    """The run's checkpoints, to look at."""
    if mirror.storage is None:
        return FolderShelf(mirror.run_dir / "checkpoints", fence)
    return ObjectShelf(mirror.storage, mirror.run_dir / "work", fence)


def _fail(mirror: Mirror, tracker: Tracker, fence: Fence) -> None:
    """Puts on record that the run failed, unless it is another driver's by now."""
    try:
        if fence.fault() is not None:
            tracker.leave()
            return
    except StorageError:
        # A store that has failed is no reason to say nothing of it.
        pass
    tracker.finish("FAILED", _SHIP_S)
    _tell(tracker)
    with suppress(StorageError):
        mirror.push("error.txt")
        mirror.push_records()


def begin(
    spec: RunSpec,
    params: Mapping[str, object] | None = None,
    tags: Mapping[str, str] | None = None,
    parent: Path | None = None,
) -> Tracker:
    """Writes what the run is into its folder and begins its record.

    Args:
        spec: with absolute paths.
        params: recorded beside those of the spec.
        tags: of the MLflow run.
        parent: run folder of the MLflow parent run.
    """
    spec_path = write_spec(spec)
    write_json(spec.run_dir / "strengths.json", strengths(spec))
    # A resume keeps what the run was begun with, wherever the base lies by now.
    if not (spec.run_dir / BASE_FILE).exists():
        identity = {
            "checkpoint": str(spec.model.checkpoint),
            "fingerprint": fingerprint(local_folder(spec.model.checkpoint)),
        }
        write_json(spec.run_dir / BASE_FILE, identity)
    tracker = Tracker.create(
        spec.run_dir,
        uri=resolve_uri(spec.tracking.uri, spec.cluster.local_storage),
        experiment=spec.tracking.experiment,
        run_name=spec.name,
        params={**spec.model_dump(mode="json"), **(params or {})},
        tags=tags,
        parent=parent,
        credentials=spec.tracking.credentials,
    )
    tracker.artifact(spec_path)
    return tracker


def _end(spec: RunSpec, outcome: Outcome, tracker: Tracker, began: float) -> TrainResult:
    """Writes how the run ended, and says how to go on with one that was stopped."""
    stopped, mirror = outcome["status"] == "stopped", Mirror.of(spec)
    result = TrainResult(
        status="stopped" if stopped else "finished",
        step=outcome["step"],
        start_step=outcome["start_step"],
        run_dir=spec.run_place,
        metrics=outcome["metrics"],
        final=None if stopped else f"{spec.run_place}/final",
        seconds=round(time.monotonic() - began, 3),
    )
    # Before MLflow is waited for: the run has ended, whatever comes of its record.
    write_json(spec.run_dir / "result.json", asdict(result))
    if stopped:
        command = f"maps-ray train {shlex.quote(f'{spec.run_place}/spec.yaml')} --resume"
        with suppress(OSError):
            print(f"stopped after step {result.step} of {spec.training.max_steps}; continue with: {command}")
        tracker.finish("KILLED", _SHIP_S)
    else:
        tracker.finish("FINISHED")
    missing = _tell(tracker)
    if missing is not None:
        result = replace(result, tracking=missing)
        write_json(spec.run_dir / "result.json", asdict(result))
    mirror.push_records()
    mirror.push("progress.json", "result.json")
    # Else the run goes on from here, or what MLflow lacks is sent from the spool that is here.
    if not stopped and missing is None:
        mirror.remove()
    return result


def _tell(tracker: Tracker) -> str | None:
    """Says what MLflow has not got, where that is so."""
    missing = tracker.missing
    if missing is not None:
        with suppress(OSError):
            print(missing, file=sys.stderr, flush=True)
    return missing


def _fit(spec: RunSpec, need: Capacity, bar: ProgressBar, stop: StopOnSignal, fence: Fence) -> Outcome:
    """Runs the workers to their end and returns their outcome.

    Raises:
        TrainingError: they failed.
    """
    bar.say("starting workers")
    import ray

    from maps_ray.training.worker import train_worker

    mailbox, cluster = open_mailbox(), spec.cluster
    records = Records.here(spec.run_dir, None if isinstance(cluster.storage, Path) else spec.run_place)
    fit = Fit(
        train_worker,
        {"spec": spec.model_dump(mode="json"), "claims": fence.claims, "records": records},
        need,
        spec.run_dir,
        max_failures=cluster.max_failures,
        start_timeout_s=cluster.start_timeout_s,
        collective_timeout_s=cluster.collective_timeout_s,
        mailbox=mailbox,
        patient=not isinstance(cluster.workers, int),
        sizes=[] if isinstance(cluster.workers, int) else cluster.sizes(global_batch_size(spec)),
    )
    fit.start()
    state: MailboxState | None = None
    looked = time.monotonic()
    try:
        while fit.is_alive():
            fit.join(_LOOK_S)
            if time.monotonic() - looked > _ROOM_S:
                looked = time.monotonic()
                if fit.more_room():
                    mailbox.regroup.remote()
            if stop.requested.is_set():
                mailbox.stop.remote()
            with suppress(ray.exceptions.RayError):
                # Also once behind the last `join`: the outcome comes just before the thread's end.
                state = ray.get(mailbox.state.remote(), timeout=_ANSWER_S)
                bar.update(state["progress"])
    except KeyboardInterrupt:
        # The second Ctrl-C: the workers end with Ray, the last checkpoint stays.
        return _stopped(Mirror.of(spec))
    finally:
        ray.kill(mailbox)
    if fit.error is not None:
        (spec.run_dir / "error.txt").write_text(str(fit.error))
        raise TrainingError(_describe(spec, fit)) from fit.error
    outcome = state["outcome"] if state else None
    if outcome is None:
        raise TrainingError(f"the workers of {spec.name} ended without an outcome; see {spec.run_dir}")
    if outcome["status"] == "failed":
        raise TrainingError(outcome["message"])
    return outcome


class StopOnSignal:
    """Turns the first SIGINT or SIGTERM into a request to stop, a second SIGINT into KeyboardInterrupt.

    Outside the main thread signals are left alone.
    """

    def __init__(self) -> None:
        self.requested = threading.Event()
        self._before: dict[signal.Signals, SignalHandler] = {}

    def install(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        for number in (signal.SIGINT, signal.SIGTERM):
            # Installed twice: what was there before the first time is put back in the end.
            self._before.setdefault(number, signal.getsignal(number))
            signal.signal(number, self._on_signal)

    def __enter__(self) -> StopOnSignal:
        self.install()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.requested.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested.set()
        # Not print: the handler may have interrupted a print. The terminal may have gone.
        with suppress(OSError):
            os.write(2, b"\nstopping: the workers make a checkpoint first; Ctrl-C again stops at once\n")


def _stopped(mirror: Mirror) -> Outcome:
    last = newest(_shelf(mirror))
    step = step_of(last) if last else 0
    return {"status": "stopped", "step": step, "start_step": step, "metrics": {}}


def _describe(spec: RunSpec, fit: Fit) -> str:
    """What went wrong in the workers, without Ray's wrapping, how often, and what is left."""
    shelf = _shelf(Mirror.of(spec))
    try:
        last = newest(shelf)
        where = shelf.place(last) if last else None
        kept = f"the last complete checkpoint is {where}; continue with --resume" if last else "no checkpoint was made"
    except StorageError as error:
        kept = f"what is left cannot be seen now: {error}"
    restarts = max(0, len(fit.losses) - 1)
    assert fit.error is not None
    final = final_fault(fit.error)
    if final is not None:
        return f"{spec.name} has ended: {final} (all of it in {spec.run_dir / 'error.txt'}); {kept}"
    return (
        f"{spec.name} was given up after {restarts} restart{'' if restarts == 1 else 's'}: {fit.describe()} "
        f"(all of it in {spec.run_dir / 'error.txt'}); {kept}"
    )
