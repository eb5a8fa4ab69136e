"""Qwen2.5 from transformers, with one matrix for embedding and output head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from maps_ray.models.attention import Attention, FloatBuffers
from maps_ray.models.sizes import DecoderSizes
from maps_ray.models.torchvision_import import ensure_torchvision

ensure_torchvision()
from transformers import Qwen2Config, Qwen2Model  # noqa: E402
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding  # noqa: E402

# Of a published `qwen_config`, what says how it was stored and not what it is.
_STORAGE_FIELDS = ("model_type", "torch_dtype", "dtype", "transformers_version", "architectures")


class FloatRotaryEmbedding(FloatBuffers, Qwen2RotaryEmbedding):
    """Rotary embedding whose frequencies stay fp32."""


class TiedEmbedding(nn.Embedding):
    """Token ids -> embeddings, and hidden states -> logits, by one matrix.

    Both go through `forward`, where ZeRO-3 gathers the matrix.
    """

    def forward(self, values: Tensor) -> Tensor:
        """Ids (...) int64 -> (..., hidden); floating-point hidden states (..., hidden) -> logits (..., vocabulary)."""
        return functional.linear(values, self.weight) if values.is_floating_point() else super().forward(values)


class CausalModel(nn.Module):
    """Qwen2 under the name that a causal language model gives it."""

    def __init__(self, config: DecoderSizes, attention: Attention) -> None:
        super().__init__()
        text: dict[str, Any] = {key: value for key, value in config.text.items() if key not in _STORAGE_FIELDS}
        chosen = {
            "use_cache": False,
            "attn_implementation": attention,
            "is_causal": config.causal,
        }
        qwen = Qwen2Config(**{**text, **chosen})
        self.model = Qwen2Model(qwen)
        self.model.embed_tokens = TiedEmbedding(qwen.vocab_size, qwen.hidden_size)
        nn.init.normal_(self.model.embed_tokens.weight, std=qwen.initializer_range)
        with torch.device("cpu"):
            self.model.rotary_emb = FloatRotaryEmbedding(qwen)


class LanguageBackbone(nn.Module):
    """The language model under its published name."""

    def __init__(self, config: DecoderSizes, attention: Attention) -> None:
        super().__init__()
        self.llm = CausalModel(config, attention)
