"""Weights between a run and its base: the rule, tensor by tensor; what stays; what is refused with nothing written."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from run_specs import MakeSpec
from safetensors.torch import load_file, save_file
from small_policy import write_finished_run
from typer.testing import CliRunner

from maps_ray.cli import app
from maps_ray.models import describe, load_policy, save_policy
from maps_ray.models.minivla.tiny import write_tiny
from maps_ray.proximity.schedule import schedule
from maps_ray.proximity.stack import assign
from maps_ray.spec import SpecError
from maps_ray.training.merge import merge, parse_lines, parse_weights
from maps_ray.training.run_folder import write_spec


@pytest.fixture
def run(make_spec: MakeSpec, base: Path) -> Path:
    """A finished run: its base's weights moved at random."""
    spec = make_spec()
    write_finished_run(spec, base, step=7)
    (spec.run_dir / "final" / "lora_adapter").mkdir()
    return spec.run_dir


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()}


def test_modules_move_by_their_weight_and_the_others_not_at_all(run: Path, base: Path, tmp_path: Path) -> None:
    out = tmp_path / "merged"
    arguments = ["merge", str(run), "--weights", "dinov2=0.5,language_last=0.2,siglip=0", "--out", str(out)]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0 and done.stdout.strip() == str(out)
    before, after, found = weights(base), weights(run / "final"), weights(out)
    assert found.keys() == after.keys()
    last = f".layers.{max(int(name.split('.')[3]) for name in found if '.layers.' in name)}."
    for name, tensor in found.items():
        a = 1.0
        if name.startswith("vision_backbone.featurizer."):
            a = 0.5
        elif name.startswith("vision_backbone.fused_featurizer."):
            a = 0.0
        elif name.startswith(("language_model.lm_head.", "language_model.model.embed_tokens.")) or last in name:
            a = 0.2
        torch.testing.assert_close(tensor, (1 - a) * before[name] + a * after[name], rtol=0, atol=1e-7)
        if a == 1:
            assert torch.equal(tensor, after[name])
    # A checkpoint like any other, with the trained head; adapters that are merged already would be stale.
    assert not (out / "lora_adapter").exists()
    merged, trained = load_policy(out), load_policy(run / "final")
    assert torch.equal(merged.action_head.model.fc1.weight, trained.action_head.model.fc1.weight)
    assert merged.trained_for == trained.trained_for
    assert '"dinov2": 0.5' in (out / "merge.json").read_text()


def test_lines_grow_along_the_order(run: Path, base: Path, tmp_path: Path) -> None:
    out = merge(run, tmp_path / "lines", lines=[0.2, 0.8])
    before, after, found = weights(base), weights(run / "final"), weights(out)
    info = describe(run / "final")
    places = schedule(info.stack, ["dinov2", "siglip", "projector", "language"], "linear", 1.0, "layer")
    owners = assign(info.stack, info.parameters)
    for name, layer in owners.items():
        key = info.published_name(name)
        if key in found:
            a = 0.2 + 0.6 * (1 - places[layer.name])
            torch.testing.assert_close(found[key], (1 - a) * before[key] + a * after[key], rtol=0, atol=1e-6)
    assert merge(run, tmp_path / "again", lines=[1, 1]) and all(
        torch.equal(tensor, after[name]) for name, tensor in weights(tmp_path / "again").items()
    )


def test_a_published_base_of_minivla_is_read_under_its_own_keys(make_spec: MakeSpec, tmp_path: Path) -> None:
    write_tiny(tmp_path / "tiny", "oft")
    native = Path(shutil.copytree(tmp_path / "tiny", tmp_path / "native"))
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in load_file(native / "model.safetensors").items():
        module, _, name = key.partition("|")
        parts.setdefault(module, {})[name] = tensor
    (native / "model.safetensors").unlink()
    torch.save({"model": parts}, native / "latest.pt")
    spec = make_spec()
    model = spec.model.model_copy(update={"name": "minivla_oft", "checkpoint": native})
    spec = spec.model_copy(update={"model": model, "name": "native"})
    policy = load_policy(native, name="minivla_oft")
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(1.0)
    spec.run_dir.mkdir(parents=True)
    save_policy(policy.state_dict(), native, spec.run_dir / "final", dtype=torch.bfloat16, trained_for={"chunk": 8})
    write_spec(spec)
    out = merge(spec.run_dir, tmp_path / "merged", weights={"projector": 0.25})
    first, last, found = weights(tmp_path / "tiny"), weights(spec.run_dir / "final"), weights(out)
    key = "projector|projector.2.weight"
    expected = (0.75 * first[key] + 0.25 * last[key]).bfloat16().float()
    assert torch.equal(found[key], expected)


def test_what_cannot_be_merged_is_refused_and_nothing_is_written(run: Path, base: Path, tmp_path: Path) -> None:
    out = tmp_path / "merged"

    def fault(**options: object) -> str:
        with pytest.raises(SpecError) as caught:
            merge(run, out, **options)  # type: ignore[arg-type]
        assert not out.exists() and not list(tmp_path.glob(".merged*"))
        return str(caught.value)

    assert "--weights dinov2 = 1.5: must be in [0, 1]" in fault(weights={"dinov2": 1.5})
    assert "--lines, last = nan: must be in [0, 1]" in fault(lines=[0.1, float("nan")])
    assert "did you mean 'dinov2'" in fault(weights={"dinov": 0.5})
    assert "'action_head', which is no pretrained module" in fault(weights={"action_head": 0.5})
    assert "'language' and 'language_last' both hold" in fault(weights={"language": 0.5, "language_last": 0.5})
    assert "give either --weights or --lines" in fault()
    other = Path(shutil.copytree(base, tmp_path / "other"))
    changed = load_file(other / "model.safetensors")
    changed["projector.fc1.bias"] += 1
    save_file(changed, other / "model.safetensors")
    assert f"--base = '{other}': not the base that" in fault(weights={"dinov2": 0.5}, base=other)
    assert "is not there: say where it is now with --base" in fault(weights={"dinov2": 0.5}, base=tmp_path / "none")
    # Without a record of the base, weights of another shape still do not fit.
    (run / "base.json").unlink()
    changed["projector.fc1.bias"] = torch.zeros(3)
    save_file(changed, other / "model.safetensors")
    assert "projector.fc1.bias: expected" in fault(weights={"projector": 0.5}, base=other)
    shutil.rmtree(run / "final")
    assert "has not finished: continue it" in fault(weights={"dinov2": 0.5})
    for text in ("dinov2", "dinov2=a", "dinov2=0.1,dinov2=0.2", ""):
        with pytest.raises(SpecError, match="give each module once"):
            parse_weights(text)
    for text in ("0.1", "0.1,0.2,0.3", "a,b"):
        with pytest.raises(SpecError, match="give two numbers"):
            parse_lines(text)
