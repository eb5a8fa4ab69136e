"""Attention both ways: without padding, no mask computes what a full mask computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from maps_ray.models import load_policy
from maps_ray.models.decoder import bidirectional_mask, run_both_ways
from maps_ray.models.minivla.tiny import write_tiny


@pytest.fixture(params=["llama", "qwen"])
def decoder(request: pytest.FixtureRequest, small_checkpoint: Path, tmp_path: Path) -> Any:
    if request.param == "llama":
        return load_policy(small_checkpoint).language_model.model
    write_tiny(tmp_path / "oft", "oft")
    return load_policy(tmp_path / "oft").llm_backbone.llm.model


@pytest.fixture
def masks(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What torch's attention is called with."""
    seen: list[Any] = []
    attend = functional.scaled_dot_product_attention

    def record(*args: Any, attn_mask: Any = None, is_causal: bool = False, **options: Any) -> Any:
        seen.append((attn_mask, is_causal))
        return attend(*args, attn_mask=attn_mask, is_causal=is_causal, **options)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", record)
    return seen


def run(decoder: Any, attended: torch.Tensor, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states, and the gradient of a sum of them."""
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(*attended.shape, decoder.config.hidden_size, generator=generator, requires_grad=True)
    hidden = run_both_ways(decoder, embeddings, attended, "sdpa", **options)
    (gradient,) = torch.autograd.grad(hidden[attended].square().sum(), embeddings)
    return hidden.detach(), gradient


def test_without_padding_no_mask_is_needed(decoder: Any, masks: list[Any]) -> None:
    attended = torch.ones(2, 9, dtype=torch.bool)
    dense = run(decoder, attended, dense=True)
    assert masks and all(seen == (None, False) for seen in masks)
    masks.clear()
    masked = run(decoder, attended)
    assert masks and all(mask.dtype == torch.bool and mask.all() for mask, _ in masks)
    for left, right in zip(dense, masked, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-5)


def test_padding_keeps_the_mask(decoder: Any, masks: list[Any]) -> None:
    attended = torch.ones(2, 9, dtype=torch.bool)
    attended[1, 6:] = False
    dense, masked = run(decoder, attended, dense=True)[0], run(decoder, attended)[0]
    assert torch.equal(dense, masked) and all(torch.equal(mask[:, 0, 0], attended) for mask, _ in masks)
    # The padded row is what its unpadded part would be alone, and a later position reaches an earlier one.
    short = run(decoder, attended[1:, :6], dense=True)
    whole = run(decoder, torch.ones(1, 6, dtype=torch.bool))
    torch.testing.assert_close(short[0], whole[0], rtol=1e-5, atol=1e-5)
    embeddings = torch.randn(1, 6, decoder.config.hidden_size)
    changed = embeddings.clone()
    changed[:, -1] += 1
    full = torch.ones(1, 6, dtype=torch.bool)
    first, second = (run_both_ways(decoder, each, full, "sdpa", dense=True)[:, 0] for each in (embeddings, changed))
    assert (first - second).abs().max() > 1e-4


def test_eager_attention_always_has_a_mask() -> None:
    mask = bidirectional_mask(torch.tensor([[True, False]]), torch.float32, "eager")
    assert mask.flatten().tolist() == [0.0, torch.finfo(torch.float32).min]


def test_policies_train_without_a_mask_and_predict_with_one(
    small_checkpoint: Path, small_batch: dict[str, torch.Tensor], masks: list[Any]
) -> None:
    policy = load_policy(small_checkpoint, num_images=2, use_proprio=True)
    batch = {name: value[:1] for name, value in small_batch.items()}
    assert batch["attention_mask"].all() and not small_batch["attention_mask"].all()
    language = policy.config.text["num_hidden_layers"]
    trained = policy.train()(**batch).actions
    assert [mask is None for mask, _ in masks[-language:]] == [True] * language
    predicted = policy.eval()(**batch).actions
    assert [mask is None for mask, _ in masks[-language:]] == [False] * language
    torch.testing.assert_close(trained, predicted, rtol=0, atol=1e-5)
