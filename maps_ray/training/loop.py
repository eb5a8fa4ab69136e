"""The training loop of one worker, from start or checkpoint to the trained weights.

Each worker looks for the newest complete checkpoint when it starts, so a restart after a loss, a resume by hand and a
first start are one path. Import this after `prepare_process`: it imports DeepSpeed.
"""

from __future__ import annotations

import math
import shutil
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from maps_ray.data import Batches, Loader, Mixture, loader_processes
from maps_ray.evaluation.rollouts import Progress
from maps_ray.models import save_policy
from maps_ray.spec import RunSpec, TrainingSpec
from maps_ray.tracking.tracker import Tracker
from maps_ray.training.checkpoint import (
    full_weights,
    load_state,
    newest_checkpoint,
    read_manifest,
    save_checkpoint,
    seed_everything,
    write_state,
)
from maps_ray.training.engine import DTYPES, Bound, Loaded, load, save_options, start_engine
from maps_ray.training.errors import TrainingError
from maps_ray.training.mailbox import Line
from maps_ray.training.offline import sample_errors, summary
from maps_ray.training.rollouts import Rollouts
from maps_ray.training.run_folder import EvaluationRecord, global_batch_size
from maps_ray.training.together import TogetherError, together

_RECENT_STEPS = 20


class Run:
    """One worker's part of a run, from start or checkpoint to the end."""

    def __init__(self, spec: RunSpec, device: torch.device, line: Line) -> None:
        self.spec = spec
        self.line = line
        self.training = spec.training
        self.device = device
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.global_batch_size = global_batch_size(spec)
        self.step = 0
        self.start_step = 0
        self.saved_step = -1
        self.metrics: dict[str, float] = {}
        """The last value of each metric."""
        self.measured: dict[str, float] = {}
        """What evaluations at this step gave, until the driver has been told."""
        self.record = EvaluationRecord(spec.run_dir)
        self.rollouts = Rollouts(spec, self.record, line.stop_requested)
        self.tracker = Tracker.open(spec.run_dir) if self.rank == 0 else None
        self.step_times: deque[float] = deque(maxlen=_RECENT_STEPS)
        torch.set_num_threads(max(1, int(spec.cluster.cpus_per_worker)))

    def run(self) -> dict[str, Any]:
        """Trains to the last step, or until asked to stop; returns the outcome."""
        self._say("loading model and data")
        self.loaded, self.bound = self._set_up()
        self._restore()
        if self.step < self.training.max_steps and (not self._roll_out() or self._ended_by_driver()):
            return self._outcome("stopped")
        batches = Batches(
            self.loaded.train,
            self.loaded.processor,
            seed=self.training.seed,
            global_batch_size=self.global_batch_size,
            rank=self.rank,
            world_size=self.world_size,
            micro_batches=self.training.gradient_accumulation,
            augment=self.spec.data.augment,
        )
        self._say("training")
        processes = loader_processes(self.spec.cluster.cpus_per_worker, self.device.type == "cuda")
        last = self.training.max_steps
        with Loader(batches, self.step, last, device=self.device, processes=processes) as stream:
            while self.step < self.training.max_steps:
                stop = self._step(stream)
                last = self.step == self.training.max_steps
                every = self.spec.evaluation.every
                if last or (every and self.step % every == 0):
                    self._evaluate()
                rolls = self.rollouts.due(self.step)
                # Rollouts take minutes and longer: whatever happens meanwhile, the run goes on from here.
                if last or stop or rolls or self.step % self.training.checkpoint_every == 0:
                    self._save()
                if not last and (stop or not self._roll_out() or self._ended_by_driver()):
                    return self._outcome("stopped")
        # A run that was lost after its last checkpoint is not evaluated again; rank 0 says whether it was.
        if together(lambda: self.rank == 0 and self.record.at(self.step) is None)[0]:
            self._evaluate()
        self._export(self.spec.run_dir / "final")
        rolled = self._roll_out()
        self._ended_by_driver()
        return self._outcome("finished" if rolled else "stopped")

    def _outcome(self, status: str) -> dict[str, Any]:
        return {"status": status, "step": self.step, "start_step": self.start_step, "metrics": self.metrics}

    def _set_up(self) -> tuple[Loaded, Bound]:
        loaded: list[Loaded] = []
        try:
            together(lambda: loaded.append(load(self.spec)))
        except TogetherError as error:
            raise TrainingError(f"model or data of {self.spec.name} cannot be loaded: {error}") from None
        self._say("starting the engine")
        bound = start_engine(self.spec, loaded[0].policy)
        seed_everything(self.training.seed, self.rank, 0)
        return loaded[0], bound

    def _restore(self) -> None:
        # Rank 0 decides: where storage is cached, another rank may not see the newest folder yet.
        folder = together(lambda: newest_checkpoint(self._checkpoints) if self.rank == 0 else None)[0]
        if folder is None:
            return
        self._say(f"restoring {folder.name}")
        manifest = read_manifest(folder)
        self.step = self.start_step = self.saved_step = int(manifest["step"])
        if manifest["position"] != self.step * self.global_batch_size:
            raise TrainingError(
                f"{folder} was made with another global batch: the next sample is {manifest['position']}, "
                f"not {self.step} x {self.global_batch_size}"
            )
        self.metrics = dict(manifest["metrics"]) | (self.record.rollouts_at(self.step) or {})
        seed_everything(self.training.seed, self.rank, self.step)
        saved = int(manifest["world_size"])
        try:
            together(lambda: load_state(self.bound.engine, folder, saved, self.rank, self.world_size))
        except TogetherError as error:
            raise TrainingError(
                f"cannot go on from the newest checkpoint: {error}; remove its folder to use the one before"
            ) from None

    def _step(self, stream: Iterator[dict[str, torch.Tensor]]) -> bool:
        """One optimizer step; returns whether the run was asked to stop."""
        began = time.perf_counter()
        engine = self.bound.engine
        rate = learning_rate(self.step, self.training)
        for group in engine.optimizer.param_groups:
            group["lr"] = rate
        total = 0.0
        stop = False
        for micro in range(self.training.gradient_accumulation):
            loss = engine(**next(stream)).loss
            engine.backward(loss)
            total = total + loss.detach().float()
            if micro == self.training.gradient_accumulation - 1:
                # Before the weights move: a step on a loss that is not finite would spoil them.
                mean, stop = self._agree(total / self.training.gradient_accumulation)
            engine.step()
        norm = engine.get_global_grad_norm()
        norm = math.nan if norm is None else float(norm)
        # DeepSpeed says -1 where a part of the norm is not finite.
        if not (math.isfinite(norm) and norm >= 0 and engine.was_step_applied()):
            raise self._diverged(f"the gradient norm is {norm}")
        self.step += 1
        self.step_times.append(time.perf_counter() - began)
        values = {
            "train/loss": mean,
            "train/learning_rate": rate,
            "train/grad_norm": norm,
            "train/samples_per_second": self.global_batch_size / self.step_times[-1],
        }
        if self.step % self.training.log_every == 0 or self.step == self.training.max_steps:
            values |= self.bound.statistics()
        self._log(values)
        pace = sum(self.step_times) / len(self.step_times)
        self._say(
            "training",
            loss=mean,
            samples_per_second=self.global_batch_size / pace,
            seconds_left=pace * (self.training.max_steps - self.step),
        )
        return stop

    def _agree(self, loss: torch.Tensor) -> tuple[float, bool]:
        """The loss averaged over workers, and whether to stop: one small all-reduce for both."""
        asked = self.line.stop_requested()
        sums = torch.stack([loss, torch.tensor(float(asked), device=loss.device)]).double()
        dist.all_reduce(sums)
        mean, stops = (sums / self.world_size).tolist()
        if not math.isfinite(mean):
            raise self._diverged(f"the loss is {mean}")
        return mean, stops > 0

    def _diverged(self, what: str) -> TrainingError:
        kept = newest_checkpoint(self._checkpoints)
        return TrainingError(
            f"{what} in step {self.step + 1}; "
            + (f"the last checkpoint, {kept}, is sound. " if kept else "no checkpoint was made yet. ")
            + "Try a lower training.learning_rate, more training.warmup_steps, or training.clip_norm = 1 in a new run"
        )

    def _evaluate(self) -> None:
        results = {}
        for split, samples in self.loaded.evaluation.items():
            self._say(f"evaluating {split}")
            results[split] = self._action_error(samples)
        if self.rank == 0:
            self.record.add(self.step, results)
        values = {
            f"eval/{split}/{name}": value
            for split, result in results.items()
            for name, value in result.items()
            if name.endswith("_l1")
        }
        self._log(values)
        self.measured |= values

    def _action_error(self, samples: Mixture) -> dict[str, Any]:
        """The action error on one split; every rank gets the whole result."""
        engine, processor = self.bound.engine, self.loaded.processor
        engine.module.eval()
        mine = sample_errors(engine, samples, processor, self.spec.evaluation, self.device, self.rank, self.world_size)
        engine.module.train()
        # In the order of samples, so that the sums do not depend on the number of workers.
        return summary(samples, sorted(row for rows in together(lambda: mine) for row in rows))

    def _save(self) -> None:
        if self.step == self.saved_step:
            return
        self._say("saving a checkpoint")
        began = time.perf_counter()
        save_checkpoint(
            self._checkpoints,
            self.step,
            lambda folder: write_state(self.bound.engine, folder, self.rank),
            {
                "spec": self.spec.model_dump(mode="json"),
                # The next sample of the endless sequence of epochs.
                "position": self.step * self.global_batch_size,
                "tracking": self.tracker.spool.identity().run_key if self.tracker else None,
                "metrics": self.metrics,
            },
            self.training.keep_checkpoints,
        )
        self.saved_step = self.step
        self.line.saved(self.step)
        self._log({"train/checkpoint_seconds": time.perf_counter() - began})
        self._say("training")

    def _roll_out(self) -> bool:
        """Rolls the weights of this step out, where that is due and has not ended.

        Returns:
            False when the run was asked to stop meanwhile.
        """
        if not self.rollouts.pending(self.step):
            return True
        folder = self.rollouts.folder(self.step)
        if self.step > self.start_step:
            self.rollouts.forget(self.step)
        last = self.step == self.training.max_steps
        weights = self.spec.run_dir / "final" if last else folder / "checkpoint"
        if not last:
            self._export(weights)
        self._say("rolling out")
        values = self.rollouts.run(self.step, weights, self.tracker, self._say_rollouts)
        if not last and self.rank == 0:
            shutil.rmtree(weights, ignore_errors=True)
        if values is None:
            return False
        self._log(values)
        self.measured |= values
        return True

    def _ended_by_driver(self) -> bool:
        """Tells the driver what was measured at this step, if anything was; returns whether it ends the run here.

        A checkpoint is made when the driver asks for one, and before the run ends.
        """
        while self.measured:
            word = together(lambda: self.line.evaluated(self.step, self.measured) if self.rank == 0 else None)[0]
            if word in ("save", "stop"):
                self._save()
            if word in ("go", "stop"):
                self.measured = {}
                return bool(word == "stop")
        return False

    def _export(self, folder: Path) -> None:
        self._say("writing the trained weights")
        state = full_weights(self.bound.engine, self.rank)

        def write() -> None:
            if self.rank == 0:
                shutil.rmtree(folder, ignore_errors=True)
                demonstrations = self.loaded.demonstrations
                save_policy(
                    state,
                    self.spec.model.checkpoint,
                    folder,
                    dtype=DTYPES[self.training.precision],
                    step=self.step,
                    statistics={name: one.to_dict() for name, one in demonstrations.statistics.items()},
                    **save_options(self.spec, self.loaded.policy.config, demonstrations),
                )

        try:
            together(write)
        except TogetherError as error:
            raise TrainingError(
                f"cannot write the trained weights to {folder} ({error}); the checkpoint of step {self.step} holds "
                "them: free some space, then continue with --resume"
            ) from None

    @property
    def _checkpoints(self) -> Path:
        return self.spec.run_dir / "checkpoints"

    def _log(self, values: dict[str, float]) -> None:
        self.metrics |= values
        if self.tracker:
            self.tracker.metrics(self.step, values)

    def _say_rollouts(self, progress: Progress) -> None:
        self._say("rolling out", episodes=progress.done, all_episodes=progress.total)

    def _say(self, phase: str, **values: float) -> None:
        self.line.progress(phase, self.step, **values)


def learning_rate(step: int, training: TrainingSpec) -> float:
    """Learning rate of one optimizer step: a pure function of the step, so a resumed run needs no scheduler state.

    Linear warm-up over the first `warmup_steps` steps, whose last one has the full rate, then `constant`, `linear` or
    `cosine` decay. A decaying course would reach 0 at step `max_steps`, one after the last step.

    Args:
        step: optimizer steps done before this one, 0 .. max_steps - 1.
        training: `learning_rate`, `warmup_steps`, `max_steps` and `schedule`.
    """
    if step < training.warmup_steps:
        return training.learning_rate * (step + 1) / training.warmup_steps
    done = (step - training.warmup_steps) / (training.max_steps - training.warmup_steps)
    if training.schedule == "linear":
        return training.learning_rate * (1 - done)
    if training.schedule == "cosine":
        return training.learning_rate * 0.5 * (1 + math.cos(math.pi * done))
    return training.learning_rate
