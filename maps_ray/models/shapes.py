"""Names and shapes of the parameters of common parts, from their sizes alone. No torch."""

from __future__ import annotations

from collections.abc import Collection

from maps_ray.models.checkpoint_faults import Shape
from maps_ray.models.sizes import DecoderText
from maps_ray.models.towers import TowerConfig

Shapes = dict[str, Shape]


def linear(name: str, out_features: int, in_features: int, bias: bool = True) -> Shapes:
    """A linear layer."""
    shapes: Shapes = {f"{name}.weight": (out_features, in_features)}
    return shapes | {f"{name}.bias": (out_features,)} if bias else shapes


def norm(name: str, size: int) -> Shapes:
    """A LayerNorm."""
    return {f"{name}.weight": (size,), f"{name}.bias": (size,)}


def tower_shapes(prefix: str, tower: TowerConfig) -> Shapes:
    """A vision tower under timm's names."""
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
        shapes |= norm(f"{name}.norm1", dim) | norm(f"{name}.norm2", dim)
        shapes |= linear(f"{name}.attn.qkv", 3 * dim, dim) | linear(f"{name}.attn.proj", dim, dim)
        shapes |= linear(f"{name}.mlp.fc1", tower.mlp_dim, dim) | linear(f"{name}.mlp.fc2", dim, tower.mlp_dim)
        if tower.init_values is not None:
            shapes |= {f"{name}.ls1.gamma": (dim,), f"{name}.ls2.gamma": (dim,)}
    shapes |= norm("norm", dim)
    if tower.global_pool == "map":
        shapes["attn_pool.latent"] = (1, 1, dim)
        shapes |= linear("attn_pool.q", dim, dim) | linear("attn_pool.kv", 2 * dim, dim)
        shapes |= linear("attn_pool.proj", dim, dim) | norm("attn_pool.norm", dim)
        shapes |= linear("attn_pool.mlp.fc1", tower.mlp_dim, dim) | linear("attn_pool.mlp.fc2", dim, tower.mlp_dim)
    return {prefix + key: shape for key, shape in shapes.items()}


def decoder_shapes(prefix: str, text: DecoderText, *, biased: Collection[str] = ()) -> Shapes:
    """Embedding, layers and final norm of a Llama-like decoder, as transformers names them.

    Args:
        prefix: of every name, for instance `language_model.model.`.
        text: the decoder's configuration with all sizes filled in.
        biased: which of `q_proj`, `k_proj`, `v_proj`, `o_proj`, `gate_proj`, `up_proj`, `down_proj` have a bias.
    """
    hidden, inner = text["hidden_size"], text["intermediate_size"]
    queries = text["num_attention_heads"] * text["head_dim"]
    keys = text["num_key_value_heads"] * text["head_dim"]
    projections = {
        "self_attn": {"q_proj": (queries, hidden), "k_proj": (keys, hidden), "v_proj": (keys, hidden)}
        | {"o_proj": (hidden, queries)},
        "mlp": {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)},
    }
    shapes: Shapes = {f"{prefix}embed_tokens.weight": (text["vocab_size"], hidden), f"{prefix}norm.weight": (hidden,)}
    for layer in range(text["num_hidden_layers"]):
        name = f"{prefix}layers.{layer}"
        for part, linears in projections.items():
            for projection, (rows, columns) in linears.items():
                shapes |= linear(f"{name}.{part}.{projection}", rows, columns, projection in biased)
        shapes[f"{name}.input_layernorm.weight"] = (hidden,)
        shapes[f"{name}.post_attention_layernorm.weight"] = (hidden,)
    return shapes
