"""What Ray Train calls on every worker.

Errors that a restart would only repeat end the run at once: all workers return, and the outcome says why. Any other
error is the driver's to handle, which starts the workers again.
"""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING

from maps_ray.spec import RunSpec
from maps_ray.training.mailbox import Line, Outcome, RunTask, WorkerConfig
from maps_ray.training.run_faults import TrainingError

if TYPE_CHECKING:
    import torch
    from ray.actor import ActorHandle

    from maps_ray.training.mailbox import Mailbox


class TrainConfig(RunTask, WorkerConfig):
    """One run, and what `Fit` adds."""


def train_worker(config: TrainConfig) -> None:
    """Trains as one of the workers."""
    from maps_ray.training.engine import prepare_process

    device = prepare_process(config["gpu"])
    import ray
    import torch.distributed as dist

    first = dist.get_rank() == 0
    if first:
        config["mailbox"].started.remote()
    outcome = run_task(config, device, config["mailbox"] if first else None)
    if first:
        ray.get(config["mailbox"].ended.remote(outcome))


def run_task(task: RunTask, device: torch.device, mailbox: ActorHandle[Mailbox] | None) -> Outcome:
    """One worker's part of a run, from start or checkpoint to its end; nothing of it is left in the process.

    Args:
        task: with `merge`, a run is merged and nothing trained (`merged.MergedRun`).
        device: of this worker.
        mailbox: of the run, on rank 0.

    Returns:
        the outcome, as `Run.run` gives it, or `failed` with a message.
    """
    import torch.distributed as dist

    from maps_ray.run_storage import run_storage
    from maps_ray.training.claims import Fence
    from maps_ray.training.loop import Run
    from maps_ray.training.merged import MergedRun
    from maps_ray.training.run_folder import at_size

    spec, merge = at_size(RunSpec.model_validate(task["spec"]), dist.get_world_size()), task.get("merge")
    fence = Fence.from_plain(spec.run_dir, run_storage(spec), task["claims"])
    with Line(mailbox, task["records"]) as line:
        run = Run(spec, device, line, fence) if merge is None else MergedRun(spec, device, line, fence, **merge)
        try:
            return run.run()
        except TrainingError as error:
            return {"status": "failed", "message": str(error)}
        finally:
            bound = getattr(run, "bound", None)
            if bound is not None:
                bound.engine.destroy()
            del run, bound
            gc.collect()
