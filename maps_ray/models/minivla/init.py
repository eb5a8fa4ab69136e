"""A policy with random weights, for pretraining and tests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Unpack

import torch

from maps_ray.models.attention import Attention
from maps_ray.models.minivla.backbone import MiniVLA
from maps_ray.models.minivla.config import Kind, PolicyConfig
from maps_ray.models.minivla.model import MiniVLAOFT, MiniVLAVQ
from maps_ray.models.minivla.vq import ActionVQ, VQActionTokenizer
from maps_ray.models.minivla.vq_config import VQConfig
from maps_ray.models.sizes import PolicySizes


def create_policy(
    config: Mapping[str, Any],
    *,
    kind: Kind | None = None,
    action_vq: ActionVQ | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    attention: Attention = "sdpa",
    **given: Unpack[PolicySizes],
) -> MiniVLA:
    """Builds a policy with random weights: timm's initialisation for the towers, Qwen2's for the language model.

    Args:
        config: contents of a `config.json`.
        action_vq: MiniVLA-VQ's tokenizer; none makes a random one.
        seed: the same seed gives the same weights; the global generator is left as it was.

    The other arguments are those of `load_policy`; `given` are its `sizes`.

    Raises:
        CheckpointError: a field of `config` is missing, unknown or out of range.
    """
    sizes = PolicyConfig.from_dict(config, kind=kind, **given)
    policy: MiniVLA
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if sizes.kind == "vq":
            vq = action_vq or ActionVQ(VQConfig(sizes.chunk, sizes.action_dim))
            policy = MiniVLAVQ(sizes, VQActionTokenizer(vq, sizes.tokenizer_size - 1), attention)
        else:
            policy = MiniVLAOFT(sizes, attention)
    policy.fresh_modules = tuple(dict.fromkeys(layer.modules[0] for layer in policy.stack()))
    return policy.to(dtype)
