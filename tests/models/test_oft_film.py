"""The towers with FiLM: their file in both layouts, their start, and what the mean over the text does."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from maps_ray.models import CheckpointError, create_policy, describe, load_policy, save_policy
from maps_ray.models.lora import low_rank_change
from maps_ray.models.openvla_oft.film_file import file_key, is_film, published_film_file
from maps_ray.models.openvla_oft.tensors import parameter_shapes
from maps_ray.proximity.stack import assign

OPTIONS: dict[str, Any] = {"num_images": 2, "use_proprio": True, "film": True}


@pytest.fixture
def published_keys(oft_fixtures: Path) -> dict[str, dict[str, list[int]]]:
    return json.loads(gzip.decompress((oft_fixtures / "film_vision_backbone_keys.json.gz").read_bytes()))


def towers(checkpoint: Path, fixtures: Path) -> dict[str, torch.Tensor]:
    weights = load_file(checkpoint / "model.safetensors") | load_file(fixtures / "film_only.safetensors")
    return {key: value for key, value in weights.items() if key.startswith("vision_backbone.")}


def test_file_without_adapters_has_the_published_keys(oft_checkpoint: Path, oft_fixtures: Path, published_keys) -> None:
    keys = {file_key(key): list(value.shape) for key, value in towers(oft_checkpoint, oft_fixtures).items()}
    assert keys == published_keys["plain"]


def test_file_with_adapters_has_the_published_keys(oft_checkpoint: Path, oft_fixtures: Path, published_keys) -> None:
    stored = published_film_file(towers(oft_checkpoint, oft_fixtures))
    ranks = {
        key: [4 if size == 32 and "lora_" in key else size for size in value.shape] for key, value in stored.items()
    }
    assert ranks == published_keys["with_adapters"]


def test_adapters_in_the_file_are_merged(film_checkpoint: Path, oft_fixtures: Path, tmp_path: Path) -> None:
    """The rank says alpha: half the rank of 32, as the published training has it."""
    folder = shutil.copytree(film_checkpoint, tmp_path / "checkpoint")
    stored = published_film_file(towers(folder, oft_fixtures))
    layer = "vision_backbone.featurizer.patch_embed.proj"
    for part in ("A", "B"):
        tensor = stored[f"{layer}.lora_{part}.default.weight"]
        tensor.copy_(torch.randn(tensor.shape))
    torch.save(stored, folder / "vision_backbone--100_checkpoint.pt")
    before = load_policy(film_checkpoint, dtype=torch.float32, **OPTIONS).state_dict()
    policy = load_policy(folder, dtype=torch.float32, **OPTIONS)
    for name, tensor in policy.state_dict().items():
        expected = before[name]
        if name == f"{layer}.weight":
            a, b = stored[f"{layer}.lora_A.default.weight"], stored[f"{layer}.lora_B.default.weight"]
            assert low_rank_change(a, b, 0.5).abs().max() > 1
            expected = (expected + low_rank_change(a, b, 0.5)).to(torch.bfloat16).float()
        assert torch.equal(tensor, expected), name
    assert torch.equal(policy.read_anchor(f"{layer}.weight").float(), policy.state_dict()[f"{layer}.weight"])


def test_film_has_no_anchor_and_a_layer_of_its_own(film_checkpoint: Path) -> None:
    policy = load_policy(film_checkpoint, dtype=torch.float32, **OPTIONS)
    owners = assign(policy.stack(), [name for name, _ in policy.named_parameters()])
    for name, layer in owners.items():
        assert (layer.name == "film") == is_film(name)
        assert (policy.read_anchor(name) is None) == (not layer.pretrained)
    assert [layer.name for layer in policy.stack() if not layer.pretrained] == [
        "film",
        "proprio_projector",
        "action_head",
    ]


def test_film_without_a_file_starts_from_the_seed(small_checkpoint: Path, small_batch) -> None:
    first, again, other = (load_policy(small_checkpoint, seed=seed, **OPTIONS) for seed in (1, 1, 2))
    assert first.fresh_modules == ("film",) == describe(small_checkpoint, **OPTIONS).fresh_modules
    weights = [
        policy.state_dict()["vision_backbone.featurizer.blocks.1.scale.weight"] for policy in (first, again, other)
    ]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    found = {name: tuple(parameter.shape) for name, parameter in first.named_parameters()}
    assert found == parameter_shapes(first.config)
    # The instruction reaches the image tokens, and only with FiLM.
    other_text = {**small_batch, "input_ids": small_batch["input_ids"].clone()}
    other_text["input_ids"][:, 9] = 5
    assert not torch.equal(first(**small_batch).projected, first(**other_text).projected)
    plain = load_policy(small_checkpoint, num_images=2, use_proprio=True)
    assert torch.equal(plain(**small_batch).projected, plain(**other_text).projected)


def test_round_trip(small_checkpoint: Path, tmp_path: Path) -> None:
    policy = load_policy(small_checkpoint, dtype=torch.bfloat16, **OPTIONS)
    save_policy(policy.state_dict(), small_checkpoint, tmp_path / "out", dtype=torch.bfloat16, step=3)
    again = load_policy(tmp_path / "out", dtype=torch.bfloat16, **OPTIONS)
    assert again.fresh_modules == () and describe(tmp_path / "out", **OPTIONS).problems == []
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in policy.state_dict().items())


def test_create_policy_initialises_film_as_linear_layers(small_config: dict[str, Any]) -> None:
    scale = create_policy(small_config, film=True).vision_backbone.featurizer.blocks[0].scale
    # torch's default is uniform up to 1 / sqrt(32); timm's would be normal with standard deviation 0.02, biases zero.
    assert scale.weight.abs().max() <= 32**-0.5 < 2 * scale.weight.abs().max()
    assert scale.bias.abs().max() > 0


def test_files_that_are_refused(film_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="was trained with FiLM: load it with film=True"):
        load_policy(film_checkpoint)
    assert "load it with film=True" in describe(film_checkpoint).problems[0]
    folder = shutil.copytree(film_checkpoint, tmp_path / "checkpoint")
    file = folder / "vision_backbone--100_checkpoint.pt"
    stored = torch.load(file, weights_only=True)
    key = "vision_backbone.featurizer.blocks.1.shift.bias"
    torch.save({name: value for name, value in stored.items() if name != key}, file)
    with pytest.raises(CheckpointError, match=r"blocks\.1\.shift\.bias: expected \[48\], found nothing"):
        load_policy(folder, film=True)
    stored = published_film_file({name.replace(".block.", "."): value for name, value in stored.items()})
    torch.save({name: value for name, value in stored.items() if "lora_B" not in name}, file)
    with pytest.raises(CheckpointError, match="adapters are incomplete"):
        load_policy(folder, film=True)
