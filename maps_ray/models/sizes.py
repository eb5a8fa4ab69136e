"""Sizes: of vision towers and decoders, and what a policy is built for beside what `config.json` says. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NotRequired, Protocol, TypedDict, cast, get_args

from maps_ray.models.checkpoint_faults import CheckpointError


@dataclass(frozen=True)
class TowerConfig:
    """One vision tower; the fields are keyword arguments of timm's `VisionTransformer`."""

    img_size: int
    patch_size: int
    embed_dim: int
    depth: int
    num_heads: int
    mlp_ratio: float = 4.0
    init_values: float | None = None
    class_token: bool = True
    reg_tokens: int = 0
    no_embed_class: bool = False
    global_pool: str = "token"
    act_layer: str | None = None

    @property
    def patches(self) -> int:
        """Patches of one image."""
        return (self.img_size // self.patch_size) ** 2

    @property
    def prefix_tokens(self) -> int:
        return int(self.class_token) + self.reg_tokens

    @property
    def mlp_dim(self) -> int:
        # Cut off as timm does: SigLIP's 1152 x 3.7362 = 4304.1 stands for 4304.
        return int(self.embed_dim * self.mlp_ratio)

    def timm_kwargs(self) -> dict[str, object]:
        return {**asdict(self), "num_classes": 0}


# Architectures behind `timm_model_ids` of published checkpoints, by the part of the id before the weights' tag.
STOCK_TOWERS: dict[str, dict[str, object]] = {
    "vit_large_patch14_reg4_dinov2": {
        "patch_size": 14,
        "embed_dim": 1024,
        "depth": 24,
        "num_heads": 16,
        "init_values": 1e-5,
        "reg_tokens": 4,
        "no_embed_class": True,
    },
    "vit_so400m_patch14_siglip_224": {
        "patch_size": 14,
        "embed_dim": 1152,
        "depth": 27,
        "num_heads": 16,
        "mlp_ratio": 3.7362,
        "class_token": False,
        "global_pool": "map",
    },
}


def whole_number(
    raw: Mapping[str, object], name: str, otherwise: object = None, where: str = "", least: int = 1
) -> int:
    """A size that `config.json` says.

    Args:
        raw: the object in which it stands, or not.
        name: of the field.
        otherwise: what counts where it does not.
        where: name of the object, with a dot behind.
        least: what it may be.

    Raises:
        CheckpointError: it is something else.
    """
    if name not in raw and otherwise is None:
        raise CheckpointError(f"config.json: {where}{name} missing")
    value = raw.get(name, otherwise)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise CheckpointError(f"config.json: {where}{name} = {value!r}: must be a whole number, at least {least}")
    return value


def listed(raw: Mapping[str, object], name: str) -> list[object]:
    """A list that `config.json` has; empty where it is null or missing.

    Raises:
        CheckpointError: it is something else.
    """
    value = raw.get(name)
    if value is not None and not isinstance(value, list):
        raise CheckpointError(f"config.json: {name} = {value!r}: must be a list")
    return list(value or ())


def decoder_text(given: Mapping[str, object], where: str) -> DecoderText:
    """The configuration of a language model, with the sizes that transformers fills in.

    Args:
        given: as `config.json` has it.
        where: name of the object there.

    Raises:
        CheckpointError: a size is missing or out of range.
    """
    for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
        whole_number(given, name, where=f"{where}.")
    text = cast(dict[str, Any], dict(given))
    text["num_key_value_heads"] = text.get("num_key_value_heads") or text["num_attention_heads"]
    text["head_dim"] = text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]
    for name in ("num_key_value_heads", "head_dim"):
        whole_number(text, name, where=f"{where}.")
    theta = text.get("rope_theta")
    if theta is not None and (isinstance(theta, bool) or not isinstance(theta, int | float) or theta <= 0):
        raise CheckpointError(f"config.json: {where}.rope_theta = {theta!r}: must be a number above 0")
    return cast(DecoderText, text)


def check_tower(name: str, tower: TowerConfig) -> None:
    """Raises `CheckpointError`, naming the tower `name`, for sizes with which timm or the policy would fail."""
    for size in ("img_size", "patch_size", "embed_dim", "depth", "num_heads", "reg_tokens"):
        whole_number(asdict(tower), size, where=f"{name}.", least=int(size != "reg_tokens"))
    if isinstance(tower.mlp_ratio, bool) or not isinstance(tower.mlp_ratio, int | float) or tower.mlp_ratio <= 0:
        raise CheckpointError(f"config.json: {name}.mlp_ratio = {tower.mlp_ratio!r}: must be a number above 0")
    if not isinstance(tower.class_token, bool):
        raise CheckpointError(f"config.json: {name}.class_token = {tower.class_token!r}: must be true or false")
    if tower.img_size % tower.patch_size:
        raise CheckpointError(
            f"config.json: {name}: img_size = {tower.img_size!r}: must be a multiple of the patch size "
            f"{tower.patch_size}"
        )
    if tower.embed_dim % tower.num_heads:
        raise CheckpointError(
            f"config.json: {name}: embed_dim = {tower.embed_dim}: must be a multiple of num_heads = {tower.num_heads}"
        )
    if tower.depth < 2:
        raise CheckpointError(f"config.json: {name}: depth = {tower.depth}: features come from the last block but one")
    # `token` needs a class token. With `avg` timm would build `fc_norm` in place of `norm`, which published checkpoints
    # have.
    pools = ("token", "map", "") if tower.class_token else ("map", "")
    if tower.global_pool not in pools:
        raise CheckpointError(
            f"config.json: {name}: global_pool = {tower.global_pool!r}: must be one of {pools} where class_token is "
            f"{tower.class_token}"
        )


MAX_IMAGES = 3

Head = Literal["l1", "diffusion", "discrete"]
"""How actions come out: regressed, denoised, or as tokens of the language model."""


AttentionMask = Literal["causal", "bidirectional"]
"""Whether a position of the language model attends to those before it, or to all."""

ReleasedFault = Literal["masked_slot", "evaluation_token"]
"""A fault of the authors' MiniVLA-OFT that can be repeated. `masked_slot`: in training, an action slot is hidden from
attention where the id of its true action happens to be the padding id. `evaluation_token`: evaluation puts id 29871
behind the prompt (Llama's empty token, a word in Qwen) and id 2 behind the slots; training has neither."""


class PolicySizes(TypedDict, total=False):
    """What a policy is built for, beside what `config.json` says of the pretrained model."""

    num_images: int
    """Images per sample, 1 to 3."""
    use_proprio: bool
    """Whether proprioception is read."""
    chunk: int
    """Actions predicted at once."""
    action_dim: int
    proprio_dim: int
    head: Head
    film: bool
    """Whether the instruction modulates the vision towers (FiLM)."""
    attention_mask: AttentionMask | None
    """Of the language model; none takes what the checkpoint was trained with. MiniVLA-OFT alone has a choice."""
    released_faults: Sequence[ReleasedFault] | None
    """Faults of the authors' MiniVLA-OFT to repeat; none takes what the checkpoint was trained with, usually none."""


class DecoderText(TypedDict):
    """Configuration of a Llama or Qwen2 as transformers names its fields; what else a `config.json` says of it, such
    as `rope_theta`, stands beside these and reaches transformers unchanged."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    attention_bias: NotRequired[bool]
    """Of Llama: whether the projections of attention have biases."""
    mlp_bias: NotRequired[bool]
    pad_token_id: NotRequired[int | None]


DEFAULT_SIZES: PolicySizes = {
    "num_images": 1,
    "use_proprio": False,
    "chunk": 8,
    "action_dim": 7,
    "proprio_dim": 8,
    "head": "l1",
    "film": False,
    "attention_mask": None,
    "released_faults": None,
}


def policy_sizes(raw: Mapping[str, object], given: PolicySizes) -> PolicySizes:
    """The sizes asked for; where none is given, those that the checkpoint was trained with, or else the defaults.

    Args:
        raw: contents of `config.json`; its object `policy`, where there is one, holds the sizes of its training.

    Returns:
        all of them.

    Raises:
        CheckpointError: a size out of range, or more images than the checkpoint was trained with.
        TypeError: no size has that name.
    """
    # Options of commands come here by name, unseen by a type checker.
    for name in given:
        if name not in DEFAULT_SIZES:
            raise TypeError(f"policy_sizes() got an unexpected keyword argument {name!r}")
    stored = raw.get("policy") or {}
    if not isinstance(stored, Mapping):
        raise CheckpointError(f"config.json: policy = {stored!r}: must be an object")
    sizes = {
        **DEFAULT_SIZES,
        **{name: stored[name] for name in DEFAULT_SIZES if name in stored},
        **{name: value for name, value in given.items() if value is not None},
    }
    most = stored.get("num_images", MAX_IMAGES)
    for images in (sizes["num_images"], most):
        if images not in range(1, MAX_IMAGES + 1):
            raise CheckpointError(f"num_images = {images!r}: must be 1 to {MAX_IMAGES}")
    if sizes["num_images"] > most:
        raise CheckpointError(
            f"num_images = {sizes['num_images']}: the checkpoint was trained with {stored['num_images']}; give fewer "
            "cameras, or start from the base model"
        )
    for name in ("use_proprio", "film"):
        if not isinstance(sizes[name], bool):
            raise CheckpointError(f"{name} = {sizes[name]!r}: must be true or false")
    for name in ("chunk", "action_dim", "proprio_dim"):
        if not isinstance(sizes[name], int) or sizes[name] < 1:
            raise CheckpointError(f"{name} = {sizes[name]!r}: must be at least 1")
    for name in ("use_proprio", "film"):
        # A text such as `no` would count as true.
        if not isinstance(sizes[name], bool):
            raise CheckpointError(f"{name} = {sizes[name]!r}: must be true or false")
    masks, faults = get_args(AttentionMask), get_args(ReleasedFault)
    if sizes["attention_mask"] not in (None, *masks):
        raise CheckpointError(f"attention_mask = {sizes['attention_mask']!r}: must be one of {', '.join(masks)}")
    sizes["released_faults"] = tuple(sizes["released_faults"] or ())
    for fault in sizes["released_faults"]:
        if fault not in faults:
            raise CheckpointError(f"released_faults = {fault!r}: must be one of {', '.join(faults)}")
    if sizes["head"] not in get_args(Head):
        raise CheckpointError(f"head = {sizes['head']!r}: must be one of {', '.join(get_args(Head))}")
    return cast(PolicySizes, sizes)


def refuse_mask(sizes: PolicySizes, policy: str, only: AttentionMask) -> None:
    """Raises `CheckpointError` where a policy without the choice is asked for another mask, or for faults.

    Args:
        sizes: of `policy_sizes`.
        policy: its name.
        only: the mask that it has.
    """
    if sizes["attention_mask"] not in (None, only):
        raise CheckpointError(f"attention_mask = {sizes['attention_mask']!r}: {policy} is {only}; leave it out")
    if sizes["released_faults"]:
        raise CheckpointError(f"released_faults = {list(sizes['released_faults'])}: only minivla_oft has such; [] here")


@dataclass(frozen=True, kw_only=True)
class BaseConfig:
    """Sizes that a policy of any backbone has; the backbone's `PolicyConfig` adds its own."""

    dinov2: TowerConfig
    siglip: TowerConfig
    text: DecoderText
    """Configuration of the language model, with the sizes filled in."""
    tokenizer_size: int
    """Ids of the tokenizer, action tokens included; the embedding is padded beyond it."""
    num_images: int
    """Images per sample, 1 to 3."""
    use_proprio: bool
    """Whether proprioception is read."""
    chunk: int
    """Actions predicted at once."""
    action_dim: int
    proprio_dim: int

    @property
    def image_size(self) -> int:
        """Height and width in pixels."""
        return self.dinov2.img_size

    @property
    def depths(self) -> tuple[int, int, int]:
        """Blocks of DINOv2, of SigLIP and of the language model."""
        return self.dinov2.depth, self.siglip.depth, self.text["num_hidden_layers"]


class HeadSizes(Protocol):
    """What the action head and the proprio projector need to know of a policy, of this backbone or another."""

    @property
    def text(self) -> DecoderText: ...
    @property
    def chunk(self) -> int: ...
    @property
    def action_dim(self) -> int: ...
    @property
    def proprio_dim(self) -> int: ...


class ProjectorSizes(Protocol):
    """What the projector needs to know of a policy."""

    @property
    def dinov2(self) -> TowerConfig: ...
    @property
    def siglip(self) -> TowerConfig: ...
    @property
    def text(self) -> DecoderText: ...


class VisionSizes(ProjectorSizes, Protocol):
    """What the fused towers and their projector need to know of a policy."""

    @property
    def film(self) -> bool: ...


class DecoderSizes(Protocol):
    """What a Qwen2 needs to know of a policy."""

    @property
    def text(self) -> DecoderText: ...
    @property
    def causal(self) -> bool: ...
