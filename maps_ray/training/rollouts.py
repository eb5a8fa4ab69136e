"""Success rates of a run: rank 0 drives the simulators.

While they are `blocking`, all ranks wait for it: the simulators take the CPUs that the workers leave idle, and ask Ray
for none. Otherwise the weights of the step are kept in its folder, and `Aside` rolls them out in a thread of rank 0,
whose actors have resources of their own: while training goes on, or after it.
Episodes that ended are kept in the step's folder: a run that was stopped or lost goes on after them.
"""

from __future__ import annotations

import logging
import shutil
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from maps_ray.evaluation.rollouts import Evaluation, Progress, Resources, RolloutRequest, Stopped, evaluate, tables
from maps_ray.spec import RolloutSpec, RunSpec
from maps_ray.tracking.tracker import Tracker
from maps_ray.training.ranks import RanksError, on_all_ranks
from maps_ray.training.run_faults import TrainingError
from maps_ray.training.run_folder import EvaluationRecord

# Shorter than a collective of the process group may take.
_TURN_S = 5.0
# Actors are ended, and an episode's last step may take as long.
_CLOSE_S = 30.0
_log = logging.getLogger(__name__)


class Rollouts:
    """The rollouts of one run; every rank has them."""

    def __init__(self, spec: RunSpec, record: EvaluationRecord, stop: Callable[[], bool]) -> None:
        self._spec = spec
        self._stop = stop
        self._record = record
        self._first = dist.get_rank() == 0
        chosen = spec.evaluation.rollouts
        self.blocking = chosen is None or chosen.when == "blocking"
        """Whether all ranks wait for each rollout, at its step."""

    def due(self, step: int) -> bool:
        """Whether the weights after so many optimizer steps are to be rolled out."""
        chosen = self._spec.evaluation.rollouts
        if chosen is None or step == 0:
            return False
        return step == self._spec.training.max_steps or (chosen.every > 0 and step % chosen.every == 0)

    def pending(self, step: int) -> bool:
        """Whether they are due and have not ended; every rank calls it, and gets the same answer."""
        if not self.due(step):
            return False
        # Rank 0 decides: where storage is cached, another rank may not see the newest record yet.
        return on_all_ranks(lambda: self._first and self._record.rollouts_at(step) is None)[0]

    def folder(self, step: int) -> Path:
        """What the rollouts of a step leave: episodes, tables, videos."""
        return self._spec.run_dir / "rollouts" / f"step-{step:08d}"

    def forget(self, step: int) -> None:
        """Removes what an earlier part of the run left, which came to this step by itself."""
        if self._first:
            shutil.rmtree(self.folder(step), ignore_errors=True)

    def kept(self, up_to: int) -> list[int]:
        """Steps whose weights were kept to be rolled out, and were not; on rank 0."""
        if self.blocking:
            return []
        # Weights that were only half written when a run was lost have another name (`RolloutTurns._set_aside`).
        folders = (self._spec.run_dir / "rollouts").glob("step-*/checkpoint")
        steps = sorted(int(path.parent.name.removeprefix("step-")) for path in folders)
        return [step for step in steps if step <= up_to and self._record.rollouts_at(step) is None]

    def run(
        self, step: int, checkpoint: Path, tracker: Tracker | None, say: Callable[[Progress], None]
    ) -> dict[str, float] | None:
        """Rolls the weights of a step out and records the result; every rank calls it.

        Args:
            step: of the weights.
            checkpoint: folder with the weights.
            tracker: of rank 0; gets table and videos.
            say: called on rank 0 after each episode.

        Returns:
            `rollout/<suite>/success` and so on; None when the run was asked to stop before all episodes had ended.

        Raises:
            TrainingError: on every rank, when the rollouts cannot go on.
        """
        # On a GPU the policy of the rollouts lives beside this process.
        torch.cuda.empty_cache()
        drive = _Drive(lambda: self.evaluate(step, checkpoint, say)) if self._first else None
        try:
            # Turn by turn: a collective that waited for all episodes would run into its timeout.
            while on_all_ranks(lambda: drive is not None and drive.runs())[0]:
                pass

            def keep() -> dict[str, float] | None:
                evaluation = drive.result() if drive else None
                return None if evaluation is None else self.keep(step, evaluation, tracker)

            return on_all_ranks(keep)[0]
        except RanksError as error:
            raise TrainingError(
                f"the rollouts after step {step} failed: {error}; the checkpoint of that step and the episodes that "
                "ended are kept: continue with --resume"
            ) from None

    def evaluate(
        self,
        step: int,
        checkpoint: Path,
        say: Callable[[Progress], None] | None = None,
        stop: Callable[[], bool] | None = None,
    ) -> Evaluation:
        """Rolls the weights of a step out; on rank 0, in a thread.

        Args:
            step: of the weights.
            checkpoint: folder with the weights.
            say: called after each episode.
            stop: asked whether to end early; none asks whether the run was asked to stop.

        Raises:
            Stopped: as `stop` asked for.
            Exception: whatever keeps the rollouts from their end.
        """
        chosen = self._spec.evaluation.rollouts
        assert chosen is not None
        request = RolloutRequest(
            suites=tuple(chosen.suites),
            episodes=chosen.episodes,
            tasks=tuple(chosen.tasks) if chosen.tasks is not None else None,
            seed=chosen.seed,
            max_steps=chosen.max_steps,
        )
        return evaluate(
            checkpoint,
            request,
            self.folder(step),
            on_progress=say,
            stop=stop or self._stop,
            resources=resources(chosen),
        )

    def keep(self, step: int, evaluation: Evaluation, tracker: Tracker | None) -> dict[str, float]:
        """Records what rollouts gave; on rank 0. Returns the metrics."""
        values = evaluation.metrics()
        if tracker:
            # Before the record: a run that is lost in between does this once more, and MLflow shows it once.
            tracker.metrics(step, values)
            folder = self.folder(step)
            tracker.text(tables.as_text(evaluation), f"{folder.relative_to(self._spec.run_dir)}/table.txt")
            for path in (folder / "evaluation.json", *sorted(folder.glob("videos/*/*.mp4"))):
                tracker.artifact(path, str(path.parent.relative_to(self._spec.run_dir)))
        self._record.add_rollouts(step, values)
        return values


def resources(chosen: RolloutSpec) -> Resources:
    """What rollouts ask of the cluster, in the words of `evaluate`; `trainer` is the node of this process."""
    import ray

    asked = chosen.resources
    return Resources(
        # Beside training nobody can say what is free: one simulator, where no number is given.
        workers=chosen.workers or (1 if chosen.when == "asynchronous" else None),
        cpus=asked.simulator.cpus,
        gpus=asked.policy.gpus,
        environment_gpus=asked.simulator.gpus,
        environment_memory=int(asked.simulator.memory_gib * 2**30),
        policy_cpus=asked.policy.cpus,
        policy_memory=int(asked.policy.memory_gib * 2**30),
        node=ray.get_runtime_context().get_node_id() if asked.placement == "trainer" else None,
    )


class Aside:
    """Rollouts of steps that training has left behind, one after the other, in a thread of rank 0."""

    def __init__(self, rollouts: Rollouts, stop: Callable[[], bool]) -> None:
        self._rollouts = rollouts
        self._stop = stop
        self._waiting: deque[tuple[int, Path]] = deque()
        self._now: tuple[int, Path, _Drive] | None = None
        self._closed = False
        self._faults: list[str] = []

    def add(self, step: int, weights: Path) -> None:
        """Has the weights of a step rolled out when those before them are."""
        self._waiting.append((step, weights))

    def __contains__(self, step: int) -> bool:
        now = [self._now[0]] if self._now else []
        return step in (*now, *(waiting for waiting, _ in self._waiting))

    def take(self, wait_s: float = 0.0) -> tuple[int, Evaluation, Path] | None:
        """The next result, with its step and the folder of the weights; None when there is none yet.

        Args:
            wait_s: how long to wait for one.
        """
        if self._now is None and self._waiting:
            step, weights = self._waiting.popleft()
            self._now = (step, weights, _Drive(self._action(step, weights)))
        if self._now is None or self._now[2].runs(wait_s):
            return None
        (step, weights, drive), self._now = self._now, None
        try:
            evaluation = drive.result()
        except Exception as error:
            _log.warning("the rollouts after step %d failed: %s", step, error)
            # Not raised: training goes on, and `check` ends the run where all ranks ask for it.
            self._faults.append(f"the rollouts after step {step} failed: {error}")
            return None
        return None if evaluation is None else (step, evaluation, weights)

    @property
    def runs(self) -> bool:
        """Whether any are left that may still come to an end."""
        return not self._stop() and (self._now is not None or bool(self._waiting))

    def check(self) -> None:
        """Raises `RuntimeError` where some have failed."""
        if self._faults:
            raise RuntimeError("; ".join(self._faults))

    def close(self) -> None:
        """Ends what runs; the episodes that ended stay."""
        self._closed = True
        if self._now is not None:
            self._now[2].runs(_CLOSE_S)

    def _action(self, step: int, weights: Path) -> Callable[[], Evaluation]:
        return lambda: self._rollouts.evaluate(step, weights, stop=lambda: self._closed or self._stop())


class _Drive:
    """An evaluation in a thread of its own."""

    def __init__(self, action: Callable[[], Evaluation]) -> None:
        self._action = action
        self._found: Evaluation | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="rollouts", daemon=True)
        self._thread.start()

    def runs(self, wait_s: float = _TURN_S) -> bool:
        """Whether it still runs, after waiting for its end for a while."""
        self._thread.join(wait_s)
        return self._thread.is_alive()

    def result(self) -> Evaluation | None:
        """What it found; None when the run was asked to stop. Raises what it raised."""
        if self._error is not None and not isinstance(self._error, Stopped):
            raise self._error
        return self._found

    def _run(self) -> None:
        try:
            self._found = self._action()
        except BaseException as error:
            # `result` raises it where it is asked for: here it would end the thread alone.
            self._error = error
