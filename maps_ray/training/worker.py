"""What Ray Train calls on every worker.

Errors that a restart would only repeat end the run at once: all workers return, and `outcome.json` says why. Any other
error is Ray's to handle, which starts the workers again.
"""

from __future__ import annotations

from typing import Any

from maps_ray.spec import RunSpec
from maps_ray.training.errors import TrainingError
from maps_ray.training.run_folder import OUTCOME_FILE, write_json


def train_worker(config: dict[str, Any]) -> None:
    """Trains as one of the workers.

    Args:
        config: `spec`, the resolved spec as plain data, and `gpu`, whether each worker has one.
    """
    from maps_ray.training.engine import prepare_process

    spec = RunSpec.model_validate(config["spec"])
    device = prepare_process(config["gpu"])
    import torch.distributed as dist

    from maps_ray.training.loop import Run

    try:
        outcome = Run(spec, device).run()
    except TrainingError as error:
        outcome = {"status": "failed", "message": str(error)}
    if dist.get_rank() == 0:
        write_json(spec.run_dir / OUTCOME_FILE, outcome)
