"""What Ray Train calls on every worker.

Errors that a restart would only repeat end the run at once: all workers return, and the outcome says why. Any other
error is the driver's to handle, which starts the workers again.
"""

from __future__ import annotations

from typing import Any

from maps_ray.spec import RunSpec
from maps_ray.training.run_faults import TrainingError


def train_worker(config: dict[str, Any]) -> None:
    """Trains as one of the workers.

    Args:
        config: `spec`, the resolved spec as plain data, `mailbox`, `gpu`, whether each worker has one, `claims` of the
            run (`claims`) and `records`, where they belong (`mailbox.Records`).
    """
    from maps_ray.training.engine import prepare_process

    device = prepare_process(config["gpu"])
    import ray
    import torch.distributed as dist

    from maps_ray.run_storage import run_storage
    from maps_ray.training.claims import Fence
    from maps_ray.training.loop import Run
    from maps_ray.training.mailbox import Line, Records
    from maps_ray.training.run_folder import at_size

    spec = at_size(RunSpec.model_validate(config["spec"]), dist.get_world_size())
    first = dist.get_rank() == 0
    if first:
        config["mailbox"].started.remote()
    fence = Fence.from_plain(spec.run_dir, run_storage(spec), config["claims"])
    with Line(config["mailbox"] if first else None, Records(**config["records"])) as line:
        try:
            outcome = Run(spec, device, line, fence).run()
        except TrainingError as error:
            outcome = {"status": "failed", "message": str(error)}
    if first:
        ray.get(config["mailbox"].ended.remote(outcome))
