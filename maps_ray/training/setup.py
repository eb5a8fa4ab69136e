"""What a worker trains: policy, data and engine, from the spec."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from maps_ray.data import Demonstrations, Processor, Samples
from maps_ray.data.layout import ACTION, STATE
from maps_ray.models import load_policy, load_processor
from maps_ray.proximity.schedule import schedule
from maps_ray.proximity.stack import StackLayer, assign
from maps_ray.proximity.zero import Binding, ShardedAdamSPD, bind
from maps_ray.spec import RunSpec
from maps_ray.training.engine import initialize

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Loaded:
    """What is read from files, before any process talks to another."""

    policy: Any
    processor: Processor
    demonstrations: Demonstrations
    train: Samples
    evaluation: dict[str, Samples]
    """Split -> samples, for the splits that training does not see."""


@dataclass(frozen=True)
class Bound:
    """The engine with its anchors."""

    engine: Any
    binding: Binding
    modules: dict[str, str]
    """Parameter name -> its broadest module, for metrics."""


def load(spec: RunSpec) -> Loaded:
    """Reads checkpoint and data.

    Raises:
        SpecError, DatasetError, maps_ray.models.CheckpointError: they cannot be used.
    """
    demonstrations = Demonstrations(spec.data, use_proprio=spec.model.use_proprio)
    width = demonstrations.dataset.width
    sizes: dict[str, Any] = {"chunk": spec.data.chunk, "action_dim": width(ACTION)}
    proprio: dict[str, Any] = {"proprio_dim": width(STATE)} if spec.model.use_proprio else {}
    policy = load_policy(
        spec.model.checkpoint,
        name=spec.model.name,
        dtype=DTYPES[spec.training.precision],
        num_images=len(spec.data.cameras),
        use_proprio=spec.model.use_proprio,
        seed=spec.training.seed,
        **sizes,
        **proprio,
    )
    processor = load_processor(spec.model.checkpoint, name=spec.model.name, **sizes)
    others = [split for split in demonstrations.splits if split != "train"]
    return Loaded(
        policy,
        processor,
        demonstrations,
        demonstrations.samples("train"),
        {split: demonstrations.samples(split) for split in others},
    )


def start_engine(spec: RunSpec, policy: Any) -> Bound:
    """Shards the policy and gives each shard its strength and anchor; every rank calls it."""
    stack: list[StackLayer] = policy.stack()
    names = [name for name, _ in policy.named_parameters()]
    owners = assign(stack, names)
    proximity = spec.proximity
    strengths = schedule(stack, proximity.order, proximity.shape, proximity.lambda_max, proximity.granularity)
    dtype = DTYPES[spec.training.precision]

    def read_anchor(name: str) -> Tensor | None:
        if not owners[name].pretrained:
            return None
        anchor: Tensor | None = policy.read_anchor(name)
        # bf16 training starts from the weights rounded to bf16: those are the anchor, and hold no drift at the start.
        return anchor.to(dtype) if anchor is not None and dtype == torch.bfloat16 else anchor

    training = spec.training
    optimizer = ShardedAdamSPD(policy.parameters(), lr=training.learning_rate, betas=training.betas, eps=training.eps)
    engine = initialize(policy, optimizer, training)
    binding = bind(engine, optimizer, {name: strengths[owners[name].name] for name in names}, read_anchor)
    return Bound(engine, binding, {name: owners[name].modules[0] for name in names})
