"""What a worker trains: policy, data, anchors and the DeepSpeed engine around them, from the spec.

`prepare_process` comes first. DeepSpeed chooses its accelerator when it is imported, so nothing here imports it before
it is needed.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from maps_ray.data import Demonstrations, Mixture, Processor
from maps_ray.metrics import DRIFT
from maps_ray.models import load_policy
from maps_ray.models.activations import checkpoint_blocks
from maps_ray.models.files.weights import refuse_not_finite
from maps_ray.models.lora import adapter_starts, add_adapters, base_name, is_adapter
from maps_ray.proximity.flat_step import fused_is_there
from maps_ray.proximity.rules import tensor_rules
from maps_ray.proximity.schedule import frozen_tensors
from maps_ray.proximity.stack import StackLayer, assign
from maps_ray.spec import RunSpec, TrainingSpec
from maps_ray.training.model_checks import policy_options
from maps_ray.training.ranks import RanksError, on_all_ranks
from maps_ray.training.run_faults import TrainingError

if TYPE_CHECKING:
    from maps_ray.models.policy import BasePolicy
    from maps_ray.proximity.zero import Binding
    from maps_ray.proximity.zero.deepspeed_engine import Engine
    from maps_ray.proximity.zero.finite import FiniteGuard

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def prepare_process(gpu: bool) -> torch.device:
    """Chooses the accelerator; call it before anything imports DeepSpeed.

    Args:
        gpu: whether Ray gave this worker a GPU.

    Returns:
        the device that the engine will use.
    """
    os.environ["DS_ACCELERATOR"] = "cuda" if gpu else "cpu"
    import deepspeed.ops
    from deepspeed.utils import logger

    # Without this DeepSpeed compiles a shared-memory collective on first use (47 s) and dies without a compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logger.setLevel(logging.ERROR)
    for handler in logger.handlers:
        handler.setLevel(logging.ERROR)
    return torch.device("cuda", torch.cuda.current_device()) if gpu else torch.device("cpu")


@dataclass(frozen=True)
class PolicyAndData:
    """What is known from files, before any process talks to another."""

    policy: BasePolicy
    processor: Processor
    demonstrations: Demonstrations
    train: Mixture
    evaluation: dict[str, Mixture]
    """Split -> samples, for the splits that training does not see."""


@dataclass(frozen=True)
class BoundEngine:
    """The engine with its anchors."""

    engine: Engine
    binding: Binding
    guard: FiniteGuard
    modules: dict[str, str]
    """Parameter name -> its broadest module, for metrics."""
    frozen: tuple[str, ...]
    """Broadest modules of which every weight is frozen."""
    idle: frozenset[str]
    """Parameters that can get no gradient and take no state."""

    def statistics(self) -> dict[str, float]:
        """Drift and projection rate of each module, as `Binding.module_statistics`; frozen modules have drift 0."""
        still = {f"{DRIFT}{module}": 0.0 for module in self.frozen}
        return {**still, **self.binding.module_statistics(self.modules)}

    def shown(self, spec: RunSpec) -> AbstractContextManager[None]:
        """Within it the model has the weights that the spec evaluates and exports; every rank enters it."""
        from maps_ray.proximity.zero import averaged

        return averaged(self.engine) if spec.evaluation.averaged else nullcontext()


def load(spec: RunSpec) -> PolicyAndData:
    """Opens checkpoint and data; the pretrained weights stay in their files until `start_engine`.

    Raises:
        SpecError, DatasetError, maps_ray.models.CheckpointError: they cannot be used.
    """
    demonstrations = Demonstrations(spec.data, use_proprio=spec.model.use_proprio)
    action_dim = demonstrations.action_dim
    proprio = {"proprio_dim": demonstrations.proprio_dim} if spec.model.use_proprio else {}
    policy = build_policy(spec, {"action_dim": action_dim, **proprio}, deferred=True)
    assert policy.folder is not None
    processor = policy.read_processor(policy.folder)
    others = [split for split in demonstrations.splits if split != "train"]
    return PolicyAndData(
        policy,
        processor,
        demonstrations,
        demonstrations.samples("train"),
        {split: demonstrations.samples(split) for split in others},
    )


def start_engine(spec: RunSpec, policy: BasePolicy) -> BoundEngine:
    """Shards the policy and gives each shard its weights, strength and anchor; every rank calls it.

    A rank reads from the checkpoint what it owns: under ZeRO-3 and of anchors, its ranges of each tensor.

    Raises:
        TrainingError: on every rank, when any cannot read its weights.
    """
    from maps_ray.proximity.zero import ShardedAdamSPD, bind
    from maps_ray.proximity.zero.finite import FiniteGuard

    stack: list[StackLayer] = policy.stack()
    names = [name for name, _ in policy.named_parameters()]
    owners = assign(stack, names)
    frozen = frozen_tensors(stack, owners, spec.proximity.freeze)
    for name, parameter in policy.named_parameters():
        if name in frozen:
            parameter.requires_grad_(False)
    # Of trained tensors alone: the released recipe counts no layer that is frozen.
    dimensions = {name: parameter.dim() for name, parameter in policy.named_parameters() if parameter.requires_grad}
    rules = tensor_rules(stack, owners, dimensions, spec, policy.published_name)
    # After the strengths, for which the released recipe counts these too.
    idle = policy.idle_parameters()
    for name in idle:
        policy.get_parameter(name).requires_grad_(False)
    starts = adapter_starts(policy) if spec.holds_adapters_to_start else {}
    dtype = DTYPES[spec.training.precision]

    def read_anchor(name: str) -> Tensor | None:
        if is_adapter(name):
            # None of B, which starts at zero, and of all adapters under the paper's rule: a zero anchor needs no
            # storage.
            return starts.get(name)
        if not owners[name].pretrained:
            return None
        return policy.read_anchor(name)

    training = spec.training
    _place(policy, spec)
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    # Behind `_place`: which device the weights are on decides whether torch has a fused step.
    fused = training.fused == "auto" and fused_is_there(trained)
    optimizer = ShardedAdamSPD(
        trained,
        lr=training.learning_rate,
        betas=training.betas,
        eps=training.eps,
        weight_decay=training.weight_decay,
        fused=fused,
    )
    engine = initialize(policy, optimizer, training)
    # bf16 training starts from the weights rounded to bf16: those are the anchor, and hold no drift at the start.
    rounded = dtype if dtype == torch.bfloat16 else None
    binding = bind(
        engine,
        optimizer,
        rules.strengths,
        read_anchor,
        l2_sp=rules.l2_sp,
        rates=rules.rates,
        begins=rules.begins,
        ema=training.ema,
        radius_rate=spec.proximity.radius_rate if spec.proximity.shape == "learned" else None,
        anchor_dtype=rounded,
    )
    silence(policy, binding, rules.begins)
    # Anchors are the last that is read of the base: its mapped pages are given back.
    policy.close_base()
    moving = {owners[name].modules[0] for name in names if name not in frozen}
    still = dict.fromkeys(owners[name].modules[0] for name in names if name in frozen)
    modules = {name: owners[name].modules[0] for name in names}
    guard = FiniteGuard(engine, optimizer)
    return BoundEngine(engine, binding, guard, modules, tuple(module for module in still if module not in moving), idle)


def silence(policy: BasePolicy, binding: Binding, begins: Mapping[str, int]) -> None:
    """Gives tensors that begin later no gradient until then: it would count in the norm that clips the others'."""
    for name, parameter in policy.named_parameters():
        if begins.get(name) and parameter.requires_grad:
            parameter.register_hook(lambda grad, name=name: torch.zeros_like(grad) if binding.waits(name) else None)


def _place(policy: BasePolicy, spec: RunSpec) -> None:
    from maps_ray.proximity.zero import place_weights

    deferred = {name for name, _ in policy.named_parameters() if base_name(name) in policy.deferred}

    def read(name: str) -> Tensor:
        weights = policy.read_anchor(base_name(name))
        assert weights is not None  # a deferred parameter has pretrained weights
        # Under ZeRO-3 a rank reads its own ranges alone, and the first loss tells.
        if spec.training.zero_stage < 3:
            refuse_not_finite(str(spec.model.checkpoint), {name: weights})
        return weights

    def place() -> None:
        place_weights(policy, deferred, read, deepspeed_config(spec.training))

    try:
        on_all_ranks(place)
    except RanksError as error:
        raise TrainingError(f"the weights of {spec.model.checkpoint} cannot be loaded: {error}") from None
    policy.deferred = frozenset()


def build_policy(spec: RunSpec, dimensions: Mapping[str, int], deferred: bool = False) -> BasePolicy:
    """Opens the checkpoint and puts adapters in where the spec asks for them.

    Args:
        spec: of the run.
        dimensions: `action_dim`, and `proprio_dim` where the policy reads proprioception.
        deferred: leave the pretrained weights in their files, where `start_engine` finds them.

    Raises:
        maps_ray.models.CheckpointError: the checkpoint cannot be used.
        ValueError: a LoRA target that names no layer.
    """
    # Every rank draws its new modules itself, and `place_weights` sends nothing: the seed makes them equal.
    seed = spec.training.seed
    policy = load_policy(
        spec.model.checkpoint,
        dtype=DTYPES[spec.training.precision],
        seed=seed,
        attention=spec.model.attention,
        deferred=deferred,
        **policy_options(spec),
        **dimensions,
    )
    if spec.training.activation_checkpointing:
        checkpoint_blocks(policy.modules())
    lora = spec.model.lora
    if lora is None:
        return policy
    return add_adapters(policy, lora.rank, spec.lora_alpha, lora.targets, seed, lora.init)


def deepspeed_config(training: TrainingSpec) -> dict[str, object]:
    """DeepSpeed's configuration for a spec: ZeRO stage, precision, clipping, accumulation."""
    # Adding up in bf16 loses the small gradients of the later passes.
    sums = "fp32" if training.precision == "fp32" or training.gradient_accumulation > 1 else "bf16"
    return {
        "train_micro_batch_size_per_gpu": training.batch_size,
        "gradient_accumulation_steps": training.gradient_accumulation,
        "gradient_clipping": training.clip_norm,
        # Whether a step is finite is decided on the device, by `FiniteGuard`.
        "bf16": {"enabled": training.precision == "bf16", "check_grad_overflow": False},
        "data_types": {"grad_accum_dtype": sums},
        "zero_optimization": {
            **training.deepspeed.model_dump(exclude_none=True),
            "stage": training.zero_stage,
            # With it DeepSpeed's record of where a tensor lies in the shards is wrong (`partitions` refuses it).
            "round_robin_gradients": False,
        },
        # The optimizer is ours; DeepSpeed asks to say that this is meant.
        "zero_allow_untested_optimizer": True,
        # With offload it would insist on its own CPU Adam, which knows no anchors (`ZeRORuntimeException` in 0.19).
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }


def initialize(model: torch.nn.Module, optimizer: torch.optim.Optimizer, training: TrainingSpec) -> Engine:
    """The DeepSpeed engine around `model`, in the process group that is already there."""
    import deepspeed

    deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)
    engine: Engine
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=deepspeed_config(training))
    return engine
