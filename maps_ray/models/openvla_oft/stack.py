"""The ordered stack of OpenVLA-OFT: DINOv2 blocks, SigLIP blocks, projector, language layers, then the new modules."""

from __future__ import annotations

from maps_ray.models.openvla_oft.config import PolicyConfig
from maps_ray.models.openvla_oft.layout import module_shapes
from maps_ray.models.stack_layers import block_layers, tower_layers
from maps_ray.proximity.stack import StackLayer

# What stands inside a tower's block and is not FiLM's.
_TOWER_BLOCK = r"blocks\.{}\.(?!scale\.|shift\.).+"


def stack(config: PolicyConfig) -> list[StackLayer]:
    """The layers in forward order (MAPS, section 3).

    What comes before a module's first block belongs to that block, what comes after its last block to the last. FiLM,
    the action head and the projectors of proprioception and noisy actions are learned for the task at hand and have no
    pretrained weights to stay near, also where a checkpoint brings them along. Adapters belong to the layer that they
    adapt.
    """
    layers = tower_layers("dinov2", r"vision_backbone\.featurizer\.", config.dinov2.depth, _TOWER_BLOCK)
    layers += tower_layers("siglip", r"vision_backbone\.fused_featurizer\.", config.siglip.depth, _TOWER_BLOCK)
    layers.append(StackLayer("projector", ("projector",), r"projector\..+"))
    layers += block_layers(
        "language",
        r"language_model\.",
        config.text["num_hidden_layers"],
        r"model\.layers\.{}\..+",
        first=r"model\.embed_tokens\..+",
        last=r"model\.norm\..+",
        head=r"lm_head\..+",
        halves=True,
    )
    if config.film:
        pattern = r"vision_backbone\.(fused_)?featurizer\.blocks\.\d+\.(scale|shift)\..+"
        layers.append(StackLayer("film", ("film",), pattern, False))
    return layers + [StackLayer(name, (name,), rf"{name}\..+", False) for name in module_shapes(config)]
