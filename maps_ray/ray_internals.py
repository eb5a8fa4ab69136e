"""What this package uses of Ray 2.60 that Ray keeps to itself, each with the reason; an upgrade is checked here.

Besides these, `training.worker` derives from `ray.train.torch.config._TorchBackend`, whose `on_start` is the only
place that runs in all workers before Ray sets ranks, and `training.placement` mends what Ray Train leaves when its
controller is lost while it starts.
Ray is imported when a function is called: commands that need none of it stay quick.
"""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ray.tune import Callback, Tuner
    from ray.tune.schedulers import TrialScheduler
    from ray.tune.search import Searcher
    from ray.util.placement_group import PlacementGroup

HEAD_RESOURCE = "node:__internal_head__"
"""Which Ray gives to the head node alone: `ray.nodes` does not say otherwise which one it is."""


def cluster_of_this_machine() -> str:
    """Address of the cluster that `address="auto"` means; empty where there is none.

    `ray.init` finds it by itself, but waits for minutes where what it finds is dead: who asks first can knock.
    """
    from ray._private.services import canonicalize_bootstrap_address

    return canonicalize_bootstrap_address("auto") or ""


def read_environment_again() -> None:
    """Lets Ray take its `RAY_` variables as they are now; the C++ side has read them when it was imported."""
    import ray

    ray._raylet.Config.initialize("")


def keep_environment() -> None:
    """Lets the workers of a cluster on this machine run in this process's environment, also below `uv run`.

    Ray would give them a copy of the working directory, checkpoints and all, refuse one of more than 512 MiB, and start
    each with `uv` (`ray._private.worker._maybe_modify_runtime_env`). Unless the user says that this is wanted.
    """
    import ray

    if "RAY_ENABLE_UV_RUN_RUNTIME_ENV" not in os.environ:
        ray._private.ray_constants.RAY_ENABLE_UV_RUN_RUNTIME_ENV = False


def free_resources_by_node() -> dict[str, dict[str, float]]:
    """Node -> free resources, of nodes that stay; `ray.available_resources` adds them up, with nodes that drain."""
    from ray._private.state import available_resources_per_node, state

    going = state.get_draining_nodes()
    return {node: free for node, free in available_resources_per_node().items() if node not in going}


def actor_lives(actor_id: str, timeout: float) -> bool:
    """Whether the cluster that this process belongs to has an actor, in the words of Ray Train's `is_actor_alive`.

    The public `ray.util.state.get_actor` asks a dashboard, of the latest cluster on this machine if there are several.

    Args:
        actor_id: as hexadecimal digits.
        timeout: not needed: the answer comes from the control service, without which this process ends.
    """
    from ray._private.state import actors

    # Without a state it is not known of, which a control service that is overloaded says as well.
    return bool(actors(actor_id).get("State") != "DEAD")


def placement_groups_of(actor_id: str) -> list[PlacementGroup]:
    """What an actor has reserved and not given back, also one that is dead; the public table does not say who made a
    placement group.

    Args:
        actor_id: as hexadecimal digits.
    """
    from ray import PlacementGroupID
    from ray._private.state import state
    from ray.core.generated.gcs_pb2 import PlacementGroupTableData
    from ray.util.placement_group import PlacementGroup

    table = state._connect_and_get_accessor().get_placement_group_table()
    rows = [PlacementGroupTableData.FromString(row) for row in table]
    return [
        PlacementGroup(PlacementGroupID(row.placement_group_id))
        for row in rows
        if row.creator_actor_id.hex() == actor_id and row.state != PlacementGroupTableData.REMOVED
    ]


def startup_faults(timeouts: bool) -> tuple[type[Exception], ...]:
    """What `ControllerError.controller_failure` is where a group of workers was lost while it started.

    The public `ControllerError` holds faults of the user's set-up as well, which starting again would only repeat.

    Args:
        timeouts: whether to count that there was no room in time.
    """
    from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError, WorkerGroupStartupTimeoutError

    return (WorkerGroupStartupFailedError, *((WorkerGroupStartupTimeoutError,) if timeouts else ()))


def preemption() -> object | None:
    """What Ray Train has told this worker of nodes of its group that will be taken away; None where there is none.

    The public `ray.train.get_preemption_info` makes all workers meet, in each step; a run's own agreement does already.
    """
    # Where there are workers of Ray Train it is loaded; a run without Ray shall not load it.
    context = sys.modules.get("ray.train.v2._internal.execution.context")
    if context is None:
        return None
    try:
        info: object | None = context.get_train_context().preemption_context.preemption_info
    except RuntimeError:
        return None
    return info


def parts_of(tuner: Tuner) -> tuple[Sequence[Callback], Searcher, TrialScheduler]:
    """Callbacks, searcher and scheduler of a tuner.

    Those of a restored one are what Tune has stored, not what was given to it, and no call hands them out.
    """
    inside = tuner._local_tuner
    return inside._run_config.callbacks, inside._tune_config.search_alg, inside._tune_config.scheduler


def awaited_checkpoint() -> type:
    """What a scheduler holds in place of a checkpoint that a trial has been asked for: a promise of this process."""
    from ray.train._internal.session import _FutureTrainingResult

    kind: type = _FutureTrainingResult
    return kind


def read_trial_checkpoint(folder: Path) -> object:
    """What `Trainable.save_checkpoint` returned, of a checkpoint that Tune keeps; the trial's own actor alone can ask
    for it, and it may have ended."""
    from ray.tune.trainable.trainable import _DICT_CHECKPOINT_FILE_NAME

    stored: object = pickle.loads((folder / _DICT_CHECKPOINT_FILE_NAME).read_bytes())
    return stored
