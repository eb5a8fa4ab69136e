"""The training loop of one worker, from start or checkpoint to the trained weights.

Each worker looks for the newest complete checkpoint when it starts, so a restart after a loss, a resume by hand and a
first start are one path. Import this after `prepare_process`: it imports DeepSpeed.

A step (`Run._step`) queues its work on the device and waits for nothing of it. What it gave is read while the next one
runs; whether it may move the weights is decided on the device (`proximity.zero.finite`); whether to stop is agreed
beside the tensors, over gloo, and known one step later.
"""

from __future__ import annotations

import math
import time
from collections import deque
from contextlib import ExitStack, suppress
from datetime import timedelta
from pathlib import Path
from typing import Literal, Unpack

import torch
import torch.distributed as dist

from maps_ray import metrics
from maps_ray.data import Batches, Loader, Mixture, loader_processes
from maps_ray.models.decoder import padding_known
from maps_ray.proximity.zero.finite import NotFinite
from maps_ray.run_storage import work_folder
from maps_ray.spec import RunSpec, TrainingSpec
from maps_ray.tracking.tracker import Tracker
from maps_ray.training import notice
from maps_ray.training.checkpoint import Saver, newest_manifest, restore
from maps_ray.training.claims import Fence
from maps_ray.training.engine import BoundEngine, PolicyAndData, load, start_engine
from maps_ray.training.export import export_policy
from maps_ray.training.mailbox import Line, Outcome, ProgressValues
from maps_ray.training.measures import Laps, Late, Reading, Work, peak_flops
from maps_ray.training.mirror import Mirror
from maps_ray.training.offline import sample_errors, summary
from maps_ray.training.ranks import Poll, RanksError, gloo_group, on_all_ranks
from maps_ray.training.rollout_turns import RolloutTurns, RunActions
from maps_ray.training.run_faults import FinalError, TrainingError, is_out_of_memory, out_of_memory, planned_memory
from maps_ray.training.run_folder import EvaluationRecord, SplitErrors, global_batch_size
from maps_ray.training.shelf import FolderShelf, ObjectShelf, Shelf, newest
from maps_ray.training.state import seed_everything

_RECENT_STEPS = 20
_LEAVE_S = 60


class Run:
    """One worker's part of a run, from start or checkpoint to the end."""

    def __init__(self, spec: RunSpec, device: torch.device, line: Line, fence: Fence | None = None) -> None:
        """
        Args:
            spec: of the run.
            device: of this worker.
            line: to the driver.
            fence: the run as the driver has claimed it; none where nobody has.
        """
        self.spec = spec
        self.fence = fence
        self.mirror = Mirror.of(spec)
        self._room = ExitStack()
        self.shelf: Shelf
        if self.mirror.storage is None:
            self.shelf = FolderShelf(spec.run_dir / "checkpoints", fence)
            self._final = spec.run_dir / "final"
        else:
            work = self._room.enter_context(work_folder(spec.cluster.scratch))
            self.shelf = ObjectShelf(self.mirror.storage, work, fence)
            self._final = work / "final"
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
        self.tracker: Tracker | None = line.tracker(spec.run_dir) if self.rank == 0 else None
        actions = RunActions(line.stop_requested, self._export, self._say, self._keep, self._publish_record)
        self.rollouts = RolloutTurns(spec, self.record, self.mirror, self.tracker, actions)
        timeout_s = spec.cluster.collective_timeout_s
        # Made here for its timeout: whoever asks for the group first makes it, and later ones get the same.
        gloo_group(timeout_s=timeout_s)
        self.saver = Saver(
            self.shelf, spec.training.keep_checkpoints, self._committed, fence, line.secure, timeout_s=timeout_s
        )
        self.step_times: deque[float] = deque(maxlen=_RECENT_STEPS)
        self.unread: list[Reading] = []
        self.poll = Poll()
        self.write_times: deque[tuple[int, float]] = deque()
        self.peak_flops = peak_flops(device, spec.training)
        # Ray gives a worker as many threads as CPUs only where OMP_NUM_THREADS is not set
        # (`set_omp_num_threads_if_unset`): the value of a driver's shell would hold here.
        torch.set_num_threads(max(1, int(spec.cluster.cpus_per_worker)))

    def run(self) -> Outcome:
        """Trains to the last step, or until asked to stop.

        Returns:
            the outcome: `status` (`finished`, `stopped`, or `regroup` to go on in another number), `step`, `start_step`
            and the last `metrics`.

        Raises:
            TrainingError: on every rank, when the run cannot go on.
            FinalError: on a rank that leaves alone: its memory is full, or it met a fault that the others did not.
        """
        try:
            outcome = self._run()
            # What is still on its way: an answer that all ranks take part in, and a write whose fault would be left in
            # its thread.
            self.poll.settle()
            self.saver.wait()
            return outcome
        except TrainingError as error:
            self._leave_with_all(error)
            raise
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            planned = planned_memory(self.spec, self.world_size, self.device.type == "cpu")
            raise FinalError(out_of_memory(self.spec, self.rank, self.step, error, planned)) from error
        finally:
            self.rollouts.close()
            self.saver.close()
            self._room.close()

    def _run(self) -> Outcome:
        self._say("loading model and data")
        self.loaded, self.bound = self._set_up()
        self._restore()
        self.rollouts.resume(self.step)
        # A group that was lost at this step, behind its checkpoint, still owes the step's rollouts.
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
        last = self.training.max_steps
        with Loader(batches, self.step, last, device=self.device, processes=self._processes) as stream, notice.heeded():
            while self.step < self.training.max_steps:
                self._step(stream)
                stop, leave, regroup = self._agree()
                self.rollouts.collect()
                last = self.step == self.training.max_steps
                every = self.spec.evaluation.every
                if last or (every and self.step % every == 0):
                    self._evaluate()
                rolls = self.rollouts.due(self.step)
                # Rollouts take minutes and longer: whatever happens meanwhile, the run goes on from here.
                due = self.step % self.training.checkpoint_every == 0
                if last or stop or leave or rolls or due:
                    self._save()
                # A process that has got SIGTERM ends in `answer`: not before its checkpoint counts.
                if leave:
                    self.saver.wait()
                    notice.answer()
                if regroup and due and not (last or stop):
                    self.saver.wait()
                    return self._outcome("regroup")
                if not last and (stop or not self._roll_out() or self._ended_by_driver()):
                    return self._outcome("stopped")
        self._evaluate_once()
        self._export(self._final, publish=True)
        rolled = self._roll_out()
        self._ended_by_driver()
        return self._outcome("finished" if rolled else "stopped")

    def _outcome(self, status: Literal["finished", "stopped", "regroup"]) -> Outcome:
        return Outcome(status=status, step=self.step, start_step=self.start_step, metrics=self.metrics)

    def _set_up(self) -> tuple[PolicyAndData, BoundEngine]:
        # Into a list, not as a result: `on_all_ranks` sends results to all ranks.
        loaded: list[PolicyAndData] = []
        try:
            on_all_ranks(lambda: loaded.append(load(self.spec)))
        except RanksError as error:
            raise TrainingError(f"model or data of {self.spec.name} cannot be loaded: {error}") from None
        self._say("starting the engine")
        bound = start_engine(self.spec, loaded[0].policy)
        self.work = Work(bound.engine.module, lambda name: bound.modules.get(name) == "language")
        # Anew: new modules have drawn from the generators, and how many there are depends on the checkpoint.
        seed_everything(self.training.seed, self.rank, 0)
        return loaded[0], bound

    def _restore(self) -> None:
        on_all_ranks(lambda: self.mirror.pull_file("evaluation.json") if self.rank == 0 else None)
        checkpoint = newest_manifest(self.shelf)
        if checkpoint is None:
            return
        name, manifest = checkpoint
        self._say(f"restoring {name}")
        self.step = self.start_step = self.saved_step = int(manifest["step"])
        self.metrics = dict(manifest["metrics"])
        if self.rank == 0:
            # They ended after the checkpoint of their step, whose manifest knows nothing of them.
            self.metrics |= self.record.rollouts_at(self.step) or {}
        # For another number of workers, whose generators no checkpoint holds; on the same `load_state` sets them.
        seed_everything(self.training.seed, self.rank, self.step)
        restore(self.bound.engine, self.shelf, checkpoint, self.global_batch_size, self.bound.idle)

    def _step(self, stream: Loader) -> None:
        """One optimizer step. Its only wait for the device is for what the step before it gave."""
        began = time.perf_counter()
        engine, guard, laps = self.bound.engine, self.bound.guard, Laps(self.device)
        rate = learning_rate(self.step, self.training)
        # By hand: a scheduler of torch's or DeepSpeed's counts steps itself, and would be state to be restored.
        for group in engine.optimizer.param_groups:
            group["lr"] = rate
        total = torch.zeros((), device=self.device)
        for micro in range(self.training.gradient_accumulation):
            inputs = next(stream)
            laps.lap("data")
            # The loader knows; a model that asked its mask would wait for the device.
            with self.work, padding_known(stream.padded):
                loss = engine(**inputs).loss
            laps.lap("forward")
            engine.backward(loss)
            laps.lap("backward")
            total = total + loss.detach().float()
            # DeepSpeed steps in the last pass alone. The guard judges the mean of all passes and ranks, so that every
            # rank comes to the same verdict without asking the others.
            if micro == self.training.gradient_accumulation - 1:
                guard.loss = self._mean(total / self.training.gradient_accumulation)
            with suppress(NotFinite):  # `guard.spoiled` says so, and is read below.
                engine.step()
            laps.lap("optimizer")
        self.step += 1
        values = Late(torch.stack([guard.loss, guard.norm.double(), guard.spoiled.double()]))
        self._read()
        self.step_times.append(time.perf_counter() - began)
        self.unread.append(Reading(self.step, rate, values, laps, self.step_times[-1], *self.work.take()))
        if self.step % self.training.log_every == 0 or self.step == self.training.max_steps:
            self._read(fully=True)

    def _mean(self, loss: torch.Tensor) -> torch.Tensor:
        """A number averaged over workers, float64, on the device."""
        mean = loss.double()
        dist.all_reduce(mean)
        return mean / self.world_size

    def _read(self, fully: bool = False) -> None:
        """Reads and records what steps gave.

        Args:
            fully: with what costs more to read: drift, projection rates, times and memory.

        Raises:
            TrainingError: a step was not finite. Neither it nor a later one has moved the weights.
        """
        while self.unread:
            reading = self.unread.pop(0)
            loss, norm, spoiled = reading.values.read()
            if spoiled:
                what = f"the gradient norm is {norm}" if math.isfinite(loss) else f"the loss is {loss}"
                raise self._diverged(what, reading.step)
            values = {
                metrics.LOSS: loss,
                metrics.LEARNING_RATE: reading.rate,
                metrics.GRADIENT_NORM: norm,
                metrics.SAMPLES_PER_SECOND: self.global_batch_size / reading.seconds,
            }
            # Statistics are of the weights as they are, so they belong to the newest step alone.
            if fully and not self.unread:
                values |= self.bound.statistics() | reading.costs(self.device, self.world_size, self.peak_flops)
            self._log(values, reading.step)
            pace = sum(self.step_times) / len(self.step_times)
            self._say(
                "training",
                loss=loss,
                samples_per_second=self.global_batch_size / pace,
                seconds_left=pace * (self.training.max_steps - self.step),
            )
        while self.write_times:
            step, seconds = self.write_times.popleft()
            self._log({metrics.CHECKPOINT_WRITE_SECONDS: seconds}, step)

    def _agree(self) -> tuple[bool, bool, bool]:
        """Whether any rank, one step ago, had been asked to stop, had got notice, and had been asked to regroup.

        Raises:
            TrainingError: a checkpoint could not be written.
        """
        counts = self.poll.ask(
            self.line.stop_requested(), notice.given(), self.line.regroup_requested(), self.saver.failed
        )
        if counts is None:
            return False, False, False
        stops, notices, regroups, failed = counts
        if failed:
            self.saver.wait()
        return bool(stops), bool(notices), bool(regroups)

    def _diverged(self, what: str, step: int) -> TrainingError:
        self.saver.close()
        # Behind `close`: the checkpoint that is on its way may still come to count.
        kept = newest(self.shelf)
        return TrainingError(
            f"{what} in step {step}; "
            + (f"the last checkpoint, {self.shelf.place(kept)}, is sound. " if kept else "no checkpoint was made yet. ")
            + "Try a lower training.learning_rate, more training.warmup_steps, or training.clip_norm = 1 in a new run"
        )

    def _leave_with_all(self, error: TrainingError) -> None:
        """Sees that every rank leaves; one that met a fault alone ends the group, for the others may wait for it."""
        try:
            self.poll.settle()
            # Monitored, which gloo alone has: NCCL's waits for a stuck rank until its watchdog ends this process too.
            dist.monitored_barrier(group=gloo_group(), timeout=timedelta(seconds=_LEAVE_S))
        except RuntimeError:
            raise FinalError(f"rank {self.rank} alone: {error}") from error

    def _evaluate_once(self) -> None:
        """Evaluates this step, unless a group that was lost after it has; rank 0, which has the record, says so."""
        if on_all_ranks(lambda: self.rank == 0 and self.record.at(self.step) is None)[0]:
            self._evaluate()

    def _evaluate(self) -> None:
        # First what the last step gave: one that was not finite ends the run before its weights are measured.
        self._read()
        results = {}
        for split, samples in self.loaded.evaluation.items():
            self._say(f"evaluating {split}")
            with self.bound.shown(self.spec):
                results[split] = self._action_error(samples)
        if self.rank == 0:
            self.record.add(self.step, results)
            self._publish_record()
        values = {
            metrics.action_error(split, name): value
            for split, result in results.items()
            for name, value in result.items()
            if name.endswith("_l1") and isinstance(value, float)
        }
        self._log(values)
        self.measured |= values

    @property
    def _processes(self) -> int:
        """Loader processes of this worker."""
        return loader_processes(self.spec.cluster.cpus_per_worker, self.device.type == "cuda")

    def _action_error(self, samples: Mixture) -> SplitErrors:
        """The action error on one split; every rank gets the whole result."""
        engine, processor = self.bound.engine, self.loaded.processor
        engine.module.eval()
        where = (self.device, self.rank, self.world_size, self._processes)
        mine = sample_errors(engine, samples, processor, self.spec.evaluation, *where)
        engine.module.train()
        # In the order of samples, so that the sums do not depend on the number of workers.
        return summary(samples, sorted(row for rows in on_all_ranks(lambda: mine) for row in rows))

    def _save(self) -> None:
        """Starts a checkpoint of this step, if there is none; it is written while training goes on."""
        if self.step == self.saved_step:
            return
        self._read()
        self._say("saving a checkpoint")
        began = time.perf_counter()
        self.saver.save(
            self.bound.engine,
            self.step,
            {
                "spec": self.spec.model_dump(mode="json"),
                # The next sample of the endless sequence of epochs.
                "position": self.step * self.global_batch_size,
                "tracking": self.tracker.run_key if self.tracker else None,
                # A copy: the loop goes on changing its own while the thread writes.
                "metrics": dict(self.metrics),
            },
        )
        self.saved_step = self.step
        self._log({metrics.CHECKPOINT_SECONDS: time.perf_counter() - began})
        self._say("training")

    def _committed(self, step: int, seconds: float) -> None:
        # In the thread that writes: what it took is recorded by the loop.
        self.line.saved(step)
        self.write_times.append((step, seconds))

    def _roll_out(self) -> bool:
        """Rolls the weights of this step out, where that is due; False when the run was asked to stop meanwhile."""
        values = self.rollouts.turn(self.step, self._final, came_here=self.step > self.start_step)
        if values is None:
            return False
        self.metrics |= values
        self.measured |= values
        return True

    def _ended_by_driver(self) -> bool:
        """Tells the driver what was measured at this step, if anything was; returns whether it ends the run here.

        A checkpoint is made when the driver asks for one, and before the run ends.
        """
        while self.measured:
            word = on_all_ranks(lambda: self.line.evaluated(self.step, self.measured) if self.rank == 0 else None)[0]
            if word in ("save", "stop"):
                self._save()
                self.saver.wait()
            if word in ("go", "stop"):
                self.measured = {}
                return bool(word == "stop")
        return False

    def _export(self, folder: Path, publish: bool = False) -> None:
        """Writes the trained weights into a folder; `publish` puts it beside the checkpoints as the run's own."""
        self.saver.wait()
        self._say("writing the trained weights")
        mirror = self.mirror if publish else None
        export_policy(self.spec, self.loaded, self.bound, self.step, folder, self.fence, mirror)

    def _publish_record(self) -> None:
        """Puts what was evaluated where the next driver looks for it; one that was overtaken has no say in it."""
        if self.mirror.storage is not None and (self.fence is None or self.fence.fault() is None):
            self.mirror.push("evaluation.json")

    def _keep(self, values: dict[str, float]) -> None:
        self.metrics |= values

    def _log(self, values: dict[str, float], step: int | None = None) -> None:
        self.metrics |= values
        if self.tracker:
            self.tracker.metrics(self.step if step is None else step, values)

    def _say(self, phase: str, **values: Unpack[ProgressValues]) -> None:
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
