"""What Ray Train runs on every worker: before it sets the ranks, and then the run itself.

Ranks come from Ray alone. A shell inside a batch job carries the ranks of its own launcher (mpirun, srun, torchrun),
and Ray's processes inherit them, also on nodes where `ray start` was called so. DeepSpeed takes Open MPI's for its own;
torch, under torchrun's variables, waits for a store that nobody serves. So they are taken out.

Errors that a restart would only repeat end the run at once: all workers return, and the outcome says why. Any other
error is the driver's to handle, which starts the workers again.
"""

from __future__ import annotations

import gc
import os
import re
from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend

from maps_ray.spec import RunSpec
from maps_ray.training.mailbox import Line, Outcome, RunTask, WorkerConfig
from maps_ray.training.notice import watch_sigterm
from maps_ray.training.run_faults import TrainingError

if TYPE_CHECKING:
    import torch
    from ray.actor import ActorHandle
    from ray.train._internal.base_worker_group import BaseWorkerGroup

    from maps_ray.training.mailbox import Mailbox


_LAUNCHERS = re.compile(
    r"""(OMPI|PMIX|PRTE|PMI2?|HYDRA|HYDI|I_MPI|MPIR|MV2|SMPI)_.*  # MPI: Open MPI, MPICH, Intel, MVAPICH, Spectrum
    |MPI_LOCAL.*|(MPI|PMI)_?(RANK|SIZE)
    |(SLURMD?|FLUX|PALS|ALPS|JSM|LSB)_.*  # batch systems
    |TORCHELASTIC_.*|MASTER_(ADDR|PORT)|ROLE_NAME  # torchrun
    |((LOCAL|NODE|GROUP|ROLE|CROSS)_)?RANK|((LOCAL|GROUP|ROLE)_)?WORLD_SIZE|(LOCAL|CROSS)_SIZE
    |AZUREML_.*|AZ_BATCH.*|SM_TRAINING_ENV|DLTS_.*  # where DeepSpeed looks for the ranks of Open MPI
    """,
    re.VERBOSE,
)


def forget_launchers(environment: MutableMapping[str, str] | None = None) -> None:
    """Removes every other launcher's variables from `environment`, by default this process's own."""
    environment = os.environ if environment is None else environment
    for name in [name for name in environment if _LAUNCHERS.fullmatch(name)]:
        del environment[name]


class _RaysRanks(_TorchBackend):
    def on_start(self, worker_group: BaseWorkerGroup, backend_config: TorchConfig) -> None:
        # Before Ray sets the ranks, and torch reads them.
        worker_group.execute(forget_launchers)
        worker_group.execute(watch_sigterm)
        super().on_start(worker_group, backend_config)


@dataclass
class RaysRanks(TorchConfig):
    """Ray's set-up of torch's process group, in an environment without other launchers' variables."""

    @property
    def backend_cls(self) -> type[_RaysRanks]:
        return _RaysRanks


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
        # Waits: with the function's end the process may end, and a call on its way with it.
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

    # Not above: `loop` imports DeepSpeed, which must not be before `prepare_process`.
    from maps_ray.run_storage import run_storage
    from maps_ray.training.claims import Fence
    from maps_ray.training.loop import Run
    from maps_ray.training.merged import MergedRun
    from maps_ray.training.ranks import gloo_group, on_all_ranks
    from maps_ray.training.run_folder import at_size

    spec, merge = at_size(RunSpec.model_validate(task["spec"]), dist.get_world_size()), task.get("merge")
    fence = Fence(spec.run_dir, run_storage(spec), task["claims"])
    unseen = on_all_ranks(fence.unseen, gloo_group(timeout_s=spec.cluster.collective_timeout_s))
    if any(unseen):
        return {"status": "failed", "message": "; ".join(dict.fromkeys(fault for fault in unseen if fault))}
    with Line(mailbox, task["records"]) as line:
        run = Run(spec, device, line, fence) if merge is None else MergedRun(spec, device, line, fence, **merge)
        try:
            return run.run()
        except TrainingError as error:
            return {"status": "failed", "message": str(error)}
        finally:
            # A run that failed while it was set up has none.
            bound = getattr(run, "bound", None)
            if bound is not None:
                bound.engine.destroy()
            del run, bound
            # The run and its parts refer to one another (`RunActions` holds its methods): without it the next trial of
            # this worker would find the engine's memory taken.
            gc.collect()
