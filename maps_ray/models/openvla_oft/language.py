"""Llama from transformers."""

from __future__ import annotations

from typing import Any

import torch

from maps_ray.models.attention import Attention, FloatBuffers
from maps_ray.models.openvla_oft.config import PolicyConfig
from maps_ray.models.torchvision_import import ensure_torchvision

ensure_torchvision()
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding  # noqa: E402

# Of a published `text_config`, what says how it was stored and not what it is.
_STORAGE_FIELDS = ("model_type", "torch_dtype", "dtype", "transformers_version", "architectures")


class FloatRotaryEmbedding(FloatBuffers, LlamaRotaryEmbedding):
    """Rotary embedding whose frequencies stay fp32."""


def build_language_model(config: PolicyConfig, attention: Attention) -> LlamaForCausalLM:
    """Llama with random weights (normal, standard deviation 0.02), or without storage inside `torch.device("meta")`."""
    text: dict[str, Any] = {key: value for key, value in config.text.items() if key not in _STORAGE_FIELDS}
    llama = LlamaConfig(**{**text, "use_cache": False, "attn_implementation": attention, "is_causal": False})
    model = LlamaForCausalLM(llama)
    with torch.device("cpu"):
        model.model.rotary_emb = FloatRotaryEmbedding(llama)
    return model
