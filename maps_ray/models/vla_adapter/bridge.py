"""VLA-Adapter's policy: actions from the hidden states of every language layer (arXiv 2509.09372, section 3).

Each block lets the action tokens attend, under one softmax, to themselves, to the states of the action queries with
the proprioception, and to the states of the task (images); the task's logits are scaled by tanh of a learned gate.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from maps_ray.models.vla_adapter.config import PolicyConfig

_ROTARY_BASE = 10000.0


class BridgeAttention(nn.Module):
    """One block: x = ReLU(W LN(attention(x) + x)), without a skip connection around it, as published."""

    def __init__(self, config: PolicyConfig) -> None:
        super().__init__()
        hidden = config.text["hidden_size"]
        self.heads = config.policy_heads
        self.pro = config.bridge == "pro"
        self.q_proj = nn.Linear(hidden, hidden)
        for source in ("self", "adapter", "task") if self.pro else ("proj",):
            names = (f"k_{source}", f"v_{source}")
            for name in names:
                self.add_module(name, nn.Linear(hidden, hidden))
        self.o_proj = nn.Linear(hidden, hidden)
        # A gate of 0 makes the task's logits 0, not its weights: at the start every task token is looked at alike.
        self.gating_factor = nn.Parameter(torch.zeros(1))
        self.ffn = nn.Sequential(nn.LayerNorm(hidden), nn.Linear(hidden, hidden), nn.ReLU())
        if self.pro:
            # Published and never used; kept so that files fit.
            self.film_gen = nn.Sequential(nn.Linear(hidden, 2 * hidden))

    def forward(self, tokens: Tensor, action: Tensor, task: Tensor) -> Tensor:
        """Action tokens (B, chunk, hidden), other sources (B, A, hidden), (B, P, hidden) -> (B, chunk, hidden)."""
        queries = self._split(self.q_proj(tokens))
        if self.pro:
            queries = interleaved_rotary(queries)
        logits, values = [], []
        # The order of the published `MLPResNetBlock_Pro`. Under one softmax it changes no more than the last bits.
        for source, states in (("self", tokens), ("adapter", action), ("task", task)):
            name = source if self.pro else "proj"
            keys = self._split(self.get_submodule(f"k_{name}")(states))
            if self.pro:
                keys = interleaved_rotary(keys)  # positions of each source count from 0
            scores = queries @ keys.transpose(-2, -1) / math.sqrt(keys.shape[-1])
            logits.append(scores * torch.tanh(self.gating_factor) if source == "task" else scores)
            values.append(self._split(self.get_submodule(f"v_{name}")(states)))
        weights = torch.softmax(torch.cat(logits, dim=-1), dim=-1)
        mixed = (weights @ torch.cat(values, dim=-2)).transpose(1, 2).reshape(tokens.shape)
        return self.ffn(self.o_proj(mixed) + tokens)

    def _split(self, states: Tensor) -> Tensor:
        return states.unflatten(-1, (self.heads, -1)).transpose(1, 2)


def interleaved_rotary(states: Tensor) -> Tensor:
    """The published turn by position: pairs are neighbours, (0, 1), (2, 3), ..., but angles are laid out in halves.

    So the two members of a pair are turned by different angles, which is no rotation and depends on more than relative
    positions. Published weights were trained with it.

    Args:
        states: (B, heads, T, d), d even.
    """
    width = states.shape[-1]
    steps = torch.arange(0, width, 2, device=states.device, dtype=torch.float32)
    positions = torch.arange(states.shape[-2], device=states.device, dtype=torch.float32)
    half = positions[:, None] * _ROTARY_BASE ** (-steps / width)
    angles = torch.cat([half, half], dim=-1)
    cosine, sine = angles.cos().to(states.dtype), angles.sin().to(states.dtype)
    turned = torch.stack([-states[..., 1::2], states[..., 0::2]], dim=-1).flatten(-2)
    return states * cosine + turned * sine


class BridgeMLP(nn.Module):
    """LayerNorm, linear, ReLU, one block for each language layer, LayerNorm, linear."""

    def __init__(self, config: PolicyConfig) -> None:
        super().__init__()
        hidden = config.text["hidden_size"]
        self.layer_norm1 = nn.LayerNorm(config.action_dim * hidden)
        self.fc1 = nn.Linear(config.action_dim * hidden, hidden)
        self.mlp_resnet_blocks = nn.ModuleList(BridgeAttention(config) for _ in range(config.text["num_hidden_layers"]))
        self.layer_norm2 = nn.LayerNorm(hidden)
        self.fc2 = nn.Linear(hidden, config.action_dim)

    def forward(self, tokens: Tensor, action: Sequence[Tensor], task: Sequence[Tensor]) -> Tensor:
        tokens = torch.relu(self.fc1(self.layer_norm1(tokens)))
        for block, action_states, task_states in zip(self.mlp_resnet_blocks, action, task, strict=True):
            tokens = block(tokens, action_states, task_states)
        return self.fc2(self.layer_norm2(tokens))


class BridgePolicy(nn.Module):
    """The action head of VLA-Adapter."""

    def __init__(self, config: PolicyConfig) -> None:
        super().__init__()
        self.shape = (config.chunk, config.action_dim * config.text["hidden_size"])
        self.model = BridgeMLP(config)

    def forward(
        self, action: Sequence[Tensor], task: Sequence[Tensor], proprio: Tensor | None, noise: Tensor | None
    ) -> Tensor:
        """Normalised actions (B, chunk, action_dim).

        Args:
            action: of each language layer, the states that predict the action queries, (B, queries, hidden).
            task: of each language layer, the states of the task, (B, P, hidden).
            proprio: (B, 1, hidden), one more token beside the action queries; none where the policy reads none.
            noise: (chunk, action_dim * hidden), the start of the action tokens; none starts from zeros.
        """
        # The published head takes no image or text at its start, but by its keys and values alone.
        start = action[0].new_zeros(self.shape) if noise is None else noise.to(action[0])
        if proprio is not None:
            action = [torch.cat([states, proprio], dim=1) for states in action]
        return self.model(start.expand(len(action[0]), *self.shape), action, task)
