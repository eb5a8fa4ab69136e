"""The ordered stack of OpenVLA-OFT: DINOv2 blocks, SigLIP blocks, projector, language layers, then the new modules."""

from __future__ import annotations

from maps_ray.models.openvla_oft.config import PolicyConfig
from maps_ray.models.openvla_oft.layout import module_shapes
from maps_ray.proximity.stack import StackLayer

_ENDS = {
    "dinov2": (
        r"vision_backbone\.featurizer\.",
        r"patch_embed\..+|pos_embed|cls_token|reg_token",
        r"norm\..+|attn_pool\..+",
    ),
    "siglip": (
        r"vision_backbone\.fused_featurizer\.",
        r"patch_embed\..+|pos_embed|cls_token|reg_token",
        r"norm\..+|attn_pool\..+",
    ),
    "language": (r"language_model\.", r"model\.embed_tokens\..+", r"model\.norm\..+|lm_head\..+"),
}


def stack(config: PolicyConfig) -> list[StackLayer]:
    """The layers in forward order (MAPS, section 3).

    What comes before a module's first block belongs to that block, what comes after its last block to the last. FiLM,
    the action head and the projectors of proprioception and noisy actions are learned for the task at hand and have no
    pretrained weights to stay near, also where a checkpoint brings them along. Adapters belong to the layer that they
    adapt.
    """
    layers = _blocks("dinov2", config.dinov2.depth, r"blocks\.{}\.(?!scale\.|shift\.).+")
    layers += _blocks("siglip", config.siglip.depth, r"blocks\.{}\.(?!scale\.|shift\.).+")
    layers.append(StackLayer("projector", ("projector",), r"projector\..+"))
    layers += _blocks("language", config.text["num_hidden_layers"], r"model\.layers\.{}\..+", halves=True)
    if config.film:
        pattern = r"vision_backbone\.(fused_)?featurizer\.blocks\.\d+\.(scale|shift)\..+"
        layers.append(StackLayer("film", ("film",), pattern, False))
    return layers + [StackLayer(name, (name,), rf"{name}\..+", False) for name in module_shapes(config)]


def _blocks(module: str, depth: int, block: str, halves: bool = False) -> list[StackLayer]:
    prefix, first, last = _ENDS[module]
    layers = []
    for index in range(depth):
        owned = [block.format(index)]
        owned += [first] if index == 0 else []
        owned += [last] if index == depth - 1 else []
        modules: tuple[str, ...] = (module,)
        if halves:
            modules += (f"{module}_early" if index < (depth + 1) // 2 else f"{module}_late",)
        layers.append(StackLayer(f"{module}.{index}", modules, f"{prefix}({'|'.join(owned)})"))
    return layers
