"""Every tensor of a MiniVLA checkpoint, its shape and its place in the stack, from the configuration. No torch.

A published `.pt` holds three dictionaries under `model`: `vision_backbone`, `projector`, `llm_backbone`. A key here is
`<dictionary>|<name>`, as in the safetensors files that this package writes; the policy's parameter is
`<dictionary>.<name>`. Qwen's output head shares the embedding's weights and is no tensor of its own.
"""

from __future__ import annotations

import re

from maps_ray.models.layers import Shapes, decoder_shapes, linear, policy_layers, tower_shapes, with_modules
from maps_ray.models.minivla.config import PolicyConfig
from maps_ray.models.openvla_oft.tensors import action_head_shapes, projector_sizes, proprio_projector_shapes
from maps_ray.proximity.stack import StackLayer

MODULES = ("vision_backbone", "projector", "llm_backbone")
EMBEDDING = "llm_backbone|llm.model.embed_tokens.weight"
TIED_HEAD = "llm_backbone|llm.lm_head.weight"
"""Published files hold the embedding under this key once more."""


def model_shapes(config: PolicyConfig) -> Shapes:
    """The tensors of the backbone, without the tied head."""
    vision, inner, hidden = projector_sizes(config)
    return (
        tower_shapes("vision_backbone|dino_featurizer.", config.dinov2)
        | tower_shapes("vision_backbone|siglip_featurizer.", config.siglip)
        | linear("projector|projector.0", inner, vision)
        | linear("projector|projector.2", hidden, inner)
        | linear("projector|projector.4", hidden, hidden)
        | decoder_shapes("llm_backbone|llm.model.", config.text, biased=("q_proj", "k_proj", "v_proj"))
    )


def module_shapes(config: PolicyConfig) -> dict[str, Shapes]:
    """Of each module that has a file of its own, the tensors it needs."""
    if config.kind == "vq":
        return {}
    shapes = {"action_head": action_head_shapes(config)}
    if config.use_proprio:
        shapes["proprio_projector"] = proprio_projector_shapes(config)
    return shapes


def parameter_shapes(config: PolicyConfig) -> Shapes:
    """Every parameter of the policy, under the policy's names."""
    shapes = {parameter_name(key): shape for key, shape in model_shapes(config).items()}
    return with_modules(shapes, module_shapes(config))


def stack(config: PolicyConfig) -> list[StackLayer]:
    """The ordered layers, see `policy_layers`."""
    return policy_layers(
        config.depths,
        (r"vision_backbone\.dino_featurizer\.", r"vision_backbone\.siglip_featurizer\."),
        r"llm_backbone\.llm\.",
        # Proprioception enters the sequence before any action leaves it.
        new=reversed(module_shapes(config)),
    )


def parameter_name(key: str) -> str:
    """Checkpoint key -> name of the parameter in the policy."""
    return key.replace("|", ".", 1)


def checkpoint_key(name: str) -> str:
    """Name of a parameter in the policy -> checkpoint key."""
    return name.replace(".", "|", 1)


# Prefixes of the policy's names -> those of the Hugging Face layout, in which OpenVLA's modules are published.
_PUBLISHED = {
    "vision_backbone.dino_featurizer.": "vision_backbone.featurizer.",
    "vision_backbone.siglip_featurizer.": "vision_backbone.fused_featurizer.",
    "projector.projector.0.": "projector.fc1.",
    "projector.projector.2.": "projector.fc2.",
    "projector.projector.4.": "projector.fc3.",
    "llm_backbone.llm.": "language_model.",
}


def published_name(name: str) -> str:
    """Name of a parameter in the policy -> its name in the Hugging Face layout, as OpenVLA's checkpoints have it."""
    for own, published in _PUBLISHED.items():
        if name.startswith(own):
            name = published + name.removeprefix(own)
    return re.sub(r"(\.ls[12])\.gamma$", r"\1.scale_factor", name)
