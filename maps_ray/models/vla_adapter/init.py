"""A policy with random weights, for tests and trials."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Unpack

import torch

from maps_ray.models.attention import Attention
from maps_ray.models.sizes import PolicySizes
from maps_ray.models.vla_adapter.config import PolicyConfig
from maps_ray.models.vla_adapter.model import VLAAdapter


def create_policy(
    config: Mapping[str, Any],
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    attention: Attention = "sdpa",
    **given: Unpack[PolicySizes],
) -> VLAAdapter:
    """Builds a policy with random weights: timm's initialisation for the towers, Qwen2's for the language model.

    Args:
        config: contents of a `config.json`.
        seed: the same seed gives the same weights; the global generator is left as it was.

    The other arguments are those of `load_policy`; `given` are its `sizes`.

    Raises:
        CheckpointError: a field of `config` is missing, unknown or out of range.
    """
    sizes = PolicyConfig.from_dict(config, **given)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        policy = VLAAdapter(sizes, attention)
    policy.fresh_modules = tuple(dict.fromkeys(layer.modules[0] for layer in policy.stack()))
    return policy.to(dtype)
