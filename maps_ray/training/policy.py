"""The policy of a run: what the spec's `model` section makes of a checkpoint, and what it was trained for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from maps_ray.models import load_policy
from maps_ray.models.activations import checkpoint_blocks
from maps_ray.models.lora import add_adapters
from maps_ray.spec import RunSpec
from maps_ray.training.model_checks import policy_options

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def build_policy(spec: RunSpec, dimensions: Mapping[str, int], deferred: bool = False) -> Any:
    """Opens the checkpoint and puts adapters in where the spec asks for them.

    Args:
        spec: of the run.
        dimensions: `action_dim`, and `proprio_dim` where the policy reads proprioception.
        deferred: leave the pretrained weights in their files, where `start_engine` finds them.

    Raises:
        maps_ray.models.CheckpointError: the checkpoint cannot be used.
        ValueError: a LoRA target that names no layer.
    """
    options = {**policy_options(spec), **dimensions}
    seed = spec.training.seed
    policy = load_policy(
        spec.model.checkpoint,
        dtype=DTYPES[spec.training.precision],
        seed=seed,
        attention=spec.model.attention,
        deferred=deferred,
        **options,
    )
    if spec.training.activation_checkpointing:
        checkpoint_blocks(policy.modules())
    lora = spec.model.lora
    return policy if lora is None else add_adapters(policy, lora.rank, lora.alpha, lora.targets, seed)


def save_options(spec: RunSpec, config: Any, camera_size: int) -> dict[str, Any]:
    """Keyword arguments of `maps_ray.models.save_policy` that say what was trained.

    Args:
        spec: of the run.
        config: of the policy, for its sizes.
        camera_size: side of the primary camera's images, in pixels.
    """
    names = ("num_images", "use_proprio", "chunk", "action_dim", "proprio_dim")
    trained_for = {name: getattr(config, name) for name in names} | {
        "head": spec.model.head,
        "film": spec.model.film,
        "normalization": spec.data.normalization,
        "images": "crop" if spec.data.augment else "plain",
        "gripper": spec.data.gripper,
        "cameras": spec.data.cameras,
        "camera_size": camera_size,
    }
    options: dict[str, Any] = {"trained_for": trained_for}
    if spec.model.lora is not None:
        options |= {"lora_alpha": spec.model.lora.alpha, "keep_adapter": True}
    return options
