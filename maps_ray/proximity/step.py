"""One Adam step with projection, over many tensors or over the pieces of them that this process owns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from maps_ray.proximity.projection import projection_ratio

# Elements handled at once. On a CPU the temporaries of a block then stay in cache, which makes the sums five times
# faster; on an accelerator a block only bounds the temporaries.
_CPU_BLOCK = 1 << 16
_DEVICE_BLOCK = 1 << 24


@dataclass(frozen=True)
class Piece:
    """A tensor, or the part of it that this process owns; empty where it owns nothing."""

    weight: Tensor
    grad: Tensor
    anchor: Tensor | None
    """Shape of `weight`; none means zeros."""
    strength: float


@dataclass(frozen=True)
class Outcome:
    """What a step did to one whole tensor."""

    distance: float
    """||theta - theta0|| after the step."""
    ratio: float | None
    """r in [0, 1]; none where nothing was projected, because c is not negative or the strength is 0."""


def projected_step(
    pieces: Sequence[Piece], adam: Callable[[], object], reduce: Callable[[Tensor], Tensor]
) -> list[Outcome]:
    """Makes the plain Adam step and projects what it did.

    Args:
        pieces: one for each tensor, the same tensors in the same order in every process that `reduce` spans.
        adam: makes the plain Adam step, in place, on every piece.
        reduce: adds partial sums, float64 [3, len(pieces)], over all processes.

    Returns:
        one outcome for each piece, about the whole tensor and equal in every process.
    """
    if not pieces:
        adam()
        return []
    device = pieces[0].weight.device
    zero = torch.zeros((), dtype=torch.float64, device=device)
    before = [_opposition(piece) if piece.strength > 0 else (zero, zero) for piece in pieces]
    adam()
    columns = [(*sums, _squared_distance(piece)) for sums, piece in zip(before, pieces, strict=True)]
    sums = torch.stack([value.to(device) for column in columns for value in column]).view(-1, 3).t().contiguous()
    outcomes = []
    for piece, inner, squared_before, squared_after in zip(pieces, *reduce(sums).tolist(), strict=True):
        distance, ratio = squared_after**0.5, None
        if inner > 0:
            ratio = projection_ratio(squared_before**0.5, distance)
            _pull(piece, piece.strength * ratio)
            distance *= abs(1.0 - piece.strength * ratio)
        outcomes.append(Outcome(distance, ratio))
    return outcomes


def add_l2_sp(pieces: Sequence[Piece], coefficient: float) -> None:
    """grad += coefficient * (theta - theta0) in place: the gradient of L2-SP's coefficient / 2 * ||theta - theta0||^2.

    Penalises the distance from the start as L2-SP does (arXiv 1802.01483, equation 2). Pieces without an anchor are
    left alone, as are the weights of that paper's fresh layers here.
    """
    for piece in pieces:
        if piece.anchor is not None:
            for weight, anchor, grad in _blocks(piece.weight, piece.anchor, piece.grad):
                grad.add_(_difference(weight, anchor), alpha=coefficient)


def _opposition(piece: Piece) -> tuple[Tensor, Tensor]:
    """<grad, theta - theta0> and ||theta - theta0||^2 of a piece, float64."""
    inner = torch.zeros((), dtype=torch.float64, device=piece.weight.device)
    squared = torch.zeros_like(inner)
    for weight, anchor, grad in _blocks(piece.weight, piece.anchor, piece.grad):
        drift = _difference(weight, anchor).double().reshape(-1)
        squared += torch.dot(drift, drift)
        inner += torch.dot(drift, grad.double().reshape(-1))
    return inner, squared


def _squared_distance(piece: Piece) -> Tensor:
    """||theta - theta0||^2 of a piece, float64."""
    squared = torch.zeros((), dtype=torch.float64, device=piece.weight.device)
    for weight, anchor in _blocks(piece.weight, piece.anchor):
        drift = _difference(weight, anchor).double().reshape(-1)
        squared += torch.dot(drift, drift)
    return squared


def _pull(piece: Piece, amount: float) -> None:
    """theta -= amount * (theta - theta0), in place."""
    if amount:
        for weight, anchor in _blocks(piece.weight, piece.anchor):
            weight.sub_(_difference(weight, anchor), alpha=amount)


def _difference(weight: Tensor, anchor: Tensor | None) -> Tensor:
    # In half precision the difference of two near weights would keep one or two bits.
    weight = weight if weight.dtype in (torch.float32, torch.float64) else weight.float()
    return weight if anchor is None else weight - anchor


def _blocks(first: Tensor, *others: Tensor | None) -> Iterator[tuple[Any, ...]]:
    """Views of equally shaped tensors, a block at a time; an absent tensor gives none in every block."""
    tensors = (first, *others)
    block = _CPU_BLOCK if first.device.type == "cpu" else _DEVICE_BLOCK
    if first.numel() <= block or not all(tensor is None or tensor.is_contiguous() for tensor in tensors):
        yield tensors
        return
    flat = [None if tensor is None else tensor.view(-1) for tensor in tensors]
    for start in range(0, first.numel(), block):
        yield tuple(None if tensor is None else tensor[start : start + block] for tensor in flat)
