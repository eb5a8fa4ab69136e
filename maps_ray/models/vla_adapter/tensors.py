"""Every tensor of a VLA-Adapter checkpoint, its shape and its place in the stack, from the configuration. No torch.

Keys are those of published checkpoints: OpenVLA's names around Qwen2, with `action_queries.weight` in the model's own
file; the policy and the proprio projector have files of their own. A MiniVLA, from which a training starts, keeps the
same tensors in three dictionaries: `published_key` says which is which.
"""

from __future__ import annotations

from maps_ray.models.layers import Shapes, decoder_shapes, linear, norm, policy_layers, tower_shapes, with_modules
from maps_ray.models.minivla.tensors import parameter_name as minivla_parameter_name
from maps_ray.models.minivla.tensors import published_name
from maps_ray.models.openvla_oft.tensors import (
    checkpoint_key,
    parameter_name,
    projector_sizes,
    proprio_projector_shapes,
)
from maps_ray.models.sizes import TowerConfig
from maps_ray.models.vla_adapter.config import PolicyConfig
from maps_ray.proximity.stack import StackLayer

EMBEDDING = "language_model.model.embed_tokens.weight"
TIED_HEAD = "language_model.lm_head.weight"
"""Some files hold the embedding under this key once more."""
QUERIES = "action_queries.weight"


def published_key(minivla_key: str) -> str:
    """Key of a MiniVLA's tensor (`<dictionary>|<name>`) -> its key in a published VLA-Adapter checkpoint."""
    return published_name(minivla_parameter_name(minivla_key))


def pretrained_shapes(config: PolicyConfig) -> Shapes:
    """The tensors of towers, projector and language model, whose embedding is also the output head."""
    vision, inner, hidden = projector_sizes(config)
    return {
        **_tower("vision_backbone.featurizer.", config.dinov2),
        **_tower("vision_backbone.fused_featurizer.", config.siglip),
        **linear("projector.fc1", inner, vision),
        **linear("projector.fc2", hidden, inner),
        **linear("projector.fc3", hidden, hidden),
        **decoder_shapes("language_model.model.", config.text, biased=("q_proj", "k_proj", "v_proj")),
    }


def query_shapes(config: PolicyConfig) -> Shapes:
    """The action queries."""
    return {QUERIES: (config.queries, config.text["hidden_size"])}


def module_shapes(config: PolicyConfig) -> dict[str, Shapes]:
    """Of each module that has a file of its own, the tensors it needs, without the prefix `module.`."""
    shapes: dict[str, Shapes] = {}
    if config.use_proprio:
        shapes["proprio_projector"] = proprio_projector_shapes(config)
    shapes["action_head"] = action_head_shapes(config)
    return shapes


def action_head_shapes(config: PolicyConfig) -> Shapes:
    """The tensors of the policy."""
    hidden = config.text["hidden_size"]
    projections: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    if config.bridge == "pro":
        sources = ("self", "adapter", "task")
        projections = ("q_proj", *(f"{part}_{source}" for source in sources for part in ("k", "v")), "o_proj")
    shapes = norm("model.layer_norm1", config.action_dim * hidden)
    shapes |= linear("model.fc1", hidden, config.action_dim * hidden)
    for block in range(config.text["num_hidden_layers"]):
        name = f"model.mlp_resnet_blocks.{block}"
        shapes |= (
            {f"{name}.gating_factor": (1,)} | norm(f"{name}.ffn.0", hidden) | linear(f"{name}.ffn.1", hidden, hidden)
        )
        for projection in projections:
            shapes |= linear(f"{name}.{projection}", hidden, hidden)
        if config.bridge == "pro":
            shapes |= linear(f"{name}.film_gen.0", 2 * hidden, hidden)
    return shapes | norm("model.layer_norm2", hidden) | linear("model.fc2", config.action_dim, hidden)


def parameter_shapes(config: PolicyConfig) -> Shapes:
    """Every parameter of the policy, under the policy's names."""
    shapes = {parameter_name(key): shape for key, shape in pretrained_shapes(config).items()}
    return with_modules(shapes | query_shapes(config), module_shapes(config))


def stack(config: PolicyConfig) -> list[StackLayer]:
    """The ordered layers, see `policy_layers`."""
    return policy_layers(
        config.depths,
        (r"vision_backbone\.featurizer\.", r"vision_backbone\.fused_featurizer\."),
        r"language_model\.",
        new=["action_queries", *module_shapes(config)],
    )


def _tower(prefix: str, tower: TowerConfig) -> Shapes:
    return {checkpoint_key(name): shape for name, shape in tower_shapes(prefix, tower).items()}
