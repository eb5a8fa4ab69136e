"""Rates, late starts and scheduled L2-SP of each tensor, as a spec wants them, for all four policies at full size."""

from __future__ import annotations

from typing import Any

import pytest
from full_size import full_size

from maps_ray.proximity.rules import TensorRules, tensor_rules
from maps_ray.proximity.schedule import ScheduleError
from maps_ray.proximity.stack import assign
from maps_ray.spec import RunSpec

POLICIES = ("openvla_oft", "minivla_oft", "minivla_vq", "vla_adapter")
# Prefixes of the parameters' names -> the module that they belong to.
TOWERS = {
    "openvla_oft": ("vision_backbone.featurizer.", "vision_backbone.fused_featurizer."),
    "minivla_oft": ("vision_backbone.dino_featurizer.", "vision_backbone.siglip_featurizer."),
    "minivla_vq": ("vision_backbone.dino_featurizer.", "vision_backbone.siglip_featurizer."),
    "vla_adapter": ("vision_backbone.featurizer.", "vision_backbone.fused_featurizer."),
}
NEW = ("action_head.", "proprio_projector.", "action_queries.")


def rules_of(name: str, **sections: Any) -> tuple[TensorRules, dict[str, Any]]:
    """The rules, and parameter name -> layer."""
    model = full_size(name)
    owners = assign(model.stack, model.dimensions)
    spec = RunSpec.model_validate({"name": "r", "model": {"checkpoint": "c"}, "data": {"path": "d"}, **sections})
    return tensor_rules(model.stack, owners, model.dimensions, spec, model.published), owners


@pytest.mark.parametrize("name", POLICIES)
def test_rates_decay_from_the_last_layer_of_the_order_to_the_first(name: str) -> None:
    rules, owners = rules_of(name, training={"layer_decay": 0.9})
    stack = full_size(name).stack
    line = [layer.name for layer in stack if layer.pretrained]
    behind = {layer: len(line) - place for place, layer in enumerate(line)}
    for key, layer in owners.items():
        expected = 0.9 ** behind[layer.name] if layer.pretrained else 1
        assert rules.rates.get(key, 1) == pytest.approx(expected, rel=1e-12), key
    # Embeddings go with the first block, a tied or own output head with the language model.
    assert rules.rates[f"{TOWERS[name][0]}patch_embed.proj.weight"] == pytest.approx(0.9 ** len(line))
    assert not any(key.startswith(NEW) for key in rules.rates)


def test_the_decay_follows_the_order_of_the_spec() -> None:
    order = ["language_late", "dinov2", "siglip", "projector", "language_early"]
    rules, owners = rules_of("minivla_oft", training={"layer_decay": 0.5}, proximity={"order": order})
    layers = sum(layer.pretrained for layer in full_size("minivla_oft").stack)
    rate_of = {owners[key].name: rate for key, rate in rules.rates.items()}
    assert rate_of["language.12"] == pytest.approx(0.5**layers)
    assert rate_of["dinov2.0"] == pytest.approx(0.5 ** (layers - 12))
    assert rate_of["language.11"] == 0.5


@pytest.mark.parametrize("name", POLICIES)
def test_learning_rates_reach_the_modules_that_they_name(name: str) -> None:
    given = {"dinov2": 1e-5, "siglip": 2e-5, "projector": 1e-4, "language_last": 3e-5}
    if name != "minivla_vq":
        given["action_head"] = 5e-4
    rules, _ = rules_of(name, training={"learning_rate": 5e-5, "learning_rates": given, "layer_decay": 0.9})
    dinov2, siglip = TOWERS[name]
    last = max(int(key.split(".layers.")[1].split(".")[0]) for key in full_size(name).dimensions if ".layers." in key)
    plain, _ = rules_of(name, training={"layer_decay": 0.9})
    for key in full_size(name).dimensions:
        if key.startswith(dinov2):
            expected = 1e-5
        elif key.startswith(siglip):
            expected = 2e-5
        elif key.startswith("projector."):
            expected = 1e-4
        elif f".layers.{last}." in key or ".embed_tokens." in key or ".lm_head." in key:
            expected = 3e-5
        elif key.startswith("action_head."):
            expected = 5e-4
        else:
            expected = 5e-5 * plain.rates.get(key, 1)
        assert 5e-5 * rules.rates.get(key, 1) == pytest.approx(expected, rel=1e-12), key


@pytest.mark.parametrize("name", POLICIES)
def test_until_a_step_only_the_named_modules_train(name: str) -> None:
    first = {"minivla_vq": ["projector"], "vla_adapter": ["action_head", "action_queries"]}.get(name, ["action_head"])
    rules, _ = rules_of(name, training={"freeze_until": {"modules": first, "step": 30}})
    waiting = {key for key in full_size(name).dimensions if not key.startswith(tuple(f"{one}." for one in first))}
    assert rules.begins == dict.fromkeys(waiting, 30)
    assert 0 < len(waiting) < len(full_size(name).dimensions)
    assert rules_of(name)[0].begins == {}


@pytest.mark.parametrize("name", POLICIES)
def test_l2_sp_is_scheduled_as_strengths_are(name: str) -> None:
    for recipe in ("paper", "released"):
        rules, owners = rules_of(
            name,
            proximity={"recipe": recipe, "lambda_max": 0.02, "l2_sp": {"strength": 0.02, "shape": "linear"}},
        )
        assert rules.l2_sp == {key: value for key, value in rules.strengths.items() if value}
        assert not any(layer for key, layer in owners.items() if not layer.pretrained and key in rules.l2_sp)
    alone, _ = rules_of(name, proximity={"lambda_max": 0, "strengths": {"siglip": 2}, "l2_sp": {"strength": 0.02}})
    # A strength given by hand is no coefficient.
    assert set(alone.l2_sp.values()) == {0.02}
    assert {key for key, value in alone.strengths.items() if value} == {
        key for key in full_size(name).dimensions if key.startswith(TOWERS[name][1])
    }


@pytest.mark.parametrize("name", POLICIES)
def test_radii_are_learned_where_a_constant_shape_would_hold(name: str) -> None:
    for recipe in ("paper", "released"):
        learned, _ = rules_of(name, proximity={"recipe": recipe, "shape": "learned", "lambda_max": 7})
        constant, _ = rules_of(name, proximity={"recipe": recipe, "shape": "constant", "lambda_max": 1})
        assert learned.strengths == constant.strengths
        assert 1.0 in set(learned.strengths.values()) <= {0.0, 1.0}


@pytest.mark.parametrize(
    ("training", "field", "message"),
    [
        ({"learning_rates": {"dinov": 1e-5}}, "training.learning_rates", "did you mean 'dinov2'"),
        ({"learning_rates": {"action_haed": 1e-5}}, "training.learning_rates", "did you mean 'action_head'"),
        (
            {"learning_rates": {"language": 1e-5, "language_last": 1e-5}},
            "training.learning_rates",
            "'language' and 'language_last' both hold",
        ),
        (
            {"freeze_until": {"modules": ["acton_head"], "step": 3}},
            "training.freeze_until",
            "'acton_head'.*did you mean 'action_head'",
        ),
        (
            {"freeze_until": {"modules": ["language", "language_late"], "step": 3}},
            "training.freeze_until",
            "'language' and 'language_late' both hold",
        ),
    ],
)
@pytest.mark.parametrize("name", ["openvla_oft", "vla_adapter"])
def test_modules_that_a_model_lacks_or_named_twice_are_refused(
    name: str, training: dict[str, Any], field: str, message: str
) -> None:
    with pytest.raises(ScheduleError, match=message) as caught:
        rules_of(name, training=training)
    assert caught.value.field == field


def test_a_policy_without_a_head_says_what_it_has() -> None:
    with pytest.raises(ScheduleError, match=r"'action_head', which is no module of this model: .*allowed: dinov2, "):
        rules_of("minivla_vq", training={"freeze_until": {"modules": ["action_head"], "step": 3}})
