"""What a checkpoint says about the sizes of a VLA-Adapter policy. No torch.

Three forms of `config.json` are read: the one this package writes (`model_type: vla_adapter`), a published one (that of
OpenVLA with Qwen2 as `text_config`), and that of the MiniVLA which a training starts from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Unpack, get_args

from maps_ray.models.checkpoint_faults import CheckpointError
from maps_ray.models.files.folders import find_module, stored_shapes
from maps_ray.models.minivla.config import ACTION_TOKENS, is_minivla
from maps_ray.models.minivla.config import PolicyConfig as MiniVLAConfig
from maps_ray.models.minivla.config import full_config as minivla_config
from maps_ray.models.sizes import STOCK_TOWERS, BaseConfig, PolicySizes, listed

Bridge = Literal["pro", "original"]
"""The policy's attention: `original` has one key and one value projection for its three sources, `pro` one for each
source, and rotary positions."""

# Of Qwen2.5's vocabulary, which published configurations do not tell apart from the tokenizer's.
_QWEN_VOCABULARY, _QWEN_TOKENIZER = 151936, 151921
_QWEN_ACTION_TOKEN_BEGIN = 151386
# Sizes that stand at the top of a `config.json` which has no object `policy`.
_TOP_LEVEL = ("num_images", "chunk", "action_dim", "proprio_dim")


@dataclass(frozen=True, kw_only=True)
class PolicyConfig(BaseConfig):
    """Sizes of a VLA-Adapter policy."""

    action_token_begin: int
    """A label greater than it marks the slot of an action query."""
    queries: int
    """Action queries: 64 as published, 56 in the constants of MAPS' authors."""
    bridge: Bridge
    policy_heads: int
    """Heads of the policy's attention. It has one block for each language layer."""

    film: Literal[False] = False
    causal: Literal[True] = True

    @property
    def task_tokens(self) -> int:
        """Sequence positions, from the first, whose hidden states are the policy's task part: as many as patches."""
        return self.num_images * self.dinov2.patches

    @classmethod
    def from_dict(
        cls, raw: Mapping[str, Any], folder: Path | None = None, **given: Unpack[PolicySizes]
    ) -> PolicyConfig:
        """Reads the contents of `config.json`, and what the folder's files say of the new modules.

        Args:
            raw: the contents; its object `policy`, where there is one, holds the sizes of its training.
            folder: of the checkpoint; none takes what `raw` says.
            given: described by `PolicySizes`; `head` must be `l1` and `film` false.

        Raises:
            CheckpointError: a field is missing, unknown or out of range.
        """
        own = is_adapter_config(raw)
        sizes: dict[str, Any] = dict(given)
        stored = raw.get("policy") if own else None
        if own and not isinstance(stored, Mapping):
            sizes = {**{name: raw[name] for name in _TOP_LEVEL if name in raw}, **sizes}
            # Published folders say by their files alone whether proprioception is read.
            sizes.setdefault("use_proprio", folder is not None and find_module(folder, "proprio_projector") is not None)
        # MiniVLA's reader takes `policy` for its own kind only.
        basis = {**minivla_form(raw), "model_type": "minivla_oft", "policy": stored or {}}
        common = MiniVLAConfig.from_dict(basis, kind="oft", **{**sizes})
        bridge, queries, heads = (raw.get(name) for name in ("bridge", "queries", "policy_heads"))
        # What the head's file shows comes before what is written: published configurations do not say it.
        bridge = _stored_bridge(folder) or bridge or "pro"
        if bridge not in get_args(Bridge):
            raise CheckpointError(f"config.json: bridge = {bridge!r}: must be one of {', '.join(get_args(Bridge))}")
        queries, heads = 64 if queries is None else queries, 8 if heads is None else heads
        for name, value in (("queries", queries), ("policy_heads", heads)):
            if not isinstance(value, int) or value < 1:
                raise CheckpointError(f"config.json: {name} = {value!r}: must be at least 1")
        width = common.text["hidden_size"]
        if width % heads or (bridge == "pro" and (width // heads) % 2):
            raise CheckpointError(
                f"config.json: policy_heads = {heads}: {width} channels must divide into them, evenly for rotary pairs"
            )
        return cls(
            dinov2=common.dinov2,
            siglip=common.siglip,
            text=common.text,
            tokenizer_size=common.tokenizer_size,
            action_token_begin=_action_token_begin(raw, common),
            queries=queries,
            bridge=bridge,
            policy_heads=heads,
            num_images=common.num_images,
            use_proprio=common.use_proprio,
            chunk=common.chunk,
            action_dim=common.action_dim,
            proprio_dim=common.proprio_dim,
        )


def is_adapter_config(raw: Mapping[str, object]) -> bool:
    """Whether the contents of a `config.json` describe a VLA-Adapter: OpenVLA's layout around Qwen2."""
    text = raw.get("text_config")
    return raw.get("model_type") in (None, "vla_adapter", "openvla") and (
        isinstance(text, Mapping) and text.get("model_type") == "qwen2"
    )


def minivla_form(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The sizes of backbone and tokenizer under the names of a MiniVLA's `config.json`.

    Raises:
        CheckpointError: neither a VLA-Adapter nor a MiniVLA.
    """
    if not is_adapter_config(raw):
        if str(raw.get("model_type")).startswith("minivla") or is_minivla(raw):
            return dict(raw)
        raise CheckpointError(
            f"config.json: model_type = {raw.get('model_type')!r}: VLA-Adapter is OpenVLA's layout with a qwen2 "
            "text_config, and starts from a MiniVLA"
        )
    text = raw["text_config"]
    form: dict[str, Any] = {"qwen_config": text}
    form["len_tokenizer"] = raw.get("len_tokenizer") or (
        _QWEN_TOKENIZER if text.get("vocab_size") == _QWEN_VOCABULARY else text.get("vocab_size")
    )
    form |= {name: raw[name] for name in ("img_size", "dino_kwargs", "siglip_kwargs") if name in raw}
    ids, sizes = listed(raw, "timm_model_ids"), listed(raw, "image_sizes")
    if "dino_kwargs" not in form and len(ids) == 2 and len(sizes) == 2:
        for name, timm_id in zip(("dino_kwargs", "siglip_kwargs"), ids, strict=True):
            tower = STOCK_TOWERS.get(str(timm_id).split(".")[0])
            if tower is None:
                raise CheckpointError(
                    f"config.json: timm_model_ids has {timm_id!r}; known: {', '.join(STOCK_TOWERS)}; give the sizes of "
                    "others as dino_kwargs and siglip_kwargs"
                )
            form[name] = tower
        form["img_size"] = sizes[0]
    return form


def full_config(raw: Mapping[str, Any], config: PolicyConfig) -> dict[str, Any]:
    """The `config.json` that this package writes for a checkpoint that had `raw`."""
    own_form = is_adapter_config(raw)
    form = minivla_form(raw) if own_form else minivla_config(raw, "oft")
    basis = dict(raw) if own_form else {}
    names = ("len_tokenizer", "img_size", "dino_kwargs", "siglip_kwargs")
    text = {**form["qwen_config"], "model_type": "qwen2"}
    basis |= {name: form[name] for name in names} | {"text_config": text}
    own = {"bridge": config.bridge, "queries": config.queries, "policy_heads": config.policy_heads}
    return {**basis, **own, "action_token_begin_idx": config.action_token_begin, "model_type": "vla_adapter"}


def _action_token_begin(raw: Mapping[str, object], common: MiniVLAConfig) -> int:
    """Published code marks slots by one number for Qwen's vocabulary, below the first action token of any tokenizer."""
    given = raw.get("action_token_begin_idx")
    if isinstance(given, int):
        return given
    if common.text["vocab_size"] == _QWEN_VOCABULARY:
        return _QWEN_ACTION_TOKEN_BEGIN
    return common.tokenizer_size - ACTION_TOKENS - 1


def _stored_bridge(folder: Path | None) -> Bridge | None:
    file = find_module(folder, "action_head") if folder is not None else None
    if file is None:
        return None
    keys = stored_shapes(file)
    if not any("mlp_resnet_blocks.0.gating_factor" in key for key in keys):
        return None  # MiniVLA-OFT's head or another: the check of shapes says what is wrong
    return "pro" if any(".k_self." in key for key in keys) else "original"
