"""The ordered stack of MiniVLA: DINOv2 blocks, SigLIP blocks, projector, language layers, then the new modules."""

from __future__ import annotations

from maps_ray.models.minivla.config import PolicyConfig
from maps_ray.models.stack_layers import block_layers, tower_layers
from maps_ray.proximity.stack import StackLayer


def stack(config: PolicyConfig) -> list[StackLayer]:
    """The layers in forward order (MAPS, section 3).

    What comes before a module's first block belongs to that block, what comes after its last block to the last. The
    embedding, which is also Qwen's output head, belongs to the first language layer. Head and proprio projector of
    MiniVLA-OFT have no pretrained weights to stay near, also where a checkpoint brings them along.
    """
    layers = tower_layers("dinov2", r"vision_backbone\.dino_featurizer\.", config.dinov2.depth)
    layers += tower_layers("siglip", r"vision_backbone\.siglip_featurizer\.", config.siglip.depth)
    layers.append(StackLayer("projector", ("projector",), r"projector\..+"))
    layers += block_layers(
        "language",
        r"llm_backbone\.llm\.model\.",
        config.text["num_hidden_layers"],
        r"layers\.{}\..+",
        first=r"embed_tokens\..+",
        last=r"norm\..+",
        halves=True,
    )
    if config.kind == "oft":
        if config.use_proprio:
            layers.append(StackLayer("proprio_projector", ("proprio_projector",), r"proprio_projector\..+", False))
        layers.append(StackLayer("action_head", ("action_head",), r"action_head\..+", False))
    return layers
