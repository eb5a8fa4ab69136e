"""MiniVLA-OFT with bidirectional attention: what it reads, what it ignores, how it refuses input that does not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from maps_ray.models import load_policy, load_processor, save_policy
from maps_ray.models.lora import add_adapters
from maps_ray.models.minivla.tiny import write_tiny
from maps_ray.proximity.stack import assign

MASK = "bidirectional"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("minivla_oft") / "checkpoint"
    write_tiny(folder, "oft", ["pick up the red bowl", "place cup"])
    return folder


@pytest.fixture
def policy(checkpoint: Path):
    return load_policy(checkpoint, num_images=2, use_proprio=True, attention_mask=MASK)


@pytest.fixture(scope="module")
def batch(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Two samples of different length, two images each."""
    processor = load_processor(checkpoint, attention_mask=MASK)
    rng = np.random.default_rng(0)
    return processor.collate(
        [
            processor.encode(
                sentence,
                list(rng.integers(0, 256, (2, 60, 70, 3), dtype=np.uint8)),
                rng.uniform(-1, 1, 8),
                rng.uniform(-1, 1, (8, 7)),
            )
            for sentence in ("pick up the red bowl", "place cup")
        ]
    )


def test_loss_is_the_mean_error_of_the_head_on_the_states_before_the_slots(policy, batch) -> None:
    out = policy(**batch)
    assert out.actions.shape == (2, 8, 7) and out.projected.shape == (2, 32, 64)
    assert out.loss.item() == pytest.approx((out.actions - batch["actions"]).abs().mean().item())
    for row in range(2):
        first = int((batch["labels"][row] > policy.config.action_token_begin).int().argmax())
        # 32 patches and one proprio token stand behind the first token.
        states = out.hidden[row, 33 + first - 1 : 33 + first - 1 + 56]
        assert torch.equal(out.action_hidden[row], states)
    out.loss.backward()
    without = {name for name, parameter in policy.named_parameters() if parameter.grad is None}
    assert without and all(".blocks.2." in name or ".norm." in name or "attn_pool" in name for name in without)


@pytest.mark.parametrize("changed", ["second image", "proprio", "prompt", "attention"])
def test_every_input_reaches_every_action(policy, batch, changed: str) -> None:
    """Attention is bidirectional: also the first slot sees what comes late."""
    before = policy(**batch).actions
    inputs = {name: value.clone() for name, value in batch.items()}
    if changed == "second image":
        inputs["pixel_values"][:, 6:] += 1.0
    elif changed == "proprio":
        inputs["proprio"] += 1.0
    elif changed == "prompt":
        inputs["input_ids"][:, 9] = 5
    else:
        inputs["attention_mask"][:, 3] = False
    assert ((policy(**inputs).actions - before).abs().amax(dim=2) > 1e-5).all()


def test_later_slots_reach_earlier_actions_and_padding_none(policy, batch) -> None:
    out = policy(**batch)
    shorter = {name: value[1:] for name, value in batch.items()}
    length = int((batch["labels"][1] > policy.config.action_token_begin).nonzero().max()) + 2
    alone = {
        name: value[:, :length] if name in ("input_ids", "labels", "attention_mask") else value
        for name, value in shorter.items()
    }
    assert alone["attention_mask"].all() and length < batch["input_ids"].shape[1]
    torch.testing.assert_close(policy(**alone).actions, out.actions[1:], rtol=0, atol=1e-5)
    # The token after the slots is attended: hiding it changes the first action.
    alone["attention_mask"] = alone["attention_mask"].clone()
    alone["attention_mask"][:, -1] = False
    assert (policy(**alone).actions[0, 0] - out.actions[1, 0]).abs().max() > 1e-6


def test_ids_of_action_slots_and_padding_do_not_matter(policy, batch) -> None:
    inputs = {name: value.clone() for name, value in batch.items()}
    inputs["input_ids"][inputs["labels"] > policy.config.action_token_begin] = 5
    inputs["input_ids"][~inputs["attention_mask"]] = 5
    assert torch.equal(policy(**inputs).actions, policy(**batch).actions)


@pytest.mark.parametrize("images", [1, 3])
def test_one_to_three_images_and_other_chunks(checkpoint: Path, images: int) -> None:
    policy = load_policy(checkpoint, num_images=images, chunk=5, action_dim=4)
    processor = load_processor(checkpoint, chunk=5, action_dim=4)
    inputs = processor.collate([processor.encode("pick up", [np.zeros((30, 30, 3), np.uint8)] * images)])
    out = policy(**inputs)
    assert out.loss is None and out.actions.shape == (1, 5, 4)
    assert out.projected.shape == (1, 16 * images, 64)


def test_attention_implementations_agree(checkpoint: Path, batch) -> None:
    first, second = (
        load_policy(checkpoint, num_images=2, use_proprio=True, attention=attention, attention_mask=MASK)(**batch)
        for attention in ("sdpa", "eager")
    )
    torch.testing.assert_close(first.actions, second.actions, rtol=0, atol=2e-5)


def test_bfloat16_stays_near_and_keeps_the_rotary_frequencies(policy, checkpoint: Path, batch) -> None:
    half = load_policy(checkpoint, num_images=2, use_proprio=True, attention_mask=MASK).bfloat16()
    frequencies = half.llm_backbone.llm.model.rotary_emb.inv_freq
    # Qwen2.5's base, 1e6, for heads of 16.
    expected = 1e6 ** (-torch.arange(0, 16, 2) / 16)
    assert frequencies.dtype == torch.float32
    torch.testing.assert_close(frequencies, expected)
    out = half(**batch)
    assert out.actions.dtype == torch.bfloat16 and out.loss.dtype == torch.float32
    assert (out.actions.float() - policy(**batch).actions).abs().max() < 0.15


def test_batch_that_does_not_fit_is_refused(policy, checkpoint: Path, batch) -> None:
    def run(**changes: Any) -> None:
        policy(**{**batch, **changes})

    with pytest.raises(ValueError, match=r"pixel_values have shape \[2, 6, 56, 56\], expected \[B, 12, 56, 56\]"):
        run(pixel_values=batch["pixel_values"][:, :6])
    with pytest.raises(ValueError, match="proprio is missing"):
        run(proprio=None)
    with pytest.raises(ValueError, match=r"proprio has shape \[2, 5\], expected \[2, 8\]"):
        run(proprio=batch["proprio"][:, :5])
    with pytest.raises(ValueError, match=r"actions have shape \[2, 4, 7\], expected \[2, 8, 7\]"):
        run(actions=batch["actions"][:, :4])
    labels = batch["labels"].clone()
    labels[labels > policy.config.action_token_begin] = -100
    with pytest.raises(RuntimeError, match="must mark 56 slots"):
        run(labels=labels)
    with pytest.raises(ValueError, match="no proprio projector"):
        load_policy(checkpoint, num_images=2, attention_mask=MASK)(**batch)


def test_adapters_train_and_are_merged_when_saved(checkpoint: Path, batch, tmp_path: Path) -> None:
    sizes = {"num_images": 2, "use_proprio": True, "attention_mask": MASK}
    policy = load_policy(checkpoint, **sizes)
    before = policy(**batch).actions
    add_adapters(policy, rank=4)
    assert torch.equal(policy(**batch).actions, before)
    assign(policy.stack(), [name for name, _ in policy.named_parameters()])
    optimizer = torch.optim.SGD([parameter for parameter in policy.parameters() if parameter.requires_grad], lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        policy(**batch).loss.backward()
        optimizer.step()
    after = policy(**batch).actions
    assert (after - before).abs().max() > 1e-3
    save_policy(policy.state_dict(), checkpoint, tmp_path / "out", dtype=torch.float32, trained_for=sizes)
    merged = load_policy(tmp_path / "out")
    assert merged.state_dict().keys() == load_policy(checkpoint, **sizes).state_dict().keys()
    torch.testing.assert_close(merged(**batch).actions, after, rtol=0, atol=1e-4)
