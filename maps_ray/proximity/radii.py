"""Learned radii: a projection whose strength nobody sets, one radius for each tensor (FTP, arXiv 2310.19182).

With c_t = W~_t - W_0 after the free step, the paper projects (its equation for layer-wise projection)

    W_t = W_0 + min(1, gamma_t / |c_t|) c_t

and learns gamma by Adam from the gradient of the loss at W_{t-1}, chained through that projection:

    d gamma_t = <g_t, c_{t-1}> / |c_{t-1}|,    gamma_t = clip(gamma_{t-1} - mu m^ / (sqrt(v^) + 1e-8), floor, |c_t|)

with the first and second moments m and v of d gamma, decays 0.9 and 0.999, and mu = 0.01. Since W_{t-1} - W_0 has the
direction of c_{t-1}, <g_t, W_{t-1} - W_0> / |W_{t-1} - W_0| is the same number: two of the sums of `step` give it, and
|c_t| comes from the third. So a radius costs no pass over the weights. A gradient whose step would lead further on the
way gone widens the radius, one that opposes it narrows it.

Two things differ from the paper. The norm is that of the whole tensor, not the largest sum over a row: one radius for
each tensor. And gamma starts, and has its floor, at the length of the tensor's first step, not at 1e-8: a weight held
so near to W_0 is W_0 in float32, and has lost the direction that the gradient of gamma needs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_BETAS, _EPS = (0.9, 0.999), 1e-8


class Radii:
    """The radii of some tensors, with Adam's state of each; equal in every process.

    Args:
        held: whether a tensor has a radius, in the order of the sums' columns.
        rate: mu, in units of the weights.
        device: of the sums.
    """

    def __init__(self, held: Sequence[bool], rate: float, device: torch.device) -> None:
        if not (math.isfinite(rate) and rate > 0):
            raise ValueError(f"radius_rate = {rate!r}: must be a finite number above 0")
        self._held = torch.tensor(held, device=device)
        self._rate = rate
        self._state = torch.zeros(5, len(held), dtype=torch.float64, device=device)

    @property
    def values(self) -> Tensor:
        """gamma of each tensor, float64; 0 before its first step and where there is none."""
        return self._state[0]

    def pulls(self, sums: Tensor) -> Tensor:
        """Moves the radii by one step; returns the share of each c_t that is taken back, float64 [tensors].

        Args:
            sums: <g, d>, |d|^2 and |c_t|^2 - |d|^2 of whole tensors, float64 [3, tensors].
        """
        inner, squared, growth = sums.unbind()
        radius, floor, first, second, steps = self._state.unbind()
        # Rounding may leave a hair less than 0 where a step lands on the anchor.
        length = (squared + growth).clamp(min=0).sqrt()
        moving = self._held & (length > 0)
        fresh, known = moving & (radius == 0), moving & (radius > 0)
        # Until a tensor has moved, d is 0 and this is 0 / 0.
        gradient = (inner / squared.sqrt()).nan_to_num(0.0, 0.0, 0.0)
        steps = steps + known
        first = torch.where(known, torch.lerp(gradient, first, _BETAS[0]), first)
        second = torch.where(known, torch.lerp(gradient.square(), second, _BETAS[1]), second)
        mean = first / (1 - _BETAS[0] ** steps)
        root = (second / (1 - _BETAS[1] ** steps)).sqrt()
        moved = radius - self._rate * mean / (root + _EPS)
        floor = torch.where(fresh, length, floor)
        # Nearer to the anchor than its floor, the paper's clip would have its upper end below its lower one: the floor
        # stands.
        moved = torch.minimum(torch.maximum(moved, floor), torch.maximum(length, floor))
        radius = torch.where(known, moved, torch.where(fresh, length, radius))
        self._state = torch.stack((radius, floor, first, second, steps))
        return torch.where(known & (length > radius), 1 - radius / length, 0.0)

    def state(self) -> list[list[float]]:
        """Five numbers of each tensor, for a checkpoint."""
        return [list(row) for row in self._state.t().tolist()]

    def load_state(self, rows: Sequence[Sequence[float]]) -> None:
        """Takes over what `state` gave.

        Raises:
            ValueError: other tensors, or numbers that are not finite.
        """
        state = torch.tensor(rows, dtype=torch.float64, device=self._state.device).view(-1, 5).t()
        if state.shape != self._state.shape or not torch.isfinite(state).all():
            raise ValueError(
                f"radii of {len(rows)} tensors for {self._held.numel()}, which must be finite: use another checkpoint"
            )
        self._state = state.contiguous()
