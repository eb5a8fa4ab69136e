"""Low-rank adapters: where they go, what they add, and how they are stored."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from maps_ray.models import CheckpointError, create_policy, load_policy, save_policy
from maps_ray.models.lora import Adapter, add_adapters, base_name, is_adapter, merge_adapters
from maps_ray.models.minivla.tiny import tiny_config
from maps_ray.models.openvla_oft.film_file import is_film
from maps_ray.proximity.stack import assign

OPTIONS = {"num_images": 2, "use_proprio": True}


def adapted(checkpoint: Path, **options: Any):
    """A policy whose adapters change something."""
    policy = add_adapters(load_policy(checkpoint, dtype=torch.float32, **OPTIONS), 4, alpha=8, **options)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.1)
    return policy


def test_published_adapter_reaches_the_same_layers(oft_fixtures: Path, oft_checkpoint: Path) -> None:
    policy = add_adapters(load_policy(oft_checkpoint, dtype=torch.float32), 4)
    stored = load_file(oft_fixtures / "lora_adapter/adapter_model.safetensors")
    shapes = {
        f"base_model.model.{name.replace('.default.', '.')}": tuple(parameter.shape)
        for name, parameter in policy.named_parameters()
        if is_adapter(name)
    }
    assert shapes == {name: tuple(tensor.shape) for name, tensor in stored.items()}


def test_merged_adapter_equals_the_forward_pass_through_it(oft_fixtures: Path, oft_checkpoint: Path) -> None:
    """The published adapter, merged as the checkpoint is read, and run by peft beside the weights."""
    policy = add_adapters(load_policy(oft_checkpoint, dtype=torch.float32), 4, alpha=4)
    stored = load_file(oft_fixtures / "lora_adapter/adapter_model.safetensors")
    weights = {
        name: stored[f"base_model.model.{name.replace('.default.', '.')}"] if is_adapter(name) else tensor
        for name, tensor in policy.state_dict().items()
    }
    policy.load_state_dict(weights)
    merged = load_policy(oft_checkpoint, dtype=torch.float32, adapter=oft_fixtures / "lora_adapter")
    plain = load_policy(oft_checkpoint, dtype=torch.float32)
    torch.manual_seed(1)
    batch = {
        "pixel_values": torch.randn(1, 6, 56, 56),
        "input_ids": torch.tensor([[1, *range(5, 20), *[31999] * 56, 2]]),
        "attention_mask": torch.ones(1, 73, dtype=torch.bool),
    }
    batch["labels"] = batch["input_ids"].masked_fill(batch["input_ids"] < 31744, -100)
    actions = [model(**batch).actions for model in (policy, merged, plain)]
    torch.testing.assert_close(actions[0], actions[1], rtol=0, atol=2e-5)
    assert (actions[0] - actions[2]).abs().max() > 1e-3
    hidden = [model(**batch).hidden for model in (policy, merged)]
    logits = [model.language_logits(states) for model, states in zip((policy, merged), hidden, strict=True)]
    torch.testing.assert_close(*logits, rtol=0, atol=1e-4)
    # An anchor is the merged weight: training starts there.
    for name, parameter in merged.named_parameters():
        anchor = merged.read_anchor(name)
        assert anchor is None or torch.equal(anchor.float(), parameter), name


def test_adapters_train_and_the_rest_is_frozen(small_checkpoint: Path, small_batch) -> None:
    policy = adapted(small_checkpoint)
    trained = {name for name, parameter in policy.named_parameters() if parameter.requires_grad}
    heads = {name for name in trained if name.startswith(("action_head.", "proprio_projector."))}
    assert trained - heads == {name for name, _ in policy.named_parameters() if is_adapter(name)}
    assert len(heads) == 20
    policy(**small_batch).loss.backward()
    unused = ("blocks.2.", "fused_featurizer.blocks.1.", "attn_pool", "lm_head")
    for name, parameter in policy.named_parameters():
        expected = name in trained and not any(part in name for part in unused)
        assert (parameter.grad is not None) == expected, name


def test_adapters_belong_to_the_layer_they_adapt_with_a_zero_anchor(small_checkpoint: Path) -> None:
    policy = adapted(small_checkpoint)
    names = [name for name, _ in policy.named_parameters()]
    owners = assign(policy.stack(), names)
    plain = load_policy(small_checkpoint, dtype=torch.float32, **OPTIONS)
    expected = assign(plain.stack(), [name for name, _ in plain.named_parameters()])
    for name, layer in owners.items():
        if is_adapter(name):
            prefix = name.partition(".lora_")[0]
            assert layer.name == expected[f"{prefix}.weight"].name
            assert policy.read_anchor(name) is None
        else:
            assert layer.name == expected[base_name(name)].name
            assert (policy.read_anchor(name) is None) == (not layer.pretrained)
    assert owners["vision_backbone.featurizer.patch_embed.proj.lora_A.default.weight"].name == "dinov2.0"
    assert owners["language_model.lm_head.lora_B.default.weight"].name == "language.2"


def test_a_chosen_set(small_checkpoint: Path, small_batch) -> None:
    policy = add_adapters(load_policy(small_checkpoint, dtype=torch.float32, **OPTIONS), 2, targets=["q_proj", "fc1"])
    layers = {name.partition(".lora_")[0] for name, _ in policy.named_parameters() if is_adapter(name)}
    assert {name.rpartition(".")[2] for name in layers} == {"q_proj", "fc1"}
    assert not any(name.startswith(("action_head", "proprio_projector")) for name in layers)
    # At the start adapters change nothing.
    plain = load_policy(small_checkpoint, dtype=torch.float32, **OPTIONS)
    assert torch.equal(policy(**small_batch).actions, plain(**small_batch).actions)
    with pytest.raises(ValueError, match=r"LoRA targets \['qproj'\].*'q_proj'"):
        add_adapters(plain, 2, targets=["qproj"])


def test_adapters_are_deterministic_and_follow_the_dtype(small_config: dict[str, Any]) -> None:
    state = torch.get_rng_state()
    first, again, other = (add_adapters(create_policy(small_config), 2, seed=seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    name = "projector.fc1.lora_A.default.weight"
    assert torch.equal(first[name], again[name]) and not torch.equal(first[name], other[name])
    half = add_adapters(create_policy(small_config, dtype=torch.bfloat16), 2)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}


def test_save_merges_and_keeps_the_adapter(small_checkpoint: Path, small_batch, tmp_path: Path) -> None:
    policy = adapted(small_checkpoint)
    out = tmp_path / "out"
    save_policy(policy.state_dict(), small_checkpoint, out, dtype=torch.float32, lora_alpha=8, keep_adapter=True)
    merged = load_policy(out, dtype=torch.float32, **OPTIONS)
    from_adapter = load_policy(small_checkpoint, dtype=torch.float32, adapter=out / "lora_adapter", **OPTIONS)
    for name, tensor in merge_adapters(policy.state_dict(), 8).items():
        assert torch.equal(merged.state_dict()[name], tensor), name
    for name, layer in assign(merged.stack(), merged.state_dict()).items():
        if layer.pretrained:
            assert torch.equal(merged.state_dict()[name], from_adapter.state_dict()[name]), name
    torch.testing.assert_close(merged(**small_batch).actions, policy(**small_batch).actions, rtol=0, atol=2e-5)
    config = json.loads((out / "lora_adapter/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (4, 8, "LORA")
    plain = load_policy(small_checkpoint, dtype=torch.float32, **OPTIONS).state_dict()
    with pytest.raises(CheckpointError, match="there are no adapters to save"):
        save_policy(plain, small_checkpoint, tmp_path / "other", dtype=torch.float32, keep_adapter=True)


def test_film_keeps_its_own_layers_whole(small_config: dict[str, Any]) -> None:
    policy = add_adapters(create_policy(small_config, film=True), 2)
    film = {name: parameter for name, parameter in policy.named_parameters() if is_film(name)}
    assert len(film) == 20 and all(parameter.requires_grad for parameter in film.values())


@pytest.mark.parametrize("kind", ["oft", "vq"])
def test_minivla(kind: Any) -> None:
    """Everything pretrained but the embedding, which is the output head as well."""
    policy = add_adapters(create_policy(tiny_config(kind)), 2)
    layers = {name.partition(".lora_")[0] for name, _ in policy.named_parameters() if is_adapter(name)}
    assert {name.partition(".")[0] for name in layers} == {"vision_backbone", "projector", "llm_backbone"}
    assert not any(name.endswith(("lm_head", "embed_tokens")) for name in layers)
    heads = {name for name, parameter in policy.named_parameters() if parameter.requires_grad and not is_adapter(name)}
    assert heads == {name for name, _ in policy.named_parameters() if name.startswith("action_head.")}
    before = create_policy(tiny_config(kind)).state_dict()
    merged = merge_adapters(policy.state_dict(), None)
    assert merged.keys() == before.keys() and all(torch.equal(merged[name], before[name]) for name in before)


@pytest.fixture
def adapter(oft_fixtures: Path, tmp_path: Path) -> Path:
    return shutil.copytree(oft_fixtures / "lora_adapter", tmp_path / "adapter")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type = 'LOHA': must be 'LORA'"),
        ({"use_dora": True}, "use_dora = True: only plain LoRA"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights = 'pissa_niter_4': it belongs to a base"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern = .*: only plain LoRA"),
        ({"r": 8}, "A is .*; r is 8"),
        ({"lora_alpha": "much"}, "lora_alpha = 'much'"),
    ],
)
def test_adapters_that_are_refused(adapter: Path, changes: dict[str, Any], message: str) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(CheckpointError, match=message):
        Adapter.read(adapter)


def test_adapter_of_another_model(adapter: Path, small_checkpoint: Path) -> None:
    with pytest.raises(CheckpointError, match="does not fit the model"):
        load_policy(small_checkpoint, adapter=adapter)
    file = adapter / "adapter_model.safetensors"
    save_file({key: value for key, value in load_file(file).items() if "lora_B" not in key}, file)
    with pytest.raises(CheckpointError, match="lora_A or lora_B is missing"):
        Adapter.read(adapter)
    file.unlink()
    with pytest.raises(CheckpointError, match=r"cannot read .*adapter_model\.safetensors"):
        Adapter.read(adapter)
