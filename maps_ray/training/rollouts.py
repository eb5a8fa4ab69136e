"""Success rates during training: rank 0 drives the simulators, all ranks wait for it.

Training stands still meanwhile, so the simulators take the CPUs that the workers do not use, and ask Ray for none.
Episodes that ended are kept in the step's folder: a run that was stopped or lost goes on after them.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from maps_ray.evaluation.rollouts import Evaluation, Progress, Resources, RolloutRequest, Stopped, evaluate, tables
from maps_ray.spec import RunSpec
from maps_ray.tracking.tracker import Tracker
from maps_ray.training.errors import TrainingError
from maps_ray.training.run_folder import EvaluationRecord
from maps_ray.training.together import TogetherError, together

# Shorter than a collective of the process group may take.
_TURN_S = 5.0


class Rollouts:
    """The rollouts of one run; every rank has them."""

    def __init__(self, spec: RunSpec, record: EvaluationRecord, stop: Callable[[], bool]) -> None:
        self._spec = spec
        self._stop = stop
        self._record = record
        self._first = dist.get_rank() == 0

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
        return together(lambda: self._first and self._record.rollouts_at(step) is None)[0]

    def folder(self, step: int) -> Path:
        """What the rollouts of a step leave: episodes, tables, videos."""
        return self._spec.run_dir / "rollouts" / f"step-{step:08d}"

    def forget(self, step: int) -> None:
        """Removes what an earlier part of the run left, which came to this step by itself."""
        if self._first:
            shutil.rmtree(self.folder(step), ignore_errors=True)

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
        drive = _Drive(lambda: self._evaluate(step, checkpoint, say)) if self._first else None
        try:
            while together(lambda: drive is not None and drive.runs())[0]:
                pass
            return together(lambda: self._keep(step, drive.result(), tracker) if drive else None)[0]
        except TogetherError as error:
            raise TrainingError(
                f"the rollouts after step {step} failed: {error}; the checkpoint of that step and the episodes that "
                "ended are kept: continue with --resume"
            ) from None

    def _evaluate(self, step: int, checkpoint: Path, say: Callable[[Progress], None]) -> Evaluation:
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
            stop=self._stop,
            resources=Resources(workers=chosen.workers, cpus=0, gpus=0),
        )

    def _keep(self, step: int, found: Evaluation | None, tracker: Tracker | None) -> dict[str, float] | None:
        if found is None:
            return None
        values = found.metrics()
        self._record.add_rollouts(step, values)
        if tracker:
            folder = self.folder(step)
            tracker.text(tables.as_text(found), f"{folder.relative_to(self._spec.run_dir)}/table.txt")
            for path in (folder / "evaluation.json", *sorted(folder.glob("videos/*/*.mp4"))):
                tracker.artifact(path, str(path.parent.relative_to(self._spec.run_dir)))
        return values


class _Drive:
    """An evaluation in a thread of its own."""

    def __init__(self, action: Callable[[], Evaluation]) -> None:
        self._action = action
        self._found: Evaluation | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="rollouts", daemon=True)
        self._thread.start()

    def runs(self) -> bool:
        """Whether it still runs, after waiting for its end for a while."""
        self._thread.join(_TURN_S)
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
            self._error = error
