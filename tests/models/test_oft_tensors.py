"""Keys, shapes and layers from the configuration alone, without torch."""

from __future__ import annotations

import gzip
import json
import math
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from maps_ray.models import CheckpointError, create_policy
from maps_ray.models.openvla_oft.config import PolicyConfig
from maps_ray.models.openvla_oft.model import OpenVLAOFT
from maps_ray.models.openvla_oft.tensors import (
    action_head_shapes,
    checkpoint_key,
    model_shapes,
    parameter_name,
    parameter_shapes,
    proprio_projector_shapes,
    stack,
)
from maps_ray.models.sizes import policy_sizes
from maps_ray.proximity.stack import assign


@pytest.fixture(scope="module")
def openvla_7b(request: pytest.FixtureRequest) -> dict[str, Any]:
    path = Path(request.fspath).parents[1] / "fixtures" / "openvla7b_keys.json.gz"
    return json.loads(gzip.decompress(path.read_bytes()))


@pytest.fixture(scope="module")
def config_7b(openvla_7b: dict[str, Any]) -> PolicyConfig:
    return PolicyConfig.from_dict(openvla_7b["base_config"], num_images=2, use_proprio=True)


def test_layout_of_openvla_7b(openvla_7b: dict[str, Any], config_7b: PolicyConfig) -> None:
    shapes = model_shapes(config_7b)
    assert shapes == {key: tuple(shape) for key, shape in openvla_7b["model"].items()}
    assert len(shapes) == 982
    assert sum(math.prod(shape) for shape in shapes.values()) == 7_541_237_184
    for name, found in (
        ("action_head", action_head_shapes(config_7b)),
        ("proprio_projector", proprio_projector_shapes(config_7b)),
    ):
        expected = openvla_7b[f"{name}--{{step}}_checkpoint.pt (LIBERO)"]
        assert {f"module.{key}": shape for key, shape in found.items()} == {
            key: tuple(shape) for key, shape in expected.items()
        }


def test_layout_equals_the_policy_at_full_size(config_7b: PolicyConfig) -> None:
    with torch.device("meta"):
        policy = OpenVLAOFT(config_7b)
    assert {name: tuple(tensor.shape) for name, tensor in policy.state_dict().items()} == parameter_shapes(config_7b)


def test_layout_equals_the_policy_with_uneven_sizes(small_config: dict[str, Any]) -> None:
    policy = create_policy(small_config, dtype=torch.float32, num_images=3, use_proprio=True, proprio_dim=5)
    found = {name: tuple(parameter.shape) for name, parameter in policy.named_parameters()}
    assert found == parameter_shapes(policy.config)


def test_names_and_keys_are_inverse(config_7b: PolicyConfig) -> None:
    keys = list(model_shapes(config_7b))
    assert [checkpoint_key(parameter_name(key)) for key in keys] == keys
    assert parameter_name("vision_backbone.featurizer.blocks.3.ls2.scale_factor").endswith(".ls2.gamma")


def test_stack_covers_every_parameter_once(config_7b: PolicyConfig) -> None:
    layers = stack(config_7b)
    owners = assign(layers, parameter_shapes(config_7b))
    names = [layer.name for layer in layers]
    assert names[:24] == [f"dinov2.{i}" for i in range(24)]
    assert names[24:51] == [f"siglip.{i}" for i in range(27)]
    assert names[51:84] == ["projector", *(f"language.{i}" for i in range(32))]
    assert names[84:] == ["proprio_projector", "action_head"]
    assert [layer.pretrained for layer in layers] == [True] * 84 + [False] * 2
    assert Counter(module for layer in layers for module in layer.modules) == {
        "dinov2": 24,
        "siglip": 27,
        "projector": 1,
        "language": 32,
        "language_early": 16,
        "language_late": 16,
        "proprio_projector": 1,
        "action_head": 1,
    }
    owned = {
        "vision_backbone.featurizer.pos_embed": "dinov2.0",
        "vision_backbone.featurizer.reg_token": "dinov2.0",
        "vision_backbone.featurizer.norm.bias": "dinov2.23",
        "vision_backbone.featurizer.blocks.1.ls1.gamma": "dinov2.1",
        "vision_backbone.fused_featurizer.patch_embed.proj.weight": "siglip.0",
        "vision_backbone.fused_featurizer.attn_pool.latent": "siglip.26",
        "language_model.model.embed_tokens.weight": "language.0",
        "language_model.model.layers.10.mlp.up_proj.weight": "language.10",
        "language_model.model.norm.weight": "language.31",
        "language_model.lm_head.weight": "language.31",
        "action_head.model.fc1.weight": "action_head",
    }
    assert {name: owners[name].name for name in owned} == owned


def test_odd_number_of_language_layers(small_config: dict[str, Any]) -> None:
    layers = stack(PolicyConfig.from_dict(small_config))
    halves = [layer.modules[1] for layer in layers if layer.name.startswith("language")]
    assert halves == ["language_early", "language_early", "language_late"]
    assert layers[-1].name == "action_head" and "proprio_projector" not in {layer.name for layer in layers}


def test_describe_needs_no_torch(small_checkpoint: Path) -> None:
    code = (
        "import sys; from maps_ray.models import describe\n"
        f"info = describe({str(small_checkpoint)!r}, num_images=2, use_proprio=True)\n"
        "assert not {'torch', 'timm', 'transformers'} & set(sys.modules)\n"
        "print(info.name, info.dtype, info.image_size, len(info.parameters), len(info.stack), info.problems,"
        " info.fresh_modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout.strip() == "openvla_oft bfloat16 28 147 11 [] ()"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llava"}, "model_type = 'llava'; known: openvla"),
        ({"text_config": None}, "text_config is missing"),
        ({"text_config": {"model_type": "mistral"}}, "text_config.model_type = 'mistral': must be 'llama'"),
        ({"vision_kwargs": None}, r"timm_model_ids has 'none'; known: vit_large_patch14_reg4_dinov2"),
        ({"vision_kwargs": {"img_size": 28}}, "vision_kwargs.featurizer is missing"),
        ({"vision_kwargs": {"img_size": 28, "featurizer": {"deep": 3}}}, r"featurizer: unknown \['deep'\]"),
        ({"vision_kwargs": {"img_size": 28, "featurizer": {"depth": 3}}}, "missing 3 required positional arguments"),
        ({"vision_kwargs": "large"}, "vision_kwargs = 'large': must be an object"),
        ({"use_fused_vision_backbone": False}, "needs DINOv2 and SigLIP together"),
    ],
)
def test_config_that_describes_no_policy(small_config: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        create_policy({**small_config, **changes}, dtype=torch.float32)


def test_towers_that_cannot_work(small_config: dict[str, Any]) -> None:
    small_config["vision_kwargs"]["featurizer"]["depth"] = 1
    with pytest.raises(CheckpointError, match="last block but one"):
        create_policy(small_config, dtype=torch.float32)
    small_config["vision_kwargs"]["featurizer"].update(depth=3, patch_size=7)
    with pytest.raises(CheckpointError, match="16 and 4 patches"):
        create_policy(small_config, dtype=torch.float32)
    small_config["vision_kwargs"]["featurizer"].update(patch_size=14, num_heads=3)
    with pytest.raises(CheckpointError, match="embed_dim = 16: must be a multiple of num_heads = 3"):
        create_policy(small_config, dtype=torch.float32)
    del small_config["vision_kwargs"]["fused_featurizer"]["global_pool"]
    small_config["vision_kwargs"]["featurizer"]["num_heads"] = 2
    with pytest.raises(CheckpointError, match="global_pool = 'token'"):
        create_policy(small_config, dtype=torch.float32)
    small_config["vision_kwargs"]["img_size"] = 30
    with pytest.raises(CheckpointError, match="must be a multiple of the patch size"):
        create_policy(small_config, dtype=torch.float32)


@pytest.mark.parametrize("sizes", [{"num_images": 0}, {"num_images": 4}, {"chunk": 0}, {"proprio_dim": 0}])
def test_sizes_out_of_range(small_config: dict[str, Any], sizes: dict[str, int]) -> None:
    (name,) = sizes
    with pytest.raises(CheckpointError, match=f"{name} = {sizes[name]}"):
        create_policy(small_config, dtype=torch.float32, **sizes)


@pytest.mark.parametrize("name", ["use_proprio", "film"])
def test_a_text_is_no_switch(name: str) -> None:
    with pytest.raises(CheckpointError, match=f"{name} = 'no': must be true or false"):
        policy_sizes({}, {name: "no"})  # type: ignore[misc]
