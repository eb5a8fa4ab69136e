"""The projected step on flat memory: the rule of `projection` as two passes over blocks that fit the cache.

The first pass reads gradient, weight, anchor and moments of a block, makes the Adam step on it, and leaves the three
sums that the rule needs, with d = theta - theta0 and u = tilde - theta:

    <g, d>,   |d|^2,   |tilde - theta0|^2 - |theta - theta0|^2 = <u, 2 d + u>

The last form loses no digits, however small a step is beside the distance, so products in float32 and sums over the
blocks in float64 are enough. The blocks are added up in their order to one column for each tensor, processes add up
their columns, and a second pass pulls back the tensors whose gradient opposes the drift. Nothing loops over tensors
during a step, and nothing waits for an accelerator; the same memory in the same processes gives the same bits.

Here is what all forms of the step share; they are in `flat_step` (torch), `cpu_step` (Numba) and `triton_step`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from maps_ray.proximity.blocks import Limits, Segment


@dataclass(frozen=True)
class Hyperparameters:
    """Adam's numbers in one step of one parameter."""

    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    """Decoupled, as in AdamW (arXiv 1711.05101)."""

    @classmethod
    def of(cls, group: Mapping[str, Any]) -> Hyperparameters:
        """Those of an optimizer's group."""
        return cls(float(group["lr"]), group["betas"], group["eps"], group.get("weight_decay", 0.0))


@dataclass(frozen=True)
class StepInputs:
    """What the first pass of a step is made from; sequences have an entry for each parameter."""

    parameters: Sequence[Tensor]
    """Those that the step was made for, or others in their place; changed in place."""
    grads: Sequence[Tensor]
    states: Sequence[Mapping[str, Tensor]]
    """`step`, `exp_avg` and `exp_avg_sq` of each; changed in place."""
    hyperparameters: Sequence[Hyperparameters]
    number: int | None = None
    """Which step this is, from 1; needed where a rule begins later and the states are not asked."""
    skip: Tensor | None = None
    """0, or 1 to leave weights and states as they are; float32 scalar on their device, for the fused step."""


def projection_pulls(sums: Tensor, strengths: Tensor) -> tuple[Tensor, Tensor]:
    """The rule for all tensors at once, without a look at a number on the host.

    Args:
        sums: <g, d>, |d|^2 and <u, 2 d + u> of whole tensors, float64 [3, tensors].
        strengths: lambda of each, float64 [tensors].

    Returns:
        r in [0, 1] of each, -1 where nothing is projected because c is not negative or the strength is 0; and
        strength * r, the share of tilde - theta0 that is taken back. float64 [tensors].
    """
    inner, squared, growth = sums.unbind()
    # Rounding may leave a hair less than 0 where a step lands on the anchor.
    after = (squared + growth).clamp(min=0).sqrt()
    # (after - before) / after, by the difference of the squares, which is known better than that of the roots.
    ratio = (growth / (after * (after + squared.sqrt()))).nan_to_num(0.0, 0.0, 0.0).clamp(0.0, 1.0)
    # c = -<g, d> < 0 in the paper (arXiv 2411.01713, algorithm 1). All other tensors get an exact 0: a step that is not
    # projected must be Adam's, bit for bit.
    opposes = (inner > 0) & (strengths > 0)
    return torch.where(opposes, ratio, -1.0), torch.where(opposes, strengths * ratio, 0.0)


class AnchoredSegments:
    """What a step pulls towards: the segments of some parameters and their anchors.

    Args:
        segments: of each parameter, in the order in which they lie in it.
        anchors: of each parameter, of its shape and on its device, kept by reference; none means zeros.
        tensors: how many columns the sums have.
    """

    def __init__(self, segments: Sequence[Sequence[Segment]], anchors: Sequence[Tensor | None], tensors: int) -> None:
        self.tensors = tensors
        self._segments, self._anchors = [list(owned) for owned in segments], list(anchors)

    def squared_distances(self, parameters: Sequence[Tensor]) -> Tensor:
        """|theta - theta0|^2 of the segments, float64 [tensors].

        Another pass over the weights, a tensor at a time: for a step whose numbers are wanted.
        """
        device = parameters[0].device
        squares = torch.zeros(self.tensors, dtype=torch.float64, device=device)
        block = Limits.of(device).block
        for parameter, owned, anchor in zip(parameters, self._segments, self._anchors, strict=True):
            weights = parameter.detach().reshape(-1)
            start = None if anchor is None else anchor.detach().reshape(-1)
            dtype = torch.promote_types(torch.float32, weights.dtype)
            for segment in owned:
                end = segment.begin + segment.length
                for begin in range(segment.begin, end, block):
                    piece = weights[begin : min(begin + block, end)].to(dtype)
                    if start is not None:
                        piece = piece - start[begin : min(begin + block, end)]
                    squares[segment.tensor] += torch.linalg.vector_norm(piece, dtype=torch.float64).square()
        return squares


class ProjectedStep(Protocol):
    """The two passes of one step, in this order."""

    def advance(self, given: StepInputs) -> Tensor:
        """Makes the Adam step, in place, and measures it.

        Returns:
            <g, d>, |d|^2 and <u, 2 d + u> over this process's parts, float64 [3, tensors]; 0 where nothing is measured.
        """

    def pull(self, parameters: Sequence[Tensor], amounts: Tensor) -> None:
        """theta -= amount * (theta - theta0), in place, for every tensor with a strength.

        Args:
            parameters: as given to `advance`.
            amounts: of each tensor, float64 [tensors].
        """

    def squared_distances(self, parameters: Sequence[Tensor]) -> Tensor:
        """|theta - theta0|^2 of the segments, float64 [tensors]."""
