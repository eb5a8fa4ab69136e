"""A run's loop in a shared folder, each rank on a node of its own that sees late what the other has written: it goes to
its end, and on from a checkpoint of just now, as where nothing lags."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed as dist
from lagging import LaggingFolder
from loop_runs import final_bytes, keep_checkpoint, run
from run_specs import MakeSpec

from maps_ray.spec import RunSpec
from maps_ray.tracking.tracker import Tracker

# Longer than a busy machine takes from one rank's write to the other's look.
LAG_S = 10.0


def everything(specs: dict[str, RunSpec]) -> dict[str, Any]:
    run(specs["undisturbed"])
    spec = specs["lagging"]
    storage = spec.run_dir.parent
    folder = LaggingFolder(storage, storage.with_name(f"{storage.name}-names"), LAG_S, f"node{dist.get_rank()}")
    with folder.installed():
        first = run(spec)
        finals = [final_bytes(spec)] if dist.get_rank() == 0 else []
        keep_checkpoint(spec, 4)
        dist.barrier()
        before = folder.hidden
        second = run(spec)
    dist.barrier()
    hidden: list[int] = [0, 0]
    dist.all_gather_object(hidden, folder.hidden - before)
    finals += [final_bytes(spec), final_bytes(specs["undisturbed"])]
    return {"first": first, "second": second, "finals": finals, "hidden": hidden}


def test_each_rank_sees_the_others_files_late(make_spec: MakeSpec, tmp_path: Path) -> None:
    from processes import in_processes

    training = {"max_steps": 6, "checkpoint_every": 4, "keep_checkpoints": 2}
    specs = {name: make_spec(name, training=training) for name in ("undisturbed", "lagging")}
    for spec in specs.values():
        Tracker.create(spec.run_dir, uri="sqlite:///unused.db", experiment="e", run_name=spec.name, ship=False)
    found = in_processes(2, everything, specs)
    assert [found[part].get("message") for part in ("first", "second")] == [None, None]
    assert (found["first"]["start_step"], found["second"]["start_step"]) == (0, 4)
    first, second, undisturbed = found["finals"]
    assert len(undisturbed) == 3 and first == second == undisturbed
    # The second rank looked for the first one's part in vain, and waited.
    assert found["hidden"][1] > 0
