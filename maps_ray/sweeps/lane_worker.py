"""What the workers of a lane do: trial after trial, in processes that stay.

Imports, Ray's workers and their process group are paid for once. A trial still begins like any run: model, data and
engine are made anew, and every generator is seeded.
"""

from __future__ import annotations

import gc
from typing import Any

from maps_ray.spec import RunSpec
from maps_ray.training.errors import TrainingError


def train_lane(config: dict[str, Any]) -> None:
    """Runs the tasks of a mailbox, until it is closed. Ray Train calls it on every worker.

    Args:
        config: `mailbox`, and `gpu`.
    """
    from maps_ray.training.engine import prepare_process

    device = prepare_process(config["gpu"])
    import ray
    import torch.distributed as dist

    from maps_ray.training.together import together

    mailbox, first = config["mailbox"], dist.get_rank() == 0
    if first:
        mailbox.started.remote()
    while True:
        task: Any = together(lambda: ray.get(mailbox.next_task.remote()) if first else None)[0]
        if task == "close":
            return
        if task != "wait":
            outcome = _run(RunSpec.model_validate(task["spec"]), device, mailbox if first else None)
            if first:
                ray.get(mailbox.ended.remote(outcome))


def _run(spec: RunSpec, device: Any, mailbox: Any | None) -> dict[str, Any]:
    from maps_ray.training.loop import Run
    from maps_ray.training.mailbox import Line

    with Line(mailbox) as line:
        run = Run(spec, device, line)
        try:
            return dict(run.run())
        except TrainingError as error:
            return {"status": "failed", "message": str(error)}
        finally:
            bound = getattr(run, "bound", None)
            if bound is not None:
                bound.engine.destroy()
            del run, bound
            gc.collect()
