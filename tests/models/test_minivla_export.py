"""Exports of MiniVLA are what the published training leaves behind, and bring every bit back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from minivla_data import write_published
from typer.testing import CliRunner

from maps_ray.cli import app
from maps_ray.models import CheckpointError, describe, export_policy, load_policy, save_policy
from maps_ray.models.minivla.tiny import write_tiny
from maps_ray.spec import SpecError

LOW, HIGH = [10.0] * 7, [20.0] * 7
STATISTICS: dict[str, Any] = {
    "small": {
        "action": {
            **{"min": LOW, "max": HIGH, "q01": [11.0] * 7, "q99": [19.0] * 7},
            "mask": [True] * 6 + [False],
        },
        "proprio": {"min": [0.0] * 8, "max": [2.0] * 8, "q01": [0.5] * 8, "q99": [1.5] * 8},
        "num_transitions": 5,
    }
}
LATEST = Path("checkpoints") / "latest-checkpoint.pt"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A policy of each kind with bf16 weights, as training saves it."""
    root, folders = tmp_path_factory.mktemp("trained"), {}
    for kind in ("vq", "oft"):
        write_tiny(root / kind, kind, ["open the drawer"])
        sizes: dict[str, Any] = {"num_images": 2, "use_proprio": kind == "oft"}
        state = load_policy(root / kind, dtype=torch.bfloat16, **sizes).state_dict()
        trained_for = {**sizes, "chunk": 8, "action_dim": 7, "normalization": "q01_q99", "images": "plain"}
        folders[kind] = root / f"{kind} trained"
        save_policy(
            {name: tensor + 0.125 for name, tensor in state.items()},
            root / kind,
            folders[kind],
            dtype=torch.bfloat16,
            step=9,
            statistics=STATISTICS,
            trained_for=trained_for,
        )
    return folders


@pytest.mark.parametrize("kind", ["vq", "oft"])
def test_export_brings_every_bit_back(trained: dict[str, Path], tmp_path: Path, kind: str) -> None:
    out = export_policy(trained[kind], tmp_path / "out", "minivla")
    assert not list(out.rglob("*.safetensors")) or kind == "vq"
    before, after = (load_policy(path, dtype=torch.bfloat16) for path in (trained[kind], out))
    assert type(after) is type(before) and after.config == before.config and after.fresh_modules == ()
    first, second = before.state_dict(), after.state_dict()
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert describe(out).problems == [] and describe(out).dtype == "bfloat16"
    assert json.loads((out / "dataset_statistics.json").read_text()) == STATISTICS
    observation = [np.full((60, 60, 3), 90, np.uint8)] * 2, "open the drawer", [1.0] * 8 if kind == "oft" else None
    assert np.array_equal(before.predict(*observation), after.predict(*observation))


@pytest.mark.parametrize("kind", ["vq", "oft"])
def test_files_hold_what_published_scripts_look_for(trained: dict[str, Path], tmp_path: Path, kind: str) -> None:
    out = export_policy(trained[kind], tmp_path / "out", "minivla")
    parts = torch.load(out / LATEST, weights_only=True)["model"]
    language = parts["llm_backbone"]
    assert torch.equal(language["llm.lm_head.weight"], language["llm.model.embed_tokens.weight"])
    values = sum(tensor.numel() for part in parts.values() for tensor in part.values())
    # The tied head is the embedding's memory, stored once; names and zip entries take about 200 bytes a tensor.
    assert (out / LATEST).stat().st_size < 2 * values + 400 * sum(map(len, parts.values()))
    vla = json.loads((out / "config.json").read_text())["vla"]
    if kind == "vq":
        assert vla == {"action_tokenizer": "libero_vq_extra_action_tokenizer"}
        assert set(torch.load(out / "vq/checkpoints/model.pt", weights_only=True)) == {
            "encoder",
            "decoder",
            "vq_embedding",
        }
    else:
        head = torch.load(out / "action_head--9_checkpoint.pt", weights_only=True)
        assert head["module.model.fc2.bias"].shape == (7,) and all(key.startswith("module.") for key in head)
        assert (out / "proprio_projector--9_checkpoint.pt").is_file()


def test_keys_and_bits_are_the_published_ones(tmp_path: Path) -> None:
    file = write_published(tmp_path / "published")
    (tmp_path / "published" / "dataset_statistics.json").write_text(json.dumps(STATISTICS))
    out = export_policy(tmp_path / "published", tmp_path / "out", "minivla")
    before, after = (torch.load(path, weights_only=True)["model"] for path in (file, out / LATEST))
    assert before.keys() == after.keys()
    for module, tensors in before.items():
        assert tensors.keys() == after[module].keys()
        assert all(
            tensor.dtype == after[module][name].dtype and torch.equal(tensor, after[module][name])
            for name, tensor in tensors.items()
        )
    half = export_policy(tmp_path / "published", tmp_path / "half", "minivla", dtype=torch.float32)
    assert describe(half).dtype == "float32"
    assert json.loads((half / "config.json").read_text())["torch_dtype"] == "float32"


def test_configuration_names_the_base_model(trained: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(trained["vq"], tmp_path / "run"))
    config = json.loads((folder / "config.json").read_text())
    parts = {"vision_backbone_id": "dinosiglip-vit-so-224px", "llm_backbone_id": "qwen25-0_5b-extra"}
    libero, bridge = "libero_vq_extra_action_tokenizer", "bridge_vq_extra_action_tokenizer"
    cases: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"model": parts}, {"base_vlm": "prism-qwen25-extra-dinosiglip-224px+0_5b", "action_tokenizer": libero}),
        (
            {"vla": {"base_vlm": "mine", "epochs": 3, "action_tokenizer": "extra_action_tokenizer"}},
            {"base_vlm": "mine", "epochs": 3, "action_tokenizer": libero},
        ),
        ({"vla": {"action_tokenizer": bridge}}, {"action_tokenizer": bridge}),
    ]
    for number, (stored, expected) in enumerate(cases):
        (folder / "config.json").write_text(json.dumps(config | stored))
        out = export_policy(folder, tmp_path / f"out{number}", "minivla")
        assert json.loads((out / "config.json").read_text())["vla"] == expected


def test_ranges_stand_where_the_published_evaluation_reads_them(trained: dict[str, Path], tmp_path: Path) -> None:
    """It only knows quantiles; actions of a policy that was trained on minimum and maximum come out the same."""
    folder = Path(shutil.copytree(trained["oft"], tmp_path / "run"))
    config = json.loads((folder / "config.json").read_text())
    config["policy"]["normalization"] = "min_max"
    (folder / "config.json").write_text(json.dumps(config))
    out = export_policy(folder, tmp_path / "out", "minivla")
    entry = json.loads((out / "dataset_statistics.json").read_text())["small"]
    assert (entry["action"]["q01"], entry["action"]["q99"]) == (LOW, HIGH)
    assert entry["proprio"]["q99"] == [2.0] * 8 and entry["num_transitions"] == 5
    observation = [np.full((60, 60, 3), 90, np.uint8)] * 2, "open the drawer", [1.0] * 8
    assert np.array_equal(load_policy(folder).predict(*observation), load_policy(out).predict(*observation))


def test_what_is_refused(trained: dict[str, Path], small_checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(CheckpointError, match=r"cannot be written as openvla-oft; .* for --format minivla"):
        export_policy(trained["vq"], out, "openvla-oft")
    with pytest.raises(CheckpointError, match=r"cannot be written as minivla; .* for --format openvla-oft"):
        export_policy(small_checkpoint, out, "minivla")
    with pytest.raises(CheckpointError, match="no format is named 'minvla'; known: openvla-oft, minivla"):
        export_policy(trained["vq"], out, "minvla")
    with pytest.raises(CheckpointError, match="adapters are merged when training ends"):
        export_policy(trained["vq"], out, "minivla", adapter=tmp_path)
    with pytest.raises(CheckpointError, match="exists already"):
        export_policy(trained["vq"], trained["oft"], "minivla")
    folder = Path(shutil.copytree(trained["oft"], tmp_path / "run"))
    (folder / "dataset_statistics.json").unlink()
    with pytest.raises(CheckpointError, match="actions would have no units"):
        export_policy(folder, out, "minivla")
    (folder / "action_head--9_checkpoint.safetensors").unlink()
    with pytest.raises(CheckpointError, match="has no action_head: there is nothing to evaluate"):
        export_policy(folder, out, "minivla")
    assert not out.exists()


def test_command(trained: dict[str, Path], tmp_path: Path) -> None:
    runner, out = CliRunner(), tmp_path / "out"
    result = runner.invoke(app, ["export", str(trained["vq"]), "--format", "minivla", "--out", str(out)])
    assert result.exit_code == 0 and result.output.strip() == f"minivla: {out}"
    assert load_policy(out).config.kind == "vq"
    result = runner.invoke(
        app, ["export", str(trained["vq"]), "--format", "openvla-oft", "--out", str(tmp_path / "no")]
    )
    assert isinstance(result.exception, SpecError) and "--format minivla" in str(result.exception.problems[0])
