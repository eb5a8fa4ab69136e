"""The policy computes what the published OpenVLA-OFT code computes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from maps_ray.models import load_policy
from maps_ray.models.images import ImageTransform
from maps_ray.models.openvla_oft.film_file import file_key
from maps_ray.models.openvla_oft.model import PolicyOutput
from maps_ray.models.openvla_oft.tensors import checkpoint_key
from maps_ray.models.openvla_oft.tokens import ActionTokenizer

TOLERANCE = 2e-5
CASES = {"case_img1": (1, False), "case_img2_proprio": (2, True), "case_img2_proprio_pad2": (2, True)}


def read_case(
    folder: Path, case: str, inputs: str | None = None
) -> tuple[dict[str, torch.Tensor], dict[str, np.ndarray]]:
    """The batch and what the published code computes; `inputs` names another case with the same batch."""
    expected = dict(np.load(folder / f"{case}.npz"))
    stored = np.load(folder / f"{inputs or case}.npz")
    transform = ImageTransform.from_config(json.loads((folder / "checkpoint/preprocessor_config.json").read_text()))
    batch = {
        name: torch.from_numpy(stored[f"in_{name}"])
        for name in ("input_ids", "attention_mask", "labels", "actions", "proprio")
        if f"in_{name}" in stored
    }
    batch["pixel_values"] = torch.from_numpy(np.stack([transform.all(row) for row in stored["in_images"]]))
    return batch, expected


def close(actual: torch.Tensor, expected: np.ndarray) -> None:
    np.testing.assert_allclose(actual.detach().numpy(), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("case", CASES)
def test_forward_and_gradients(oft_fixtures: Path, oft_checkpoint: Path, case: str, attention: str) -> None:
    images, proprio = CASES[case]
    batch, expected = read_case(oft_fixtures, case)
    policy = load_policy(
        oft_checkpoint, dtype=torch.float32, num_images=images, use_proprio=proprio, attention=attention
    )
    assert policy.fresh_modules == ()
    out = policy(**batch)
    close_to_published(out, expected)
    out.loss.backward()
    norms = json.loads((oft_fixtures / f"{case}.gradnorms.json").read_text())
    norms = {name: norm for name, norm in norms.items() if proprio or not name.startswith("proprio_projector.")}
    gradients_are(policy, norms, expected, checkpoint_key)


def test_film(oft_fixtures: Path, film_checkpoint: Path) -> None:
    batch, expected = read_case(oft_fixtures, "case_film_img2_proprio", "case_img2_proprio")
    policy = load_policy(film_checkpoint, dtype=torch.float32, num_images=2, use_proprio=True, film=True)
    assert policy.fresh_modules == ()
    out = policy(**batch)
    close_to_published(out, expected)
    out.loss.backward()

    def published(name: str) -> str:
        key = checkpoint_key(name)
        return f"vision_backbone.{file_key(key)}" if key.startswith("vision_backbone.") else key

    norms = json.loads((oft_fixtures / "case_film_img2_proprio.gradnorms.json").read_text())
    gradients_are(policy, norms, expected, published)


def test_discrete_actions(oft_fixtures: Path, oft_checkpoint: Path) -> None:
    batch, expected = read_case(oft_fixtures, "case_img1_logits", "case_img1")
    policy = load_policy(oft_checkpoint, dtype=torch.float32, head="discrete")
    assert policy.action_head is None and policy.fresh_modules == ()
    out = policy(**batch)
    close(out.loss, expected["out_lm_loss"])
    logits = policy.language_logits(out.action_hidden)[0]
    close(logits[:, 31744:32000], expected["slot_logits_action256"])
    close(logits.logsumexp(dim=-1), expected["slot_logits_logsumexp"])
    actions = ActionTokenizer(32000).decode(expected["slot_logits_argmax"]).reshape(1, 8, 7)
    close(out.actions, actions)
    out.loss.backward()
    assert policy.language_model.lm_head.weight.grad.norm() > 0


def close_to_published(out: PolicyOutput, expected: dict[str, np.ndarray]) -> None:
    close(out.loss, expected["out_loss"])
    close(out.actions, expected["out_predicted_actions"])
    close(out.action_hidden, expected["out_actions_hidden_states"])
    close(out.projected, expected["out_projected_patches"])
    attended = expected["out_multimodal_attention_mask"]
    close(out.hidden[torch.from_numpy(attended)], expected["out_last_hidden_states"][attended])


def gradients_are(
    policy: torch.nn.Module,
    norms: dict[str, float | None],
    expected: dict[str, np.ndarray],
    published: Callable[[str], str],
) -> None:
    """Every parameter has the gradient that the published code computes; `published` gives a parameter's name there."""
    gradients = {published(name): parameter.grad for name, parameter in policy.named_parameters()}
    assert gradients.keys() == norms.keys()
    for name, norm in norms.items():
        gradient = gradients[name]
        assert (gradient is None) == (norm is None), name
        if gradient is not None:
            assert gradient.norm().item() == pytest.approx(norm, rel=1e-4, abs=TOLERANCE), name
    for name, gradient in expected.items():
        if name.startswith("grad:"):
            actual = gradients[name.removeprefix("grad:")]
            assert actual is not None
            close(actual, gradient)


def test_a_causal_mask_would_be_caught(oft_fixtures: Path, oft_checkpoint: Path, monkeypatch) -> None:
    batch, expected = read_case(oft_fixtures, "case_img1")
    policy = load_policy(oft_checkpoint, dtype=torch.float32).eval()

    def causal(attended: torch.Tensor, dtype: torch.dtype, attention: str) -> torch.Tensor:
        size = attended.shape[1]
        return torch.ones(size, size, dtype=torch.bool).tril()[None, None] & attended[:, None, None, :]

    monkeypatch.setattr("maps_ray.models.decoder.bidirectional_mask", causal)
    out = policy(**batch)
    assert np.abs(out.hidden.detach().numpy() - expected["out_last_hidden_states"]).max() > 1
    assert abs(out.loss.item() - expected["out_loss"]) > 100 * TOLERANCE


def test_a_row_does_not_depend_on_its_batch(oft_fixtures: Path, oft_checkpoint: Path) -> None:
    """The shorter prompt alone, and three times over, gives what it gave beside the longer one."""
    batch, expected = read_case(oft_fixtures, "case_img2_proprio_pad2")
    policy = load_policy(oft_checkpoint, dtype=torch.float32, num_images=2, use_proprio=True)
    length = int(batch["attention_mask"][0].sum())
    short = {
        name: value[:1, :length] if name in ("input_ids", "labels", "attention_mask") else value[:1]
        for name, value in batch.items()
    }
    close(policy(**short).actions[0], expected["out_predicted_actions"][0])
    thrice = {name: torch.cat([value] * 3) for name, value in short.items()}
    close(policy(**thrice).actions[2], expected["out_predicted_actions"][0])
