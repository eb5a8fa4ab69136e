"""A trial, as Ray Tune runs it: an actor whose group of training workers stays from trial to trial.

Imports, Ray's workers and their process group are paid for once in an actor. A trial still begins like any run: model,
data and engine are made anew, every generator is seeded, and its run folder is that of `maps-ray train`: a finished one
returns its result at once, an unfinished one goes on.

`step` returns at the next evaluation that has the first objective. Where a scheduler decides by it, the workers wait
for its word, so that a trial that ends early ends at this very step, and one that is copied is copied at this step.
"""

from __future__ import annotations

import math
import os
import time
import uuid
from dataclasses import asdict
from pathlib import Path, PurePosixPath
from typing import TypedDict

from ray import tune

from maps_ray.files import read_json, seen, write_json
from maps_ray.metrics import EVALUATION
from maps_ray.run_storage import run_storage
from maps_ray.spec import RunSpec
from maps_ray.spec.sweep_spec import MUTATING, PAUSING
from maps_ray.sweeps.folder import (
    BASE_FILE,
    GIVEN,
    KEPT,
    SPACE_FILE,
    SPEC_FILE,
    Copies,
    read_base,
    read_space,
    read_spec,
    source_run,
)
from maps_ray.sweeps.journal import Ended, Journal
from maps_ray.sweeps.objectives import cost, decision_steps, evaluations, newest_values
from maps_ray.sweeps.schedules import TRIED, TrialConfig, facts_of, fields_of, trial_spec
from maps_ray.sweeps.space import MergeFields
from maps_ray.training.claims import LAG_S, Fence
from maps_ray.training.cluster import Capacity, capacity
from maps_ray.training.fit import Fit
from maps_ray.training.mailbox import MailboxState, Outcome, Records, RunTask, WorkerConfig, open_mailbox
from maps_ray.training.mirror import Mirror
from maps_ray.training.progress import ProgressWriter
from maps_ray.training.run_faults import TrainingError
from maps_ray.training.train import TrainResult, take_over

TIMES_FILE = "times.json"
_POLL_S = 0.25
_END_S = 30.0


Result = dict[str, object]
"""What Ray Tune is told: `step`, `cost`, each metric, `status`, and `done` or `error` at the end."""


class Standing(TypedDict):
    """What Ray Tune keeps of a trial as its checkpoint; weights and moments lie in the run's own."""

    name: str
    seen: int
    """The last step that Tune has a result of."""
    kept: str | None
    """The copy of that step's checkpoint, in the sweep's folder, where others may go on from it."""


class SweepTrial(tune.Trainable):
    """One actor of Tune, on the driver's node; `reset_config` hands its workers the next trial.

    Where its fields have `merge`, it evaluates and trains nothing.
    """

    _fence: Fence | None

    def __init__(self, *arguments: object, **options: object) -> None:
        # By name: `super()` fails in a copy of this class that was sent by value.
        tune.Trainable.__init__(self, *arguments, **options)
        # Ray may remove a job's working directory with a node that is lost, and asks where it is before each reset.
        os.chdir(self._folder)

    def setup(self, config: TrialConfig, folder: str = "") -> None:
        """Takes its configuration, and the sweep's folder."""
        self._workers: _Workers | None = None
        self._folder = Path(folder)
        self._begin(config)

    def reset_config(self, new_config: TrialConfig) -> bool:
        self._leave()
        self._begin(new_config)
        # Tune takes an actor over only where this is so.
        return True

    def step(self) -> Result:
        """Trains to the next evaluation that counts, or to the end."""
        if self._fault is not None:
            # Told as a result one step ago, so that `Recorder` could take Tune's retries away before it raises.
            raise TrainingError(self._fault)
        if (ended := self._ended_before) is not None:
            # An earlier driver has recorded its end, and was lost before Tune had.
            if ended.status == "failed":
                return self._failed(ended.step, ended.values, ended.error or "failed")
            return self._result(ended.step, ended.values) | {"status": ended.status, "done": True}
        if not self._at_work:
            for step, values in evaluations(self._run_dir):
                if self._counts(step, values):
                    return self._seen_now(step, values)
            finished = read_json(self._run_dir / "result.json")
            if finished and finished["status"] == "finished":
                return self._finished(finished["step"])
        return self._train()

    def save_checkpoint(self, checkpoint_dir: str) -> Standing:
        """Where the trial stands. Where the scheduler pauses trials, the checkpoint of that step is complete; where it
        copies them, there is a copy that the workers will not prune.
        """
        kept = None
        if self._pauses and self._at_work and self._workers is not None and self._seen > 0:
            own = self._save(self._workers)
            kept = self._keep(own) if self._copies_kept else None
        return {"name": self._spec.name, "seen": self._seen, "kept": kept}

    def load_checkpoint(self, checkpoint: Standing | None) -> None:
        """Goes on after what Tune has seen; from another trial's copy in place of its own state, if it is another's."""
        assert checkpoint is not None
        self._seen = checkpoint["seen"]
        if checkpoint["name"] == self._spec.name:
            return
        run_dir, kept = self._run_dir, str(checkpoint["kept"])
        own, name = f"trials/{self._spec.name}", PurePosixPath(kept).name
        # What it had made itself does not count from here on.
        self._fence = Fence.earlier(run_dir, self._mirror.storage).claim(self._seen)
        self._copies.prune(f"{own}/checkpoints")
        # The scheduler put it here when it decided so.
        given = f"{own}/{GIVEN}/{name}"
        self._copies.copy(given if self._copies.has(given) else kept, f"{own}/checkpoints/{name}")
        self._copies.claim(f"{own}/checkpoints/{name}", self._fence.token)
        entries = read_json(run_dir / "evaluation.json") or []
        # Later ones are of the course that is given up.
        write_json(run_dir / "evaluation.json", [entry for entry in entries if entry["step"] <= self._seen])
        self._mirror.push("evaluation.json")

    def cleanup(self) -> None:
        self._leave()
        if self._workers is not None:
            self._workers.close()

    def _begin(self, config: TrialConfig) -> None:
        folder = self._folder
        for name in (SPEC_FILE, BASE_FILE, SPACE_FILE):
            # The driver has written them; on another node they may be seen late.
            seen(folder / name, LAG_S)
        sweep, self._base, space = read_spec(folder), read_base(folder), read_space(folder)
        trial, fields = facts_of(config), fields_of(config, space)
        self._merge: MergeFields | None = fields.get("merge")
        self._spec = trial_spec(self._base, folder, trial["name"], trial["seed"], fields)
        # The driver's folder: this process may have another scratch (MAPS_RAY_SCRATCH, TMPDIR) from Ray's environment.
        self._run_dir = folder / "trials" / trial["name"]
        self._objective = sweep.objectives[0]
        self._decides = sweep.scheduler.name != "none" and trial["source"] in TRIED
        self._pauses = self._decides and sweep.scheduler.name in PAUSING
        _, every = decision_steps(self._objective, self._base)
        interval = sweep.scheduler.options.get("perturbation_interval", every)
        assert isinstance(interval, int | float)
        # Others may be given the copy of the last interval until the next one's is there.
        copied = self._pauses and sweep.scheduler.name in MUTATING
        self._copies_kept = 1 + math.ceil(interval / every) if copied else 0
        self._mirror = Mirror(self._run_dir, run_storage(self._spec))
        self._copies = Copies(folder, run_storage(self._base))
        self._mirror.pull_file("evaluation.json")
        self._fence = None
        self._ended_before: Ended | None = Journal(folder).ended.get(trial["name"])
        self._seen = 0
        self._at_work = False
        self._fault: str | None = None

    def _counts(self, step: int, values: dict[str, float]) -> bool:
        return self._seen < step < self._spec.training.max_steps and self._objective in values

    def _train(self) -> Result:
        if self._workers is None or not self._workers.alive:
            self._workers = _Workers(self._folder, self._base)
        workers = self._workers
        if not self._at_work:
            self._give(workers)
            self._at_work = True
        else:
            workers.say("decide", self._seen, "go")
        record = ProgressWriter(self._run_dir, self._spec.training.max_steps)
        known = self._seen
        while True:
            state = workers.state(known)
            if state["task"] != self._spec.name:
                # The mailbox was lost, and what it held.
                self._give(workers)
                continue
            if state["progress"]:
                record.write(**state["progress"])
            for step, values in sorted(state["evaluations"].items()):
                known = max(known, step)
                if self._counts(step, values):
                    self._fetch_record(state["evaluations"])
                    return self._seen_now(step, values)
            if state["outcome"] is not None:
                self._at_work = False
                self._fetch_record(state["evaluations"])
                return self._ended(state["outcome"])
            if not workers.alive:
                self._at_work = False
                raise TrainingError(f"{self._spec.name} failed: {workers.fit.describe()}") from workers.fit.error

    def _fetch_record(self, told: dict[int, dict[str, float]]) -> None:
        """Brings the record of evaluations up to what workers have told, where they wrote it on another node: from the
        object store, or in a shared folder when it is seen. On this one they may be about to add to it."""
        deadline = time.monotonic() + LAG_S
        while self._lacks(told):
            if self._mirror.storage is not None:
                self._mirror.pull_file("evaluation.json")
                return
            if time.monotonic() > deadline:
                return
            seen(self._run_dir / "evaluation.json", LAG_S)
            time.sleep(_POLL_S)

    def _lacks(self, told: dict[int, dict[str, float]]) -> bool:
        known = dict(evaluations(self._run_dir))
        return any(
            name not in known.get(step, {})
            for step, values in told.items()
            for name in values
            if name == self._objective or name.startswith(EVALUATION)
        )

    def _give(self, workers: _Workers) -> None:
        decides = (self._objective, self._spec.training.max_steps) if self._decides else None
        # One that goes on from another's copy is taken over already, from that step on (`load_checkpoint`).
        self._fence = self._fence or take_over(self._mirror)
        place = None if self._mirror.storage is None else self._spec.run_place
        task: RunTask = {
            "name": self._spec.name,
            "spec": self._spec.model_dump(mode="json"),
            "claims": self._fence.claims,
            "records": Records.here(self._run_dir, place),
        }
        if self._merge is not None:
            run, how = source_run(self._folder, self._spec.name, self._merge)
            task["merge"] = {"run": run, "weights": how.get("weights"), "lines": how.get("lines")}
        workers.say("give", task, decides, self._seen)

    def _ended(self, outcome: Outcome) -> Result:
        self._record(outcome)
        if outcome["status"] == "finished":
            return self._finished(outcome["step"])
        if outcome["status"] == "stopped":
            raise TrainingError(f"{self._spec.name} was stopped at step {outcome['step']}")
        (self._run_dir / "error.txt").write_text(outcome["message"])
        step = max([step for step, _ in evaluations(self._run_dir)], default=0)
        return self._failed(step, newest_values(self._run_dir), outcome["message"])

    def _failed(self, step: int, values: dict[str, float], fault: str) -> Result:
        """What is known of a trial that must not be tried again; the step after it is Tune's error."""
        self._fault = fault
        return self._result(step, values) | {"status": "failed", "error": fault}

    def _finished(self, step: int) -> Result:
        return self._result(step, newest_values(self._run_dir)) | {"status": "finished", "done": True}

    def _seen_now(self, step: int, values: dict[str, float]) -> Result:
        self._seen = step
        return self._result(step, values) | {"status": "running"}

    def _result(self, step: int, values: dict[str, float]) -> Result:
        # Every result has a cost: a scheduler asks for it, and a trial without the objective is never the best.
        price = cost(self._objective, values[self._objective]) if self._objective in values else math.inf
        return {"step": step, "cost": price, **values}

    def _record(self, outcome: Outcome) -> None:
        """How the workers left the run, as `maps-ray train` records it."""
        known = read_json(self._run_dir / "result.json")
        # A trial that was set aside may have ended elsewhere before these workers were told to leave it.
        if outcome["status"] == "failed" or (known and known["status"] == "finished"):
            return
        place = self._spec.run_place
        final = f"{place}/final" if outcome["status"] == "finished" and self._merge is None else None
        result = TrainResult(
            status="finished" if outcome["status"] == "finished" else "stopped",
            step=outcome["step"],
            start_step=outcome["start_step"],
            run_dir=place,
            metrics=outcome["metrics"],
            final=final,
            # Tune's own count, over all actors that the trial has had.
            seconds=round(self._time_total, 3),
        )
        write_json(self._run_dir / "result.json", asdict(result))
        self._mirror.push("result.json", "progress.json")

    def _save(self, workers: _Workers) -> str:
        """Has the workers save the step they wait at; returns its checkpoint's name."""
        workers.say("decide", self._seen, "save")
        while workers.state(self._seen)["saved"] < self._seen:
            if not workers.alive:
                raise TrainingError(f"{self._spec.name} failed: {workers.fit.describe()}") from workers.fit.error
            time.sleep(_POLL_S)
        return f"step-{self._seen:08d}"

    def _keep(self, own: str) -> str:
        """A copy of a checkpoint, beside those that others may still be given."""
        trial = f"trials/{self._spec.name}"
        if not self._copies.has(f"{trial}/{KEPT}/{own}"):
            self._copies.copy(f"{trial}/checkpoints/{own}", f"{trial}/{KEPT}/{own}")
        self._copies.prune(f"{trial}/{KEPT}", keep=self._copies_kept)
        return f"{trial}/{KEPT}/{own}"

    def _leave(self) -> None:
        """Has the workers end the trial that they are in, with a checkpoint."""
        workers, self._at_work = self._workers if self._at_work else None, False
        while workers is not None and workers.alive:
            # Each time: a mailbox that was started anew has forgotten it.
            workers.say("stop")
            # No evaluation is news any more, the outcome alone.
            state = workers.state(self._spec.training.max_steps)
            if state["outcome"] is not None:
                self._record(state["outcome"])
            # Workers that still wait for room have begun nothing that they would leave.
            if state["outcome"] is not None or not state["starts"] or state["task"] != self._spec.name:
                return


class _Workers:
    """A TorchTrainer whose workers wait for tasks."""

    def __init__(self, folder: Path, base: RunSpec) -> None:
        self._mailbox = open_mailbox()
        cluster = base.cluster
        self.need: Capacity = capacity(cluster)
        self._folder = folder / "workers" / uuid.uuid4().hex[:12]
        self._folder.mkdir(parents=True)
        self._times: dict[str, float] = {}
        self._note("asked")
        self.fit = Fit(
            train_tasks,
            {},
            self.need,
            self._folder,
            max_failures=cluster.max_failures,
            start_timeout_s=cluster.start_timeout_s,
            collective_timeout_s=cluster.collective_timeout_s,
            mailbox=self._mailbox,
            patient=True,
        )
        self.fit.start()

    @property
    def alive(self) -> bool:
        return self.fit.is_alive()

    def say(self, what: str, *details: object) -> None:
        import ray

        ray.get(getattr(self._mailbox, what).remote(*details))

    def state(self, known: int) -> MailboxState:
        """As `Mailbox.state` gives it, at once when there is news after the step `known`."""
        import ray

        state: MailboxState = ray.get(self._mailbox.state.remote(known, _POLL_S))
        if state["starts"] and "ready" not in self._times:
            self._note("ready")
        return state

    def close(self) -> None:
        """Lets the workers end; those that still wait for room end with the actor."""
        import ray

        self.say("close")
        if self.state(-1)["starts"]:
            self.fit.join(_END_S)
        self._note("closed")
        ray.kill(self._mailbox)

    def _note(self, what: str) -> None:
        """Puts the time on record, for what a sweep held."""
        self._times[what] = time.time()
        write_json(self._folder / TIMES_FILE, self._times)


def train_tasks(config: WorkerConfig) -> None:
    """Runs the tasks of a mailbox, until it is closed. Ray Train calls it on every worker."""
    # Here, not above: a trial's actor, which imports this file, does without torch.
    from maps_ray.training.engine import prepare_process

    device = prepare_process(config["gpu"])
    import ray
    import torch.distributed as dist

    from maps_ray.training.ranks import on_all_ranks
    from maps_ray.training.worker import run_task

    mailbox, first = config["mailbox"], dist.get_rank() == 0
    if first:
        mailbox.started.remote()
    while True:
        # Asked in turns of 20 s: the others wait in a collective, which has a timeout.
        task: RunTask | str = on_all_ranks(lambda: ray.get(mailbox.next_task.remote()) if first else "wait")[0]
        if task == "close":
            return
        if not isinstance(task, str):
            outcome = run_task(task, device, mailbox if first else None)
            if first:
                ray.get(mailbox.ended.remote(outcome))
