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
    return states_at(hidden, slot_positions(slots, count, hidden.shape[1]))


def slot_positions(slots: Tensor, count: int, length: int) -> Tensor:
    """Of each slot the position before it in the sequence, (B, count) int64: see `slot_states`.

    Args:
        slots, count: as there.
        length: S, of the sequence.
    """
    # Checked on the device: reading the counts back would make the host wait for it.
    torch._assert_async((slots.sum(dim=1) == count).all(), f"each row of labels must mark {count} slots of the action")
    positions = slots.int().argsort(dim=1, descending=True, stable=True)[:, :count]
    return positions + (length - slots.shape[1] - 1)


def states_at(hidden: Tensor, positions: Tensor) -> Tensor:
    """(B, S, hidden) at (B, count) -> (B, count, hidden)."""
    return hidden[torch.arange(len(hidden), device=hidden.device)[:, None], positions]
