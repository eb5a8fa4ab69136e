"""Llama from transformers, run with fully bidirectional attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from maps_ray.models.openvla_oft.config import PolicyConfig
from maps_ray.models.torchvision_import import ensure_torchvision

ensure_torchvision()
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding  # noqa: E402

Attention = Literal["sdpa", "eager"]

# Of a published `text_config`, what says how it was stored and not what it is.
_STORAGE_FIELDS = ("model_type", "torch_dtype", "dtype", "transformers_version", "architectures")


class FloatRotaryEmbedding(LlamaRotaryEmbedding):
    """Rotary embedding whose frequencies stay fp32 when the model is cast.

    `Module.bfloat16()`, which DeepSpeed calls, casts buffers too; frequencies rounded to bf16 turn the keys by wrong
    angles.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FloatRotaryEmbedding:
        super()._apply(lambda tensor: tensor.to(fn(tensor).device), recurse)
        return self


def build_language_model(config: PolicyConfig, attention: Attention) -> LlamaForCausalLM:
    """Llama with random weights (normal, standard deviation 0.02), or without storage inside `torch.device("meta")`."""
    text: dict[str, Any] = {key: value for key, value in config.text.items() if key not in _STORAGE_FIELDS}
    llama = LlamaConfig(**{**text, "use_cache": False, "attn_implementation": attention})
    model = LlamaForCausalLM(llama)
    with torch.device("cpu"):
        model.model.rotary_emb = FloatRotaryEmbedding(llama)
    return model


def bidirectional_mask(padding_mask: Tensor, dtype: torch.dtype, attention: Attention) -> Tensor:
    """A mask under which every position attends to every position that is not padding.

    Args:
        padding_mask: (B, S) bool, False at padding.
        dtype: of the hidden states; the additive mask of eager attention needs it.
        attention: which attention the mask is for.

    Returns:
        (B, 1, 1, S): bool for `sdpa`, additive for `eager`. transformers takes a four-dimensional mask as it is and
        adds no causal part.
    """
    mask = padding_mask[:, None, None, :]
    if attention == "sdpa":
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)
