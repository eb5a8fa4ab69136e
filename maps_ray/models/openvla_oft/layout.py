"""Every tensor of an OpenVLA-OFT checkpoint and its shape, from the configuration alone. No torch.

Keys are those of published checkpoints. The policy's parameter names are the same but for LayerScale, which those
files call `scale_factor` and timm calls `gamma`.
"""

from __future__ import annotations

import re

from maps_ray.models.errors import Shape
from maps_ray.models.openvla_oft.config import PolicyConfig, TowerConfig

Shapes = dict[str, Shape]


def model_shapes(config: PolicyConfig) -> Shapes:
    """The tensors of `model.safetensors`."""
    return {
        **_tower("vision_backbone.featurizer.", config.dinov2),
        **_tower("vision_backbone.fused_featurizer.", config.siglip),
        **_projector(config),
        **_language(config),
    }


def action_head_shapes(config: PolicyConfig) -> Shapes:
    """The tensors of the L1 action head, without the prefix `module.` that its file may carry."""
    hidden = config.text["hidden_size"]
    slots = config.action_dim * hidden
    shapes: Shapes = {"model.layer_norm1.weight": (slots,), "model.layer_norm1.bias": (slots,)}
    shapes |= _linear("model.fc1", hidden, slots)
    for block in range(2):
        shapes |= _norm(f"model.mlp_resnet_blocks.{block}.ffn.0", hidden)
        shapes |= _linear(f"model.mlp_resnet_blocks.{block}.ffn.1", hidden, hidden)
    return shapes | _norm("model.layer_norm2", hidden) | _linear("model.fc2", config.action_dim, hidden)


def proprio_projector_shapes(config: PolicyConfig) -> Shapes:
    """The tensors of the proprio projector, without the prefix `module.`."""
    hidden = config.text["hidden_size"]
    return _linear("fc1", hidden, config.proprio_dim) | _linear("fc2", hidden, hidden)


def parameter_shapes(config: PolicyConfig) -> Shapes:
    """Every parameter of the policy, under the policy's names."""
    shapes = {parameter_name(key): shape for key, shape in model_shapes(config).items()}
    shapes |= {f"action_head.{key}": shape for key, shape in action_head_shapes(config).items()}
    if config.use_proprio:
        shapes |= {f"proprio_projector.{key}": shape for key, shape in proprio_projector_shapes(config).items()}
    return shapes


def parameter_name(key: str) -> str:
    """Checkpoint key -> name of the parameter in the policy."""
    return re.sub(r"(\.ls[12])\.scale_factor$", r"\1.gamma", key)


def checkpoint_key(name: str) -> str:
    """Name of a parameter in the policy -> checkpoint key."""
    return re.sub(r"(\.ls[12])\.gamma$", r"\1.scale_factor", name)


def _linear(name: str, out_features: int, in_features: int, bias: bool = True) -> Shapes:
    shapes: Shapes = {f"{name}.weight": (out_features, in_features)}
    return shapes | {f"{name}.bias": (out_features,)} if bias else shapes


def _norm(name: str, size: int) -> Shapes:
    return {f"{name}.weight": (size,), f"{name}.bias": (size,)}


def _tower(prefix: str, tower: TowerConfig) -> Shapes:
    dim = tower.embed_dim
    positions = tower.patches + (0 if tower.no_embed_class else tower.prefix_tokens)
    shapes: Shapes = {
        "pos_embed": (1, positions, dim),
        "patch_embed.proj.weight": (dim, 3, tower.patch_size, tower.patch_size),
        "patch_embed.proj.bias": (dim,),
    }
    if tower.class_token:
        shapes["cls_token"] = (1, 1, dim)
    if tower.reg_tokens:
        shapes["reg_token"] = (1, tower.reg_tokens, dim)
    for block in range(tower.depth):
        name = f"blocks.{block}"
        shapes |= _norm(f"{name}.norm1", dim) | _norm(f"{name}.norm2", dim)
        shapes |= _linear(f"{name}.attn.qkv", 3 * dim, dim) | _linear(f"{name}.attn.proj", dim, dim)
        shapes |= _linear(f"{name}.mlp.fc1", tower.mlp_dim, dim) | _linear(f"{name}.mlp.fc2", dim, tower.mlp_dim)
        if tower.init_values is not None:
            shapes |= {f"{name}.ls1.scale_factor": (dim,), f"{name}.ls2.scale_factor": (dim,)}
    shapes |= _norm("norm", dim)
    if tower.global_pool == "map":
        shapes["attn_pool.latent"] = (1, 1, dim)
        shapes |= _linear("attn_pool.q", dim, dim) | _linear("attn_pool.kv", 2 * dim, dim)
        shapes |= _linear("attn_pool.proj", dim, dim) | _norm("attn_pool.norm", dim)
        shapes |= _linear("attn_pool.mlp.fc1", tower.mlp_dim, dim) | _linear("attn_pool.mlp.fc2", dim, tower.mlp_dim)
    return {prefix + key: shape for key, shape in shapes.items()}


def projector_sizes(config: PolicyConfig) -> tuple[int, int, int]:
    """Input, inner and output width of the projector: inner is four times the concatenated towers' width."""
    vision = config.dinov2.embed_dim + config.siglip.embed_dim
    return vision, 4 * vision, config.text["hidden_size"]


def _projector(config: PolicyConfig) -> Shapes:
    vision, inner, hidden = projector_sizes(config)
    return (
        _linear("projector.fc1", inner, vision)
        | _linear("projector.fc2", hidden, inner)
        | _linear("projector.fc3", hidden, hidden)
    )


def _language(config: PolicyConfig) -> Shapes:
    text = config.text
    hidden, inner, vocabulary = text["hidden_size"], text["intermediate_size"], text["vocab_size"]
    queries = text["num_attention_heads"] * text["head_dim"]
    keys = text["num_key_value_heads"] * text["head_dim"]
    prefix = "language_model.model."
    shapes: Shapes = {
        f"{prefix}embed_tokens.weight": (vocabulary, hidden),
        f"{prefix}norm.weight": (hidden,),
        "language_model.lm_head.weight": (vocabulary, hidden),
    }
    for layer in range(text["num_hidden_layers"]):
        name = f"{prefix}layers.{layer}"
        bias = bool(text["attention_bias"])
        shapes |= _linear(f"{name}.self_attn.q_proj", queries, hidden, bias)
        shapes |= _linear(f"{name}.self_attn.k_proj", keys, hidden, bias)
        shapes |= _linear(f"{name}.self_attn.v_proj", keys, hidden, bias)
        shapes |= _linear(f"{name}.self_attn.o_proj", hidden, queries, bias)
        bias = bool(text["mlp_bias"])
        shapes |= _linear(f"{name}.mlp.gate_proj", inner, hidden, bias)
        shapes |= _linear(f"{name}.mlp.up_proj", inner, hidden, bias)
        shapes |= _linear(f"{name}.mlp.down_proj", hidden, inner, bias)
        shapes[f"{name}.input_layernorm.weight"] = (hidden,)
        shapes[f"{name}.post_attention_layernorm.weight"] = (hidden,)
    return shapes
