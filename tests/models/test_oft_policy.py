"""What the policy reads, what it ignores, and how it refuses input that does not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from maps_ray.models import create_policy, load_policy, load_processor
from maps_ray.models.decoder import slot_states


@pytest.fixture
def policy(small_checkpoint: Path):
    return load_policy(small_checkpoint, dtype=torch.float32, num_images=2, use_proprio=True)


def test_black_and_white_images_give_different_actions(oft_checkpoint: Path, oft_fixtures: Path) -> None:
    policy = load_policy(oft_checkpoint, dtype=torch.float32)
    stored = np.load(oft_fixtures / "case_img1.npz")
    text = {name: torch.from_numpy(stored[f"in_{name}"]) for name in ("input_ids", "attention_mask", "labels")}
    black, white = (policy(pixel_values=torch.full((1, 6, 56, 56), value), **text) for value in (-1.0, 1.0))
    assert black.loss is None
    assert (black.actions - white.actions).abs().max() > 1e-2
    # The same with the whole of the second tower's channels equal: both towers see.
    pixels = torch.full((1, 6, 56, 56), -1.0)
    pixels[:, 3:] = 1.0
    siglip_only = policy(pixel_values=pixels, **text)
    assert (black.actions - siglip_only.actions).abs().max() > 1e-3
    assert (white.actions - siglip_only.actions).abs().max() > 1e-3


@pytest.mark.parametrize("changed", ["second image", "proprio", "prompt", "attention"])
def test_every_input_reaches_the_actions(policy, small_batch, changed: str) -> None:
    before = policy(**small_batch).actions
    batch = {name: value.clone() for name, value in small_batch.items()}
    if changed == "second image":
        batch["pixel_values"][:, 6:] += 1.0
    elif changed == "proprio":
        batch["proprio"] += 1.0
    elif changed == "prompt":
        batch["input_ids"][:, 9] = 5
    else:
        batch["attention_mask"][:, 3] = False
    assert (policy(**batch).actions - before).abs().max() > 1e-4


def test_ids_of_action_slots_and_padding_do_not_matter(policy, small_batch) -> None:
    batch = {name: value.clone() for name, value in small_batch.items()}
    batch["input_ids"][batch["labels"] > policy.config.action_token_begin] = 5
    batch["input_ids"][~batch["attention_mask"]] = 5
    assert torch.equal(policy(**batch).actions, policy(**small_batch).actions)


@pytest.mark.parametrize("images", [1, 2, 3])
def test_one_to_three_images(small_checkpoint: Path, images: int) -> None:
    policy = load_policy(small_checkpoint, dtype=torch.float32, num_images=images)
    processor = load_processor(small_checkpoint)
    batch = processor.collate([processor.encode("pick up", [np.zeros((30, 30, 3), np.uint8)] * images)])
    out = policy(**batch)
    assert out.projected.shape == (1, 4 * images, 32)
    assert out.hidden.shape == (1, 4 * images + batch["input_ids"].shape[1], 32)
    assert out.actions.shape == (1, 8, 7)


def test_other_chunks_and_dimensions(small_config: dict[str, Any], small_batch) -> None:
    policy = create_policy(small_config, dtype=torch.float32, num_images=2, chunk=3, action_dim=4)
    labels = torch.full_like(small_batch["labels"], -100)
    labels[:, 10:22] = 60
    inputs = {name: small_batch[name] for name in ("pixel_values", "input_ids", "attention_mask")}
    out = policy(labels=labels, actions=torch.zeros(2, 3, 4), **inputs)
    assert out.actions.shape == (2, 3, 4)
    # The state before each slot: the sequence is the text with 2 * 4 patches after its first token.
    assert torch.equal(out.action_hidden, out.hidden[:, 8 + 9 : 8 + 21])
    assert out.loss.item() == pytest.approx(out.actions.abs().mean().item())


def test_language_logits_come_from_the_same_hidden_states(policy, small_batch) -> None:
    slots = small_batch["labels"] > policy.config.action_token_begin
    hidden = policy(**small_batch).hidden
    logits = policy.language_logits(slot_states(hidden, slots, 56))
    assert logits.shape == (2, 56, 68)
    logits.sum().backward()
    assert policy.language_model.lm_head.weight.grad is not None


def test_bfloat16_stays_near_and_keeps_the_rotary_frequencies(small_checkpoint: Path, small_batch) -> None:
    options = {"num_images": 2, "use_proprio": True}
    full = load_policy(small_checkpoint, dtype=torch.float32, **options)
    half = load_policy(small_checkpoint, dtype=torch.float32, **options).bfloat16()
    assert torch.equal(half.language_model.model.rotary_emb.inv_freq, full.language_model.model.rotary_emb.inv_freq)
    out = half(**small_batch)
    assert out.actions.dtype == torch.bfloat16 and out.loss.dtype == torch.float32
    assert (out.actions.float() - full(**small_batch).actions).abs().max() < 0.1


def test_batch_that_does_not_fit_is_refused(policy, small_checkpoint: Path, small_batch) -> None:
    def run(**changes: Any) -> None:
        policy(**{**small_batch, **changes})

    with pytest.raises(ValueError, match=r"pixel_values have shape \[2, 6, 28, 28\], expected \[B, 12, 28, 28\]"):
        run(pixel_values=small_batch["pixel_values"][:, :6])
    with pytest.raises(ValueError, match="proprio is missing"):
        run(proprio=None)
    with pytest.raises(ValueError, match=r"proprio has shape \[2, 5\], expected \[2, 8\]"):
        run(proprio=small_batch["proprio"][:, :5])
    with pytest.raises(ValueError, match=r"actions have shape \[2, 4, 7\], expected \[2, 8, 7\]"):
        run(actions=small_batch["actions"][:, :4])
    labels = small_batch["labels"].clone()
    labels[0, -12] = -100
    with pytest.raises(RuntimeError, match="must mark 56 slots"):
        run(labels=labels)
    without = load_policy(small_checkpoint, dtype=torch.float32, num_images=2)
    with pytest.raises(ValueError, match="no proprio projector"):
        without(**small_batch)


def test_create_policy_is_deterministic_and_leaves_the_generator(small_config: dict[str, Any]) -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, again = (create_policy(small_config, dtype=torch.float32, seed=3).state_dict() for _ in range(2))
    other = create_policy(small_config, dtype=torch.float32, seed=4).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[name], again[name]) for name in first)
    name = "language_model.model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(first[name], other[name])
    assert first[name].std().item() == pytest.approx(0.02, rel=0.1)
    assert first["vision_backbone.featurizer.blocks.0.mlp.fc1.weight"].std().item() == pytest.approx(0.02, rel=0.1)
