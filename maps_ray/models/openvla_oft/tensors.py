"""Every tensor of an OpenVLA-OFT checkpoint, its shape and its place in the stack, from the configuration. No torch.

Keys are those of published checkpoints. The policy's parameter names are the same but for LayerScale, which those
files call `scale_factor` and timm calls `gamma`.
"""

from __future__ import annotations

import re

from maps_ray.models.layers import Shapes, decoder_shapes, linear, norm, policy_layers, tower_shapes, with_modules
from maps_ray.models.openvla_oft.config import PolicyConfig
from maps_ray.models.sizes import HeadSizes, ProjectorSizes, TowerConfig
from maps_ray.proximity.stack import StackLayer


def model_shapes(config: PolicyConfig) -> Shapes:
    """The tensors of `model.safetensors`."""
    return {
        **_tower("vision_backbone.featurizer.", config.dinov2),
        **_tower("vision_backbone.fused_featurizer.", config.siglip),
        **_projector(config),
        **_language(config),
    }


def action_head_shapes(config: HeadSizes, prefix: str = "model") -> Shapes:
    """The tensors of the L1 action head, without the prefix `module.` that its file may carry.

    The diffusion head is the same network under the prefix `noise_predictor.mlp_resnet`.
    """
    hidden = config.text["hidden_size"]
    slots = config.action_dim * hidden
    shapes = norm(f"{prefix}.layer_norm1", slots) | linear(f"{prefix}.fc1", hidden, slots)
    for block in range(2):
        shapes |= norm(f"{prefix}.mlp_resnet_blocks.{block}.ffn.0", hidden)
        shapes |= linear(f"{prefix}.mlp_resnet_blocks.{block}.ffn.1", hidden, hidden)
    return shapes | norm(f"{prefix}.layer_norm2", hidden) | linear(f"{prefix}.fc2", config.action_dim, hidden)


def proprio_projector_shapes(config: HeadSizes) -> Shapes:
    """The tensors of the proprio projector, without the prefix `module.`."""
    hidden = config.text["hidden_size"]
    return linear("fc1", hidden, config.proprio_dim) | linear("fc2", hidden, hidden)


def module_shapes(config: PolicyConfig) -> dict[str, Shapes]:
    """Of each module that OFT adds and saves in a file of its own, the tensors it needs."""
    shapes: dict[str, Shapes] = {}
    if config.use_proprio:
        shapes["proprio_projector"] = proprio_projector_shapes(config)
    if config.head == "l1":
        shapes["action_head"] = action_head_shapes(config)
    if config.head == "diffusion":
        hidden = config.text["hidden_size"]
        shapes["noisy_action_projector"] = linear("fc1", hidden, 1) | linear("fc2", hidden, hidden)
        shapes["action_head"] = action_head_shapes(config, "noise_predictor.mlp_resnet")
    return shapes


def film_shapes(config: PolicyConfig) -> Shapes:
    """FiLM's own tensors, under the policy's names; none without FiLM."""
    shapes: Shapes = {}
    towers = {"featurizer": config.dinov2, "fused_featurizer": config.siglip}
    for name, tower in towers.items() if config.film else ():
        for block in range(tower.depth):
            for part in ("scale", "shift"):
                layer = f"vision_backbone.{name}.blocks.{block}.{part}"
                shapes |= linear(layer, tower.embed_dim, config.text["hidden_size"])
    return shapes


def parameter_shapes(config: PolicyConfig) -> Shapes:
    """Every parameter of the policy, under the policy's names."""
    shapes = {parameter_name(key): shape for key, shape in model_shapes(config).items()}
    return with_modules(shapes | film_shapes(config), module_shapes(config))


def parameter_name(key: str) -> str:
    """Checkpoint key -> name of the parameter in the policy."""
    return re.sub(r"(\.ls[12])\.scale_factor$", r"\1.gamma", key)


def checkpoint_key(name: str) -> str:
    """Name of a parameter in the policy -> checkpoint key."""
    return re.sub(r"(\.ls[12])\.gamma$", r"\1.scale_factor", name)


def stack(config: PolicyConfig) -> list[StackLayer]:
    """The ordered layers, see `policy_layers`; FiLM, which stands inside the towers' blocks, is a new module."""
    layers = policy_layers(
        config.depths,
        (r"vision_backbone\.featurizer\.", r"vision_backbone\.fused_featurizer\."),
        r"language_model\.",
        tower_block=r"blocks\.{}\.(?!scale\.|shift\.).+",
        head=r"lm_head\..+",
        new=module_shapes(config),
    )
    if config.film:
        pattern = r"vision_backbone\.(fused_)?featurizer\.blocks\.\d+\.(scale|shift)\..+"
        new = next((place for place, layer in enumerate(layers) if not layer.pretrained), len(layers))
        layers.insert(new, StackLayer("film", ("film",), pattern, False))
    return layers


def _tower(prefix: str, tower: TowerConfig) -> Shapes:
    return {checkpoint_key(name): shape for name, shape in tower_shapes(prefix, tower).items()}


def projector_sizes(config: ProjectorSizes) -> tuple[int, int, int]:
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
    biased: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj") if text["attention_bias"] else ()
    biased += ("gate_proj", "up_proj", "down_proj") if text["mlp_bias"] else ()
    head = {"language_model.lm_head.weight": (text["vocab_size"], text["hidden_size"])}
    return decoder_shapes("language_model.model.", text, biased=biased) | head
