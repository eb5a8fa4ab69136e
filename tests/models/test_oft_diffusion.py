"""The diffusion head: its sequence, its loss, its sampling and its files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from maps_ray.models import CheckpointError, create_policy, load_policy, save_policy
from maps_ray.models.openvla_oft.diffusion import denoise, noise_schedule, time_token

FIXTURE = Path(__file__).parents[1] / "fixtures" / "diffusion_tiny"
OPTIONS: dict[str, Any] = {"num_images": 2, "use_proprio": True, "head": "diffusion"}


@pytest.fixture
def policy(small_config: dict[str, Any]):
    return create_policy(small_config, dtype=torch.float32, seed=1, **OPTIONS)


def test_schedule_is_the_squared_cosine() -> None:
    """alpha_bar(t) = cos^2((t / T + 0.008) / 1.008 * pi / 2), betas at most 0.999 (arXiv 2102.09672, equation 17)."""
    schedule = noise_schedule()
    bar = np.cos((np.arange(51) / 50 + 0.008) / 1.008 * np.pi / 2) ** 2
    betas = np.minimum(1 - bar[1:] / bar[:-1], 0.999)
    np.testing.assert_allclose(schedule.alphas_cumprod.numpy(), np.cumprod(1 - betas), rtol=1e-4)


def wave(noisy: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    """What stands for the network in the reference: some noise that depends on both."""
    return torch.sin(3 * noisy) + at.float()[:, None, None] / 50


@pytest.mark.parametrize("steps", [50, 10, 7])
def test_sampler_against_recorded_and_computed_values(steps: int) -> None:
    """The published head's DDIMScheduler, as recorded, and the formula (arXiv 2010.02502, equation 12, eta 0)."""
    with np.load(FIXTURE / "ddim.npz") as recorded:
        reference = {name: recorded[name] for name in recorded.files}
    schedule = noise_schedule()
    np.testing.assert_allclose(schedule.alphas_cumprod.numpy(), reference["alphas_cumprod"], rtol=1e-6)
    noise, clean = torch.tensor(reference["noise"]), torch.tensor(reference["clean"])
    noisy = schedule.add_noise(clean, noise, torch.tensor(reference["at"]))
    np.testing.assert_allclose(noisy, reference["noisy"], atol=1e-6)
    path: list[torch.Tensor] = []

    def predict(at: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        path.append(at)
        return wave(at, step)

    found = denoise(schedule, noise, predict, steps)
    assert schedule.timesteps.tolist() == reference[f"timesteps_{steps}"].tolist() and len(path) == steps
    kept_states = [*path[1:], found]
    for state, wanted in zip(
        (kept_states[0], kept_states[steps // 2], kept_states[-1]), reference[f"path_{steps}"], strict=True
    ):
        np.testing.assert_allclose(state, wanted, atol=2e-5)
    bars = reference["alphas_cumprod"].astype(np.float64)
    value = reference["noise"].astype(np.float64)
    every = 50 // steps
    for at in reference[f"timesteps_{steps}"]:
        estimate = np.sin(3 * value) + at / 50
        clean_estimate = np.clip((value - np.sqrt(1 - bars[at]) * estimate) / np.sqrt(bars[at]), -1, 1)
        before = bars[at - every] if at >= every else 1.0
        value = np.sqrt(before) * clean_estimate + np.sqrt(1 - before) * estimate
    # Fifty steps of this wave magnify what float32 rounds.
    np.testing.assert_allclose(found, value, atol=1e-2 if steps == 50 else 1e-4)


def test_a_tiny_run_of_this_package(policy, small_batch) -> None:
    """Loss, gradient and sampled actions of a small policy with weights of seed 1, as recorded."""
    found = tiny_run(policy, small_batch)
    if os.environ.get("WRITE_RUN"):
        np.savez_compressed(FIXTURE / "run.npz", **found)
    with np.load(FIXTURE / "run.npz") as recorded:
        reference = {name: recorded[name] for name in recorded.files}
    for name, value in found.items():
        np.testing.assert_allclose(value, reference[name], rtol=2e-4, atol=2e-5, err_msg=name)


def tiny_run(policy: Any, batch: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """What `run.npz` holds; `tests/fixtures/diffusion_tiny/README.md` says how it is written."""
    torch.manual_seed(5)
    out = policy.train()(**batch)
    out.loss.backward()
    norm = torch.stack([p.grad.norm() for p in policy.action_head.parameters()]).norm()
    inputs = {name: value for name, value in batch.items() if name != "actions"}
    noise = torch.from_numpy(np.random.default_rng(0).standard_normal((2, 8, 7)).astype(np.float32))
    with torch.no_grad():
        actions = policy.eval()(**inputs, noise=noise).actions
    return {"loss": out.loss.detach().numpy(), "head_gradient": norm.numpy(), "actions": actions.numpy()}


def test_time_token() -> None:
    token = time_token(torch.tensor([0, 7]), 8)
    assert token.shape == (2, 8) and token[0].tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    angles = 7 * np.array([1, 10000 ** (-1 / 3), 10000 ** (-2 / 3), 1e-4])
    np.testing.assert_allclose(token[1], np.concatenate([np.sin(angles), np.cos(angles)]), rtol=1e-5)


@pytest.mark.parametrize("steps", [50, 10])
def test_perfect_noise_predictions_give_the_clean_actions(steps: int) -> None:
    schedule = noise_schedule()
    clean = torch.rand(2, 3, 4) * 2 - 1

    def exact(noisy: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        kept = schedule.alphas_cumprod[at][:, None, None]
        return (noisy - kept.sqrt() * clean) / (1 - kept).sqrt()

    actions = denoise(schedule, torch.randn(2, 3, 4), exact, steps)
    torch.testing.assert_close(actions, clean, rtol=0, atol=1e-4)


def test_loss_is_that_of_the_noise_and_reaches_every_new_module(policy, small_batch) -> None:
    torch.manual_seed(3)
    out = policy(**small_batch)
    # patches of two images, proprioception and the diffusion step stand between BOS and the text.
    assert out.hidden.shape[1] == small_batch["input_ids"].shape[1] + 2 * 4 + 2
    torch.manual_seed(3)
    noise = torch.randn(2, 8, 7)
    predicted = policy.action_head(out.action_hidden)
    assert out.loss.item() == pytest.approx(((predicted - noise) ** 2).mean().item(), rel=1e-6)
    steps = torch.randint(0, 50, (2,))
    kept = noise_schedule().alphas_cumprod[steps][:, None, None]
    noisy = kept.sqrt() * small_batch["actions"] + (1 - kept).sqrt() * noise
    estimate = (noisy - (1 - kept).sqrt() * predicted) / kept.sqrt()
    torch.testing.assert_close(out.actions, estimate.clamp(-1, 1), rtol=0, atol=1e-5)
    out.loss.backward()
    for module in ("action_head", "noisy_action_projector", "proprio_projector"):
        for name, parameter in getattr(policy, module).named_parameters():
            assert parameter.grad is not None and parameter.grad.norm() > 0, name


def test_noisy_actions_and_step_reach_the_prediction(policy, small_batch, monkeypatch) -> None:
    def action_hidden(noise: float, step: int) -> torch.Tensor:
        monkeypatch.setattr(torch, "randn", lambda *size, device: torch.full(size, noise))
        monkeypatch.setattr(torch, "randint", lambda low, high, size, device: torch.full(size, step))
        return policy(**small_batch).action_hidden

    base = action_hidden(0.5, 20)
    assert torch.equal(base, action_hidden(0.5, 20))
    assert (base - action_hidden(0.6, 20)).abs().max() > 1e-4
    assert (base - action_hidden(0.5, 21)).abs().max() > 1e-4


def test_sampling(policy, small_batch) -> None:
    inputs = {name: value for name, value in small_batch.items() if name != "actions"}
    with torch.no_grad():
        torch.manual_seed(1)
        first = policy.eval()(**inputs)
        torch.manual_seed(1)
        again = policy(**inputs)
        scored = policy(**small_batch)
    assert first.loss is None and scored.loss is not None
    assert first.actions.shape == (2, 8, 7) and torch.equal(first.actions, again.actions)
    assert first.actions.abs().max() <= 1 + 1e-5
    assert not torch.equal(first.actions, scored.actions)


def test_files(policy, small_checkpoint: Path, tmp_path: Path) -> None:
    save_policy(policy.state_dict(), small_checkpoint, tmp_path / "out", dtype=torch.float32, step=5)
    names = {path.name.partition("--")[0] for path in (tmp_path / "out").glob("*--5_checkpoint.safetensors")}
    assert names == {"action_head", "noisy_action_projector", "proprio_projector"}
    again = load_policy(tmp_path / "out", dtype=torch.float32, **OPTIONS)
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in policy.state_dict().items())
    with pytest.raises(CheckpointError, match="likely cause: a diffusion head: load it with head='diffusion'"):
        load_policy(tmp_path / "out", num_images=2, use_proprio=True)
    with pytest.raises(CheckpointError, match="head = 'flow': must be one of l1, diffusion, discrete"):
        load_policy(tmp_path / "out", head="flow")
