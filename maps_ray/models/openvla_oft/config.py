"""What a checkpoint's `config.json` says about the sizes of the policy. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Unpack

from maps_ray.models.checkpoint_faults import CheckpointError
from maps_ray.models.sizes import (
    STOCK_TOWERS,
    BaseConfig,
    DecoderText,
    Head,
    PolicySizes,
    TowerConfig,
    check_tower,
    decoder_text,
    listed,
    policy_sizes,
    refuse_mask,
    whole_number,
)

# Defaults of a Llama configuration file, which lists only what differs from Llama-2 7B.
_LLAMA_DEFAULTS: dict[str, int | bool] = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32000,
    "attention_bias": False,
    "mlp_bias": False,
}

STOCK_CONFIG: dict[str, object] = {
    "model_type": "openvla",
    "timm_model_ids": ["vit_large_patch14_reg4_dinov2.lvd142m", "vit_so400m_patch14_siglip_224"],
    "timm_override_act_layers": [None, None],
    "image_sizes": [224, 224],
    "pad_to_multiple_of": 64,
    "text_config": {"model_type": "llama", "vocab_size": 32064},
}
"""What the `config.json` of openvla-7b says of its sizes."""


@dataclass(frozen=True, kw_only=True)
class PolicyConfig(BaseConfig):
    """Sizes of an OpenVLA-OFT policy."""

    action_bins: int
    head: Head = "l1"
    film: bool = False

    @property
    def action_slots(self) -> int:
        """Sequence positions that stand for one chunk of actions."""
        return self.chunk * self.action_dim

    @property
    def action_token_begin(self) -> int:
        """Greatest id below the action tokens: a label greater than it marks an action slot."""
        return self.tokenizer_size - self.action_bins - 1

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], **sizes: Unpack[PolicySizes]) -> PolicyConfig:
        """Reads the contents of `config.json`.

        `vision_kwargs` = `{"img_size", "featurizer": {...}, "fused_featurizer": {...}}` gives the towers' sizes where
        `timm_model_ids` names no known architecture.

        Raises:
            CheckpointError: a field is missing, unknown or out of range.
        """
        complete = policy_sizes(raw, sizes)
        refuse_mask(complete, "openvla_oft", "bidirectional")
        if raw.get("model_type") != "openvla":
            raise CheckpointError(f"config.json: model_type = {raw.get('model_type')!r}: must be 'openvla'")
        dinov2, siglip = _towers(raw)
        if dinov2.patches != siglip.patches:
            raise CheckpointError(
                f"config.json: the towers cut an image into {dinov2.patches} and {siglip.patches} patches; "
                "they are concatenated patch by patch and must agree"
            )
        text = _text(raw)
        return cls(
            dinov2=dinov2,
            siglip=siglip,
            text=text,
            action_bins=whole_number(raw, "n_action_bins", 256, least=2),
            # As `OpenVLAForActionPrediction` counts: the embedding was padded by so many rows, and action tokens are
            # the last ids before them.
            tokenizer_size=text["vocab_size"] - whole_number(raw, "pad_to_multiple_of", 64, least=0),
            num_images=complete["num_images"],
            use_proprio=complete["use_proprio"],
            chunk=complete["chunk"],
            action_dim=complete["action_dim"],
            proprio_dim=complete["proprio_dim"],
            head=complete["head"],
            film=complete["film"],
        )


def _text(raw: Mapping[str, object]) -> DecoderText:
    given = raw.get("text_config")
    if not isinstance(given, Mapping):
        raise CheckpointError("config.json: text_config is missing")
    if given.get("model_type", "llama") != "llama":
        raise CheckpointError(f"config.json: text_config.model_type = {given['model_type']!r}: must be 'llama'")
    if given.get("tie_word_embeddings"):
        raise CheckpointError("config.json: text_config.tie_word_embeddings = True: OpenVLA's head is untied")
    padding = {"pad_token_id": raw.get("pad_token_id")}
    return decoder_text({**_LLAMA_DEFAULTS, **padding, **given}, "text_config")


def _towers(raw: Mapping[str, Any]) -> tuple[TowerConfig, TowerConfig]:
    if raw.get("use_fused_vision_backbone") is False:
        raise CheckpointError("config.json: use_fused_vision_backbone = False: needs DINOv2 and SigLIP together")
    ids, sizes = listed(raw, "timm_model_ids"), listed(raw, "image_sizes")
    activations = listed(raw, "timm_override_act_layers") or [None, None]
    kwargs = raw.get("vision_kwargs")
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise CheckpointError(f"config.json: vision_kwargs = {kwargs!r}: must be an object")
    if len(activations) != 2:
        raise CheckpointError(f"config.json: timm_override_act_layers = {activations}: needs two, or null")
    if kwargs is None and (len(ids) != 2 or len(sizes) != 2):
        raise CheckpointError(
            f"config.json: timm_model_ids = {ids}, image_sizes = {sizes}: needs two of each, DINOv2 then SigLIP"
        )
    towers = []
    for position, name in enumerate(("featurizer", "fused_featurizer")):
        if kwargs is not None:
            given, size = kwargs.get(name), kwargs.get("img_size")
            if not isinstance(given, Mapping):
                raise CheckpointError(f"config.json: vision_kwargs.{name} is missing")
        else:
            given, size = STOCK_TOWERS.get(str(ids[position]).split(".")[0]), sizes[position]
            if given is None:
                raise CheckpointError(
                    f"config.json: timm_model_ids has {ids[position]!r}; known: {', '.join(STOCK_TOWERS)}; "
                    "give the sizes of others as vision_kwargs"
                )
        merged = {"img_size": size, "act_layer": activations[position], **given}
        known = {field.name for field in fields(TowerConfig)}
        unknown = sorted(set(merged) - known)
        if unknown:
            raise CheckpointError(f"config.json: vision_kwargs.{name}: unknown {unknown}; allowed: {sorted(known)}")
        try:
            tower = TowerConfig(**merged)
        except TypeError as error:
            raise CheckpointError(f"config.json: vision_kwargs.{name}: {error}") from None
        check_tower(name, tower)
        towers.append(tower)
    return towers[0], towers[1]
