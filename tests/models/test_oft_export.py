"""Exports hold what the published scripts load, and bring every bit back."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from maps_ray.models import CheckpointError, export_policy, load_policy, save_policy
from maps_ray.models.files.formats import read_folder_headers
from maps_ray.models.openvla_oft.export import export_checkpoint

OPTIONS: dict[str, Any] = {"num_images": 2, "use_proprio": True}


def equal(left: Path, right: Path, dtype: torch.dtype, **options: Any) -> bool:
    states = [load_policy(path, dtype=dtype, **options).state_dict() for path in (left, right)]
    return states[0].keys() == states[1].keys() and all(
        torch.equal(states[0][name], states[1][name]) for name in states[0]
    )


def test_published_checkpoint_comes_back(oft_checkpoint: Path, oft_fixtures: Path, tmp_path: Path) -> None:
    out = export_policy(oft_checkpoint, tmp_path / "out", "openvla-oft")
    assert sorted(path.name for path in out.iterdir()) == [
        "action_head--100_checkpoint.pt",
        "config.json",
        "dataset_statistics.json",
        "generation_config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "proprio_projector--100_checkpoint.pt",
    ]
    before, after = read_folder_headers(oft_checkpoint), read_folder_headers(out)
    assert {key: (info.shape, info.dtype) for key, info in after.items()} == {
        key: (info.shape, info.dtype) for key, info in before.items()
    }
    assert equal(oft_checkpoint, out, torch.bfloat16, **OPTIONS)
    for name in ("action_head", "proprio_projector"):
        stored = load_file(oft_checkpoint / f"{name}--100_checkpoint.safetensors")
        written = torch.load(out / f"{name}--100_checkpoint.pt", weights_only=True)
        assert written.keys() == stored.keys() and all(key.startswith("module.") for key in written)
        assert all(written[key].dtype == stored[key].dtype and torch.equal(written[key], stored[key]) for key in stored)
    for name in ("config.json", "dataset_statistics.json", "preprocessor_config.json"):
        assert json.loads((out / name).read_text()) == json.loads((oft_checkpoint / name).read_text())


def test_film_has_the_published_keys(film_checkpoint: Path, oft_fixtures: Path, tmp_path: Path) -> None:
    out = export_policy(film_checkpoint, tmp_path / "out", "openvla-oft")
    keys = json.loads(gzip.decompress((oft_fixtures / "film_vision_backbone_keys.json.gz").read_bytes()))
    written = torch.load(out / "vision_backbone--100_checkpoint.pt", weights_only=True)
    assert written.keys() == keys["with_adapters"].keys()
    assert {tensor.dtype for tensor in written.values()} == {torch.bfloat16}
    assert equal(film_checkpoint, out, torch.bfloat16, film=True, **OPTIONS)


@pytest.mark.parametrize("head", ["diffusion", "discrete", "l1"])
def test_heads(small_checkpoint: Path, tmp_path: Path, head: str) -> None:
    sizes = {**OPTIONS, "head": head, "chunk": 3, "action_dim": 4, "proprio_dim": 5}
    for path in (folder := shutil.copytree(small_checkpoint, tmp_path / "base")).glob("*--7_checkpoint.*"):
        path.unlink()
    policy = load_policy(folder, dtype=torch.bfloat16, **sizes)
    save_policy(policy.state_dict(), folder, tmp_path / "trained", dtype=torch.bfloat16, step=9, trained_for=sizes)
    out = export_policy(tmp_path / "trained", tmp_path / "out", "openvla-oft")
    # The export says by itself what it was trained for.
    again = load_policy(out, dtype=torch.bfloat16)
    assert again.fresh_modules == () and again.config == policy.config
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in policy.state_dict().items())


def test_shards_and_dtype(small_checkpoint: Path, tmp_path: Path) -> None:
    out = export_checkpoint(small_checkpoint, tmp_path / "out", dtype=torch.float32, shard_bytes=100_000)
    shards = sorted(path.name for path in out.glob("model*.safetensors"))
    assert len(shards) > 2 and shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    index = json.loads((out / "model.safetensors.index.json").read_text())
    infos = read_folder_headers(out)
    assert index["metadata"]["total_size"] == sum(4 * torch.Size(info.shape).numel() for info in infos.values())
    assert {info.dtype for info in infos.values()} == {"float32"}
    assert equal(small_checkpoint, out, torch.float32, **OPTIONS)
    back = export_policy(out, tmp_path / "back", "openvla-oft", dtype=torch.bfloat16)
    assert (back / "model.safetensors").is_file() and equal(small_checkpoint, back, torch.bfloat16, **OPTIONS)


def test_adapter_is_merged(oft_checkpoint: Path, oft_fixtures: Path, tmp_path: Path) -> None:
    adapter = oft_fixtures / "lora_adapter"
    out = export_policy(oft_checkpoint, tmp_path / "out", "openvla-oft", adapter=adapter)
    merged = load_policy(oft_checkpoint, dtype=torch.bfloat16, adapter=adapter)
    exported = load_policy(out, dtype=torch.bfloat16)
    assert all(torch.equal(exported.state_dict()[name], tensor) for name, tensor in merged.state_dict().items())
    assert {info.dtype for info in read_folder_headers(out).values()} == {"bfloat16"}


def test_run_folder(small_checkpoint: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="a run that has not finished"):
        export_policy(run, tmp_path / "out", "openvla-oft")
    shutil.copytree(small_checkpoint, run / "final")
    assert equal(small_checkpoint, export_policy(run, tmp_path / "out", "openvla-oft"), torch.bfloat16, **OPTIONS)
    with pytest.raises(CheckpointError, match="neither a checkpoint folder nor a run"):
        export_policy(tmp_path, tmp_path / "other", "openvla-oft")


def test_what_is_refused(small_checkpoint: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(small_checkpoint, tmp_path / "checkpoint")
    with pytest.raises(CheckpointError, match="exists already"):
        export_policy(folder, folder, "openvla-oft")
    (folder / "dataset_statistics.json").unlink()
    with pytest.raises(CheckpointError, match="actions would have no units"):
        export_policy(folder, tmp_path / "out", "openvla-oft")
    (folder / "model.safetensors").unlink()
    (folder / "lora_adapter").mkdir()
    with pytest.raises(CheckpointError, match="only an adapter that was not merged: load the base model with adapter="):
        export_policy(folder, tmp_path / "out", "openvla-oft")
    assert not (tmp_path / "out").exists()
