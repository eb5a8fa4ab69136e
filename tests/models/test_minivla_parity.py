"""The policies compute what the published MiniVLA code computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from minivla_data import read_json, read_npz

from maps_ray.models import load_policy, load_processor
from maps_ray.models.decoder import splice_mask
from maps_ray.models.minivla.processor import image_transform
from maps_ray.models.minivla.vq import VQActionTokenizer, load_vq
from maps_ray.models.openvla_oft.tokens import ActionTokenizer

TOLERANCE = 2e-5
PATCHES = 16


def close(actual: Any, expected: np.ndarray, relative: float = 0.0) -> None:
    np.testing.assert_allclose(np.asarray(actual), expected, rtol=relative, atol=TOLERANCE)


@pytest.fixture(scope="module")
def case() -> dict[str, np.ndarray]:
    return read_npz("case_img1_pad2.npz")


@pytest.fixture(scope="module")
def batch(case: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    transform = image_transform((56, 56))
    inputs = {name: torch.from_numpy(case[f"in_{name}"]) for name in ("input_ids", "attention_mask", "labels")}
    images = [transform(image) for image in case["in_image_primary"]]
    return {**inputs, "pixel_values": torch.from_numpy(np.stack(images))}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_forward_and_gradients(minivla_checkpoint: Path, batch, case, attention: str) -> None:
    policy = load_policy(minivla_checkpoint, attention=attention)
    out = policy(**batch)
    attended = splice_mask(batch["attention_mask"], PATCHES)
    close(out.loss.item(), case["out_loss"])
    close(policy.vision_backbone(batch["pixel_values"]).detach(), case["out_patch_features"])
    close(out.projected.detach(), case["out_projected_patches"])
    close(out.hidden[attended].detach(), case["out_last_hidden_states"][attended])
    logits = policy.language_logits(out.hidden).detach()
    # Logits reach 8: on processors that sum in another order their last bits alone come to 2.1e-5.
    close(logits[..., 151665:151921:16][attended], case["out_logits_action16"][attended], relative=1e-5)
    close(logits.logsumexp(dim=-1)[attended], case["out_logsumexp"][attended])
    action = case["out_action_mask"]
    assert np.array_equal(logits[:, PATCHES:-1].argmax(-1).numpy()[action], case["out_action_preds"][action])

    out.loss.backward()
    norms = read_json("case_img1_pad2.gradnorms.json")
    gradients = {name: parameter.grad for name, parameter in policy.named_parameters()}
    assert gradients.keys() == norms.keys()
    for name, norm in norms.items():
        gradient = gradients[name]
        assert (gradient is None) == (norm is None), name
        if gradient is not None:
            assert gradient.norm().item() == pytest.approx(norm, rel=1e-4, abs=TOLERANCE), name


def test_black_and_white_images_give_different_tokens_logits(minivla_checkpoint: Path, batch) -> None:
    policy = load_policy(minivla_checkpoint)
    losses = []
    for dinov2, siglip in ((-1.0, -1.0), (1.0, 1.0), (-1.0, 1.0)):
        pixels = torch.full_like(batch["pixel_values"], dinov2)
        pixels[:, 3:] = siglip
        losses.append(policy(**{**batch, "pixel_values": pixels}).loss.item())
    assert min(abs(losses[0] - losses[1]), abs(losses[0] - losses[2]), abs(losses[1] - losses[2])) > 1e-3


def test_generation_is_greedy_whatever_the_padding(minivla_checkpoint: Path, batch) -> None:
    """Against the plain way: one row at a time, without a cache, the likeliest token appended each time."""
    policy = load_policy(minivla_checkpoint).eval()
    with torch.no_grad():
        out = policy(**batch)
        assert out.actions.shape == (2, 8, 7)
        for row in range(2):
            length = int((batch["labels"][row] != -100).int().argmax())
            ids = batch["input_ids"][row : row + 1, :length]
            pixels = batch["pixel_values"][row : row + 1]
            tokens = []
            for _ in range(7):
                hidden = policy(pixels, ids, torch.ones_like(ids)).hidden
                tokens.append(int(policy.language_logits(hidden[:, -1]).argmax()))
                ids = torch.cat([ids, torch.tensor([[tokens[-1]]])], dim=1)
            assert out.tokens[row].tolist() == tokens
        close(out.actions, policy.action_tokenizer.decode(out.tokens))


def test_prompt_and_labels(minivla_checkpoint: Path, batch, case) -> None:
    """The sentence and the chunk give the ids that the published collator gives."""
    prompts = read_json("config.json")["prompts"]
    actions = read_npz("vq_action_tokenizer.npz")["actions"]
    processor = load_processor(minivla_checkpoint)
    samples = []
    for row, text in enumerate(prompts["infer"]):
        instruction = text.split("robot take to ")[1].split("?")[0]
        assert list(processor.prompts.encode(instruction.upper())) == prompts["ids_infer"][row]
        samples.append(processor.encode(instruction, [case["in_image_primary"][row]], actions=actions[row]))
        assert samples[row]["input_ids"].tolist() == prompts["ids_train"][row]
        alone = processor.encode(instruction, [case["in_image_primary"][row]])
        assert alone["input_ids"].tolist() == prompts["ids_infer"][row] and (alone["labels"] == -100).all()
    made = processor.collate(samples)
    assert made.pop("actions").shape == (2, 8, 7)
    width = made["input_ids"].shape[1]
    assert (batch["input_ids"][:, width:] == processor.pad).all() and not batch["attention_mask"][:, width:].any()
    for name, value in made.items():
        expected = batch[name] if name == "pixel_values" else batch[name][:, :width]
        assert torch.equal(value, expected), name


def test_vq_action_tokenizer(minivla_checkpoint: Path) -> None:
    stored = read_npz("vq_action_tokenizer.npz")
    model = load_vq(minivla_checkpoint / "vq")
    actions = torch.from_numpy(stored["actions"])
    with torch.no_grad():
        latent = model.latent(actions)
        codes = model.quantize(latent)
        close(latent, stored["encoder_out"])
        assert np.array_equal(codes.numpy(), stored["codes"])
        close(model.look_up(codes), stored["latent"])
    tokenizer = VQActionTokenizer(model, 151920)
    ids = tokenizer.encode(actions)
    assert np.array_equal(ids.numpy(), stored["token_ids"])
    close(tokenizer.decode(ids), stored["decoded_chunk"])
    close(tokenizer.decode(ids)[:, 0], stored["decoded_batch"])
    outside = torch.from_numpy(stored["out_of_range_ids"])[None]
    close(tokenizer.decode(outside)[0, 0], stored["out_of_range_decoded"])
    # Without added tokens the codes are the last ids of the plain vocabulary.
    assert np.array_equal(VQActionTokenizer(model, 151642).encode(actions).numpy(), stored["token_ids_noextra"])


def test_bin_action_tokenizer() -> None:
    stored = read_npz("extra_bin_action_tokenizer.npz")
    tokenizer = ActionTokenizer(151921)
    assert np.array_equal(tokenizer.encode(stored["values"]), stored["token_ids"])
    np.testing.assert_allclose(tokenizer.decode(stored["token_ids"]), stored["decoded"], rtol=0, atol=1e-12)
