"""A policy with random weights, for pretraining and tests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Unpack

import torch

from maps_ray.models.attention import Attention
from maps_ray.models.openvla_oft.config import PolicyConfig
from maps_ray.models.openvla_oft.model import OpenVLAOFT
from maps_ray.models.sizes import PolicySizes


def create_policy(
    config: Mapping[str, Any],
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    attention: Attention = "sdpa",
    **sizes: Unpack[PolicySizes],
) -> OpenVLAOFT:
    """Builds a policy with random weights: timm's initialisation for the towers, normal (0.02) for the language model.

    Args:
        config: contents of a `config.json`.
        seed: the same seed gives the same weights; the global generator is left as it was.

    The other arguments are those of `load_policy`; `sizes` are described by `PolicySizes`.

    Raises:
        CheckpointError: a field of `config` is missing, unknown or out of range.
    """
    complete = PolicyConfig.from_dict(config, **sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        policy = OpenVLAOFT(complete, attention)
    policy.fresh_modules = tuple(dict.fromkeys(layer.modules[0] for layer in policy.stack()))
    return policy.to(dtype)
