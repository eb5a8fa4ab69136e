"""One master partition: its segments, its anchors at the same offsets, and its projected step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from maps_ray.proximity.adam_spd import adam_state
from maps_ray.proximity.blocks import Rule, Segment
from maps_ray.proximity.flat_step import fused_is_there, make_step
from maps_ray.proximity.radii import Radii
from maps_ray.proximity.step import Hyperparameters, StepInputs, projection_pulls
from maps_ray.proximity.zero.partitions import Span


class Master:
    """A flat fp32 tensor that DeepSpeed steps, and what this process holds of each tensor in it.

    Args:
        flat: as it stands in the optimizer's groups. DeepSpeed may move its storage between steps.
        parts: the pieces in it, each with its slice of the anchor; the same tensors in the same order in every process,
            also those of which this one owns nothing.
        rules: of each tensor, by name.
        fused: as in `torch.optim.Adam`; none means where torch has it.
        ema: decay of an average of the weights; none keeps none.
        radius_rate: of learned radii, in place of the strengths above 0; none projects by the strengths.
    """

    def __init__(
        self,
        flat: Tensor,
        parts: Sequence[tuple[Span, Tensor | None]],
        rules: Mapping[str, Rule],
        fused: bool | None,
        ema: float | None = None,
        radius_rate: float | None = None,
    ) -> None:
        self.flat = flat
        self.names = [span.name for span, _ in parts]
        self.stepped = False
        self.ratios = torch.full((len(parts),), -1.0, dtype=torch.float64, device=flat.device)
        """r of each tensor in the last step; -1 where nothing was projected."""
        self.rules = of_part = [rules[name] for name in self.names]
        self.projected = any(rule.strength > 0 for rule in of_part)
        self.ruled = any(rule.measured or rule.pace != Rule().pace for rule in of_part)
        """Whether a step is more than the plain one."""
        self._waits = any(rule.begins for rule in of_part)
        self._number: int | None = None
        self._skip: Tensor | None = None
        self._fused = fused_is_there([flat]) if fused is None else fused
        self._cuts, anchors = _anchor_memory(flat, parts)
        begins = [sum(self._cuts[:index]) for index in range(len(self._cuts))]
        segments: list[list[Segment]] = [[] for _ in self._cuts]
        for column, (span, _) in sorted(enumerate(parts), key=lambda part: part[1][0].offset):
            # A piece never crosses a cut.
            place = max(index for index, begin in enumerate(begins) if begin <= span.offset)
            if span.numel:
                segments[place].append(Segment(column, span.offset - begins[place], span.numel, of_part[column]))
        self._decay = ema
        # From the weights, not from 0: so it needs no correction for its start.
        self.ema = None if ema is None else flat.detach().clone()
        """The average of the weights, laid out as they are."""
        strengths = [rule.strength for rule in of_part]
        self._strengths = torch.tensor(strengths, dtype=torch.float64, device=flat.device)
        held = [strength > 0 for strength in strengths]
        self.radii = None if radius_rate is None else Radii(held, radius_rate, flat.device)
        pieces = flat.detach().split(self._cuts)
        self._step = make_step(pieces, segments, anchors, [0] * len(pieces), len(parts), self._fused)

    def advance(self, state: dict[str, Tensor], numbers: Hyperparameters, skip: Tensor | None = None) -> Tensor:
        """The first pass; returns the sums over this process's pieces, float64 [3, tensors]."""
        if self.flat.grad is None:
            raise RuntimeError(f"DeepSpeed stepped the partition that holds {self.names[0]} without a gradient")
        adam_state(state, self.flat.detach(), self._fused)
        if self._waits:
            # Read once, at the start or after a resume; then counted along.
            self._number = self.waited(state) + 1
        self.stepped = True
        self._skip = None if skip is None else skip.to(self.flat.device)
        first, second = (state[key].split(self._cuts) for key in ("exp_avg", "exp_avg_sq"))
        states = [{"step": state["step"], "exp_avg": m, "exp_avg_sq": v} for m, v in zip(first, second, strict=True)]
        grads = self.flat.grad.split(self._cuts)
        hyperparameters = [numbers] * len(self._cuts)
        return self._step.advance(StepInputs(self._weights(), grads, states, hyperparameters, self._number, self._skip))

    def waited(self, state: dict[str, Tensor]) -> int:
        """Optimizer steps done."""
        if self._number is None:
            self._number = int(state["step"]) if state else 0
        return self._number

    def pull(self, sums: Tensor) -> None:
        """The second pass, from the sums over all processes."""
        if self.radii is None:
            self.ratios, amounts = projection_pulls(sums, self._strengths)
        else:
            amounts = self.radii.pulls(sums)
            self.ratios = torch.where(amounts > 0, amounts, -1.0)
        if self._skip is not None:
            # Of a gradient that is not finite the sums say nothing.
            amounts = torch.where(self._skip > 0, 0.0, amounts)
        self._step.pull(self._weights(), amounts)

    def average(self) -> None:
        """Takes the weights into their average."""
        if self.ema is not None and self._decay is not None:
            self.ema.lerp_(self.flat.detach(), 1 - self._decay)

    def squared_distances(self) -> Tensor:
        """||theta - theta0||^2 of this process's pieces, float64 [tensors]."""
        return self._step.squared_distances(self._weights())

    def _weights(self) -> Sequence[Tensor]:
        return self.flat.detach().split(self._cuts)


def _anchor_memory(flat: Tensor, parts: Sequence[tuple[Span, Tensor | None]]) -> tuple[list[int], list[Tensor | None]]:
    """Cuts a flat before the first and behind the last anchor; gives the cuts' lengths and the anchors between them."""
    anchored = [(span, anchor) for span, anchor in parts if anchor is not None and span.numel]
    anchored.sort(key=lambda part: part[0].offset)
    if not anchored:
        return [flat.numel()], [None]
    # Fresh modules and padding mostly lie at the ends: no memory is spent on zeros there.
    begin = anchored[0][0].offset
    end = anchored[-1][0].offset + anchored[-1][0].numel
    # One memory for all, which a step reads as it reads the weights; in the widest dtype every anchor stays exact.
    dtype = anchored[0][1].dtype
    for _, anchor in anchored:
        dtype = torch.promote_types(dtype, anchor.dtype)
    memory = torch.zeros(end - begin, dtype=dtype, device=flat.device)
    for span, anchor in anchored:
        memory[span.offset - begin : span.offset - begin + span.numel] = anchor
    cuts = [(begin, None), (end - begin, memory), (flat.numel() - end, None)]
    return [length for length, _ in cuts if length], [anchor for length, anchor in cuts if length]
