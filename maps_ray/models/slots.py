"""Where things stand in a policy's sequence: image tokens behind the first token of the text, then its other tokens.

In parallel decoding (OpenVLA-OFT, arXiv 2502.19645) the hidden state before an action slot predicts it.
"""

from __future__ import annotations

import torch
from torch import Tensor


def splice(patches: Tensor, text: Tensor) -> Tensor:
    """Puts image tokens (B, P, ...) behind the first token of the text (B, L, ...): (B, L + P, ...)."""
    return torch.cat([text[:, :1], patches, text[:, 1:]], dim=1)


def splice_mask(attention_mask: Tensor, patches: int) -> Tensor:
    """(B, L) bool or 0/1 mask of the text -> (B, L + patches) bool mask of the sequence."""
    mask = attention_mask.bool()
    return splice(mask.new_ones(len(mask), patches), mask)


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
