"""Ties strengths and anchors to the master partitions of a DeepSpeed engine."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from maps_ray.metrics import DRIFT, PROJECTION_RATE
from maps_ray.proximity.adam_spd import check_strength
from maps_ray.proximity.blocks import Rule
from maps_ray.proximity.step import Hyperparameters
from maps_ray.proximity.zero.deepspeed_engine import Engine
from maps_ray.proximity.zero.master import Master
from maps_ray.proximity.zero.optimizer import ShardedAdamSPD
from maps_ray.proximity.zero.partitions import Span, process_group, reduce_device, spans


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
    """r of the projection; none where nothing was projected. Under learned radii the share that was taken back."""
    radius: float | None = None
    """The learned one; none where there is none."""

    @property
    def projected(self) -> bool:
        """Whether the projection changed the step."""
        return bool(self.ratio)


class Binding:
    """The flat memory of every master partition, and what the last step did to it. Made by `bind`."""

    def __init__(
        self,
        optimizer: ShardedAdamSPD,
        masters: Sequence[Master],
        anchor_norms: Mapping[str, float],
        reduce: Callable[[Tensor], Tensor],
    ) -> None:
        self._optimizer = optimizer
        self._masters = {master.flat: master for master in masters}
        self._anchor_norms = anchor_norms
        self._reduce = reduce
        self._begins = {
            name: (master, rule.begins)
            for master in masters
            for name, rule in zip(master.names, master.rules, strict=True)
        }

    def step(self, flats: Sequence[tuple[Tensor, dict[str, object]]], adam: Callable[[], object]) -> None:
        """Steps master partitions and projects all tensors in them. Called by `ShardedAdamSPD.step`."""
        masters = [self._masters[flat] for flat, _ in flats]
        if not any(master.ruled for master in masters):
            # Torch's own step and no all-reduce: a run without strengths costs what Adam costs.
            adam()
            for master in masters:
                master.stepped = True
                master.average()
            return
        state = self._optimizer.state
        # The protocol of torch's gradient scalers, see `finite`.
        skip = getattr(self._optimizer, "found_inf", None)
        sums = [
            master.advance(state[flat], Hyperparameters.of(group), skip)
            for master, (flat, group) in zip(masters, flats, strict=True)
        ]
        if any(master.projected for master in masters):
            # One all-reduce for all masters of this call, in float64: a step moves a weight by a hundred-thousandth of
            # its distance, and the ratio lives in the digits behind (arXiv 2411.01713, algorithm 1).
            whole = self._reduce(torch.cat(sums, dim=1)).to(sums[0].device)
            columns = whole.split([len(master.names) for master in masters], dim=1)
            for master, part in zip(masters, columns, strict=True):
                master.pull(part)
        for master in masters:
            master.average()

    def statistics(self) -> dict[str, TensorStatistics]:
        """Statistics of every tensor that has a strength or an anchor, by name; equal in every process.

        Every process must call it: it measures the weights as they are now, and adds up over the processes once.
        Ratios are those of the last step. Empty before the first step.
        """
        if not any(master.stepped for master in self._masters.values()):
            return {}
        masters = list(self._masters.values())
        distances = self._reduce(torch.cat([master.squared_distances() for master in masters])).tolist()
        ratios = torch.cat([master.ratios for master in masters]).tolist()
        radii = [radius for master in masters for radius in self._radii_of(master)]
        names = [name for master in masters for name in master.names]
        return {
            name: TensorStatistics(
                math.sqrt(squared), self._anchor_norms[name], ratio if ratio >= 0 else None, radius or None
            )
            for name, squared, ratio, radius in zip(names, distances, ratios, radii, strict=True)
            if name in self._anchor_norms
        }

    def averages(self, flat: Tensor) -> Tensor | None:
        """The average of a master partition's weights, laid out as it; none where none is kept."""
        return self._masters[flat].ema

    def radii(self) -> dict[str, list[float]]:
        """The state of every tensor's learned radius, for a checkpoint; empty where none are learned."""
        return {
            name: row
            for master in self._masters.values()
            if master.radii
            for name, row in zip(master.names, master.radii.state(), strict=True)
        }

    def load_radii(self, states: Mapping[str, Sequence[float]]) -> None:
        """Takes over what `radii` gave, under any stage and number of processes.

        Raises:
            ValueError: radii of other tensors, or numbers that are not finite.
        """
        for master in self._masters.values():
            if master.radii is None:
                continue
            missing = [name for name in master.names if name not in states]
            if missing:
                raise ValueError(f"it holds no radius of {', '.join(missing[:10])}")
            master.radii.load_state([states[name] for name in master.names])

    def waits(self, name: str) -> bool:
        """Whether the next step leaves a tensor as it is, because it begins later."""
        master, begins = self._begins[name]
        return bool(begins) and master.waited(self._optimizer.state.get(master.flat, {})) < begins

    @staticmethod
    def _radii_of(master: Master) -> list[float]:
        return [0.0] * len(master.names) if master.radii is None else master.radii.values.tolist()

    def module_statistics(self, modules: Mapping[str, str]) -> dict[str, float]:
        """Statistics summed up over modules, as metrics.

        Args:
            modules: parameter name -> name of its module or layer.

        Returns:
            `drift/<module>`: sqrt(sum ||theta - theta0||^2) / sqrt(sum ||theta0||^2) over its tensors with stored
            anchors, and `projection_rate/<module>`: the share of its trained tensors that the last step projected.
            Where radii are learned also `radius/<module>`: sqrt(sum radius^2) in the units of drift, and
            `strength/<module>`: what the last step took back of tilde - theta0, on average over its tensors.
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
                metrics[f"{DRIFT}{module}"] = drift / math.hypot(*(tensor.anchor_norm for tensor in anchored))
            metrics[f"{PROJECTION_RATE}{module}"] = sum(tensor.projected for tensor in tensors) / len(tensors)
            learned = [tensor for tensor in tensors if tensor.radius is not None]
            if learned:
                norm = math.hypot(*(tensor.anchor_norm for tensor in learned))
                metrics[f"radius/{module}"] = math.hypot(*(tensor.radius or 0.0 for tensor in learned)) / (norm or 1.0)
                metrics[f"strength/{module}"] = sum(tensor.ratio or 0.0 for tensor in learned) / len(learned)
        return metrics


def bind(
    engine: Engine,
    optimizer: ShardedAdamSPD,
    strengths: Mapping[str, float],
    read_anchor: Callable[[str], Tensor | None],
    *,
    l2_sp: float | Mapping[str, float] = 0.0,
    rates: Mapping[str, float] | None = None,
    begins: Mapping[str, int] | None = None,
    ema: float | None = None,
    radius_rate: float | None = None,
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
        l2_sp: coefficient of L2-SP (arXiv 1802.01483, equation 2), of all anchored tensors or by name: decoupled from
            Adam's moments as weight decay is in AdamW, theta -= lr * l2_sp * (theta - theta0). Tensors without an
            anchor are left alone, as are that paper's fresh layers.
        rates: parameter name -> factor of the learning rate, where it is not 1.
        begins: parameter name -> steps during which it stays as it is; Adam starts afresh after them.
        ema: decay of an average of the weights that each process keeps of its partitions; none keeps none.
        radius_rate: learns a radius for each tensor with a strength above 0, in place of projecting by the strength
            (`maps_ray.proximity.radii`), at this rate; none learns none.
        anchor_dtype: what the slices are rounded to; none keeps the dtype that `read_anchor` gives.

    Returns:
        the binding, which is also `optimizer.binding`.

    Raises:
        ValueError: a strength that is negative or no number.
        LayoutError: a ZeRO optimizer or option whose layout is unknown or wrong, such as `round_robin_gradients`.
        BindError: strengths that miss a parameter or name an unknown one, an anchor of the wrong shape, not finite
            or not readable, or a master partition that does not hold the model's own weights.
    """
    pieces = spans(engine)
    if engine.optimizer.optimizer is not optimizer:
        raise BindError("the engine steps another optimizer: give deepspeed.initialize this one as `optimizer`")
    _check_strengths(engine, pieces, strengths)
    group, device = process_group(engine), reduce_device(engine)

    def reduce(sums: Tensor) -> Tensor:
        if dist.get_world_size(group) > 1:
            sums = sums.to(device)
            dist.all_reduce(sums, group=group)
        return sums

    anchors, faults = _slice_anchors(pieces, read_anchor, anchor_dtype)
    faults += [fault for span in pieces if span.numel and (fault := span.fault())]
    _raise_everywhere(faults, group)
    # Of each whole tensor: elements, elements that have an anchor, and the squared norm of the anchor. The sums show
    # what no process sees alone: elements owned by none or by two, and a `read_anchor` that answers otherwise there.
    # Counts beside norms in float64, for one all-reduce: whole numbers are exact in it up to 2^53.
    local = [[span.numel, 0 if anchor is None else span.numel, _squared_norm(anchor)] for span, anchor in anchors]
    sums = reduce(torch.tensor(local, dtype=torch.float64)).tolist()
    for span, (elements, anchored, _) in zip(pieces, sums, strict=True):
        if elements != math.prod(span.shape) or anchored not in (0, elements):
            faults.append(f"{span.name}: the partitions hold {elements:.0f} of its elements, {anchored:.0f} anchored")
    # Equal sums everywhere: every process raises alike.
    if faults:
        raise BindError("\n".join(faults[:10]))
    norms = {}
    rules = {}
    for (span, _), (_, anchored, squared) in zip(anchors, sums, strict=True):
        name = span.name
        # Without an anchor the penalty would be plain L2, toward 0.
        penalty = l2_sp if isinstance(l2_sp, float | int) else l2_sp.get(name, 0.0)
        rules[name] = Rule(
            strengths[name], (rates or {}).get(name, 1.0), penalty if anchored else 0.0, (begins or {}).get(name, 0)
        )
        # An adapter has no anchor to store, but zero, from which its drift is measured.
        if strengths[name] > 0 or anchored:
            norms[name] = math.sqrt(squared)
    fused = optimizer.defaults["fused"]
    owned = _by_flat(anchors)
    # Popped, so that a slice is freed once its master has copied it: no process holds all anchors twice.
    masters = [Master(flat, owned.pop(flat), rules, fused, ema, radius_rate) for flat in list(owned)]
    optimizer.binding = Binding(optimizer, masters, norms, reduce)
    return optimizer.binding


def _by_flat(anchors: list[tuple[Span, Tensor | None]]) -> dict[Tensor, list[tuple[Span, Tensor | None]]]:
    """What lies in each master partition, in the order of the spans; takes the slices of the anchors over."""
    owned: dict[Tensor, list[tuple[Span, Tensor | None]]] = {}
    # Out of the caller's list: it would hold every slice until `bind` returns.
    anchors.reverse()
    while anchors:
        span, anchor = anchors.pop()
        owned.setdefault(span.flat, []).append((span, anchor))
    return owned


def _check_strengths(engine: Engine, pieces: Sequence[Span], strengths: Mapping[str, float]) -> None:
    known = {name for name, _ in engine.module.named_parameters(remove_duplicate=False)}
    unknown = [name for name in strengths if name not in known]
    missing = [span.name for span in pieces if span.name not in strengths]
    if unknown or missing:
        raise BindError(f"strengths without a parameter: {unknown[:10]}; parameters without a strength: {missing[:10]}")
    for span in pieces:
        check_strength(strengths[span.name], span.name)


def _slice_anchors(
    pieces: Sequence[Span], read_anchor: Callable[[str], Tensor | None], dtype: torch.dtype | None
) -> tuple[list[tuple[Span, Tensor | None]], list[str]]:
    """Each span with its slice of the anchor, and what is wrong with the anchors."""
    sliced: list[tuple[Span, Tensor | None]] = []
    faults = []
    for span in pieces:
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
            # Always a copy: what was read may be a view of the mapped file, whose pages are given back.
            anchor = anchor.to(span.flat.device, dtype or anchor.dtype, copy=True)
            if not torch.isfinite(anchor).all():
                faults.append(f"{span.name}: anchor has NaN or infinite elements")
        sliced.append((span, anchor))
    return sliced, faults


def _squared_norm(anchor: Tensor | None) -> float:
    return 0.0 if anchor is None else float(torch.linalg.vector_norm(anchor, dtype=torch.float64)) ** 2


def _raise_everywhere(faults: Sequence[str], group: dist.ProcessGroup) -> None:
    """Raises in all processes when one has a fault: a process that raised alone would leave the others waiting."""
    gathered: list[list[str]] = [[] for _ in range(dist.get_world_size(group))]
    dist.all_gather_object(gathered, list(faults[:10]), group=group)
    together = list(dict.fromkeys(fault for part in gathered for fault in part))
    if together:
        raise BindError("\n".join(together[:10]))
