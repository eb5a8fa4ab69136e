"""The released recipe against the strengths that the authors' code gives to the full-size models, without weights."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from maps_ray.models.minivla.config import PolicyConfig as MiniVLAConfig
from maps_ray.models.minivla.layout import model_shapes as minivla_shapes
from maps_ray.models.minivla.layout import module_shapes as minivla_modules
from maps_ray.models.minivla.layout import parameter_name, published_name
from maps_ray.models.minivla.stack import stack as minivla_stack
from maps_ray.models.openvla_oft.config import PolicyConfig as OpenVLAConfig
from maps_ray.models.openvla_oft.layout import checkpoint_key, parameter_shapes
from maps_ray.models.openvla_oft.stack import stack as openvla_stack
from maps_ray.proximity.schedule import (
    ScheduleError,
    frozen_tensors,
    layer_strengths,
    released_strengths,
    tensor_strengths,
)
from maps_ray.proximity.stack import assign
from maps_ray.spec import ProximitySpec

FIXTURE = Path(__file__).parents[1] / "fixtures" / "maps_released" / "strengths.json.gz"
RELEASED = json.loads(gzip.decompress(FIXTURE.read_bytes()))
SHAPES = {"layerwise_decay": "linear", "layerwise_decay_cosine": "cosine", "constant": "constant"}
MINIVLA = {"model": {"vision_backbone_id": "dinosiglip-vit-so-224px", "llm_backbone_id": "qwen25-0_5b-extra"}}
OPENVLA = {
    "model_type": "openvla",
    "timm_model_ids": ["vit_large_patch14_reg4_dinov2.lvd142m", "vit_so400m_patch14_siglip_224"],
    "image_sizes": [224, 224],
    "text_config": {"vocab_size": 32064},
}
EMBEDDING, NORM = "language_model.model.embed_tokens.", "language_model.model.norm."


def model(name: str) -> tuple[Any, dict[str, int], Any]:
    """Stack, dimensions of every parameter under the policy's names, and the names' published form."""
    if name == "minivla":
        config = MiniVLAConfig.from_dict(MINIVLA, kind="oft", use_proprio=True)
        shapes = {parameter_name(key): shape for key, shape in minivla_shapes(config).items()}
        for module, tensors in minivla_modules(config).items():
            shapes |= {f"{module}.{key}": shape for key, shape in tensors.items()}
        return minivla_stack(config), {key: len(shape) for key, shape in shapes.items()}, published_name
    sizes = OpenVLAConfig.from_dict(OPENVLA, use_proprio=True)
    return openvla_stack(sizes), {key: len(shape) for key, shape in parameter_shapes(sizes).items()}, checkpoint_key


def of_spec(name: str, trained: Any = None, **fields: Any) -> dict[str, float]:
    """Published name -> strength, as a run with these fields would have it."""
    stack, dimensions, published = model(name)
    owners = assign(stack, dimensions)
    chosen = ProximitySpec(recipe="released", **fields)
    frozen = frozen_tensors(stack, owners, chosen.freeze)
    held = {key: value for key, value in dimensions.items() if key not in frozen}
    return {published(key): value for key, value in tensor_strengths(stack, owners, held, chosen, published).items()}


def column(file: str, name: str) -> dict[str, float]:
    place = RELEASED[file]["columns"].index(name)
    plain = not file.endswith("lora")
    return {key: (values[1:] if plain else values)[place] for key, values in RELEASED[file]["parameters"].items()}


def without_new(strengths: dict[str, float]) -> dict[str, float]:
    new = {key: value for key, value in strengths.items() if key.startswith(("action_head.", "proprio_projector."))}
    assert len(new) == 20 and set(new.values()) == {0.0}
    return {key: value for key, value in strengths.items() if key not in new}


@pytest.mark.parametrize("name", ["minivla", "openvla"])
@pytest.mark.parametrize("released", SHAPES)
def test_every_tensor_is_held_as_the_released_code_holds_it(name: str, released: str) -> None:
    file = {"minivla": "minivla_qwen25_0_5b", "openvla": "openvla_7b"}[name]
    _, dimensions, published = model(name)
    rule = released_strengths({published(key): value for key, value in dimensions.items()}, 1.0, SHAPES[released])
    expected = column(file, released)
    assert without_new(rule) == pytest.approx(expected, abs=1e-9)
    spec = of_spec(name, shape=SHAPES[released])
    assert without_new(spec) == pytest.approx(expected, abs=1e-9)
    assert without_new(of_spec(name, shape=SHAPES[released], lambda_max=3.2)) == pytest.approx(
        {key: 3.2 * value for key, value in expected.items()}, abs=1e-9
    )


@pytest.mark.parametrize("file", ["minivla_qwen25_0_5b_lora", "openvla_7b_lora"])
@pytest.mark.parametrize("released", SHAPES)
def test_adapters_are_held_like_the_tensors_that_they_adapt(file: str, released: str) -> None:
    expected = column(file, released)
    dimensions = {key: 4 if "patch_embed" in key else 2 for key in expected}
    assert released_strengths(dimensions, 1.0, SHAPES[released]) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("name", ["minivla", "openvla"])
@pytest.mark.parametrize(
    ("released", "modules"),
    [
        ("rft_vision", ["dinov2", "siglip"]),
        ("rft_early_llm", ["language_all_but_last"]),
        ("rft_vision_early_llm", ["dinov2", "siglip", "language_all_but_last"]),
    ],
)
def test_robust_layers_are_strengths_given_by_module(name: str, released: str, modules: list[str]) -> None:
    file = {"minivla": "minivla_qwen25_0_5b", "openvla": "openvla_7b"}[name]
    given = of_spec(name, shape="constant", lambda_max=0, strengths=dict.fromkeys(modules, 1.0))
    assert without_new(given) == pytest.approx(column(file, released), abs=1e-9)


# The released freezes -> the same as modules and groups here.
FREEZES = {
    "freeze_dino": ["dinov2"],
    "freeze_vision": ["dinov2", "siglip"],
    "freeze_vision+unfreeze_dino": ["siglip"],
    "freeze_language": ["language"],
    "freeze_language+unfreeze_early_language": ["language_last", "language_norm"],
    "freeze_language+unfreeze_last_llm_layer": ["language_all_but_last", "language_norm"],
    "freeze_language+unfreeze_early_language+unfreeze_last_llm_layer": ["language_norm"],
    "freeze_vlm+unfreeze_early_language": ["dinov2", "siglip", "projector", "language_last", "language_norm"],
}


@pytest.mark.parametrize("name", ["minivla", "openvla"])
@pytest.mark.parametrize("flags", FREEZES)
def test_frozen_layers_are_left_out_and_the_rest_is_numbered_anew(name: str, flags: str) -> None:
    freeze = RELEASED[{"minivla": "minivla_qwen25_0_5b", "openvla": "openvla_7b"}[name]]["freezes"][flags]
    _, dimensions, published = model(name)
    frozen = tuple(freeze["frozen_prefixes"])
    expected = {published(key) for key in dimensions if not published(key).startswith(frozen)}
    found = of_spec(name, freeze=FREEZES[flags])
    assert set(found) == expected
    layers = freeze["layerwise_decay_strength_by_layer_key"]
    for key, value in without_new(found).items():
        layer = next((layer for layer in layers if key.startswith(f"{layer}.")), "(no number)")
        assert value == pytest.approx(0 if key.endswith(".bias") else layers[layer], abs=1e-9), key


def test_the_order_decides_which_numbered_layers_come_first() -> None:
    plain = of_spec("minivla")
    turned = of_spec("minivla", order=["language", "siglip", "dinov2"])
    assert plain[EMBEDDING + "weight"] == turned[EMBEDDING + "weight"] == pytest.approx(1 / 76)
    block = "{}.blocks.{}.mlp.fc1.weight".format
    assert turned["language_model.model.layers.0.mlp.up_proj.weight"] == 1
    assert turned[block("vision_backbone.fused_featurizer", 0)] == pytest.approx(1 - 24 / 76)
    assert turned[block("vision_backbone.featurizer", 23)] == pytest.approx(2 / 76)
    halves = of_spec("minivla", order=["language_late", "dinov2", "siglip", "projector", "language_early"])
    assert halves["language_model.model.layers.12.mlp.up_proj.weight"] == 1
    assert halves["language_model.model.layers.0.mlp.up_proj.weight"] == pytest.approx(1 - 63 / 76)


def test_module_granularity_counts_the_entries_with_numbered_layers() -> None:
    found = of_spec("openvla", granularity="module")
    assert found["vision_backbone.featurizer.blocks.23.norm1.weight"] == 1
    assert found["vision_backbone.fused_featurizer.blocks.0.norm1.weight"] == 0.75
    assert found["language_model.model.layers.31.mlp.up_proj.weight"] == 0.5
    assert found["projector.fc1.weight"] == found["language_model.lm_head.weight"] == 0.25
    assert found["projector.fc1.bias"] == 0


def test_layers_are_held_by_what_holds_their_blocks() -> None:
    stack, _, _ = model("minivla")
    layers = layer_strengths(stack, ProximitySpec(recipe="released", freeze=["dinov2"], strengths={"projector": 0.5}))
    assert layers["siglip.0"] == 1 and layers["projector"] == 0.5 and layers["dinov2.3"] == layers["action_head"] == 0
    assert layers["language.23"] == pytest.approx(2 / 52)


def test_action_queries_are_held_under_a_constant_shape_alone() -> None:
    tensors = {"vision_backbone.featurizer.blocks.0.mlp.fc1.weight": 2, "action_queries.weight": 2}
    assert released_strengths(tensors)["action_queries.weight"] == 0
    assert released_strengths(tensors, 2.0, "constant")["action_queries.weight"] == 2


@pytest.mark.parametrize(
    ("lambda_max", "shape", "message"),
    [(-1.0, "linear", "lambda_max = -1.0: must be"), (1.0, "linaer", "did you mean 'linear'")],
)
def test_values_out_of_range_are_refused(lambda_max: float, shape: Any, message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        released_strengths({"a.0.weight": 2}, lambda_max, shape)


def test_groups_cover_a_language_model_without_overlap() -> None:
    stack, dimensions, _ = model("openvla")
    owners = assign(stack, dimensions)
    parts = [frozen_tensors(stack, owners, [f"language_{part}"]) for part in ("all_but_last", "last", "norm")]
    assert sum(map(len, parts)) == len(frozen_tensors(stack, owners, ["language"])) == 291
    assert {name.split(".")[2] for name in parts[0]} == {"layers"}
    assert parts[2] == {"language_model.model.norm.weight"}
    with pytest.raises(ScheduleError, match=r"'language_al_but_last'.*did you mean 'language_all_but_last'"):
        frozen_tensors(stack, owners, ["language_al_but_last"])
