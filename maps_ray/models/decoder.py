"""A decoder run both ways or causally, and where things stand in its sequence.

Image tokens stand behind the first token of the text, then come its other tokens. In parallel decoding (OpenVLA-OFT,
arXiv 2502.19645) the hidden state before an action slot predicts it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from maps_ray.models.sizes import DecoderText

Attention = Literal["sdpa", "eager"]
# A context, and no argument of `forward`: a policy's arguments are those of a batch, whoever calls it
# (`contracts.Policy`).
_padded: ContextVar[bool | None] = ContextVar("padded", default=None)
# Of a published configuration, what says how a language model was stored and not what it is.
_STORAGE_FIELDS = ("model_type", "torch_dtype", "dtype", "transformers_version", "architectures")


def decoder_options(text: DecoderText) -> dict[str, Any]:
    """Keyword arguments of the configuration that transformers has of the decoder."""
    return {name: value for name, value in text.items() if name not in _STORAGE_FIELDS}


class FloatBuffers(nn.Module):
    """Keeps its buffers fp32 when the model is cast; put it before a rotary embedding in the bases.

    `Module.bfloat16()`, which DeepSpeed calls, casts buffers too; frequencies rounded to bf16 turn the keys by wrong
    angles.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(lambda tensor: tensor.to(fn(tensor).device), recurse)
        return self


@contextmanager
def padding_known(padded: bool) -> Iterator[None]:
    """Says, for the forward passes inside, whether any position of their batch is padding.

    Who has made the batch knows it; else a policy looks at the mask, for which the host waits for the device.
    """
    token = _padded.set(padded)
    try:
        yield
    finally:
        _padded.reset(token)


def run_both_ways(
    model: nn.Module, embeddings: Tensor, attended: Tensor, attention: Attention, dense: bool = False
) -> Tensor:
    """Runs a decoder of transformers with every position attending to every one that is not padding.

    Args:
        model: the decoder, built with `is_causal=False` in its configuration.
        embeddings: (B, S, hidden).
        attended: (B, S) bool, False at padding.
        attention: what the decoder was built with.
        dense: give `sdpa` no mask where nothing is padded. Only then can torch take its flash kernel, which knows no
            masks; the host waits for the device once to see it, outside `padding_known`. A row's last bits then depend
            on the other rows' padding.

    Returns:
        (B, S, hidden): last hidden states; rows at padding mean nothing.
    """
    mask = None
    known = _padded.get()
    if attention != "sdpa" or not dense or (not attended.all() if known is None else known):
        mask = bidirectional_mask(attended, embeddings.dtype, attention)
    # Without a mask the decoder's own `is_causal` would speak.
    hidden: Tensor = model(inputs_embeds=embeddings, attention_mask=mask, is_causal=False).last_hidden_state
    return hidden


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
    # The lowest number in place of -inf, as in transformers' own `eager_mask`: a row that is masked throughout stays
    # finite.
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)


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
    # Checked on the device: reading the counts back would make the host wait for it. Private in torch 2.13, which has
    # no public form.
    torch._assert_async((slots.sum(dim=1) == count).all(), f"each row of labels must mark {count} slots of the action")
    # A sort has a shape that is known; `nonzero` would make the host wait for the number of slots. Stable, so that
    # slots keep their order in the sequence.
    positions = slots.int().argsort(dim=1, descending=True, stable=True)[:, :count]
    return positions + (length - slots.shape[1] - 1)


def states_at(hidden: Tensor, positions: Tensor) -> Tensor:
    """(B, S, hidden) at (B, count) -> (B, count, hidden)."""
    return hidden[torch.arange(len(hidden), device=hidden.device)[:, None], positions]
