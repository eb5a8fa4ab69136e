"""Both recipes as a spec asks for them: strengths by tensor from a configuration alone, adapters and their anchors."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from run_specs import MakeSpec
from typer.testing import CliRunner

from maps_ray.cli import app
from maps_ray.models import describe, load_policy
from maps_ray.models.lora import adapter_starts, add_adapters, is_adapter
from maps_ray.spec import RunSpec, SpecError, dump, load_spec
from maps_ray.training.model_checks import trained_shapes
from maps_ray.training.preflight import check, published_strengths, strengths

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


JOBS = Path(__file__).parents[2] / "jobs"
RUN_SPECS = sorted(JOBS.glob("tiny*.yaml")) + sorted((JOBS / "paper").glob("*.yaml"))
SHAPES = ("linear", "cosine", "constant")


def printed(spec: Path, folder: Path, *overrides: str, tensors: bool = True) -> Any:
    """What `maps-ray strengths` prints of a bundled spec, for a checkpoint that is a configuration alone."""
    changed = [f"model.checkpoint={folder}", *overrides]
    options = [part for one in changed for part in ("--set", one)]
    done = CliRunner().invoke(app, ["strengths", str(spec), *options, *(["--tensors"] if tensors else []), "--json"])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def configuration(spec: RunSpec, root: Path) -> Path:
    """A folder with the configuration of the bundled base, or of the full-size model that is not there."""
    content = json.dumps(OPENVLA if spec.model.name == "openvla_oft" else MINIVLA)
    if spec.model.checkpoint.is_dir():
        content = (spec.model.checkpoint / "config.json").read_text()
    (root / "config.json").write_text(content)
    return root


def is_new(name: str) -> bool:
    plain = name.removeprefix("base_model.model.")
    return plain.startswith(("action_head.", "proprio_projector.", "action_queries."))


@pytest.mark.parametrize("path", RUN_SPECS, ids=lambda path: path.stem)
def test_every_bundled_spec_prints_its_strengths_without_weights(path: Path, tmp_path: Path) -> None:
    spec = load_spec(path)
    folder = configuration(spec, tmp_path)
    openvla = spec.model.name == "openvla_oft"
    file = "openvla_7b" if openvla else "minivla_qwen25_0_5b"
    for lora in (False, True):
        chosen = "model.lora={rank: 32}" if lora else "model.lora=null"
        tensors = printed(path, folder, chosen)
        # One spec of each policy under all shapes.
        shapes = SHAPES if path.stem.startswith("libero") else SHAPES[:1]
        for place, shape in enumerate(shapes if path.parent.name == "paper" else ()):
            found = printed(path, folder, chosen, f"proximity.shape={shape}") if place else tensors
            fixture = RELEASED[f"{file}_lora" if lora else file]["parameters"]
            expected = {
                name: spec.proximity.lambda_max * values[place + (not lora)] for name, values in fixture.items()
            }
            # Qwen's output head is its embedding: the released code adapts it, and it gets no gradient.
            tied = {name for name in expected if ".lm_head." in name and not openvla}
            expected = {name: value for name, value in expected.items() if name not in tied}
            held = {name: value for name, value in found.items() if not is_new(name)}
            assert held == pytest.approx(expected, abs=1e-9), (lora, shape)
            queries = spec.proximity.lambda_max if shape == "constant" else 0.0
            for name in found.keys() - held.keys():
                assert found[name] == (queries if name == "action_queries.weight" else 0.0), name
        rows = printed(path, folder, chosen, tensors=False)
        # A row says the highest strength in it, and where tensors of a layer differ, how many have which.
        assert {row["strength"] for row in rows} <= set(tensors.values()) | {0.0}
        counts: Counter[str] = Counter()
        for row in rows:
            counts.update(row.get("strengths", {}))
        several = Counter(f"{value:.6g}" for value in tensors.values())
        assert all(count <= several[value] for value, count in counts.items())
        assert bool(counts) == (spec.proximity.recipe == "released"), lora


def test_a_reversed_order_under_the_released_recipe(tmp_path: Path) -> None:
    path = JOBS / "paper" / "libero_vla_adapter.yaml"
    folder = configuration(load_spec(path), tmp_path)
    found = printed(path, folder, "proximity.order=[language, projector, siglip, dinov2]", "proximity.lambda_max=76")
    assert found["language_model.model.layers.0.mlp.up_proj.weight"] == pytest.approx(76)
    assert found["vision_backbone.fused_featurizer.blocks.0.mlp.fc1.weight"] == pytest.approx(76 - 24)
    assert found["vision_backbone.featurizer.blocks.23.mlp.fc1.weight"] == pytest.approx(2)
    assert found["projector.fc1.weight"] == found["vision_backbone.featurizer.pos_embed"] == pytest.approx(1)


def test_files_that_are_none_of_the_policy_change_no_strength(full_size, tmp_path: Path) -> None:
    """A checkpoint beside which a head of another kind lies, whose module nobody knows."""
    spec = full_size("minivla_oft", recipe="released")
    before = published_strengths(spec)
    torch.save({"module.0.weight": torch.zeros(2, 2)}, spec.model.checkpoint / "value_head--100_checkpoint.pt")
    assert published_strengths(spec) == before


def test_groups_that_are_frozen_leave_the_count_in_the_command(full_size, tmp_path: Path) -> None:
    spec = full_size("minivla_oft", recipe="released", freeze=["language_all_but_last", "language_norm"])
    (tmp_path / "spec.yaml").write_text(dump(spec))
    done = CliRunner().invoke(app, ["strengths", str(tmp_path / "spec.yaml"), "--tensors", "--json"])
    found = json.loads(done.stdout)
    released = RELEASED["minivla_qwen25_0_5b"]["freezes"]["freeze_language+unfreeze_last_llm_layer"]
    layers = released["layerwise_decay_strength_by_layer_key"]
    assert found["language_model.model.layers.23.mlp.up_proj.weight"] == pytest.approx(
        layers["language_model.model.layers.23"]
    )
    assert found["language_model.model.embed_tokens.weight"] == pytest.approx(layers["(no number)"])
    assert (
        "language_model.model.norm.weight" not in found
        and "language_model.model.layers.0.mlp.up_proj.weight" not in found
    )
    rows = {row["module"]: row for row in strengths(spec)}
    # Of the first language layer the embedding is trained, which the group leaves out.
    assert rows["language.0"]["frozen_tensors"] == 12 and rows["language.1"]["frozen"]
    assert rows["language.23"]["frozen_tensors"] == 1
    table = CliRunner().invoke(app, ["strengths", str(tmp_path / "spec.yaml")]).stdout
    assert "12 frozen" in table


@pytest.mark.parametrize(
    ("section", "fields", "message"),
    [
        (
            "proximity",
            {"recipe": "realeased"},
            r"proximity\.recipe = 'realeased': must be one of 'paper' or 'released'",
        ),
        ("proximity", {"radius_rate": float("inf")}, r"proximity\.radius_rate = inf: .*finite"),
        ("proximity", {"radius_rate": 0}, r"proximity\.radius_rate = 0: .*greater than 0"),
        ("proximity", {"l2_sp": {"strength": -1}}, r"proximity\.l2_sp.*-1"),
        ("proximity", {"l2_sp": {"strength": 1, "shape": "lin"}}, r"proximity\.l2_sp.*'lin': must be one of 'linear'"),
        ("proximity", {"lora_anchor": "start"}, r"proximity\.lora_anchor = 'start': must be one of 'zero' or 'init'"),
        ("training", {"ema": 1.0}, r"training\.ema = 1\.0: .*less than 1"),
        ("training", {"layer_decay": 0}, r"training\.layer_decay = 0: .*greater than 0"),
        ("training", {"layer_decay": 1.5}, r"training\.layer_decay = 1\.5: .*less than or equal to 1"),
        (
            "training",
            {"learning_rates": {"dinov2": -1e-5}},
            r"training\.learning_rates\.dinov2 = -1e-05: .*greater than 0",
        ),
        ("training", {"weight_decay": float("nan")}, r"training\.weight_decay = nan: .*finite"),
        (
            "training",
            {"freeze_until": {"modules": ["action_head"], "step": 10}, "max_steps": 10},
            r"freeze_until\.step \(10\) must be less than max_steps \(10\)",
        ),
        ("training", {"freeze_until": {"modules": [], "step": 1}}, r"training\.freeze_until\.modules = \[\]"),
        ("training", {"freeze_until": {"modules": ["siglip", "siglip"], "step": 1}}, r"module named twice: siglip"),
        ("evaluation", {"averaged": True}, r"evaluation\.averaged = True: no average is kept; set training\.ema"),
        (
            "model",
            {"lora": {"init": "xavier"}},
            r"model\.lora\.init = 'xavier': must be one of 'gaussian' or 'kaiming'",
        ),
        ("model", {"lora": {"alpha": 0}}, r"model\.lora\.alpha = 0: .*greater than 0"),
    ],
)
def test_values_out_of_range_name_their_field_and_what_is_allowed(
    make_spec: MakeSpec, section: str, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(SpecError, match=message):
        make_spec(**{section: fields})


def test_an_average_of_adapters_is_not_exported(make_spec: MakeSpec) -> None:
    with pytest.raises(
        SpecError, match=r"evaluation\.averaged = True: averaged adapters, merged, are not .*leave it out"
    ):
        make_spec(model={"lora": {"rank": 2}}, training={"ema": 0.9}, evaluation={"averaged": True})
    # An average that is kept beside adapters is fine.
    assert make_spec(model={"lora": {"rank": 2}}, training={"ema": 0.9}).training.ema == 0.9


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"training": {"learning_rates": {"language_lst": 1e-5}}},
            r"training\.learning_rates = \{'language_lst': 1e-05\}: .*did you mean 'language_last'",
        ),
        (
            {"training": {"freeze_until": {"modules": ["acton_head"], "step": 2}}},
            r"training\.freeze_until = .*'acton_head'.*did you mean 'action_head'",
        ),
        ({"proximity": {"freeze": ["dinov"]}}, r"proximity\.freeze = \['dinov'\]: .*did you mean 'dinov2'"),
        ({"proximity": {"strengths": {"siglp": 1}}}, r"proximity\.strengths = .*did you mean 'siglip'"),
        (
            {"training": {"freeze_until": {"modules": ["siglip"], "step": 2}}, "proximity": {"freeze": ["siglip"]}},
            r"training\.freeze_until = .*nothing of siglip is trained: name other modules",
        ),
    ],
)
def test_unknown_groups_are_refused_before_anything_is_written(
    make_spec: MakeSpec, sections: dict[str, Any], message: str
) -> None:
    spec = make_spec(**sections)
    with pytest.raises(SpecError, match=message):
        check(spec)
    assert not spec.run_dir.exists()
