"""Ties strengths and anchors to the master partitions of a DeepSpeed engine."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from maps_ray.proximity.adam_spd import check_strength
from maps_ray.proximity.step import Outcome, Piece, add_l2_sp, projected_step
from maps_ray.proximity.zero.layout import Span, process_group, reduce_device, spans
from maps_ray.proximity.zero.optimizer import ShardedAdamSPD


class BindError(RuntimeError):
    """Strengths, anchors or partitions that do not fit the engine; raised in every process alike."""


@dataclass(frozen=True)
class TensorStatistics:
    """What the last step did to one whole tensor."""

    drift: float
    """||theta - theta0||."""
    anchor_norm: float
    """||theta0||; 0 for a zero anchor."""
    ratio: float | None
    """r of the projection; none where nothing was projected."""

    @property
    def projected(self) -> bool:
        """Whether the projection changed the step."""
        return bool(self.ratio)


class Binding:
    """The pieces of every measured tensor, and what the last step did to it. Made by `bind`."""

    def __init__(
        self,
        pieces: Mapping[Tensor, Sequence[_MasterPiece]],
        anchor_norms: Mapping[str, float],
        reduce: Callable[[Tensor], Tensor],
        l2_sp: float,
    ) -> None:
        self._l2_sp = l2_sp
        self._pieces = pieces
        self._anchor_norms = anchor_norms
        self._reduce = reduce
        self._outcomes: dict[str, Outcome] = {}

    def step(self, flats: Sequence[Tensor], adam: Callable[[], object]) -> None:
        """Steps the master partitions `flats` and projects all tensors in them. Called by `ShardedAdamSPD.step`."""
        measured = [piece for flat in flats for piece in self._pieces[flat]]
        pieces = [piece.now() for piece in measured]
        if self._l2_sp:
            add_l2_sp(pieces, self._l2_sp)
        outcomes = projected_step(pieces, adam, self._reduce)
        self._outcomes.update((piece.span.name, outcome) for piece, outcome in zip(measured, outcomes, strict=True))

    def statistics(self) -> dict[str, TensorStatistics]:
        """Statistics of every tensor that has a strength or an anchor, by name; equal in every process.

        They are a by-product of the step and cost no communication. Empty before the first step.
        """
        return {
            name: TensorStatistics(outcome.distance, self._anchor_norms[name], outcome.ratio)
            for name, outcome in self._outcomes.items()
        }

    def module_statistics(self, modules: Mapping[str, str]) -> dict[str, float]:
        """Statistics summed up over modules, as metrics.

        Args:
            modules: parameter name -> name of its module or layer.

        Returns:
            `drift/<module>`: sqrt(sum ||theta - theta0||^2) / sqrt(sum ||theta0||^2) over its tensors with stored
            anchors, and `projection_rate/<module>`: the share of its trained tensors that the last step projected.
            Modules without a measured tensor are left out.
        """
        members: dict[str, list[TensorStatistics]] = {}
        for name, statistics in self.statistics().items():
            members.setdefault(modules[name], []).append(statistics)
        metrics = {}
        for module, tensors in members.items():
            anchored = [tensor for tensor in tensors if tensor.anchor_norm > 0]
            if anchored:
                drift = math.hypot(*(tensor.drift for tensor in anchored))
                metrics[f"drift/{module}"] = drift / math.hypot(*(tensor.anchor_norm for tensor in anchored))
            metrics[f"projection_rate/{module}"] = sum(tensor.projected for tensor in tensors) / len(tensors)
        return metrics


@dataclass(frozen=True)
class _MasterPiece:
    span: Span
    anchor: Tensor | None
    strength: float

    def now(self) -> Piece:
        # Views are made anew: DeepSpeed may move a flat's storage between steps.
        begin, numel = self.span.offset, self.span.numel
        flat = self.span.flat
        if flat.grad is None:
            raise RuntimeError(f"DeepSpeed stepped the partition that holds {self.span.name} without a gradient")
        return Piece(
            flat.detach().narrow(0, begin, numel), flat.grad.narrow(0, begin, numel), self.anchor, self.strength
        )


def bind(
    engine: Any,
    optimizer: ShardedAdamSPD,
    strengths: Mapping[str, float],
    read_anchor: Callable[[str], Tensor | None],
    l2_sp: float = 0.0,
    anchor_dtype: torch.dtype | None = None,
) -> Binding:
    """Gives a sharded optimizer its strengths and anchors, and proves where every tensor lies.

    Call it in every process, after `deepspeed.initialize` and before `engine.load_checkpoint`: anchors come from the
    base weights, never from a checkpoint. Each process keeps the slices of its own master partitions, on their device
    and in the dtype `read_anchor` gives: bf16 slices are exact for a bf16 base and take half the memory.

    Args:
        engine: what `deepspeed.initialize` returned; ZeRO stage 1, 2 or 3.
        optimizer: the client optimizer that was given to it.
        strengths: parameter name -> lambda, for every trained parameter of `engine.module` under its first name.
            Further names, such as those of frozen or tied parameters, are ignored if they are parameters too.
        read_anchor: gives the whole base tensor of a parameter, on the CPU; none for a zero anchor (LoRA), or, where
            the strength is 0, for a tensor without pretrained weights. Called only for tensors of which this process
            owns a piece.
        l2_sp: coefficient of L2-SP's pull toward the anchors, added to the gradients of all anchored tensors.
        anchor_dtype: what the slices are rounded to; none keeps the dtype that `read_anchor` gives.

    Returns:
        the binding, which is also `optimizer.binding`.

    Raises:
        ValueError: a strength that is negative or no number.
        LayoutError: a ZeRO optimizer or option whose layout is unknown or wrong, such as `round_robin_gradients`.
        BindError: strengths that miss a parameter or name an unknown one, an anchor of the wrong shape, not finite
            or not readable, or a master partition that does not hold the model's own weights.
    """
    found = spans(engine)
    if engine.optimizer.optimizer is not optimizer:
        raise BindError("the engine steps another optimizer: give deepspeed.initialize this one as `optimizer`")
    _check_strengths(engine, found, strengths)
    group, device = process_group(engine), reduce_device(engine)

    def reduce(sums: Tensor) -> Tensor:
        if dist.get_world_size(group) > 1:
            sums = sums.to(device)
            dist.all_reduce(sums, group=group)
        return sums

    anchors, faults = _slice_anchors(found, read_anchor, anchor_dtype)
    faults += [fault for span in found if span.numel and (fault := span.fault())]
    _raise_everywhere(faults, group)
    # Of each whole tensor: elements, elements that have an anchor, and the squared norm of the anchor.
    local = [[span.numel, 0 if anchor is None else span.numel, _squared_norm(anchor)] for span, anchor in anchors]
    sums = reduce(torch.tensor(local, dtype=torch.float64)).tolist()
    for span, (elements, anchored, _) in zip(found, sums, strict=True):
        if elements != math.prod(span.shape) or anchored not in (0, elements):
            faults.append(f"{span.name}: the partitions hold {elements:.0f} of its elements, {anchored:.0f} anchored")
    if faults:
        raise BindError("\n".join(faults[:10]))
    pieces: dict[Tensor, list[_MasterPiece]] = {span.flat: [] for span in found}
    norms = {}
    for (span, anchor), (_, anchored, squared) in zip(anchors, sums, strict=True):
        if strengths[span.name] > 0 or anchored:
            pieces[span.flat].append(_MasterPiece(span, anchor, strengths[span.name]))
            norms[span.name] = math.sqrt(squared)
    optimizer.binding = Binding(pieces, norms, reduce, l2_sp)
    return optimizer.binding


def _check_strengths(engine: Any, found: Sequence[Span], strengths: Mapping[str, float]) -> None:
    known = {name for name, _ in engine.module.named_parameters(remove_duplicate=False)}
    unknown = [name for name in strengths if name not in known]
    missing = [span.name for span in found if span.name not in strengths]
    if unknown or missing:
        raise BindError(f"strengths without a parameter: {unknown[:10]}; parameters without a strength: {missing[:10]}")
    for span in found:
        check_strength(strengths[span.name], span.name)


def _slice_anchors(
    found: Sequence[Span], read_anchor: Callable[[str], Tensor | None], dtype: torch.dtype | None
) -> tuple[list[tuple[Span, Tensor | None]], list[str]]:
    """Each span with its slice of the anchor, and what is wrong with the anchors."""
    sliced: list[tuple[Span, Tensor | None]] = []
    faults = []
    for span in found:
        try:
            anchor = read_anchor(span.name) if span.numel else None
        except Exception as error:  # whatever it is, the other processes must hear of it
            faults.append(f"{span.name}: cannot read its anchor: {error!r}")
            anchor = None
        if anchor is not None and (tuple(anchor.shape) != span.shape or not anchor.is_floating_point()):
            faults.append(
                f"{span.name}: anchor is {anchor.dtype} of shape {tuple(anchor.shape)}, the parameter {span.shape}"
            )
            anchor = None
        if anchor is not None:
            anchor = anchor.detach().reshape(-1)[span.start : span.start + span.numel]
            anchor = anchor.to(span.flat.device, dtype or anchor.dtype, copy=True)
            if not torch.isfinite(anchor).all():
                faults.append(f"{span.name}: anchor has NaN or infinite elements")
        sliced.append((span, anchor))
    return sliced, faults


def _squared_norm(anchor: Tensor | None) -> float:
    return 0.0 if anchor is None else float(torch.linalg.vector_norm(anchor, dtype=torch.float64)) ** 2


def _raise_everywhere(faults: Sequence[str], group: dist.ProcessGroup) -> None:
    """Raises in all processes when one has a fault: a process that raised alone would leave the others waiting."""
    gathered: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, list(faults[:10]), group=group)
    together = list(dict.fromkeys(fault for part in gathered for fault in part))
    if together:
        raise BindError("\n".join(together[:10]))
