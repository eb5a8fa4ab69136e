"""What is planned for: the policy of a spec, without weights, and the shapes of its batches.

What a spec refers to may be missing: a checkpoint is then taken to be the published one of `model.name`, and data to be
as LIBERO's. Each such guess is written down in words.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from accelerate import init_empty_weights
from torch import Tensor

from maps_ray.data import DatasetError, data_sizes
from maps_ray.models import CheckpointError, create_policy, load_processor, stock_config
from maps_ray.models.activations import checkpoint_blocks
from maps_ray.models.collate import IGNORED
from maps_ray.models.files.folders import read_config
from maps_ray.models.lora import add_adapters, is_adapter
from maps_ray.models.minivla.config import VQConfig
from maps_ray.models.minivla.vq import ActionVQ
from maps_ray.models.policy import BasePolicy
from maps_ray.proximity.schedule import ScheduleError, frozen_tensors
from maps_ray.proximity.stack import assign
from maps_ray.spec import LoraSpec, Problem, RunSpec, SpecError
from maps_ray.training.engine import DTYPES
from maps_ray.training.model_checks import policy_options
from maps_ray.training.planning.profile import PassProfile, run_pass
from maps_ray.training.planning.terms import Counts

_DIMENSIONS = {"action_dim": 7, "proprio_dim": 8}
# Tokens of a prompt with a sentence of some 15 words: OpenVLA's, and Qwen's chat form with its system text.
_PROMPT_TOKENS = {"openvla_oft": 32}
_CHAT_PROMPT_TOKENS = 60
_SENTENCE = "pick up the black bowl on the wooden cabinet and place it on the plate"
# Codes of a chunk, and what ends a sequence of MiniVLA-VQ.
_VQ_ANSWER = (7, 2)

# DeepSpeed's default: under stage 3, smaller tensors stay whole on every rank.
_WHOLE_BELOW = 100_000


@dataclass
class Subject:
    """The policy of a spec on the meta device. Made by `read_subject`."""

    spec: RunSpec
    raw: dict[str, object]
    """Contents of the `config.json`."""
    dimensions: dict[str, int]
    """`action_dim`, and `proprio_dim` where the policy reads it."""
    prompt_tokens: int
    stored_dtype: str | None
    """Of the checkpoint, where it says."""
    assumptions: list[str] = field(default_factory=list)
    _passes: dict[int, PassProfile] = field(default_factory=dict)

    def changed(self, *, lora: LoraSpec | None = None, checkpointing: bool = False) -> Subject:
        """The same with adapters, or with activation checkpointing."""
        spec = self.spec
        if lora is not None:
            spec = spec.model_copy(update={"model": spec.model.model_copy(update={"lora": lora})})
        if checkpointing:
            training = spec.training.model_copy(update={"activation_checkpointing": True})
            spec = spec.model_copy(update={"training": training})
        return Subject(spec, self.raw, self.dimensions, self.prompt_tokens, self.stored_dtype)

    @cached_property
    def policy(self) -> BasePolicy:
        """As training builds it, all parameters on the meta device.

        Raises:
            SpecError: the configuration describes no such policy, or the spec asks for layers that it does not have.
        """
        spec = self.spec
        options: dict[str, object] = dict(self.dimensions)
        if spec.model.name == "minivla_vq":
            # Kept in fp32 beside the policy, with values: it must not be made empty.
            options["action_vq"] = ActionVQ(VQConfig(spec.data.chunk, self.dimensions["action_dim"]))
        with init_empty_weights():
            try:
                policy = create_policy(self.raw, attention=spec.model.attention, **policy_options(spec), **options)
            except CheckpointError as error:
                raise SpecError([Problem("model.checkpoint", str(spec.model.checkpoint), str(error))]) from None
            lora = spec.model.lora
            if lora is not None:
                try:
                    add_adapters(policy, lora.rank, spec.lora_alpha, lora.targets, init=lora.init)
                except ValueError as error:
                    raise SpecError([Problem("model.lora.targets", lora.targets, str(error))]) from None
        # The engine casts what adapters and heads are made of as well.
        policy.to(DTYPES[spec.training.precision]).to("meta")
        owners = assign(policy.stack(), [name for name, _ in policy.named_parameters()])
        try:
            frozen = frozen_tensors(policy.stack(), owners, spec.proximity.freeze)
        except ScheduleError as error:
            raise SpecError([Problem(f"proximity.{error.field}", spec.proximity.freeze, str(error))]) from None
        still = frozen | policy.idle_parameters()
        for name, parameter in policy.named_parameters():
            if name in still:
                parameter.requires_grad_(False)
        if spec.training.activation_checkpointing:
            checkpoint_blocks(policy.modules())
        return policy

    @cached_property
    def counts(self) -> Counts:
        """How many numbers of which kind the run holds."""
        policy, training = self.policy, self.spec.training
        owners = assign(policy.stack(), [name for name, _ in policy.named_parameters()])
        trained = frozen = anchored = whole = idle = 0
        without_gradient = self.profile(training.batch_size).without_gradient
        for name, parameter in policy.named_parameters():
            numel = parameter.numel()
            whole += numel if numel < _WHOLE_BELOW else 0
            if not parameter.requires_grad:
                frozen += numel
                continue
            trained += numel
            idle += numel if name in without_gradient else 0
            if is_adapter(name):
                # Of adapters that are held to their start only A takes memory: B starts at zero.
                held = self.spec.holds_adapters_to_start and ".lora_A." in name
            else:
                held = owners[name].pretrained
            anchored += numel if held else 0
        halves = training.precision == "bf16" or self.stored_dtype in ("bfloat16", "float16")
        return Counts(trained, frozen, anchored, whole, idle, anchor_bytes=2 if halves else 4)

    @property
    def tokens(self) -> int:
        """Positions of the language model's sequence."""
        config = self.policy.config
        # What both towers say of a patch is one position.
        patches = config.dinov2.patches * config.num_images
        return int(patches + config.use_proprio + len(self._ids()[0]))

    def profile(self, batch: int) -> PassProfile:
        """One forward and backward pass of so many samples."""
        if batch not in self._passes:
            self._passes[batch] = run_pass(self.policy, self.batch(batch), batch)
        return self._passes[batch]

    def activations(self, batch: int) -> int:
        """Most bytes of activations and temporaries at any moment; on a line between one sample and the spec's batch
        for others."""
        full = self.spec.training.batch_size
        if batch in self._passes or batch in (1, full):
            return self.profile(batch).peak
        one, most = self.profile(1).peak, self.profile(full).peak
        return round(one + (most - one) * (batch - 1) / (full - 1))

    def batch(self, size: int) -> dict[str, Tensor]:
        """Keyword arguments of the policy's `forward`: ids with values, all else shapes alone."""
        config = self.policy.config
        ids, labels = (torch.tensor(row).repeat(size, 1) for row in self._ids())
        inputs = {
            # Six channels: each tower has the image normalised in its own way.
            "pixel_values": torch.empty(size, 6 * config.num_images, config.image_size, config.image_size),
            "actions": torch.empty(size, config.chunk, config.action_dim),
        }
        if config.use_proprio:
            inputs["proprio"] = torch.empty(size, config.proprio_dim)
        shapes = {name: tensor.to("meta") for name, tensor in inputs.items()}
        return {**shapes, "input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids, dtype=torch.bool)}

    def _ids(self) -> tuple[list[int], list[int]]:
        """One sequence and its labels."""
        config = self.policy.config
        generated = getattr(config, "kind", "oft") == "vq"
        actions, ends = _VQ_ANSWER if generated else (config.action_slots, 1)
        answer = [config.action_token_begin + 1] * actions + [2] * ends
        return [1] * self.prompt_tokens + answer, [IGNORED] * self.prompt_tokens + answer


def read_subject(spec: RunSpec) -> Subject:
    """What a spec plans to train; files that are missing are guessed.

    Raises:
        SpecError: a `config.json` that is there and cannot be used.
    """
    assumptions = []
    folder, name = spec.model.checkpoint, spec.model.name
    if (folder / "config.json").is_file():
        try:
            _, raw = read_config(folder)
        except CheckpointError as error:
            raise SpecError([Problem("model.checkpoint", str(folder), str(error))]) from None
    else:
        raw = stock_config(name)
        assumptions.append(f"{folder} has no config.json: sizes are those of the published base model of {name}")
    try:
        dimensions = data_sizes(spec.data, use_proprio=spec.model.use_proprio)
    except (DatasetError, OSError):
        dimensions = {}
    trained = raw.get("policy") or {}
    wanted = ("action_dim", "proprio_dim") if spec.model.use_proprio else ("action_dim",)
    missing = [key for key in wanted if key not in dimensions]
    for key in missing:
        dimensions[key] = int(trained.get(key, _DIMENSIONS[key]))
    if missing:
        said = ", ".join(f"{key} {dimensions[key]}" for key in missing)
        assumptions.append(f"{spec.data.path} is no data set that can be read: {said}")
    prompt = _prompt_tokens(spec, dimensions["action_dim"])
    if prompt is None:
        prompt = _PROMPT_TOKENS.get(name, _CHAT_PROMPT_TOKENS)
        assumptions.append(f"the checkpoint's tokenizer cannot be read: a prompt has {prompt} tokens")
    dtype = raw.get("torch_dtype") or raw.get("dtype")
    return Subject(spec, raw, dimensions, prompt, dtype, assumptions)


def _prompt_tokens(spec: RunSpec, action_dim: int) -> int | None:
    """Tokens before the answer, for a sentence of usual length; None where the tokenizer cannot be read."""
    try:
        processor = load_processor(
            spec.model.checkpoint, name=spec.model.name, chunk=spec.data.chunk, action_dim=action_dim
        )
    except (CheckpointError, OSError):
        return None
    return len(processor.prompts.encode(_SENTENCE))
