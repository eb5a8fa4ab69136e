"""The run spec: everything that describes one fine-tuning run, as pydantic models.

A spec is plain data. Nothing here opens a file, imports torch or starts a process; what a field means for a model or
a data set is checked by `maps_ray.training.preflight`, before a Ray cluster starts.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_serializer, field_validator, model_validator

from maps_ray.spec.credentials import refuse_credentials
from maps_ray.spec.paths import mirror_folder, place

Count = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
NonNegative = Annotated[float, Field(ge=0)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]
Name = TypeVar("Name", str, int)
EpisodeSlice = Annotated[str, Field(pattern=r"^-?\d*:-?\d*$")]
# A folder or a URI: `pathlib` would make one slash of the two after `s3:`.
Location = Annotated[str, BeforeValidator(lambda value: str(value) if isinstance(value, Path) else value)]
StoragePlace = Annotated[Path | str, BeforeValidator(place)]


def source_name(path: str) -> str:
    """The last part of a path that is no version: `libero_90` of `s3://bucket/libero_90/1.0.0`."""
    parts = [part for part in re.split(r"[/\\]", path.split("://")[-1]) if part]
    named = [part for part in parts if not re.fullmatch(r"v?\d+(\.\d+)*", part)] or parts or ["data"]
    return named[-1].partition("@")[0].removesuffix(".hdf5")


def _each_once(names: list[Name], what: str) -> list[Name]:
    repeated = sorted({str(name) for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"{what} named twice: {', '.join(repeated)}")
    return names


class Section(BaseModel):
    """Base of all sections: unknown fields, NaN, infinities and credentials are refused; a spec never changes after it
    was read."""

    model_config = ConfigDict(
        extra="forbid", allow_inf_nan=False, frozen=True, validate_default=True, use_attribute_docstrings=True
    )

    @field_validator("*", mode="before")
    @classmethod
    def _no_credentials(cls, value: object) -> object:
        # A section inside this one looks at its own fields.
        if not isinstance(value, dict | BaseModel):
            refuse_credentials(value)
        return value


class LoraSpec(Section):
    """Low-rank adapters in place of full fine-tuning; under MAPS their anchor is zero."""

    rank: Count = 32
    """Of each adapter."""
    alpha: Positive | None = None
    """An adapter is scaled by alpha / rank; none means the rank, at most 16, or twice the rank under
    `proximity.recipe: released`."""
    init: Literal["gaussian", "kaiming"] = "gaussian"
    """How A starts, while B starts at zero: normal with standard deviation 1 / rank, or uniform as a linear layer of
    torch (Kaiming)."""
    targets: Annotated[list[str], Field(min_length=1)] | None = None
    """Last parts of layer names, such as `q_proj`; none means every pretrained linear layer and patch embedding."""


class ModelSpec(Section):
    """Which VLA is fine-tuned and from which weights."""

    name: Literal["openvla_oft", "minivla_oft", "minivla_vq", "vla_adapter"] = "openvla_oft"
    """The policy. A MiniVLA checkpoint can be trained as `minivla_oft`, as `minivla_vq` or as `vla_adapter`."""
    checkpoint: Path
    """Folder with `config.json` and `model.safetensors` (or shards), or `hf://OWNER/NAME@REVISION`. It is both the
    start and the MAPS anchor."""
    use_proprio: bool = True
    """Feed the robot state through a proprio projector, as the last "patch"."""
    head: Literal["l1", "diffusion", "discrete"] = "l1"
    """How actions come out: regressed (L1), denoised by DDIM (needs the extra `diffusion`), or as tokens."""
    film: bool = False
    """Modulate the vision towers by the instruction (FiLM)."""
    attention: Literal["sdpa", "eager"] = "sdpa"
    """Of the language model: torch's fused kernels, or plain matrix products. Both give the same up to rounding."""
    attention_mask: Literal["causal", "bidirectional"] | None = None
    """Of MiniVLA-OFT's language model. None: what the checkpoint was trained with; `causal`, as its authors run it, for
    a base model. The other policies have no choice."""
    released_faults: list[Literal["masked_slot", "evaluation_token"]] = []
    """Faults of the authors' MiniVLA-OFT to repeat. `masked_slot`: in training, a slot is hidden where the id of its
    true action is the padding id. `evaluation_token`: evaluation puts a token behind the prompt that training lacks."""
    lora: LoraSpec | None = None
    """Train low-rank adapters and the new modules; none fine-tunes everything."""

    @model_validator(mode="after")
    def _mask_can_be_chosen(self) -> ModelSpec:
        if self.name == "minivla_oft":
            if self.released_faults and self.attention_mask == "bidirectional":
                raise ValueError(
                    f"released_faults = {self.released_faults}: the released code is causal; leave them out, or set "
                    "attention_mask: causal"
                )
            return self
        only = "bidirectional" if self.name == "openvla_oft" else "causal"
        if self.attention_mask not in (None, only):
            raise ValueError(f"attention_mask = {self.attention_mask!r}: {self.name} is {only}; leave it out")
        if self.released_faults:
            raise ValueError(f"released_faults = {self.released_faults}: only minivla_oft has such; leave them out")
        return self

    @field_serializer("checkpoint", when_used="json")
    def _with_both_slashes(self, checkpoint: Path) -> str:
        return re.sub("^hf:/+", "hf://", str(checkpoint))

    def absolute(self) -> ModelSpec:
        """With a path that means the same from any working directory."""
        if self.checkpoint.parts[:1] == ("hf:",):
            return self
        return self.model_copy(update={"checkpoint": self.checkpoint.resolve()})


class SplitSpec(Section):
    """Episodes of a data set: those whose task matches, then a slice of each such task's episodes."""

    tasks: Annotated[list[str], Field(min_length=1)] = ["*"]
    """Shell-style patterns; an episode belongs when its sentence matches one of them, ignoring case."""
    exclude_tasks: list[str] = []
    """Patterns that take a task out again."""
    episodes: EpisodeSlice = ":"
    """Python slice over each matching task's episodes in data set order: `:8`, `-2:`, `:`."""
    stored: str = "train"
    """Split of the data set as it is stored: RLDS sets may have `val` beside `train`."""


class SplitsSpec(Section):
    """The three splits. An episode may stand in one of them only."""

    train: SplitSpec = SplitSpec()
    """What is trained on."""
    held_out: SplitSpec | None = None
    """Same tasks as `train`, other episodes: in distribution."""
    ood: SplitSpec | None = None
    """Tasks that `train` never shows: out of distribution."""


class SourceSpec(Section):
    """One data set of a mixture."""

    path: Location
    """Folder, file or URI: LeRobotDataset v2.0 to v3, RLDS, LIBERO HDF5; `s3://`, `gs://`, `file://`,
    `hf://datasets/NAME@REVISION`."""
    name: Annotated[str, Field(min_length=1)] | None = None
    """Key of its statistics in the checkpoint; none takes the last part of the path that is no version."""
    weight: Positive = 1.0
    """Its share of the samples drawn, see `data.balance`."""
    cameras: dict[str, str | None] = {}
    """Camera of `data.cameras` -> camera as this data set stores it; none is a view that it lacks: black."""
    action: str | None = None
    """Feature with the actions; none takes `data.action`."""
    state: str | None = None
    """Feature with the proprioception; none takes `data.state`."""
    transform: str | None = None
    """What makes trained vectors of the stored ones; none takes `data.transform`."""
    splits: SplitsSpec | None = None
    """Which of its episodes train, and which are kept; none takes `data.splits`."""

    @property
    def key(self) -> str:
        """`name`, or what the path is called."""
        return self.name or source_name(self.path)


class CacheSpec(Section):
    """What a node keeps on its disk of the data: the index of each data set, and videos fetched from object stores."""

    folder: Path | None = None
    """Shared by the workers of a node, or by all nodes; none takes `$MAPS_RAY_CACHE`, or `~/.cache/maps_ray`."""
    max_gib: NonNegative = 0
    """Room for whole videos of object stores; those used longest ago make place. 0: read by ranges, keep nothing."""


class DataSpec(Section):
    """Demonstrations and how they become batches."""

    path: Location | None = None
    """The data set, where there is one alone: as `data.sources.path`."""
    sources: Annotated[list[SourceSpec], Field(min_length=1)] | None = None
    """The data sets of a mixture, in place of `path`."""
    balance: bool = True
    """Multiply the weights of sources by their numbers of steps, as OpenVLA trains: a weight of 1 each then shows
    every step equally often. Off: the weights themselves are the shares."""
    cameras: Annotated[list[str], Field(min_length=1, max_length=3)] = ["image", "wrist_image"]
    """Cameras as stored, or `primary` and `wrist`; primary first. Their number is the number of images per sample."""
    action: str | None = None
    """Feature with the actions; none finds the usual names."""
    state: str | None = None
    """Feature with the proprioception; none finds the usual names."""
    transform: str | None = None
    """`libero`, `bridge`, `calvin`, `aloha` as the published configurations, or your own as `module:function`; none
    takes the vectors as stored, but for `gripper`."""
    chunk: Count = 8
    """Actions predicted at once."""
    augment: bool = False
    """Change training images at random as OpenVLA does: crop of 90 %, brightness, contrast, saturation, hue."""
    normalization: Literal["q01_q99", "min_max"] = "q01_q99"
    """Range of actions and proprio that becomes -1 .. 1, of each source by its own statistics."""
    gripper: Literal["libero", "none"] = "libero"
    """`libero`: the last action dimension, -1 open .. 1 closed in the data, becomes 1 open .. 0 closed and is not
    normalised. `none`: every dimension is normalised alike. A source with a transform follows the transform."""
    splits: SplitsSpec = SplitsSpec()
    """Which episodes train, and which are kept for evaluation."""
    cache: CacheSpec = CacheSpec()
    """What is kept on disk."""

    @field_validator("cameras")
    @classmethod
    def _cameras_once(cls, cameras: list[str]) -> list[str]:
        return _each_once(cameras, "camera")

    @field_validator("sources")
    @classmethod
    def _sources_once(cls, sources: list[SourceSpec] | None) -> list[SourceSpec] | None:
        if sources:
            _each_once([source.key for source in sources], "source (its `name` tells two of the same path apart)")
        return sources

    @model_validator(mode="after")
    def _path_or_sources(self) -> DataSpec:
        if (self.path is None) == (self.sources is None):
            given = "neither" if self.path is None else "both"
            raise ValueError(f"path (one data set) or sources (a mixture) must be given, found {given}")
        for source in self.sources or ():
            unknown = sorted(set(source.cameras) - set(self.cameras))
            if unknown:
                raise ValueError(
                    f"source {source.key} maps cameras that data.cameras lacks: {', '.join(unknown)}; "
                    f"data.cameras are {', '.join(self.cameras)}"
                )
        return self

    def absolute(self) -> DataSpec:
        """With paths that mean the same from any working directory."""

        def absolute(location: str) -> str:
            return location if "://" in location else str(Path(location).resolve())

        sources = self.sources and [s.model_copy(update={"path": absolute(s.path)}) for s in self.sources]
        cache = self.cache
        if cache.folder is not None:
            cache = cache.model_copy(update={"folder": cache.folder.resolve()})
        return self.model_copy(update={"path": self.path and absolute(self.path), "sources": sources, "cache": cache})

    def resolved(self) -> list[SourceSpec]:
        """The sources with everything said that they take from here; the one of `path` where there is no mixture."""
        sources = self.sources or [SourceSpec.model_validate({"path": self.path})]
        return [
            source.model_copy(
                update={
                    "name": source.key,
                    "action": source.action or self.action,
                    "state": source.state or self.state,
                    "transform": source.transform or self.transform,
                    "splits": source.splits or self.splits,
                }
            )
            for source in sources
        ]

    def field(self, number: int) -> str:
        """Where the spec names source `number`, for messages: `data`, or `data.sources.0`."""
        return "data" if self.sources is None else f"data.sources.{number}"


class L2SpSpec(Section):
    """L2-SP whose coefficient is scheduled as strengths are, along `proximity.order` and by `proximity.recipe`."""

    strength: NonNegative
    """Coefficient of the first layer."""
    shape: Literal["linear", "cosine", "constant"] = "constant"
    """How it falls along the order."""


class ProximitySpec(Section):
    """The MAPS schedule (arXiv 2511.19878): which module is held how near to its pretrained weights."""

    recipe: Literal["paper", "released"] = "paper"
    """`paper`: one strength for each layer of the stack, as the paper writes it. `released`: one for each tensor, as
    the authors' code of June 2026 gives it; docs/reproduction.md has both side by side."""
    order: Annotated[list[str], Field(min_length=1)] = ["dinov2", "siglip", "projector", "language"]
    """Modules from the one held most to the one held least. `maps-ray strengths` lists the names of a model."""
    shape: Literal["linear", "cosine", "constant", "learned"] = "linear"
    """How the strength falls along the order; `constant` is uniform SPD. `learned` sets no strength by hand: each
    tensor that `constant` would hold has a radius that follows the gradients (FTP, arXiv 2310.19182)."""
    radius_rate: Positive = 0.01
    """Adam's learning rate of the radii under `learned`, in units of the weights."""
    lambda_max: NonNegative = 1.0
    """Strength of the first layer. 0 is plain fine-tuning; 1 holds the radius; more than 1 pulls back."""
    granularity: Literal["layer", "module"] = "layer"
    """One strength for each layer of the stack, or one for each entry of `order`."""
    strengths: dict[str, NonNegative] = {}
    """Module or group -> strength of all its tensors, in place of what the schedule gives them; under `released`
    biases keep 0."""
    freeze: list[str] = []
    """Modules or groups whose weights never change. They keep their place in `order`, but under `released`, which
    numbers the other layers anew; their strength means nothing."""
    lora_anchor: Literal["zero", "init"] | None = None
    """What adapters are held to: zero, or the values that they start with. None: `zero` under the paper's recipe,
    `init` under the released one."""
    l2_sp: NonNegative | L2SpSpec = 0.0
    """L2-SP (arXiv 1802.01483), decoupled from Adam's moments: each step takes learning rate * l2_sp * (weights -
    pretrained weights) off the weights. A number holds all pretrained tensors alike; a section schedules it. 0: off."""

    @field_validator("order", "freeze")
    @classmethod
    def _modules_once(cls, modules: list[str]) -> list[str]:
        return _each_once(modules, "module")


class FreezeUntilSpec(Section):
    """Linear probing before fine-tuning (LP-FT, arXiv 2202.10054): first some modules train alone, then all."""

    modules: Annotated[list[str], Field(min_length=1)]
    """Those that train from the start, such as `action_head`. The others' moments start afresh at `step`."""
    step: Count
    """Optimizer steps during which the others stay as they are."""

    @field_validator("modules")
    @classmethod
    def _modules_once(cls, modules: list[str]) -> list[str]:
        return _each_once(modules, "module")


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
    "gradient_accumulation_steps": "set training.gradient_accumulation",
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
    def _refuse_with_reason(cls, values: object) -> Any:
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
    zero_stage: Annotated[int, Field(ge=1, le=3)] = 2
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
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
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
    seed: NonNegativeInt = 0
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


class ShareSpec(Section):
    """What Ray reserves for one actor; what is left out is not reserved."""

    cpus: NonNegative = 0
    """CPU cores, or a part of one."""
    gpus: NonNegative = 0
    """GPUs, or a part of one: two actors with 0.5 share a GPU."""
    memory_gib: NonNegative = 0
    """Of the node's memory."""


class RolloutResourcesSpec(Section):
    """What rollouts ask Ray for. Those that training waits for need nothing: they use what its workers leave idle."""

    policy: ShareSpec = ShareSpec()
    """Of the server that answers all simulators."""
    simulator: ShareSpec = ShareSpec()
    """Of each simulator."""
    placement: Literal["trainer", "free"] = "free"
    """`trainer`: on the node of the first worker, whose disk has the weights. `free`: wherever Ray finds room."""


class RolloutSpec(Section):
    """Success rates of the policy in simulators, as `maps-ray evaluate` measures them, logged as
    `rollout/<suite>/success`."""

    suites: Annotated[list[str], Field(min_length=1)]
    """Suites of tasks: `libero_object`, and what perturbs it, such as `libero_object_swap`. docs/simulators.md has
    all."""
    episodes: Count = 10
    """For each task of each suite, from its first initial states on."""
    every: NonNegativeInt = 0
    """Optimizer steps between rollouts, a multiple of `evaluation.every`; 0 rolls out once, after the last step."""
    tasks: Annotated[list[NonNegativeInt], Field(min_length=1)] | None = None
    """Places of tasks in their suite, from 0; none takes all."""
    seed: NonNegativeInt = 0
    """Of what a simulator or a policy draws."""
    max_steps: Count | None = None
    """Actions after which an episode has failed; none takes each suite's published limit."""
    workers: Count | None = None
    """Simulators side by side; none takes as many as fit the machine."""
    when: Literal["blocking", "asynchronous", "after_training"] = "blocking"
    """`blocking`: training stands still meanwhile. `asynchronous`: it goes on, and the rollouts take resources of their
    own. `after_training`: the weights of each such step are kept until the last one is done. In all three the results
    stand at the step of the weights, and the run ends when it has them."""
    resources: RolloutResourcesSpec = RolloutResourcesSpec()
    """What is asked for policy server and simulators; with `asynchronous` at least one of them must ask for something.
    """

    @field_validator("suites")
    @classmethod
    def _suites_once(cls, suites: list[str]) -> list[str]:
        return _each_once(suites, "suite")

    @field_validator("tasks")
    @classmethod
    def _tasks_once(cls, tasks: list[int] | None) -> list[int] | None:
        return tasks and _each_once(tasks, "task")

    @model_validator(mode="after")
    def _asynchronous_asks(self) -> RolloutSpec:
        asked = self.resources
        if self.when == "asynchronous" and not (asked.policy.cpus or asked.policy.gpus):
            raise ValueError(
                "when = 'asynchronous': rollouts beside training need room of their own: give resources.policy.gpus or "
                "resources.policy.cpus, and resources.simulator.cpus"
            )
        return self


class EvaluationSpec(Section):
    """Offline evaluation: action error on the splits that training does not see. And rollouts, where asked for."""

    every: NonNegativeInt = 0
    """Optimizer steps between evaluations; 0 evaluates once, after the last step."""
    batch_size: Count = 16
    """Samples per worker and forward pass."""
    max_samples: Count = 512
    """Per split, evenly spaced over it."""
    averaged: bool = False
    """Evaluate, roll out and export the average of the weights, which `training.ema` keeps, in place of the weights."""
    rollouts: RolloutSpec | None = None
    """Success rates in simulators too; none runs no simulator."""


class TrackingSpec(Section):
    """Where the run is recorded."""

    uri: str | None = None
    """MLflow tracking URI; none means a sqlite database with an artifact folder under `cluster.storage`, or under
    `cluster.scratch` where that is an object store. A user and password in it are taken out when the spec is read, into
    MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD."""
    credentials: Path | None = None
    """File of mode 0600 with lines `MLFLOW_TRACKING_USERNAME=...`, `MLFLOW_TRACKING_PASSWORD=...` or
    `MLFLOW_TRACKING_TOKEN=...`; none takes these variables from the environment."""
    experiment: Annotated[str, Field(min_length=1)] = "maps_ray"
    """MLflow experiment; made when missing."""


class ElasticSpec(Section):
    """A number of workers that follows the cluster."""

    min: Count
    """Fewer than these wait for nodes."""
    max: Count
    """More than these are not asked for. `training.batch_size` and `gradient_accumulation` are meant for so many."""

    @model_validator(mode="after")
    def _min_is_less(self) -> ElasticSpec:
        if self.min > self.max:
            raise ValueError(f"min ({self.min}) must not be more than max ({self.max})")
        return self


class ClusterSpec(Section):
    """Where the run takes place."""

    address: str | None = None
    """Ray address (`auto`, `host:port`, `ray://host:port`); none starts Ray on this machine, or joins the cluster of a
    submitted job."""
    workers: Count | ElasticSpec = 2
    """Ray Train workers: data-parallel and ZeRO ranks. `{min: 4, max: 16}` goes on with fewer when nodes are lost, and
    with more from the next checkpoint when there are more, always with the same global batch."""
    cpus_per_worker: Positive = 1
    """CPU cores that Ray reserves, and torch threads, per worker."""
    gpus_per_worker: NonNegative | Literal["auto"] = "auto"
    """`auto` gives each worker one GPU where the cluster has any, else none."""
    autoscaling: bool = False
    """The cluster adds nodes when asked: wait for the workers, up to `start_timeout_s`, where it is too small now.
    `gpus_per_worker` must then be a number: `auto` sees only the nodes that are there."""
    storage: StoragePlace = Path("runs")
    """Folder that all nodes share, or `s3://bucket/folder`, `gs://bucket/folder`: checkpoints, weights, records,
    reports. Credentials of an object store come from the environment of each node."""
    scratch: Path | None = None
    """Under an object store, folder on each node's own disk: parts of checkpoints on their way, and on the driver's the
    records and MLflow's sqlite. None takes `$MAPS_RAY_SCRATCH`, or `maps_ray-USER` among the temporary files."""
    max_failures: NonNegativeInt = 3
    """Losses of workers or nodes, in start-up as at work, survived in a row: each new checkpoint counts anew."""
    start_timeout_s: Positive = 600
    """How long to wait for an autoscaling cluster to bring the workers up."""
    collective_timeout_s: Positive = 1800
    """How long workers wait for the slowest in a collective, such as one that loads on a cold node; then they start
    again."""

    @property
    def most_workers(self) -> int:
        """The number of workers, or the largest that there may be."""
        return self.workers if isinstance(self.workers, int) else self.workers.max

    def sizes(self, global_batch_size: int) -> list[int]:
        """Numbers of workers that may train, ascending: those allowed that share the global batch evenly."""
        if isinstance(self.workers, int):
            return [self.workers]
        return [n for n in range(self.workers.min, self.workers.max + 1) if global_batch_size % n == 0]

    @property
    def local_storage(self) -> Path:
        """`storage`; under an object store, where this node keeps what it has of it."""
        return self.storage if isinstance(self.storage, Path) else mirror_folder(self.storage, self.scratch)

    @field_validator("address")
    @classmethod
    def _address_can_be_called(cls, address: str | None) -> str | None:
        if address is None or re.fullmatch(r"auto|local|(ray://)?(\[[0-9a-fA-F:.]+\]|[\w.\-]+):\d{1,5}", address):
            return address
        raise ValueError("an address is auto, host:port or ray://host:port")


class RunSpec(Section):
    """One fine-tuning run.

    A file may build on another: `base: tiny.yaml` (relative to the file) takes every field of that spec which the file
    does not give itself; sections are merged field by field, lists and values replace.
    """

    name: str
    """Folder under `cluster.storage` and name of the MLflow run."""
    model: ModelSpec
    data: DataSpec
    proximity: ProximitySpec = ProximitySpec()
    training: TrainingSpec = TrainingSpec()
    evaluation: EvaluationSpec = EvaluationSpec()
    tracking: TrackingSpec = TrackingSpec()
    cluster: ClusterSpec = ClusterSpec()

    @model_validator(mode="after")
    def _averages_are_kept(self) -> RunSpec:
        if self.evaluation.averaged and self.training.ema is None:
            raise ValueError(
                "evaluation.averaged = True: no average is kept; set training.ema, such as 0.999, or leave it out"
            )
        if self.evaluation.averaged and self.model.lora is not None:
            raise ValueError(
                "evaluation.averaged = True: averaged adapters, merged, are not the average of the merged weights; "
                "leave it out, or train without model.lora"
            )
        return self

    @field_validator("name")
    @classmethod
    def _name_is_a_folder(cls, name: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
            raise ValueError(
                "a name has letters, digits, '.', '_' and '-', starts with a letter or digit, at most 100 characters"
            )
        return name

    @property
    def lora_alpha(self) -> float | None:
        """`model.lora.alpha`, or what the recipe makes of it; none means the rank, at most 16."""
        lora = self.model.lora
        if lora is None:
            return None
        return 2.0 * lora.rank if lora.alpha is None and self.proximity.recipe == "released" else lora.alpha

    @property
    def holds_adapters_to_start(self) -> bool:
        """Whether adapters are held to the values that they start with, and not to zero."""
        chosen = self.proximity.lora_anchor
        return chosen == "init" or (chosen is None and self.proximity.recipe == "released")

    @property
    def run_dir(self) -> Path:
        """Folder that holds all that this run writes: `cluster.storage / name`; under an object store, this node's
        local copy of it."""
        return self.cluster.local_storage / self.name

    @property
    def run_place(self) -> str:
        """Where others find the run: `run_dir`, or its address on the object store."""
        storage = self.cluster.storage
        return str(storage / self.name) if isinstance(storage, Path) else f"{storage}/{self.name}"
