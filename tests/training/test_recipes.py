"""Both recipes as a spec asks for them: strengths by tensor from a configuration alone, adapters and their anchors."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch
from run_specs import MakeSpec
from typer.testing import CliRunner

from maps_ray.cli import app
from maps_ray.models import describe, load_policy
from maps_ray.models.lora import adapter_starts, add_adapters, is_adapter
from maps_ray.spec import RunSpec, SpecError, dump
from maps_ray.training.model_checks import trained_shapes
from maps_ray.training.preflight import published_strengths, strengths

FIXTURE = Path(__file__).parents[1] / "fixtures" / "maps_released" / "strengths.json.gz"
RELEASED = json.loads(gzip.decompress(FIXTURE.read_bytes()))
OPENVLA = {
    "model_type": "openvla",
    "timm_model_ids": ["vit_large_patch14_reg4_dinov2.lvd142m", "vit_so400m_patch14_siglip_224"],
    "image_sizes": [224, 224],
    "text_config": {"vocab_size": 32064},
}
MINIVLA = {"model": {"vision_backbone_id": "dinosiglip-vit-so-224px", "llm_backbone_id": "qwen25-0_5b-extra"}}


@pytest.fixture
def full_size(make_spec: MakeSpec, tmp_path: Path):
    """A spec of a full-size model, of which the configuration alone is there."""

    def make(name: str, **proximity: object) -> RunSpec:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(OPENVLA if name == "openvla_oft" else MINIVLA))
        spec = make_spec(proximity=proximity)
        return spec.model_copy(update={"model": spec.model.model_copy(update={"name": name, "checkpoint": folder})})

    return make


def with_lora(spec: RunSpec, **lora: object) -> RunSpec:
    return RunSpec.model_validate({**spec.model_dump(), "model": {**spec.model.model_dump(), "lora": lora}})


def test_the_command_prints_the_released_strengths_without_weights(full_size, tmp_path: Path) -> None:
    spec = full_size("minivla_oft", recipe="released", lambda_max=1.0)
    (tmp_path / "spec.yaml").write_text(dump(spec))
    done = CliRunner().invoke(app, ["strengths", str(tmp_path / "spec.yaml"), "--tensors", "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    expected = {name: values[1] for name, values in RELEASED["minivla_qwen25_0_5b"]["parameters"].items()}
    new = {name for name in found if name.startswith(("action_head.", "proprio_projector."))}
    assert {name: value for name, value in found.items() if name not in new} == pytest.approx(expected, abs=1e-9)
    assert {found[name] for name in new} == {0.0}
    table = CliRunner().invoke(app, ["strengths", str(tmp_path / "spec.yaml")]).stdout
    assert "tensors that differ" in table and "8 at 0.986842" in table
    plain = CliRunner().invoke(app, ["strengths", str(tmp_path / "spec.yaml"), "--set", "proximity.recipe=paper"])
    assert "tensors that differ" not in plain.stdout and "dinov2.0" in plain.stdout


def test_adapters_of_the_released_size_are_held_as_released(full_size) -> None:
    spec = with_lora(full_size("openvla_oft", recipe="released", lambda_max=1.0), rank=32)
    shapes = trained_shapes(spec, describe(spec.model.checkpoint, name="openvla_oft"))
    adapters = {name: shape for name, shape in shapes.items() if is_adapter(name)}
    assert sum(torch.Size(shape).numel() for shape in adapters.values()) == 110_828_288
    found = {name: value for name, value in published_strengths(spec).items() if name.startswith("base_model.")}
    expected = {name: values[0] for name, values in RELEASED["openvla_7b_lora"]["parameters"].items()}
    assert found == pytest.approx(expected, abs=1e-9)
    assert spec.lora_alpha == 64
    assert with_lora(full_size("openvla_oft"), rank=32).lora_alpha is None
    assert with_lora(full_size("openvla_oft", recipe="released"), rank=32, alpha=8).lora_alpha == 8


def test_the_paper_gives_each_tensor_the_strength_of_its_layer(full_size) -> None:
    spec = full_size("minivla_oft", freeze=["siglip"], strengths={"language_last": 0.7})
    found = published_strengths(spec)
    rows = {row["module"]: row for row in strengths(spec)}
    assert not any(name.startswith("vision_backbone.fused_featurizer.") for name in found)
    assert rows["siglip.3"]["frozen"] is True
    assert found["vision_backbone.featurizer.cls_token"] == rows["dinov2.0"]["strength"] == spec.proximity.lambda_max
    # The embedding is a part of the first language layer, and of the group.
    assert rows["language.0"]["strengths"] == {
        "0.7": 1,
        f"{found['language_model.model.layers.0.mlp.up_proj.weight']:.6g}": 12,
    }
    assert found["language_model.model.embed_tokens.weight"] == 0.7
    assert found["language_model.model.layers.23.mlp.up_proj.weight"] == 0.7
    assert found["language_model.model.norm.weight"] == 0


@pytest.mark.parametrize("init", ["gaussian", "kaiming"])
def test_adapters_start_from_their_seed(base: Path, init) -> None:
    first, second = (add_adapters(load_policy(base), 4, seed=3, init=init) for _ in range(2))
    starts = adapter_starts(first)
    again = adapter_starts(second)
    assert starts.keys() == {name for name, _ in first.named_parameters() if ".lora_A." in name}
    assert all(torch.equal(starts[name], again[name]) for name in starts)
    other = adapter_starts(add_adapters(load_policy(base), 4, seed=4, init=init))
    assert not any(torch.equal(starts[name], other[name]) for name in starts)
    name = next(name for name in starts if name.endswith("blocks.0.mlp.fc1.lora_A.default.weight"))
    a = starts[name]
    if init == "gaussian":
        assert a.std().item() == pytest.approx(1 / 4, rel=0.2) and a.abs().max() > 0.5
    else:
        # Uniform between the bounds of a linear layer of torch: 1 / sqrt(inputs).
        assert a.abs().max() <= a.shape[1] ** -0.5 and a.std().item() == pytest.approx(
            (3 * a.shape[1]) ** -0.5, rel=0.2
        )
    # A copy: training does not move it.
    dict(first.named_parameters())[name].data.zero_()
    assert a.abs().max() > 0


def test_an_unknown_recipe_or_group_is_named(full_size) -> None:
    with pytest.raises(SpecError, match=r"proximity\.freeze = .*'language_lst'.*did you mean 'language_last'"):
        published_strengths(full_size("minivla_oft", freeze=["language_lst"]))
    with pytest.raises(ValueError, match=r"proximity\.recipe"):
        full_size("minivla_oft", recipe="realeased")
