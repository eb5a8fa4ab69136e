"""Trained weights as a checkpoint folder that says what they were trained for."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch.distributed as dist
from torch import Tensor

from maps_ray.data.demonstrations import simulated_camera
from maps_ray.models import save_policy
from maps_ray.spec import RunSpec
from maps_ray.training.claims import Fence, overtaken
from maps_ray.training.engine import DTYPES, BoundEngine, PolicyAndData
from maps_ray.training.mirror import Mirror
from maps_ray.training.ranks import RanksError, on_all_ranks
from maps_ray.training.run_faults import OvertakenError, TrainingError
from maps_ray.training.state import full_weights


def export_policy(
    spec: RunSpec,
    loaded: PolicyAndData,
    bound: BoundEngine,
    step: int,
    folder: Path,
    fence: Fence | None = None,
    mirror: Mirror | None = None,
) -> None:
    """Writes the trained weights into a folder, in place of what is there; every rank calls it.

    Args:
        spec: of the run.
        loaded: what was trained, on which data.
        bound: the engine.
        step: optimizer steps done; a checkpoint of it is there.
        folder: of the weights.
        fence: the run as the driver has claimed it; none where nobody has.
        mirror: puts the folder beside the checkpoints as the run's own.

    Raises:
        TrainingError: on every rank alike, when they cannot be written.
        OvertakenError: on every rank alike, when the run belongs to another driver; nothing was written.
    """
    rank = dist.get_rank()

    def write() -> str | None:
        if rank != 0:
            return None
        fault = fence.fault() if fence is not None else None
        if fault is None:
            # A part of the run that was lost while it wrote has left half a folder.
            shutil.rmtree(folder, ignore_errors=True)
            write_policy(spec, loaded, weights, step, folder)
            if mirror is not None:
                # The configuration last: with it the folder is a checkpoint.
                mirror.push_folder(folder, "final", last=("config.json",))
        return fault

    try:
        with bound.shown(spec):
            weights = full_weights(bound.engine, rank)
            fault = on_all_ranks(write)[0]
    except RanksError as error:
        raise TrainingError(
            f"cannot write the trained weights to {folder} ({error}); the checkpoint of step {step} holds "
            "them: free some space, then continue with --resume"
        ) from None
    if fault is not None:
        raise OvertakenError(overtaken(fault))


def write_policy(spec: RunSpec, loaded: PolicyAndData, state: Mapping[str, Tensor], step: int, folder: Path) -> None:
    """Writes trained weights as a checkpoint folder that says what they were trained for.

    Args:
        spec: of the run.
        loaded: what was trained, on which data.
        state: the whole weights, as `full_weights` gives them.
        step: optimizer steps done.
        folder: must not exist.

    Raises:
        OSError, maps_ray.models.CheckpointError: it cannot be written.
    """
    config, demonstrations = loaded.policy.config, loaded.demonstrations
    names = ("num_images", "use_proprio", "chunk", "action_dim", "proprio_dim")
    trained_for = {name: getattr(config, name) for name in names} | {
        "head": spec.model.head,
        "film": spec.model.film,
        "normalization": spec.data.normalization,
        "images": "crop" if spec.data.augment else "plain",
        "gripper": demonstrations.gripper,
        "cameras": [simulated_camera(name) for name in spec.data.cameras],
        "camera_size": demonstrations.camera_size,
    }
    if spec.model.name == "minivla_oft":
        faults = list(config.released_faults)
        trained_for |= {"attention_mask": config.attention_mask} | ({"released_faults": faults} if faults else {})
    adapter = {} if spec.model.lora is None else {"lora_alpha": spec.lora_alpha, "keep_adapter": True}
    save_policy(
        state,
        spec.model.checkpoint,
        folder,
        dtype=DTYPES[spec.training.precision],
        step=step,
        statistics={name: one.to_dict() for name, one in demonstrations.statistics.items()},
        trained_for=trained_for,
        **adapter,
    )
