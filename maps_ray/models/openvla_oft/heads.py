"""Modules that OFT adds to OpenVLA: the continuous action head and the proprioception projector."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from maps_ray.models.sizes import HeadSizes


class ResidualBlock(nn.Module):
    """LayerNorm, linear, ReLU, then the input added."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.ffn = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.ReLU())

    def forward(self, values: Tensor) -> Tensor:
        return values + self.ffn(values)


class ResidualMLP(nn.Module):
    """LayerNorm, linear, ReLU, two residual blocks, LayerNorm, linear."""

    def __init__(self, in_width: int, width: int, out_width: int) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(in_width)
        self.fc1 = nn.Linear(in_width, width)
        self.relu = nn.ReLU()
        self.mlp_resnet_blocks = nn.ModuleList([ResidualBlock(width), ResidualBlock(width)])
        self.layer_norm2 = nn.LayerNorm(width)
        self.fc2 = nn.Linear(width, out_width)

    def forward(self, values: Tensor) -> Tensor:
        values = self.relu(self.fc1(self.layer_norm1(values)))
        for block in self.mlp_resnet_blocks:
            values = block(values)
        return self.fc2(self.layer_norm2(values))


class L1ActionHead(nn.Module):
    """Predicts each action of the chunk from the hidden states of its slots (OpenVLA-OFT, arXiv 2502.19645)."""

    def __init__(self, config: HeadSizes) -> None:
        super().__init__()
        hidden = config.text["hidden_size"]
        self.chunk = config.chunk
        self.model = ResidualMLP(config.action_dim * hidden, hidden, config.action_dim)

    def forward(self, action_hidden: Tensor) -> Tensor:
        """(B, chunk * action_dim, hidden) -> normalised actions (B, chunk, action_dim)."""
        return self.model(action_hidden.reshape(action_hidden.shape[0], self.chunk, -1))


class ProprioProjector(nn.Module):
    """Normalised proprioception -> one more token after the patches."""

    def __init__(self, config: HeadSizes) -> None:
        super().__init__()
        hidden = config.text["hidden_size"]
        self.fc1 = nn.Linear(config.proprio_dim, hidden)
        self.act_fn1 = nn.GELU()
        self.fc2 = nn.Linear(hidden, hidden)

    def forward(self, proprio: Tensor) -> Tensor:
        """(B, proprio_dim) -> (B, hidden)."""
        return self.fc2(self.act_fn1(self.fc1(proprio)))


def proprio_token(
    patches: Tensor, projector: ProprioProjector | None, proprio: Tensor | None, proprio_dim: int
) -> Tensor | None:
    """The token of the proprioception (B, 1, hidden); None for a policy that reads none.

    Args:
        patches: image tokens (B, P, hidden), of whose dtype it is.
        projector: none for a policy that reads no proprioception.
        proprio: (B, proprio_dim) normalised; (proprio_dim,) is taken for B = 1.
        proprio_dim: what the projector takes.

    Raises:
        ValueError: another shape, or proprio missing or not expected.
    """
    if projector is None:
        if proprio is not None:
            raise ValueError("proprio was given, but the policy has no proprio projector: use_proprio=True adds it")
        return None
    if proprio is None:
        raise ValueError("proprio is missing: the policy has a proprio projector")
    # Upstream's collator squeezes a batch of one.
    rows = proprio[None] if proprio.ndim == 1 and len(patches) == 1 else proprio
    if tuple(rows.shape) != (len(patches), proprio_dim):
        raise ValueError(f"proprio has shape {list(proprio.shape)}, expected {[len(patches), proprio_dim]}")
    token: Tensor = projector(rows.to(patches.dtype))[:, None]
    return token


def append_proprio(
    patches: Tensor, projector: ProprioProjector | None, proprio: Tensor | None, proprio_dim: int
) -> Tensor:
    """Image tokens (B, P, hidden), and behind them `proprio_token` where the policy reads proprioception."""
    token = proprio_token(patches, projector, proprio, proprio_dim)
    return patches if token is None else torch.cat([patches, token], dim=1)
