"""What each process of the MiniVLA test under ZeRO does."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from maps_ray.models import load_policy, load_processor
from maps_ray.proximity.adam_spd import AdamSPD
from maps_ray.proximity.schedule import schedule
from maps_ray.proximity.stack import assign
from maps_ray.spec import RunSpec
from maps_ray.training.setup import start_engine
from maps_ray.training.state import full_weights

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

STEPS = 3


def load(spec: RunSpec) -> Any:
    proprio = spec.model.use_proprio
    return load_policy(spec.model.checkpoint, name=spec.model.name, num_images=2, use_proprio=proprio)


def batch(spec: RunSpec, step: int) -> dict[str, torch.Tensor]:
    """The same four samples of a step in every process."""
    rng = np.random.default_rng(step)
    processor = load_processor(spec.model.checkpoint, name=spec.model.name)
    samples = [
        processor.encode(
            sentence,
            list(rng.integers(0, 256, (2, 56, 56, 3), dtype=np.uint8)),
            rng.uniform(-1, 1, 8) if spec.model.use_proprio else None,
            rng.uniform(-1, 1, (8, 7)),
        )
        for sentence in ("open the drawer", "close it", "push the red cup", "stop")
    ]
    return processor.collate(samples)


def train(spec: RunSpec) -> dict[str, Any]:
    """Trains under ZeRO, each process on its half of the batch; weights, losses and module statistics."""
    bound = start_engine(spec, load(spec))
    engine, rank, losses = bound.engine, dist.get_rank(), []
    for step in range(STEPS):
        half = {name: value[2 * rank : 2 * rank + 2] for name, value in batch(spec, step).items()}
        loss = engine(**half).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    engine.module.eval()
    with torch.no_grad():
        actions = engine(**batch(spec, 0)).actions
    result = {"weights": full_weights(engine, rank), "losses": losses, "actions": actions}
    result["statistics"] = bound.binding.module_statistics(bound.modules)
    engine.destroy()
    return result


def trials(specs: dict[str, RunSpec]) -> dict[str, dict[str, Any]]:
    return {name: train(spec) for name, spec in specs.items()}


def reference(spec: RunSpec) -> dict[str, torch.Tensor]:
    """The weights after the same steps of one process on whole tensors and whole batches."""
    policy = load(spec)
    named = dict(policy.named_parameters())
    owners = assign(policy.stack(), named)
    chosen = spec.proximity
    strengths = schedule(policy.stack(), chosen.order, chosen.shape, chosen.lambda_max, chosen.granularity)
    groups: list[dict[str, Any]] = []
    for name, parameter in named.items():
        group = {"params": [parameter], "strength": strengths[owners[name].name]}
        if owners[name].pretrained:
            group["anchors"] = [policy.read_anchor(name).float()]
        groups.append(group)
    optimizer = AdamSPD(groups, lr=spec.training.learning_rate)
    for step in range(STEPS):
        optimizer.zero_grad()
        policy(**batch(spec, step)).loss.backward()
        optimizer.step()
    return {name: parameter.detach() for name, parameter in named.items()}
