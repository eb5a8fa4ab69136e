"""Which hidden states predict the action slots of parallel decoding (OpenVLA-OFT, arXiv 2502.19645)."""

from __future__ import annotations

import torch
from torch import Tensor


def slot_states(hidden: Tensor, slots: Tensor, count: int) -> Tensor:
    """The hidden states that predict the slots: of each slot the state one position before it.

    Args:
        hidden: (B, S, hidden); the text is its end, but for the first token.
        slots: (B, L) bool, with exactly `count` True in each row, none at the first token.
        count: slots of each row.

    Returns:
        (B, count, hidden) in sequence order.
    """
    # Checked on the device: reading the counts back would make the host wait for it.
    torch._assert_async(
        (slots.sum(dim=1) == count).all(), f"each row of labels must mark {count} slots (chunk * action_dim)"
    )
    positions = slots.int().argsort(dim=1, descending=True, stable=True)[:, :count]
    positions = positions + (hidden.shape[1] - slots.shape[1] - 1)
    return hidden[torch.arange(len(hidden), device=hidden.device)[:, None], positions]
