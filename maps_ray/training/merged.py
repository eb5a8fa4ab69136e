"""A run that trains nothing: weights between those of a finished run and its base, evaluated as a run's are."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence

import torch

from maps_ray.models import local_folder
from maps_ray.run_copies import run_at
from maps_ray.spec import ProximitySpec, RunSpec
from maps_ray.training.claims import LAG_S, Fence
from maps_ray.training.loop import Run
from maps_ray.training.mailbox import Line, Outcome
from maps_ray.training.merge import merge
from maps_ray.training.ranks import RanksError, on_all_ranks
from maps_ray.training.run_faults import TrainingError


class MergedRun(Run):
    """One worker's part of it. The merged weights lie in the run folder's `final`, under an object store in that of
    each node, and only as long as the run: `maps-ray merge` makes them again at no cost."""

    def __init__(
        self,
        spec: RunSpec,
        device: torch.device,
        line: Line,
        fence: Fence | None,
        *,
        run: str,
        weights: Mapping[str, float] | None,
        lines: Sequence[float] | None,
    ) -> None:
        """Takes a run's spec, and what is merged.

        Args:
            spec: of data, evaluation and the checkpoint that `run` started from.
            device: of this worker.
            line: to the driver.
            fence: the run as its driver has claimed it.
            run: folder of a finished run, or its address on an object store.
            weights, lines: one of them, as `maps_ray.training.merge.merge` takes it.
        """
        super().__init__(spec, device, line, fence)
        self._source, self._weights, self._lines = run, weights, lines
        self._final = spec.run_dir / "final"
        # The first of those that see the same folder.
        self._writes = self.rank == 0
        if self.mirror.storage is not None:
            from ray.train import get_context

            self._writes = get_context().get_local_rank() == 0

    def run(self) -> Outcome:
        try:
            return super().run()
        finally:
            if self._writes:
                shutil.rmtree(self._final, ignore_errors=True)

    def _run(self) -> Outcome:
        source, final = self._source, self._final

        def write() -> None:
            if self.rank == 0:
                self.mirror.pull_file("evaluation.json")
            if self._writes:
                shutil.rmtree(final, ignore_errors=True)
                base = local_folder(self.spec.model.checkpoint)
                with run_at(source, self.spec.cluster.scratch) as folder:
                    merge(folder, final, base=base, weights=self._weights, lines=self._lines, wait_s=LAG_S)

        self._say("merging weights")
        try:
            on_all_ranks(write)
        except RanksError as error:
            raise TrainingError(f"{source} cannot be merged: {error}") from None
        # Nothing is held: the engine is there to evaluate as a run's is.
        self.spec = self.spec.model_copy(
            update={
                "model": self.spec.model.model_copy(update={"checkpoint": final, "lora": None}),
                "proximity": ProximitySpec(order=self.spec.proximity.order, lambda_max=0.0),
                "evaluation": self.spec.evaluation.model_copy(update={"averaged": False}),
            }
        )
        self._say("loading model and data")
        self.loaded, self.bound = self._set_up()
        self.step = self.start_step = self.training.max_steps
        self._evaluate_once()
        return self._outcome("finished" if self._roll_out() else "stopped")
