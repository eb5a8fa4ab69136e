"""Every tensor of an OpenVLA-OFT checkpoint and its shape, from the configuration alone. No torch.

Keys are those of published checkpoints. The policy's parameter names are the same but for LayerScale, which those
files call `scale_factor` and timm calls `gamma`.
"""

from __future__ import annotations

import re

from maps_ray.models.openvla_oft.config import HeadSizes, PolicyConfig
from maps_ray.models.shapes import Shapes, decoder_shapes, linear, norm, tower_shapes
from maps_ray.models.towers import TowerConfig


def model_shapes(config: PolicyConfig) -> Shapes:
    """The tensors of `model.safetensors`."""
    return {
        **_tower("vision_backbone.featurizer.", config.dinov2),
        **_tower("vision_backbone.fused_featurizer.", config.siglip),
        **_projector(config),
        **_language(config),
    }


def action_head_shapes(config: HeadSizes) -> Shapes:
    """The tensors of the L1 action head, without the prefix `module.` that its file may carry."""
    hidden = config.text["hidden_size"]
    slots = config.action_dim * hidden
    shapes: Shapes = {"model.layer_norm1.weight": (slots,), "model.layer_norm1.bias": (slots,)}
    shapes |= linear("model.fc1", hidden, slots)
    for block in range(2):
        shapes |= norm(f"model.mlp_resnet_blocks.{block}.ffn.0", hidden)
        shapes |= linear(f"model.mlp_resnet_blocks.{block}.ffn.1", hidden, hidden)
    return shapes | norm("model.layer_norm2", hidden) | linear("model.fc2", config.action_dim, hidden)


def proprio_projector_shapes(config: HeadSizes) -> Shapes:
    """The tensors of the proprio projector, without the prefix `module.`."""
    hidden = config.text["hidden_size"]
    return linear("fc1", hidden, config.proprio_dim) | linear("fc2", hidden, hidden)


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


def _tower(prefix: str, tower: TowerConfig) -> Shapes:
    return {checkpoint_key(name): shape for name, shape in tower_shapes(prefix, tower).items()}


def projector_sizes(config: PolicyConfig) -> tuple[int, int, int]:
    """Input, inner and output width of the projector: inner is four times the concatenated towers' width."""
    vision = config.dinov2.embed_dim + config.siglip.embed_dim
    return vision, 4 * vision, config.text["hidden_size"]


def _projector(config: PolicyConfig) -> Shapes:
    vision, inner, hidden = projector_sizes(config)
    return (
        linear("projector.fc1", inner, vision)
        | linear("projector.fc2", hidden, inner)
        | linear("projector.fc3", hidden, hidden)
    )


def _language(config: PolicyConfig) -> Shapes:
    text = config.text
    biased = ("q_proj", "k_proj", "v_proj", "o_proj") if text["attention_bias"] else ()
    biased += ("gate_proj", "up_proj", "down_proj") if text["mlp_bias"] else ()
    head = {"language_model.lm_head.weight": (text["vocab_size"], text["hidden_size"])}
    return decoder_shapes("language_model.model.", text, biased=biased) | head
