"""Sections of a run spec on training: the optimizer, its schedule, precision and DeepSpeed."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from maps_ray.spec.section import (
    Count,
    Decay,
    NonNegative,
    NonNegativeInt,
    Positive,
    Real,
    Section,
    Seed,
    Whole,
    each_once,
)


class FreezeUntilSpec(Section):
    """Linear probing before fine-tuning (LP-FT, arXiv 2202.10054): first some modules train alone, then all."""

    modules: Annotated[list[str], Field(min_length=1)]
    """Those that train from the start, such as `action_head`. The others' moments start afresh at `step`."""
    step: Count
    """Optimizer steps during which the others stay as they are."""

    @field_validator("modules")
    @classmethod
    def _modules_once(cls, modules: list[str]) -> list[str]:
        return each_once(modules, "module")


# Fields of DeepSpeed that are left out on purpose, with the reason.
_REFUSED_BY_DEEPSPEED = {
    "stage": "set training.zero_stage",
    "round_robin_gradients": "with it DeepSpeed's own record of where a tensor lies in the shards is wrong",
    "zero_hpz_partition_size": "parameters would lie in two partitions, of which one alone is projected",
    "mics_shard_size": "parameters would be sharded over a part of the workers",
    "zero_quantized_weights": "it rounds the weights, so that a held tensor would drift by itself",
    "zero_quantized_gradients": "it rounds the gradients, and the sign of a projection with them",
    "zeropp_loco_param": "it rounds the gradients, and the sign of a projection with them",
    "zenflow": "it steps the weights in parts and at other times, outside the projection",
    "super_offload": "it steps the weights in its own optimizer, without the projection",
    "load_from_fp32_weights": "weights come from the checkpoint named in model.checkpoint",
    "elastic_checkpoint": "checkpoints are maps_ray's own, for any number of workers",
    "use_multi_rank_bucket_allreduce": "it is fixed by DeepSpeed where it is safe",
    "gradient_clipping": "set training.clip_norm",
    "train_batch_size": "set training.batch_size",
    "train_micro_batch_size_per_gpu": "set training.batch_size",
    "gradient_accumulation_steps": "set training.gradient_accumulation",
    "zero_optimization": "write its fields here, and its stage as training.zero_stage",
    "bf16": "set training.precision",
    "fp16": "set training.precision",
    "optimizer": "set training.learning_rate, betas, eps and weight_decay",
    "scheduler": "set training.schedule and training.warmup_steps",
    "activation_checkpointing": "set training.activation_checkpointing",
}
_STAGE_3_FIELDS = (
    "sub_group_size",
    "stage3_prefetch_bucket_size",
    "stage3_param_persistence_threshold",
    "stage3_max_live_parameters",
    "stage3_max_reuse_distance",
    "offload_param",
)


class OffloadSpec(Section):
    """Something that ZeRO keeps in the machine's memory in place of the GPU's."""

    device: Literal["cpu"] = "cpu"
    """Where it is kept; on NVMe there is nothing to project between the steps."""
    pin_memory: bool = True
    """In pages that a GPU copies without a detour; they cannot be swapped out."""


class DeepSpeedSpec(Section):
    """Fields of DeepSpeed's `zero_optimization` that change how fast and in how much memory, not what is computed. None
    leaves DeepSpeed's own value."""

    overlap_comm: bool | None = None
    """Reduce gradients while the backward pass goes on."""
    contiguous_gradients: bool | None = None
    """Copy gradients into one buffer as they come."""
    reduce_scatter: bool | None = None
    """Reduce each gradient to its owner alone."""
    reduce_bucket_size: Count | None = None
    """Elements reduced at once: more are faster and take more memory."""
    allgather_bucket_size: Count | None = None
    """Elements gathered at once after a step; ZeRO-1 and -2."""
    sub_group_size: Count | None = None
    """Elements stepped at once; ZeRO-3."""
    stage3_prefetch_bucket_size: NonNegativeInt | None = None
    """Elements of parameters gathered ahead; ZeRO-3."""
    stage3_param_persistence_threshold: NonNegativeInt | None = None
    """Parameters of fewer elements stay whole; ZeRO-3."""
    stage3_max_live_parameters: NonNegativeInt | None = None
    """Elements of whole parameters at any time; ZeRO-3."""
    stage3_max_reuse_distance: NonNegativeInt | None = None
    """A parameter needed again within so many elements stays whole; ZeRO-3."""
    offload_optimizer: OffloadSpec | None = None
    """Masters, moments and anchors in the machine's memory, stepped by its CPUs."""
    offload_param: OffloadSpec | None = None
    """Shards of the parameters in the machine's memory; ZeRO-3."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_with_reason(cls, values: object) -> object:
        for name in values if isinstance(values, dict) else ():
            if name in _REFUSED_BY_DEEPSPEED:
                raise ValueError(f"{name} cannot be set here: {_REFUSED_BY_DEEPSPEED[name]}")
        return values


class TrainingSpec(Section):
    """The optimisation: Adam with selective projection, under DeepSpeed ZeRO."""

    learning_rate: Positive = 5e-5
    """Peak learning rate of Adam."""
    max_steps: Count = 1000
    """Optimizer steps in all."""
    batch_size: Count = 8
    """Samples per worker and forward pass."""
    gradient_accumulation: Count = 1
    """Forward passes per optimizer step."""
    zero_stage: Annotated[Whole, Field(ge=1, le=3)] = 2
    """What DeepSpeed shards: 1 optimizer state, 2 and gradients, 3 and parameters. Anchors are always sharded."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """`bf16` trains bf16 weights with fp32 masters."""
    activation_checkpointing: bool = False
    """Keep the input of each block alone and compute the rest again for the gradients: less memory, more time."""
    clip_norm: NonNegative = 1.0
    """Global gradient norm; 0 turns clipping off."""
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """Adam's decay rates of the first and second moment."""
    eps: Positive = 1e-8
    """Adam's denominator term."""
    fused: Literal["auto", False] = "auto"
    """`auto` makes the step in one pass where there is such a one, with torch's fused Adam where nothing is projected;
    false takes the plain operations, which differ in the last bit."""
    weight_decay: NonNegative = 0.0
    """Of AdamW: each step takes learning rate * weight_decay * weights off all trained weights. The authors' released
    AdamW baseline has 0.01."""
    learning_rates: dict[str, Positive] = {}
    """Module or group -> peak learning rate of its tensors, in place of `learning_rate`; same warm-up and course."""
    layer_decay: Annotated[Real, Field(gt=0, le=1)] = 1.0
    """Layer-wise decay: of L pretrained layers along `proximity.order` the k-th has learning_rate * layer_decay^(L + 1
    - k); new modules have the full rate, modules in `learning_rates` their own."""
    freeze_until: FreezeUntilSpec | None = None
    """LP-FT: train some modules alone at first; none trains all from the start."""
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Keep an average of the weights that decays by this factor each step; none keeps none. `evaluation.averaged`
    evaluates and exports it."""
    warmup_steps: NonNegativeInt = 0
    """Linear warm-up from 0; part of `max_steps`."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """Course of the learning rate after warm-up; `linear` and `cosine` end at 0."""
    seed: Seed = 0
    """Of the fresh head, the order of the samples and the augmentation."""
    deepspeed: DeepSpeedSpec = DeepSpeedSpec()
    """DeepSpeed's own fields: buckets, prefetch, offload."""
    checkpoint_every: Count = 100
    """Optimizer steps between checkpoints; the last step always makes one."""
    keep_checkpoints: Count = 2
    """Older ones are removed once a newer one is complete."""
    log_every: Count = 10
    """Optimizer steps between records of loss, drift and projection rate."""

    @model_validator(mode="after")
    def _deepspeed_fits(self) -> TrainingSpec:
        chosen = self.deepspeed.model_dump(exclude_none=True)
        for name in chosen:
            if name in _STAGE_3_FIELDS and self.zero_stage != 3:
                raise ValueError(f"deepspeed.{name} needs zero_stage = 3, this is {self.zero_stage}: leave it out")
        if "allgather_bucket_size" in chosen and self.zero_stage == 3:
            raise ValueError("deepspeed.allgather_bucket_size belongs to zero_stage 1 and 2: leave it out")
        summed = self.zero_stage == 1 and self.precision == "bf16" and self.gradient_accumulation > 1
        if summed and self.deepspeed.offload_optimizer:
            raise ValueError(
                "deepspeed.offload_optimizer: DeepSpeed cannot offload at zero_stage 1 where bf16 gradients are "
                "accumulated in fp32: set zero_stage = 2"
            )
        return self

    @model_validator(mode="after")
    def _warmup_fits(self) -> TrainingSpec:
        if self.warmup_steps >= self.max_steps:
            raise ValueError(f"warmup_steps ({self.warmup_steps}) must be less than max_steps ({self.max_steps})")
        return self

    @model_validator(mode="after")
    def _freeze_ends(self) -> TrainingSpec:
        if self.freeze_until is not None and self.freeze_until.step >= self.max_steps:
            raise ValueError(
                f"freeze_until.step ({self.freeze_until.step}) must be less than max_steps ({self.max_steps})"
            )
        return self
