"""What a checkpoint's `config.json` says about the sizes of a MiniVLA policy. No torch.

Three forms are read: the one this package writes (`model_type` with the towers' and Qwen's sizes), the same without
`model_type`, and the one of published training runs, which names the parts and no sizes (`vla.base_vlm`, or
`model.vision_backbone_id` and `model.llm_backbone_id`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, Unpack

from maps_ray.models.checkpoint_faults import CheckpointError
from maps_ray.models.files.formats import read_json
from maps_ray.models.sizes import (
    STOCK_TOWERS,
    AttentionMask,
    BaseConfig,
    DecoderText,
    PolicySizes,
    ReleasedFault,
    TowerConfig,
    check_tower,
    decoder_text,
    policy_sizes,
    refuse_mask,
    whole_number,
)

Kind = Literal["vq", "oft"]
"""How actions come out: `vq` generates tokens of a VQ action tokenizer, `oft` decodes in parallel with an L1 head."""

ACTION_TOKENS = 256
"""`<|extra_0|>` .. `<|extra_255|>`, the last ids of the tokenizer."""

# Ids of published training runs -> sizes.
_STOCK_BASES = {
    "prism-qwen25-extra-dinosiglip-224px+0_5b": ("dinosiglip-vit-so-224px", "qwen25-0_5b-extra"),
}
_STOCK_VISION = {"dinosiglip-vit-so-224px": ("vit_large_patch14_reg4_dinov2", "vit_so400m_patch14_siglip_224", 224)}
# `config.json` of Qwen/Qwen2.5-0.5B; its embedding has more rows than the tokenizer has ids.
_QWEN25_05B = {
    "model_type": "qwen2",
    "vocab_size": 151936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
    "rope_theta": 1000000.0,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 32768,
}
# Ids of Qwen2.5's tokenizer, without added action tokens.
_QWEN_TOKENIZER = 151665
# With the action tokens: 151665 + 256.
_STOCK_LANGUAGE = {"qwen25-0_5b-extra": (_QWEN25_05B, 151921)}
STOCK_CONFIG: dict[str, object] = {"vla": {"base_vlm": "prism-qwen25-extra-dinosiglip-224px+0_5b"}}
"""A `config.json` that names MiniVLA's base model, and with it its sizes."""


@dataclass(frozen=True, kw_only=True)
class PolicyConfig(BaseConfig):
    """Sizes of a MiniVLA policy."""

    kind: Kind
    attention_mask: AttentionMask = "causal"
    """Of the language model. MiniVLA-OFT as its authors run it is causal; this package's own was bidirectional at
    first, with stop tokens behind the slots, and its checkpoints stay so."""
    released_faults: tuple[ReleasedFault, ...] = ()
    """Faults of the authors' code that are repeated."""

    @property
    def causal(self) -> bool:
        """Whether a position attends to earlier ones alone."""
        return self.attention_mask == "causal"

    @property
    def action_slots(self) -> int:
        """Sequence positions that stand for one chunk of actions under parallel decoding."""
        return self.chunk * self.action_dim

    @property
    def action_token_begin(self) -> int:
        """Greatest id below the action tokens: a label greater than it marks an action slot or code."""
        return self.action_token_end - ACTION_TOKENS - 1

    @property
    def action_token_end(self) -> int:
        """The id behind the last action token.

        The authors' MiniVLA-OFT takes a tokenizer without the added action tokens, and bins of actions for its last
        ids. They overlap Qwen's special tokens, which does no harm: the slots are zeroed.
        """
        # A folder that gives Qwen's own number of ids has no added tokens to leave out.
        released = self.kind == "oft" and self.attention_mask == "causal"
        return self.tokenizer_size - (ACTION_TOKENS if released and self.tokenizer_size != _QWEN_TOKENIZER else 0)

    @classmethod
    def from_dict(
        cls,
        raw: Mapping[str, object],
        *,
        kind: Kind | None = None,
        **given: Unpack[PolicySizes],
    ) -> PolicyConfig:
        """Reads the contents of `config.json`.

        Args:
            raw: the contents; its object `policy`, where there is one, holds the sizes of its training.
            kind: none takes it from `model_type`, or `vq` where there is none.
            given: described by `PolicySizes`; `head` must be `l1` and `film` false.

        Raises:
            CheckpointError: a field is missing, unknown or out of range.
        """
        stored = raw.get("model_type")
        kind = kind or ("oft" if stored == "minivla_oft" else "vq")
        # What another kind of policy was trained for says nothing of this one.
        asked = policy_sizes(raw if stored == f"minivla_{kind}" else {}, given)
        for name, value, only in (("head", asked["head"], "l1"), ("film", asked["film"], False)):
            if value != only:
                raise CheckpointError(f"{name} = {value!r}: MiniVLA has no such part; it must be {only!r}")
        if kind == "vq":
            refuse_mask(asked, "minivla_vq", "causal")
        # Checkpoints of this package that do not name their mask were trained before it could be chosen.
        before = kind == "oft" and stored == "minivla_oft" and bool(raw.get("policy"))
        mask: AttentionMask = asked["attention_mask"] or ("bidirectional" if before else "causal")
        if asked["released_faults"] and mask != "causal":
            raise CheckpointError(
                f"released_faults = {list(asked['released_faults'])}: the released code is causal; leave them out, or "
                "set attention_mask: causal"
            )
        if kind == "vq" and asked["use_proprio"]:
            raise CheckpointError(
                "use_proprio = True: MiniVLA-VQ reads no proprioception; set model.use_proprio: false"
            )
        sizes = _sizes(raw)
        text = _text(sizes["qwen_config"])
        tokenizer_size = whole_number(sizes, "len_tokenizer")
        if not ACTION_TOKENS < tokenizer_size <= text["vocab_size"]:
            raise CheckpointError(
                f"config.json: len_tokenizer = {tokenizer_size}: must be more than the {ACTION_TOKENS} action tokens "
                f"and at most vocab_size = {text['vocab_size']}"
            )
        dinov2, siglip = (_tower(sizes, name) for name in ("dino_kwargs", "siglip_kwargs"))
        if dinov2.patches != siglip.patches:
            raise CheckpointError(
                f"config.json: the towers cut an image into {dinov2.patches} and {siglip.patches} patches; "
                "they are concatenated patch by patch and must agree"
            )
        return cls(
            kind=kind,
            dinov2=dinov2,
            siglip=siglip,
            text=text,
            tokenizer_size=tokenizer_size,
            num_images=asked["num_images"],
            use_proprio=asked["use_proprio"],
            chunk=asked["chunk"],
            action_dim=asked["action_dim"],
            proprio_dim=asked["proprio_dim"],
            attention_mask=mask,
            released_faults=tuple(asked["released_faults"] or ()),
        )


def is_minivla(raw: Mapping[str, object]) -> bool:
    """Whether the contents of a `config.json` without `model_type` describe a MiniVLA."""
    return "qwen_config" in raw or _part_ids(raw) is not None


def full_config(raw: Mapping[str, object], kind: Kind) -> dict[str, Any]:
    """The `config.json` that this package writes for a checkpoint that had `raw`."""
    return {**raw, **_sizes(raw), "model_type": f"minivla_{kind}"}


def published_base(raw: Mapping[str, object]) -> str | None:
    """The published name of the base model that the contents of a `config.json` speak of, where it is a known one."""
    parts = _part_ids(raw)
    return next((name for name, known in _STOCK_BASES.items() if known == parts), None)


def _part_ids(raw: Mapping[str, object]) -> tuple[str, str] | None:
    vla, model = raw.get("vla"), raw.get("model")
    if isinstance(vla, Mapping) and vla.get("base_vlm") in _STOCK_BASES:
        return _STOCK_BASES[vla["base_vlm"]]
    if isinstance(model, Mapping):
        vision, language = model.get("vision_backbone_id"), model.get("llm_backbone_id")
        if vision in _STOCK_VISION and language in _STOCK_LANGUAGE:
            return str(vision), str(language)
    return None


def _sizes(raw: Mapping[str, object]) -> dict[str, Any]:
    """`qwen_config`, `len_tokenizer`, `img_size`, `dino_kwargs` and `siglip_kwargs`."""
    parts = _part_ids(raw)
    sizes: dict[str, Any] = {}
    if parts is not None:
        dinov2, siglip, image = _STOCK_VISION[parts[0]]
        sizes = {"img_size": image, "dino_kwargs": STOCK_TOWERS[dinov2], "siglip_kwargs": STOCK_TOWERS[siglip]}
        sizes["qwen_config"], sizes["len_tokenizer"] = _STOCK_LANGUAGE[parts[1]]
    names = ("qwen_config", "len_tokenizer", "img_size", "dino_kwargs", "siglip_kwargs")
    sizes |= {name: raw[name] for name in names if name in raw}
    missing = [name for name in names if name not in sizes]
    if missing:
        raise CheckpointError(
            f"config.json: {', '.join(missing)} missing; known base models, which need none of them: "
            f"{', '.join(_STOCK_BASES)}"
        )
    return sizes


def _text(given: object) -> DecoderText:
    if not isinstance(given, Mapping):
        raise CheckpointError(f"config.json: qwen_config = {given!r}: must be an object")
    if given.get("model_type", "qwen2") != "qwen2":
        raise CheckpointError(f"config.json: qwen_config.model_type = {given['model_type']!r}: must be 'qwen2'")
    if given.get("tie_word_embeddings") is False:
        raise CheckpointError("config.json: qwen_config.tie_word_embeddings = False: MiniVLA's head is tied")
    return decoder_text(given, "qwen_config")


def _tower(sizes: Mapping[str, object], name: str) -> TowerConfig:
    given = sizes[name]
    if not isinstance(given, Mapping):
        raise CheckpointError(f"config.json: {name} = {given!r}: must be an object")
    known = {field.name for field in fields(TowerConfig)}
    unknown = sorted(set(given) - known)
    if unknown:
        raise CheckpointError(f"config.json: {name}: unknown {unknown}; allowed: {sorted(known)}")
    try:
        tower = TowerConfig(**{"img_size": sizes["img_size"], **given})
    except TypeError as error:
        raise CheckpointError(f"config.json: {name}: {error}") from None
    check_tower(name, tower)
    return tower


@dataclass(frozen=True)
class VQConfig:
    """Sizes of a VQ action tokenizer, named as in its published `config.json`."""

    input_dim_h: int
    """Actions of a chunk."""
    input_dim_w: int
    """Dimensions of an action."""
    n_latent_dims: int = 512
    vqvae_n_embed: int = 256
    """Codes of each codebook."""
    vqvae_groups: int = 7
    """Codebooks, and so tokens of a chunk."""
    act_scale: float = 1.0
    """Actions are divided by it before they are encoded."""

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> VQConfig:
        """Reads the contents of `config.json`; fields that only training used are ignored.

        Raises:
            CheckpointError: a size is missing or out of range.
        """
        try:
            config = cls(**{field.name: raw[field.name] for field in fields(cls) if field.name in raw})
        except TypeError as error:
            raise CheckpointError(f"config.json of the VQ action tokenizer: {error}") from None
        for name, value in asdict(config).items():
            if not isinstance(value, int | float) or value <= 0:
                raise CheckpointError(f"config.json of the VQ action tokenizer: {name} = {value!r}: must be positive")
        return config

    def to_dict(self) -> dict[str, object]:
        """The published `config.json`: sizes, and the arguments that only its loader looks at."""
        loader = {"eval": False, "device": "cpu", "load_dir": None, "encoder_loss_multiplier": 1.0}
        return {**asdict(self), **loader}


def read_vq_config(folder: Path) -> VQConfig:
    """Sizes of the tokenizer in `folder`.

    Raises:
        CheckpointError: no such folder, or no readable configuration.
    """
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder} is missing: MiniVLA-VQ needs a VQ action tokenizer there; train one with jobs/train_vq.py"
        )
    return VQConfig.from_dict(read_json(folder / "config.json"))
