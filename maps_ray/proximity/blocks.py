"""Cuts parameters into blocks that one pass of the projected step handles at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rule:
    """How a tensor is stepped and held."""

    strength: float = 0.0
    """lambda of the projection."""
    rate: float = 1.0
    """Factor of the learning rate."""
    l2_sp: float = 0.0
    """Decoupled pull toward the anchor, lr * l2_sp * (theta - theta0), beside Adam's own step."""
    begins: int = 0
    """Steps during which the tensor stays as it is. Its moments start after them, at Adam's step 1."""

    @property
    def measured(self) -> bool:
        """Whether a step needs to know how far the anchor is."""
        return self.strength > 0 or self.l2_sp > 0

    @property
    def pace(self) -> tuple[float, int, bool]:
        """What the segments of a block have in common."""
        return self.rate, self.begins, self.measured


@dataclass(frozen=True)
class Segment:
    """A tensor, or the part of it that this process owns, where it lies in a parameter of the optimizer."""

    tensor: int
    """Its column in the sums."""
    begin: int
    length: int
    rule: Rule


Piece = tuple[Segment | None, int]
"""A segment or a part of one, with its length; padding has no segment."""


@dataclass(frozen=True)
class Limits:
    """In elements."""

    block: int
    """Longest piece of one tensor."""
    small: int | None
    """From this length on a tensor has blocks of its own; none: tensors always share."""
    shared: int
    """Longest block that tensors share."""

    @classmethod
    def of(cls, device: torch.device) -> Limits:
        """On a CPU what a pass reads of a block stays in cache; elsewhere a block bounds the temporary memory."""
        # A step of 50 M fp32 parameters on two cores took 62 ms with blocks of 2^18 elements, 90 ms with 2^16.
        return cls(1 << 18, 1 << 16, 1 << 20) if device.type == "cpu" else cls(1 << 26, None, 1 << 26)


@dataclass
class Block:
    """Parts of parameters that lie behind one another, for one pass."""

    rate: float
    begins: int
    measured: bool
    parameter: int
    """One whose hyperparameters hold for all."""
    anchored: bool
    direct: bool
    """One contiguous part in the dtype that is computed in: its memory is used as it is."""
    members: list[tuple[int, int]] = field(default_factory=list)
    """Parameter, and number of its part."""
    shapes: list[torch.Size] = field(default_factory=list)
    """Of the members."""
    pieces: list[Piece] = field(default_factory=list)
    numel: int = 0
    shared: bool = False
    """Added up by segments."""
    lengths: Tensor = field(default_factory=lambda: torch.empty(0))
    """int64 [3, pieces]."""
    columns: Tensor = field(default_factory=lambda: torch.empty(0))
    """int64 [pieces]; padding belongs to a column behind the last."""
    l2_sp: Tensor | None = None
    """Of each element; none where all are 0."""

    @property
    def projected(self) -> bool:
        """Whether a tensor in it has a strength."""
        return any(segment is not None and segment.rule.strength > 0 for segment, _ in self.pieces)


def cut(segments: Sequence[Segment], numel: int, limits: Limits) -> Iterator[list[Piece]]:
    """The parts of a contiguous parameter, in order and without a gap between them."""
    part: list[Piece] = []
    filled = 0
    pace: tuple[float, int, bool] | None = None
    for segment, whole in _with_padding(segments, numel):
        measured = segment is not None and segment.rule.measured
        alone = measured and limits.small is not None and whole >= limits.small
        # What is not measured needs no scratch memory, and no bound. Equal cuts, not full ones and a rest: a short rest
        # would fall below `small`, and be added up by segments.
        count = -(-whole // limits.block) if measured else 1
        cuts = [whole * index // count for index in range(count + 1)]
        for begin, end in pairwise(cuts):
            differs = segment is not None and pace is not None and segment.rule.pace != pace
            if part and (alone or differs or (measured and filled + end - begin > limits.shared)):
                yield part
                part, filled, pace = [], 0, None
            part.append((segment, end - begin))
            filled += end - begin
            pace = segment.rule.pace if segment else pace
            if alone:
                yield part
                part, filled, pace = [], 0, None
    if part:
        yield part


def _with_padding(segments: Sequence[Segment], numel: int) -> Iterator[Piece]:
    end = 0
    for segment in segments:
        if segment.length:
            if segment.begin > end:
                yield None, segment.begin - end
            yield segment, segment.length
            end = segment.begin + segment.length
    if numel > end:
        yield None, numel - end


Pace = tuple[int, float, int]
"""Parameter, factor of its learning rate, and steps that it waits: what blocks with the same numbers share."""


def tabulate(
    segments: Sequence[Sequence[Segment]], longest: int
) -> tuple[list[tuple[int, ...]], list[float], list[Pace]]:
    """Blocks of at most `longest` elements for loops that find tensors by their addresses.

    Returns:
        parameter, begin, length, whether it is measured, place of its pace, and column of its tensor, of each block,
        sorted by column; the coefficient of L2-SP of each; and the paces.
    """
    owned = sorted(
        ((segment, number) for number, parts in enumerate(segments) for segment in parts if segment.length),
        # Blocks are added up in this order, and a GPU's segments must lie behind one another.
        key=lambda part: part[0].tensor,
    )
    paces = list(dict.fromkeys((number, part.rule.rate, part.rule.begins) for part, number in owned))
    place = {pace: index for index, pace in enumerate(paces)}
    table: list[tuple[int, ...]] = []
    penalties = []
    for segment, number in owned:
        rule = segment.rule
        row = place[number, rule.rate, rule.begins]
        for begin in range(0, segment.length, longest):
            length = min(longest, segment.length - begin)
            table.append((number, segment.begin + begin, length, int(rule.measured), row, segment.tensor))
            penalties.append(rule.l2_sp)
    return table, penalties, paces


def lay_out(
    parameters: Sequence[Tensor],
    segments: Sequence[Sequence[Segment]],
    anchored: Sequence[bool],
    groups: Sequence[int],
    dtype: torch.dtype,
    tensors: int,
) -> tuple[list[list[int] | None], list[Block]]:
    """The blocks, and for each parameter the lengths of its parts; none where it is used whole, in its own shape.

    Small parameters share blocks with others of their group.
    """
    limits = Limits.of(parameters[0].device)
    sizes: list[list[int] | None] = []
    blocks: list[Block] = []
    open_blocks: dict[tuple[object, ...], Block] = {}
    for number, parameter in enumerate(parameters):
        owned = segments[number]
        alone = len(owned) == 1 and owned[0].length == parameter.numel()
        small = limits.small is None or parameter.numel() < limits.small
        whole = alone and (small or not parameter.is_contiguous())
        parts: list[list[Piece]] = list(cut(owned, parameter.numel(), limits))
        if whole:
            parts = [[(owned[0], parameter.numel())]]
        sizes.append(None if whole else [sum(length for _, length in part) for part in parts])
        for index, part in enumerate(parts):
            rule = next((segment.rule for segment, _ in part if segment), Rule())
            numel = sum(length for _, length in part)
            direct = not whole and parameter.dtype == dtype
            key = (groups[number], rule.pace, anchored[number], parameter.dtype)
            # Small tensors that are stepped alike fill one block, for one kernel in place of hundreds.
            block = None if direct else open_blocks.get(key)
            if block is None or (rule.measured and block.numel + numel > limits.shared):
                block = Block(rule.rate, rule.begins, rule.measured, number, anchored[number], direct)
                blocks.append(block)
                if not direct:
                    open_blocks[key] = block
            block.members.append((number, index))
            block.shapes.append(parameter.shape if whole else torch.Size([numel]))
            block.pieces += part
            block.numel += numel
    for block in blocks:
        if block.measured:
            _number(block, limits, tensors, dtype, parameters[0].device)
    return sizes, blocks


def _number(block: Block, limits: Limits, tensors: int, dtype: torch.dtype, device: torch.device) -> None:
    lengths = torch.tensor([length for _, length in block.pieces])
    block.shared = len(block.pieces) > 1 or limits.small is None or block.numel < limits.small
    # One row for each sum, as `torch.segment_reduce` wants them along its axis.
    block.lengths = lengths.repeat(3, 1).to(device)
    block.columns = torch.tensor([segment.tensor if segment else tensors for segment, _ in block.pieces]).to(device)
    held = torch.tensor([segment.rule.l2_sp if segment else 0.0 for segment, _ in block.pieces], dtype=dtype)
    if held.any():
        block.l2_sp = held.repeat_interleave(lengths).to(device)
