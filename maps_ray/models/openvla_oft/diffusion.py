"""The diffusion head: predicts the noise in a chunk of actions, and denoises one from noise by DDIM.

Facts: arXiv 2502.19645, section 4; DDIM, arXiv 2010.02502. 50 training steps, squared-cosine noise schedule, the noise
is what is predicted. The noisy actions stand in the action slots, one token for each value; the diffusion step is one
more token after the patches and the proprioception.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from maps_ray.models.openvla_oft.heads import ResidualMLP
from maps_ray.models.sizes import HeadSizes

if TYPE_CHECKING:
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

DIFFUSION_STEPS = 50
"""In training and, unless asked otherwise, when actions are sampled."""


class NoisePredictor(nn.Module):
    """The network of the head, under the published name of its parameters."""

    def __init__(self, in_width: int, width: int, out_width: int) -> None:
        super().__init__()
        self.mlp_resnet = ResidualMLP(in_width, width, out_width)

    def forward(self, values: Tensor) -> Tensor:
        return self.mlp_resnet(values)


class DiffusionActionHead(nn.Module):
    """Predicts the noise in each action of the chunk from the hidden states of its slots."""

    def __init__(self, config: HeadSizes) -> None:
        super().__init__()
        hidden = config.text["hidden_size"]
        self.chunk = config.chunk
        self.noise_predictor = NoisePredictor(config.action_dim * hidden, hidden, config.action_dim)

    def forward(self, action_hidden: Tensor) -> Tensor:
        """(B, chunk * action_dim, hidden) -> noise (B, chunk, action_dim)."""
        return self.noise_predictor(action_hidden.reshape(action_hidden.shape[0], self.chunk, -1))


class NoisyActionProjector(nn.Module):
    """Each value of a noisy chunk -> one token in its slot."""

    def __init__(self, config: HeadSizes) -> None:
        super().__init__()
        hidden = config.text["hidden_size"]
        self.fc1 = nn.Linear(1, hidden)
        self.act_fn1 = nn.GELU()
        self.fc2 = nn.Linear(hidden, hidden)

    def forward(self, noisy: Tensor) -> Tensor:
        """(B, chunk, action_dim) -> (B, chunk * action_dim, hidden)."""
        values = noisy.flatten(1)[..., None].to(self.fc1.weight.dtype)
        return self.fc2(self.act_fn1(self.fc1(values)))


def time_token(steps: Tensor, width: int) -> Tensor:
    """Diffusion steps (B,) -> sinusoidal embedding (B, width) fp32: sines, then cosines, periods 2 pi .. 2 pi 10^4."""
    half = width // 2
    # Less 1, so that the last period is 10^4 times the first: `SinusoidalPositionalEncoding` of openvla-oft.
    exponents = torch.arange(half, device=steps.device) * (-math.log(10000) / (half - 1))
    angles = steps[:, None].float() * exponents.exp()[None]
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def noise_schedule() -> DDIMScheduler:
    """diffusers' DDIM scheduler with the settings of the published head.

    Raises:
        ImportError: diffusers is not installed.
    """
    try:
        from diffusers.schedulers.scheduling_ddim import DDIMScheduler
    except ImportError as error:
        raise ImportError("the diffusion head needs diffusers: pip install 'maps_ray[diffusion]'") from error
    # All else is diffusers' default, as upstream: what is estimated of the clean actions is clipped to -1 .. 1 in every
    # step (`clip_sample`).
    return DDIMScheduler(num_train_timesteps=DIFFUSION_STEPS, beta_schedule="squaredcos_cap_v2")


def denoise(schedule: DDIMScheduler, noise: Tensor, predict: Callable[[Tensor, Tensor], Tensor], steps: int) -> Tensor:
    """Denoises actions by DDIM without new noise (eta 0).

    Args:
        schedule: from `noise_schedule`.
        noise: (B, chunk, action_dim) fp32, the start.
        predict: (noisy actions, diffusion steps (B,)) -> the noise in them.
        steps: of the reverse process, 1..DIFFUSION_STEPS.

    Returns:
        (B, chunk, action_dim) fp32, normalised.
    """
    schedule.set_timesteps(steps)
    actions = noise
    for step in schedule.timesteps:
        predicted = predict(actions, step.to(noise.device).expand(len(noise)))
        actions = schedule.step(predicted.float(), step, actions).prev_sample
    return actions
