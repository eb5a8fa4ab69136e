"""A sweep from its plan to its last trial.

The driver searches and decides; lanes of Ray Train workers train. It reads how trials stand from their folders, ends
poor ones through the stop file that Ctrl-C uses too, and writes every decision into the journal before it acts on it.
"""

from __future__ import annotations

import os
import sys
import time
import uuid
from collections import deque
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from maps_ray.sweeps.decisions import Decisions
from maps_ray.sweeps.folder import append_line, begin_folder
from maps_ray.sweeps.journal import Ended, Journal, Status
from maps_ray.sweeps.lane import Lane
from maps_ray.sweeps.objectives import cost
from maps_ray.sweeps.plan import Plan, Trial
from maps_ray.sweeps.results import evaluations, newest_values
from maps_ray.sweeps.view import View
from maps_ray.tracking import Tracker, replay
from maps_ray.training.cluster import Capacity, capacity, most_groups, ray_cluster
from maps_ray.training.errors import TrainingError
from maps_ray.training.fit import ray_train_environment
from maps_ray.training.progress import ProgressWriter
from maps_ray.training.run_folder import locked, read_json, write_json
from maps_ray.training.train import StopOnSignal, TrainResult, begin

_POLL_S = 0.25
_CLOSE_S = 30.0
_SHIP_S = 30.0


@dataclass(frozen=True)
class SweepResult:
    """How a sweep ended."""

    status: Literal["finished", "stopped"]
    """`stopped`: interrupted, to be continued with `--resume`."""
    folder: Path
    trials: int
    """Trials that have ended, baselines and repeats included."""


def run_sweep(plan: Plan, resume: bool = False, show: bool = True) -> SweepResult:
    """Runs a sweep, or continues the one in its folder; a finished one is not run again.

    Raises:
        SpecError: the folder holds a sweep and `resume` is false, or one of another spec.
        TrainingError: the cluster can never hold a trial's workers, or keeps losing them.
    """
    begin_folder(plan, resume)
    with ExitStack() as stack:
        stack.enter_context(locked(plan.folder))
        stop = stack.enter_context(StopOnSignal())
        stack.enter_context(ray_cluster(plan.base.cluster))
        # Ray takes SIGTERM for itself when it connects.
        stop.install()
        # Once for all lanes: they come and go in threads of one process.
        stack.enter_context(ray_train_environment(plan.base.cluster.start_timeout_s))
        need = capacity(plan.base.cluster)
        tracker = Tracker.create(
            plan.folder,
            uri=plan.tracking_uri,
            experiment=plan.base.tracking.experiment,
            run_name=plan.spec.name,
            params={"sweep": plan.spec.model_dump(mode="json")},
            tags={"maps_ray.kind": "sweep"},
            credentials=plan.base.tracking.credentials,
        )
        view = stack.enter_context(View(plan, show))
        sweep = _Sweep(plan, need, tracker, view, stop)
        try:
            status = sweep.run()
        except BaseException as error:
            sweep.abandon()
            tracker.finish("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED", 0)
            raise
        tracker.finish("FINISHED" if status == "finished" else "KILLED", _SHIP_S)
    if status == "finished":
        replay(plan.folder)
    return SweepResult(status, plan.folder, len(sweep.journal.ended))


class _Sweep:
    def __init__(self, plan: Plan, need: Capacity, tracker: Tracker, view: View, stop: StopOnSignal) -> None:
        self.plan = plan
        self.need = need
        self.tracker = tracker
        self.view = view
        self.stop = stop
        self.journal = Journal(plan.folder)
        self.decisions = Decisions(plan, self.journal)
        self.lanes: list[Lane] = []
        self.failed_lanes = 0
        self.waiting = deque(self.decisions.unfinished())
        self.trackers: dict[str, Tracker] = {}
        self.ending: set[str] = set()
        self.began: dict[str, float] = {}
        self.exhausted = False
        self.timeline: dict[str, Any] = {}

    def run(self) -> Literal["finished", "stopped"]:
        """Runs to the end of the budget, or until asked to stop."""
        while True:
            asked = self.stop.requested.is_set()
            for lane in list(self.lanes):
                self._attend(lane, asked)
            running = [lane for lane in self.lanes if lane.trial is not None]
            if asked and not running:
                break
            if not asked:
                self._fill()
                if not self.waiting and not any(lane.trial for lane in self.lanes):
                    break
            self._sample()
            self.view.show(self.journal, [lane.trial for lane in self.lanes if lane.trial], len(self.waiting))
            time.sleep(_POLL_S)
        self.view.show(self.journal, [], len(self.waiting), last=True)
        for lane in self.lanes:
            lane.mailbox.close.remote()
        deadline = time.monotonic() + _CLOSE_S
        for lane in self.lanes:
            # One that still waits for room has no workers that could see it; it ends with Ray.
            if lane.state["starts"]:
                lane.join(max(0.0, deadline - time.monotonic()))
        self.lanes.clear()
        self._sample()
        return "stopped" if asked else "finished"

    def abandon(self) -> None:
        """Records that the running trials were left as they are."""
        for tracker in self.trackers.values():
            tracker.finish("KILLED", 0)

    def _fill(self) -> None:
        """Gives waiting trials to lanes without one, and opens lanes while there is work for them."""
        most = self._most_at_once()
        idle = [lane for lane in self.lanes if lane.trial is None]
        for lane in idle:
            if lane.state["starts"] and self._next_trial():
                self._start(self.waiting.popleft(), lane)
        starting = sum(not lane.state["starts"] for lane in self.lanes)
        while len(self.lanes) < most and self._next_trial(starting):
            folder = self.plan.folder / "lanes" / uuid.uuid4().hex[:12]
            self.lanes.append(Lane(folder, self.need, self.plan.base.cluster))
            starting += 1
        if not self._next_trial():
            # What is left runs elsewhere: let the cluster have the workers back.
            for lane in idle:
                if lane.trial is None:
                    lane.mailbox.close.remote()

    def _most_at_once(self) -> int:
        wanted = self.plan.spec.max_concurrent
        cluster = self.plan.base.cluster
        if cluster.autoscaling or (wanted and (cluster.address is not None or "RAY_ADDRESS" in os.environ)):
            # An autoscaler does not say how far it goes: asking is what makes it add nodes.
            return wanted or sys.maxsize
        return min(wanted or sys.maxsize, most_groups(self.need))

    def _next_trial(self, beside: int = 0) -> bool:
        """Whether more than `beside` trials wait, after deciding schedules if need be and allowed."""
        while len(self.waiting) <= beside and not self.exhausted:
            trials = self.decisions.next_trials(self._worker_hours())
            self.exhausted = not trials
            self.waiting.extend(trials)
        return len(self.waiting) > beside

    def _worker_hours(self) -> float:
        now = time.time()
        seconds = sum(ended.seconds for ended in self.journal.ended.values())
        seconds += sum(now - self.began[lane.trial.name] for lane in self.lanes if lane.trial)
        return seconds * self.need.workers / 3600

    def _start(self, trial: Trial, lane: Lane) -> None:
        run_dir = trial.run_dir
        run_dir.mkdir(parents=True, exist_ok=True)
        finished = read_json(run_dir / "result.json")
        if finished and finished["status"] == "finished":
            # The driver was killed between the trial's end and the journal's line.
            self.decisions.judge(trial)
            Tracker.open(run_dir).finish("FINISHED", 0)
            self._end(trial, "finished", finished["step"], finished["seconds"])
            return
        if self.decisions.judge(trial) or trial.name in self.ending:
            Tracker.open(run_dir).finish("KILLED", 0)
            self._end(trial, "stopped early", evaluations(run_dir)[-1][0], 0.0)
            return
        for name in ("result.json", "progress.json", "error.txt"):
            (run_dir / name).unlink(missing_ok=True)
        facts = self.plan.facts(trial.schedule.proximity)
        self.trackers[trial.name] = begin(
            trial.spec,
            params={**facts.params(), "source": trial.schedule.source, "schedule": trial.schedule.number},
            tags={"maps_ray.kind": "trial", "maps_ray.sweep": self.plan.spec.name},
            parent=self.plan.folder,
        )
        self.began[trial.name] = time.time()
        lane.give(trial)

    def _attend(self, lane: Lane, asked: bool) -> None:
        """Looks at one lane: has its trial ended, is it to end, are its workers lost."""
        trial = lane.trial
        if trial is not None:
            if self.decisions.judge(trial):
                self.ending.add(trial.name)
            if asked or trial.name in self.ending:
                lane.mailbox.stop.remote()
            state = lane.state
            if state["progress"]:
                ProgressWriter(trial.run_dir, trial.spec.training.max_steps).write(**state["progress"])
            outcome = state["outcome"]
            if outcome is not None:
                lane.trial = None
                self.failed_lanes = 0
                self._ended(trial, outcome)
        if lane.alive:
            return
        self.lanes.remove(lane)
        if lane.trial is not None:
            self.waiting.appendleft(lane.trial)
            self.trackers.pop(lane.trial.name).finish("KILLED", 0)
        others_work = any(other.trial is not None for other in self.lanes)
        # A lane that found no room beside others that work is tried again, not counted.
        if lane.error is not None and (lane.state["starts"] or not others_work):
            self.failed_lanes += 1
            if self.failed_lanes > self.plan.base.cluster.max_failures:
                raise TrainingError(
                    f"{self.plan.spec.name} was given up: {self.failed_lanes} groups of workers were lost in a row, "
                    f"at last by {str(lane.error).strip().splitlines()[-1]}; continue with --resume"
                ) from lane.error

    def _ended(self, trial: Trial, outcome: dict[str, Any]) -> None:
        seconds = round(time.time() - self.began.pop(trial.name), 3)
        tracker = self.trackers.pop(trial.name)
        stopped_early = outcome["status"] == "stopped" and trial.name in self.ending
        if outcome["status"] == "failed":
            (trial.run_dir / "error.txt").write_text(outcome["message"])
            tracker.tags({"maps_ray.ended": f"failed: {outcome['message']}"})
            tracker.finish("FAILED", 0)
            newest = (evaluations(trial.run_dir) or [(0, {})])[-1]
            self._end(trial, "failed", newest[0], seconds, outcome["message"])
            return
        result = TrainResult(
            status=outcome["status"],
            step=outcome["step"],
            start_step=outcome["start_step"],
            run_dir=str(trial.run_dir),
            metrics=outcome["metrics"],
            final=str(trial.run_dir / "final") if outcome["status"] == "finished" else None,
            seconds=seconds,
        )
        write_json(trial.run_dir / "result.json", asdict(result))
        if outcome["status"] == "finished":
            tracker.finish("FINISHED", 0)
            self._end(trial, "finished", outcome["step"], seconds)
        elif stopped_early:
            tracker.tags({"maps_ray.ended": f"stopped early by {self.plan.spec.scheduler.name}, step {result.step}"})
            tracker.finish("KILLED", 0)
            self._end(trial, "stopped early", outcome["step"], seconds)
        else:
            tracker.finish("KILLED", 0)

    def _end(self, trial: Trial, status: Status, step: int, seconds: float, error: str | None = None) -> None:
        values = newest_values(trial.run_dir)
        number = trial.schedule.number
        self.journal.end(Ended(trial.name, number, trial.seed, status, step, values, seconds, error))
        self.decisions.ended(number)
        done = self.journal.ended.values()
        complete = [ended.values for ended in done if ended.status == "finished"]
        names = self.plan.spec.objectives if complete else ()
        best = {f"best/{name}": min((v[name] for v in complete), key=partial(cost, name)) for name in names}
        self.tracker.metrics(len(done), {**best, "sweep/worker_hours": self._worker_hours()})
        self.view.ended(self.journal.ended[trial.name])

    def _sample(self) -> None:
        """A line in the timeline when nodes or trials have changed."""
        import ray

        now = {
            "nodes": sum(node["Alive"] for node in ray.nodes()),
            "running": sum(lane.trial is not None for lane in self.lanes),
            "pending": len(self.waiting),
        }
        if now != self.timeline:
            self.timeline = now
            append_line(self.plan.folder / "timeline.jsonl", {"time": time.time(), **now})
