"""What a worker trains: policy, data and engine, from the spec."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from maps_ray.data import Demonstrations, Processor, Samples
from maps_ray.data.layout import ACTION, STATE
from maps_ray.models import load_processor
from maps_ray.models.lora import base_name
from maps_ray.proximity.schedule import frozen_layers, layer_strengths
from maps_ray.proximity.stack import StackLayer, assign
from maps_ray.proximity.zero import Binding, ShardedAdamSPD, bind, place_weights
from maps_ray.spec import RunSpec
from maps_ray.training.engine import deepspeed_config, initialize
from maps_ray.training.errors import TrainingError
from maps_ray.training.policy import DTYPES, build_policy
from maps_ray.training.together import TogetherError, together


@dataclass(frozen=True)
class Loaded:
    """What is known from files, before any process talks to another."""

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
    frozen: tuple[str, ...]
    """Broadest modules of which every weight is frozen."""

    def statistics(self) -> dict[str, float]:
        """Drift and projection rate of each module, as `Binding.module_statistics`; frozen modules have drift 0."""
        still = {f"drift/{module}": 0.0 for module in self.frozen}
        return {**still, **self.binding.module_statistics(self.modules)}


def load(spec: RunSpec) -> Loaded:
    """Opens checkpoint and data; the pretrained weights stay in their files until `start_engine`.

    Raises:
        SpecError, DatasetError, maps_ray.models.CheckpointError: they cannot be used.
    """
    demonstrations = Demonstrations(spec.data, use_proprio=spec.model.use_proprio)
    width = demonstrations.dataset.width
    proprio = {"proprio_dim": width(STATE)} if spec.model.use_proprio else {}
    policy = build_policy(spec, {"action_dim": width(ACTION), **proprio}, deferred=True)
    processor = load_processor(
        spec.model.checkpoint, name=spec.model.name, chunk=spec.data.chunk, action_dim=width(ACTION)
    )
    others = [split for split in demonstrations.splits if split != "train"]
    return Loaded(
        policy,
        processor,
        demonstrations,
        demonstrations.samples("train"),
        {split: demonstrations.samples(split) for split in others},
    )


def start_engine(spec: RunSpec, policy: Any) -> Bound:
    """Shards the policy and gives each shard its weights, strength and anchor; every rank calls it.

    A rank reads from the checkpoint what it owns: under ZeRO-3 and of anchors, its ranges of each tensor.

    Raises:
        TrainingError: on every rank, when any cannot read its weights.
    """
    stack: list[StackLayer] = policy.stack()
    names = [name for name, _ in policy.named_parameters()]
    owners = assign(stack, names)
    strengths = layer_strengths(stack, spec.proximity)
    frozen = frozen_layers(stack, spec.proximity.freeze)
    for name, parameter in policy.named_parameters():
        if owners[name].name in frozen:
            parameter.requires_grad_(False)
    dtype = DTYPES[spec.training.precision]

    def read_anchor(name: str) -> Tensor | None:
        if not owners[name].pretrained:
            return None
        anchor: Tensor | None = policy.read_anchor(name)
        return anchor

    training = spec.training
    _place(policy, spec)
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    optimizer = ShardedAdamSPD(trained, lr=training.learning_rate, betas=training.betas, eps=training.eps)
    engine = initialize(policy, optimizer, training)
    strength_of = {name: strengths[owners[name].name] for name in names}
    # bf16 training starts from the weights rounded to bf16: those are the anchor, and hold no drift at the start.
    rounded = dtype if dtype == torch.bfloat16 else None
    binding = bind(engine, optimizer, strength_of, read_anchor, l2_sp=spec.proximity.l2_sp, anchor_dtype=rounded)
    policy.close_base()
    moving = {owners[name].modules[0] for name in names if owners[name].name not in frozen}
    still = dict.fromkeys(layer.modules[0] for layer in stack if layer.name in frozen)
    modules = {name: owners[name].modules[0] for name in names}
    return Bound(engine, binding, modules, tuple(module for module in still if module not in moving))


def _place(policy: Any, spec: RunSpec) -> None:
    deferred = {name for name, _ in policy.named_parameters() if base_name(name) in policy.deferred}

    def place() -> None:
        place_weights(
            policy, deferred, lambda name: policy.read_anchor(base_name(name)), deepspeed_config(spec.training)
        )

    try:
        together(place)
    except TogetherError as error:
        raise TrainingError(f"the weights of {spec.model.checkpoint} cannot be loaded: {error}") from None
    policy.deferred = frozenset()
