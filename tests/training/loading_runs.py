"""What each process of the tests of sharded loading does."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import policy_runs
import torch
import torch.distributed as dist

from maps_ray.models.lora import base_name
from maps_ray.proximity.zero import place_weights
from maps_ray.proximity.zero.partitions import spans
from maps_ray.spec import RunSpec
from maps_ray.training.engine import deepspeed_config, start_engine
from maps_ray.training.state import full_weights

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))


def start(spec: RunSpec, deferred: bool) -> dict[str, Any]:
    """This rank's masters and, on rank 0, all weights, buffers and the loss and gradient norm of one step."""
    bound = start_engine(spec, policy_runs.load(spec, deferred))
    engine, rank = bound.engine, dist.get_rank()
    masters = {
        span.name: (span.start, span.flat.detach()[span.offset : span.offset + span.numel].clone())
        for span in spans(engine)
    }
    weights = {name: tensor.clone() for name, tensor in full_weights(engine, rank).items()}
    buffers = {name: buffer.clone() for name, buffer in engine.module.named_buffers()}
    batch = {name: value[2 * rank : 2 * rank + 2] for name, value in policy_runs.batch(spec, 0).items()}
    loss = engine(**batch).loss
    engine.backward(loss)
    engine.step()
    norm = float(engine.get_global_grad_norm())
    trained = full_weights(engine, rank)
    engine.destroy()
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, masters)
    return {
        "masters": gathered,
        "weights": weights,
        "buffers": buffers,
        "loss": loss.item(),
        "norm": norm,
        "trained": trained,
    }


def trials(specs: dict[str, RunSpec]) -> dict[str, dict[str, Any]]:
    return {
        f"{name} {how}": start(spec, how == "deferred") for name, spec in specs.items() for how in ("plain", "deferred")
    }


def bytes_read(spec: RunSpec) -> list[int]:
    """How much each rank reads of the pretrained weights."""
    policy = policy_runs.load(spec, deferred=True)
    read = place_weights(
        policy,
        {name for name, _ in policy.named_parameters() if base_name(name) in policy.deferred},
        lambda name: policy.read_anchor(base_name(name)),
        deepspeed_config(spec.training),
    )
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, read)
    return gathered


def with_checkpoints(spec: RunSpec) -> dict[str, Any]:
    """The same, and activations are computed again for the gradients."""
    training = spec.training.model_copy(update={"activation_checkpointing": True})
    return start(spec.model_copy(update={"training": training}), deferred=True)


def all_of_it(specs: dict[str, RunSpec]) -> dict[str, Any]:
    torch.manual_seed(0)
    result: dict[str, Any] = {"trials": trials(specs)}
    result["bytes"] = {name: bytes_read(spec) for name, spec in specs.items()}
    result["checkpointed"] = {name: with_checkpoints(spec) for name, spec in specs.items() if "fp32" in name}
    return result
