"""The run spec: everything that describes one fine-tuning run, as pydantic models.

A spec is plain data. Nothing here opens a file, imports torch or starts a process; what a field means for a model or
a data set is checked by `maps_ray.training.preflight`, before a Ray cluster starts.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_serializer, field_validator, model_validator

from maps_ray.spec.cluster_spec import ClusterSpec, TrackingSpec
from maps_ray.spec.data_spec import DataSpec
from maps_ray.spec.evaluation_spec import EvaluationSpec
from maps_ray.spec.section import (
    Count,
    NonNegative,
    Positive,
    Section,
    each_once,
)
from maps_ray.spec.training_spec import TrainingSpec


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
        # `pathlib` makes one slash of the two.
        return re.sub("^hf:/+", "hf://", str(checkpoint))

    def absolute(self) -> ModelSpec:
        """With a path that means the same from any working directory."""
        # As `pathlib` has `hf://`.
        if self.checkpoint.parts[:1] == ("hf:",):
            return self
        return self.model_copy(update={"checkpoint": self.checkpoint.resolve()})


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
        return each_once(modules, "module")


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
