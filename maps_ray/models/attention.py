"""What language models need to attend both ways, and to keep exact positions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Self

import torch
from torch import Tensor, nn

Attention = Literal["sdpa", "eager"]


class FloatBuffers(nn.Module):
    """Keeps its buffers fp32 when the model is cast; put it before a rotary embedding in the bases.

    `Module.bfloat16()`, which DeepSpeed calls, casts buffers too; frequencies rounded to bf16 turn the keys by wrong
    angles.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(lambda tensor: tensor.to(fn(tensor).device), recurse)
        return self


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
