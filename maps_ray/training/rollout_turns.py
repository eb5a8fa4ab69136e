"""Which steps of a run are rolled out, and what the run does meanwhile: it waits, or trains on (`rollouts`)."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from maps_ray.evaluation.rollouts import Progress
from maps_ray.spec import RunSpec
from maps_ray.tracking.tracker import Tracker
from maps_ray.training.mirror import Mirror
from maps_ray.training.ranks import RanksError, on_all_ranks
from maps_ray.training.rollouts import Aside, Rollouts
from maps_ray.training.run_faults import TrainingError
from maps_ray.training.run_folder import EvaluationRecord


@dataclass(frozen=True)
class RunActions:
    """What rollouts ask of the run whose weights they roll out."""

    stop_requested: Callable[[], bool]
    """Whether this rank was asked to stop."""
    export: Callable[[Path], None]
    """Writes the weights as they are now into a folder; every rank calls it."""
    say: Callable[..., None]
    """Shows a phase, and how many of the episodes have ended."""
    record: Callable[[dict[str, float]], None]
    """Takes what rollouts beside training gave; called on rank 0."""
    publish_record: Callable[[], None]
    """Puts `evaluation.json` where the next driver looks for it; called on rank 0."""


class RolloutTurns:
    """The rollouts of one run, step by step; every rank has them and calls them alike."""

    def __init__(
        self,
        spec: RunSpec,
        record: EvaluationRecord,
        mirror: Mirror,
        tracker: Tracker | None,
        actions: RunActions,
    ) -> None:
        """
        Args:
            spec: of the run.
            record: of its evaluations.
            mirror: of its folder.
            tracker: of rank 0; gets rates, tables and videos.
            actions: of the run.
        """
        self._rollouts = Rollouts(spec, record, actions.stop_requested)
        self._aside = Aside(self._rollouts, actions.stop_requested)
        self._mirror, self._tracker, self._run = mirror, tracker, actions
        self._last_step = spec.training.max_steps
        self._first = dist.get_rank() == 0

    def due(self, step: int) -> bool:
        """Whether the weights after so many optimizer steps are to be rolled out."""
        return self._rollouts.due(step)

    def resume(self, step: int) -> None:
        """Takes up what was left behind up to the step that a run goes on from."""
        if self._first:
            for left in self._rollouts.kept(step):
                self._aside.add(left, self._rollouts.folder(left) / "checkpoint")

    def turn(self, step: int, final: Path, came_here: bool) -> dict[str, float] | None:
        """Rolls the weights of this step out, where that is due and has not ended.

        Args:
            step: optimizer steps done.
            final: folder of the weights after the last step.
            came_here: whether this part of the run has made the weights, so that what lies there is of an earlier one.

        Returns:
            the success rates that the run has waited for, if any; None when it was asked to stop meanwhile.

        Raises:
            TrainingError: on every rank, when the rollouts cannot go on.
        """
        last = step == self._last_step
        if not self._rollouts.pending(step):
            return {} if not last or self._await_all() else None
        folder = self._rollouts.folder(step)
        if came_here:
            self._rollouts.forget(step)
        weights = final if last else folder / "checkpoint"
        if not self._rollouts.blocking:
            self._set_aside(step, weights)
            return {} if not last or self._await_all() else None
        if not last:
            self._run.export(weights)
        self._run.say("rolling out")
        values = self._rollouts.run(step, weights, self._tracker, self._say_progress)
        if self._first:
            # Behind the record, for what is lost before it is rolled out once more; before the upload, which would take
            # the weights along.
            if not last:
                shutil.rmtree(weights, ignore_errors=True)
            self._publish(step)
        return values

    def collect(self) -> None:
        """Records what rollouts beside training gave meanwhile."""
        if not self._rollouts.blocking:
            self._take()

    def close(self) -> None:
        """Ends what runs beside training; the episodes that ended stay."""
        self._aside.close()

    def _set_aside(self, step: int, weights: Path) -> None:
        """Keeps the weights of this step to be rolled out beside training."""
        if step < self._last_step and not on_all_ranks(lambda: self._first and weights.is_dir())[0]:
            # Under another name until it is complete: a run that was lost meanwhile makes it anew.
            partial = weights.with_name(".checkpoint.partial")
            self._run.export(partial)
            on_all_ranks(lambda: partial.rename(weights) if self._first else None)
        if self._first and step not in self._aside:
            self._aside.add(step, weights)

    def _await_all(self) -> bool:
        """Waits for all rollouts that training has left behind.

        Returns:
            False when the run was asked to stop meanwhile.
        """
        if self._rollouts.blocking:
            return True
        self._run.say("rolling out")

        def more() -> bool:
            self._take(wait_s=1.0)
            return self._aside.runs

        try:
            while on_all_ranks(lambda: self._first and more())[0]:
                pass
            on_all_ranks(self._aside.check)
        except RanksError as error:
            raise TrainingError(f"{error}; the weights are kept: continue with --resume") from None
        return not on_all_ranks(lambda: self._first and self._run.stop_requested())[0]

    def _take(self, wait_s: float = 0.0) -> None:
        taken = self._aside.take(wait_s) if self._first else None
        if taken is not None:
            step, evaluation, weights = taken
            self._run.record(self._rollouts.keep(step, evaluation, self._tracker))
            # The weights of the last step are the run's own, in `final`.
            if weights.name == "checkpoint":
                shutil.rmtree(weights, ignore_errors=True)
            self._publish(step)

    def _publish(self, step: int) -> None:
        folder = self._rollouts.folder(step)
        self._mirror.push_folder(folder, f"rollouts/{folder.name}", last=("evaluation.json",))
        self._run.publish_record()

    def _say_progress(self, progress: Progress) -> None:
        self._run.say("rolling out", episodes=progress.done, all_episodes=progress.total)
