"""What each process of the tests of policies under ZeRO does, and what one process on whole tensors gives."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from maps_ray.models import load_processor
from maps_ray.models.lora import is_adapter
from maps_ray.proximity.adam_spd import AdamSPD
from maps_ray.proximity.schedule import schedule
from maps_ray.proximity.stack import assign
from maps_ray.spec import RunSpec
from maps_ray.training.engine import build_policy, start_engine
from maps_ray.training.state import full_weights

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

STEPS = 3


def make_spec(model: dict[str, Any], stage: int, strength: float = 2.0, chunk: int = 8) -> RunSpec:
    """A spec for a few steps in fp32; a strength above 1 projects from the second step on."""
    return RunSpec.model_validate(
        {
            "name": "policy",
            "model": model,
            "data": {"path": "unused", "chunk": chunk},
            "proximity": {"lambda_max": strength},
            "training": {
                "zero_stage": stage,
                "batch_size": 2,
                "precision": "fp32",
                "clip_norm": 0,
                "learning_rate": 1e-3,
                "max_steps": STEPS,
            },
        }
    )


def load(spec: RunSpec, deferred: bool = False) -> Any:
    return build_policy(spec, {"action_dim": 7, "proprio_dim": 8}, deferred)


def batch(spec: RunSpec, step: int) -> dict[str, torch.Tensor]:
    """The same four samples of a step in every process."""
    rng = np.random.default_rng(step)
    processor = load_processor(spec.model.checkpoint, name=spec.model.name, chunk=spec.data.chunk)
    samples = [
        processor.encode(
            sentence,
            list(rng.integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)),
            rng.uniform(-1, 1, 8) if spec.model.use_proprio else None,
            rng.uniform(-1, 1, (spec.data.chunk, 7)),
        )
        for sentence in ("pick up the red bowl", "open the drawer", "pick up the blue cup", "open")
    ]
    return processor.collate(samples)


def train(spec: RunSpec) -> dict[str, Any]:
    """Trains under ZeRO, each process on its half of the batch; weights, losses, actions and module statistics."""
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
    """The weights after the same steps of one process on whole tensors and batches; adapters' anchors are zero."""
    policy = load(spec)
    named = dict(policy.named_parameters())
    owners = assign(policy.stack(), named)
    chosen = spec.proximity
    strengths = schedule(policy.stack(), chosen.order, chosen.shape, chosen.lambda_max, chosen.granularity)
    groups: list[dict[str, Any]] = []
    for name, parameter in named.items():
        if parameter.requires_grad:
            groups.append({"params": [parameter], "strength": strengths[owners[name].name]})
            if owners[name].pretrained and not is_adapter(name):
                groups[-1]["anchors"] = [policy.read_anchor(name).float()]
    optimizer = AdamSPD(groups, lr=spec.training.learning_rate)
    for step in range(STEPS):
        optimizer.zero_grad()
        policy(**batch(spec, step)).loss.backward()
        optimizer.step()
    return {name: parameter.detach() for name, parameter in named.items()}


def error(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], start: dict[str, torch.Tensor]) -> float:
    """Distance of the weights found from those expected, as a share of the way from the start to these."""
    assert found.keys() == expected.keys()
    missed, moved = (
        torch.stack([(left[key].detach() - expected[key]).norm() for key in expected]).norm() for left in (found, start)
    )
    return (missed / moved).item()
