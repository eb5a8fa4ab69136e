"""The four policies at full size, from configurations alone: their stacks and the dimensions of their parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from maps_ray.models.minivla.config import PolicyConfig as MiniVLAConfig
from maps_ray.models.minivla.tensors import model_shapes, parameter_name, published_name
from maps_ray.models.minivla.tensors import module_shapes as minivla_modules
from maps_ray.models.minivla.tensors import stack as minivla_stack
from maps_ray.models.openvla_oft.config import PolicyConfig as OpenVLAConfig
from maps_ray.models.openvla_oft.tensors import checkpoint_key
from maps_ray.models.openvla_oft.tensors import parameter_shapes as openvla_shapes
from maps_ray.models.openvla_oft.tensors import stack as openvla_stack
from maps_ray.models.vla_adapter.config import PolicyConfig as AdapterConfig
from maps_ray.models.vla_adapter.tensors import parameter_shapes as adapter_shapes
from maps_ray.models.vla_adapter.tensors import stack as adapter_stack
from maps_ray.proximity.stack import StackLayer

MINIVLA = {"model": {"vision_backbone_id": "dinosiglip-vit-so-224px", "llm_backbone_id": "qwen25-0_5b-extra"}}
OPENVLA = {
    "model_type": "openvla",
    "timm_model_ids": ["vit_large_patch14_reg4_dinov2.lvd142m", "vit_so400m_patch14_siglip_224"],
    "image_sizes": [224, 224],
    "text_config": {"vocab_size": 32064},
}


class FullSize(NamedTuple):
    """What the schedule needs to know of a policy."""

    stack: list[StackLayer]
    dimensions: dict[str, int]
    """Parameter name -> number of dimensions, in the order of the model."""
    published: Callable[[str], str]
    """Parameter name -> name in the published layout."""


def full_size(name: str) -> FullSize:
    """`openvla_oft`, `minivla_oft`, `minivla_vq` or `vla_adapter`."""
    if name == "openvla_oft":
        sizes = OpenVLAConfig.from_dict(OPENVLA, use_proprio=True)
        return FullSize(openvla_stack(sizes), _dimensions(openvla_shapes(sizes)), checkpoint_key)
    if name == "vla_adapter":
        adapter = AdapterConfig.from_dict(MINIVLA)
        return FullSize(adapter_stack(adapter), _dimensions(adapter_shapes(adapter)), checkpoint_key)
    kind = name.removeprefix("minivla_")
    config = MiniVLAConfig.from_dict(MINIVLA, kind=kind, **({"use_proprio": True} if kind == "oft" else {}))
    shapes = {parameter_name(key): shape for key, shape in model_shapes(config).items()}
    for module, tensors in minivla_modules(config).items():
        shapes |= {f"{module}.{key}": shape for key, shape in tensors.items()}
    return FullSize(minivla_stack(config), _dimensions(shapes), published_name)


def _dimensions(shapes: dict[str, tuple[int, ...]]) -> dict[str, int]:
    return {name: len(shape) for name, shape in shapes.items()}
