"""The released recipe against the strengths that the authors' code gives to the full-size models, without weights."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from full_size import full_size

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
FILES = {"minivla_oft": "minivla_qwen25_0_5b", "openvla_oft": "openvla_7b"}
EMBEDDING, NORM = "language_model.model.embed_tokens.", "language_model.model.norm."


def of_spec(name: str, trained: Any = None, **fields: Any) -> dict[str, float]:
    """Published name -> strength, as a run with these fields would have it."""
    stack, dimensions, published = full_size(name)
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


@pytest.mark.parametrize("name", list(FILES))
@pytest.mark.parametrize("released", SHAPES)
def test_every_tensor_is_held_as_the_released_code_holds_it(name: str, released: str) -> None:
    file = FILES[name]
    _, dimensions, published = full_size(name)
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


@pytest.mark.parametrize("name", list(FILES))
@pytest.mark.parametrize(
    ("released", "modules"),
    [
        ("rft_vision", ["dinov2", "siglip"]),
        ("rft_early_llm", ["language_all_but_last"]),
        ("rft_vision_early_llm", ["dinov2", "siglip", "language_all_but_last"]),
    ],
)
def test_robust_layers_are_strengths_given_by_module(name: str, released: str, modules: list[str]) -> None:
    file = FILES[name]
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
    "freeze_vlm": ["dinov2", "siglip", "projector", "language"],
    "freeze_vlm+unfreeze_last_llm_layer": ["dinov2", "siglip", "projector", "language_all_but_last", "language_norm"],
    "freeze_vlm+unfreeze_early_language": ["dinov2", "siglip", "projector", "language_last", "language_norm"],
}


@pytest.mark.parametrize("name", list(FILES))
@pytest.mark.parametrize("flags", FREEZES)
def test_frozen_layers_are_left_out_and_the_rest_is_numbered_anew(name: str, flags: str) -> None:
    freeze = RELEASED[FILES[name]]["freezes"][flags]
    _, dimensions, published = full_size(name)
    frozen = tuple(prefix.replace("*", "") for prefix in freeze["frozen_prefixes"])
    new = ("action_head.", "proprio_projector.")
    names = [published(key) for key in dimensions]
    found = of_spec(name, freeze=FREEZES[flags])
    assert set(found) == {key for key in names if key.startswith(new) or not key.startswith(frozen)}
    # The rule alone, of what is left.
    ranks = dict(zip(names, dimensions.values(), strict=True))
    assert released_strengths({key: ranks[key] for key in names if key in found}) == found
    layers = freeze["layerwise_decay_strength_by_layer_key"]
    for key, value in without_new(found).items():
        layer = next((layer for layer in layers if key.startswith(f"{layer}.")), "(no number)")
        assert value == pytest.approx(0 if key.endswith(".bias") else layers[layer], abs=1e-9), key


def test_the_order_decides_which_numbered_layers_come_first() -> None:
    plain = of_spec("minivla_oft")
    turned = of_spec("minivla_oft", order=["language", "siglip", "dinov2"])
    assert plain[EMBEDDING + "weight"] == turned[EMBEDDING + "weight"] == pytest.approx(1 / 76)
    block = "{}.blocks.{}.mlp.fc1.weight".format
    assert turned["language_model.model.layers.0.mlp.up_proj.weight"] == 1
    assert turned[block("vision_backbone.fused_featurizer", 0)] == pytest.approx(1 - 24 / 76)
    assert turned[block("vision_backbone.featurizer", 23)] == pytest.approx(2 / 76)
    halves = of_spec("minivla_oft", order=["language_late", "dinov2", "siglip", "projector", "language_early"])
    assert halves["language_model.model.layers.12.mlp.up_proj.weight"] == 1
    assert halves["language_model.model.layers.0.mlp.up_proj.weight"] == pytest.approx(1 - 63 / 76)


def test_module_granularity_counts_the_entries_with_numbered_layers() -> None:
    found = of_spec("openvla_oft", granularity="module")
    assert found["vision_backbone.featurizer.blocks.23.norm1.weight"] == 1
    assert found["vision_backbone.fused_featurizer.blocks.0.norm1.weight"] == 0.75
    assert found["language_model.model.layers.31.mlp.up_proj.weight"] == 0.5
    assert found["projector.fc1.weight"] == found["language_model.lm_head.weight"] == 0.25
    assert found["projector.fc1.bias"] == 0


def test_layers_are_held_by_what_holds_their_blocks() -> None:
    stack, _, _ = full_size("minivla_oft")
    layers = layer_strengths(stack, ProximitySpec(recipe="released", freeze=["dinov2"], strengths={"projector": 0.5}))
    assert layers["siglip.0"] == 1 and layers["projector"] == 0.5 and layers["dinov2.3"] == layers["action_head"] == 0
    assert layers["language.23"] == pytest.approx(2 / 52)


def test_action_queries_are_held_under_a_constant_shape_alone() -> None:
    tensors = {"vision_backbone.featurizer.blocks.0.mlp.fc1.weight": 2, "action_queries.weight": 2}
    for root in ("", "base_model.model."):
        named = {f"{root}{name}": dimensions for name, dimensions in tensors.items()}
        assert released_strengths(named)[f"{root}action_queries.weight"] == 0
        assert released_strengths(named, 2.0, "constant")[f"{root}action_queries.weight"] == 2
    found = of_spec("vla_adapter", lambda_max=0.5)
    released = {key: 0.5 * value for key, value in column(FILES["minivla_oft"], "layerwise_decay").items()}
    own = {key: value for key, value in found.items() if key in released}
    assert own == pytest.approx(released, abs=1e-9)
    assert {value for key, value in found.items() if key not in released} == {0.0} and "action_queries.weight" in found
    constant = of_spec("vla_adapter", lambda_max=0.5, shape="constant")
    assert {key for key, value in constant.items() if value and key not in released} == {"action_queries.weight"}


@pytest.mark.parametrize(
    ("tensors", "expected"),
    [
        ({}, []),
        # No layer at all: the last place is the first. Digits in a part of the name are no number.
        ({"fc1.weight": 2, "norm1.weight": 1, "conv2d_0.weight": 4, "fc1.bias": 1}, [1, 1, 1, 0]),
        ({"projector.fc1.weight": 2}, [1]),
        # Nothing but layers: the last place is left empty.
        ({"blocks.0.fc1.weight": 2, "blocks.1.norm1.weight": 1}, [1, 2 / 3]),
        # The first number counts, also in front and at the end; the order is that of appearance, not of numbers.
        ({"5.w": 2, "blocks.3.layers.7.w": 2, "blocks.3.layers.1.w": 2, "scales.2": 1}, [1, 3 / 4, 3 / 4, 1 / 2]),
        # Two towers with the same numbers are two layers; tensors of a layer need not stand together.
        ({"a.blocks.0.w": 2, "b.blocks.0.w": 2, "x": 2, "a.blocks.0.norm.weight": 1}, [1, 2 / 3, 1 / 3, 1]),
        # A layer of which biases alone are trained is none.
        ({"blocks.0.fc1.bias": 1, "blocks.1.fc1.weight": 2, "embed.weight": 2}, [0, 1, 1 / 2]),
        # Heads are no layers, whatever numbers they have.
        ({"action_head.model.mlp_resnet_blocks.0.ffn.1.weight": 2, "blocks.1.w": 2}, [0, 1]),
    ],
)
def test_names_say_what_a_layer_is(tensors: dict[str, int], expected: list[float]) -> None:
    assert list(released_strengths(tensors)) == list(tensors)
    assert released_strengths(tensors) == pytest.approx(dict(zip(tensors, expected, strict=True)))


@pytest.mark.parametrize(
    ("lambda_max", "shape", "message"),
    [(-1.0, "linear", "lambda_max = -1.0: must be"), (1.0, "linaer", "did you mean 'linear'")],
)
def test_values_out_of_range_are_refused(lambda_max: float, shape: Any, message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        released_strengths({"a.0.weight": 2}, lambda_max, shape)


def test_groups_cover_a_language_model_without_overlap() -> None:
    stack, dimensions, _ = full_size("openvla_oft")
    owners = assign(stack, dimensions)
    parts = [frozen_tensors(stack, owners, [f"language_{part}"]) for part in ("all_but_last", "last", "norm")]
    assert sum(map(len, parts)) == len(frozen_tensors(stack, owners, ["language"])) == 291
    assert {name.split(".")[2] for name in parts[0]} == {"layers"}
    assert parts[2] == {"language_model.model.norm.weight"}
    with pytest.raises(ScheduleError, match=r"'language_al_but_last'.*did you mean 'language_all_but_last'"):
        frozen_tensors(stack, owners, ["language_al_but_last"])
