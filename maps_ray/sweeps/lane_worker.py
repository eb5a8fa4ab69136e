"""What the workers of a lane do: trial after trial, in processes that stay.

Imports, Ray's workers and their process group are paid for once. A trial still begins like any run: model, data and
engine are made anew, and every generator is seeded.
"""

from __future__ import annotations

import gc
import time
from functools import partial
from pathlib import Path
from typing import Any

from maps_ray.spec import RunSpec
from maps_ray.training.errors import TrainingError
from maps_ray.training.run_folder import OUTCOME_FILE, read_json, write_json

TRIAL_FILE = "trial.json"
READY_FILE = "ready.json"
CLOSE_FILE = "close"
ATTEMPTS_FILE = "attempts.json"
_POLL_S = 0.1
# Shorter than a collective of the process group may take.
_TURN_S = 60.0


def train_lane(config: dict[str, Any]) -> None:
    """Runs what the driver puts into the lane's folder, until it closes the lane. Ray Train calls it on every worker.

    Args:
        config: `folder` of the lane, `max_failures` of one trial, and `gpu`.
    """
    from maps_ray.training.engine import prepare_process

    device = prepare_process(config["gpu"])
    import torch.distributed as dist

    from maps_ray.training.loop import Run
    from maps_ray.training.together import together

    folder = Path(config["folder"])
    first = dist.get_rank() == 0
    if first:
        write_json(folder / READY_FILE, {"time": time.time()})
    while True:
        task: Any = together(lambda: _next_task(folder) if first else None)[0]
        if task == "close":
            return
        if task == "wait":
            continue
        spec = RunSpec.model_validate(task["spec"])
        lost = together(partial(_count_start, spec.run_dir, first))[0]
        if lost > config["max_failures"]:
            outcome = {"status": "failed", "message": f"its workers were lost {lost} times; see the lane's logs"}
        else:
            outcome = _run(Run, spec, device)
        if first:
            write_json(spec.run_dir / OUTCOME_FILE, outcome)


def _count_start(run_dir: Path, first: bool) -> int:
    """How often this trial was started before, by this driver; rank 0 counts."""
    if not first:
        return 0
    path = run_dir / ATTEMPTS_FILE
    before = int(read_json(path) or 0)
    write_json(path, before + 1)
    return before


def _next_task(folder: Path) -> Any:
    """What to do next: a trial without outcome, `close`, or `wait` when nothing came for a while."""
    deadline = time.monotonic() + _TURN_S
    while time.monotonic() < deadline:
        if (folder / CLOSE_FILE).exists():
            return "close"
        task = read_json(folder / TRIAL_FILE)
        if task is not None and not (Path(task["run_dir"]) / OUTCOME_FILE).exists():
            return task
        time.sleep(_POLL_S)
    return "wait"


def _run(run_class: Any, spec: RunSpec, device: Any) -> dict[str, Any]:
    run = run_class(spec, device)
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
