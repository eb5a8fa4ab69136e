"""Where each tensor lies in this process's fp32 master partitions.

What is read of DeepSpeed's private attributes is declared in `deepspeed_engine`.

Every ZeRO optimizer keeps its masters in flat tensors, one for each parameter group (stages 1 and 2) or sub-group
(stage 3). Stages 1 and 2 cut the concatenation of a group's tensors into equal parts, one for each process, so a part
holds whole tensors and pieces of two. Stage 3 cuts every tensor by itself. A tensor never spans two flats.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor

from maps_ray.proximity.zero.deepspeed_engine import BF16Optimizer, Engine, Stage3Optimizer, Stage12Optimizer


class LayoutError(RuntimeError):
    """A DeepSpeed configuration whose layout is not known, or is known to be wrong."""


@dataclass(frozen=True)
class Span:
    """This process's piece of one tensor; `numel` is 0 where it owns nothing of it."""

    name: str
    shape: tuple[int, ...]
    """Of the whole tensor."""
    flat: Tensor
    """The fp32 master partition, as it stands in the optimizer's groups."""
    offset: int
    """Of the piece in `flat`."""
    start: int
    """Of the piece in the flattened tensor."""
    numel: int
    weight: Tensor
    """The model's own copy of the piece, in the dtype it trains in."""
    in_place: bool
    """Whether `weight` lies where this layout says it must lie in DeepSpeed's own flat copy."""

    def fault(self) -> str | None:
        """Why the master partition cannot be the one of this tensor; none when it is proved to be."""
        if not self.in_place:
            return f"{self.name}: its weights do not lie where the layout of the partitions says"
        master = self.flat.detach()[self.offset : self.offset + self.numel]
        if master.numel() != self.numel or not torch.equal(
            master.to(self.weight.device, self.weight.dtype), self.weight
        ):
            return f"{self.name}: its master weights differ from the model's"
        return None


def process_group(engine: Engine) -> dist.ProcessGroup:
    """The processes over which the masters are partitioned."""
    group: dist.ProcessGroup = engine.optimizer.dp_process_group
    return group


def reduce_device(engine: Engine) -> torch.device:
    """Where a tensor must lie to be reduced over `process_group`."""
    # NCCL reduces what lies on a device alone, and offloaded masters lie on the host.
    backend = dist.get_backend(process_group(engine))
    return torch.device("cpu") if "gloo" in backend or "mpi" in backend else torch.device(engine.device)


def spans(engine: Engine) -> list[Span]:
    """The piece of every trained tensor, in the same order in every process.

    Tied tensors come once, under the first of their names; frozen and empty ones are left out.

    Raises:
        LayoutError: the engine's optimizer is none of ZeRO 1, 2, 3 or BF16_Optimizer, or uses an option under which
            its layout is unknown or wrong.
    """
    zero = engine.optimizer
    # Exactly these types: a subclass may lay its masters out in another way.
    readers: dict[type, Callable[[Any, dict[Tensor, str]], Iterator[Span]]] = {
        DeepSpeedZeroOptimizer: _stage_1_and_2,
        BF16_Optimizer: _bf16_optimizer,
        DeepSpeedZeroOptimizer_Stage3: _stage_3,
    }
    if type(zero) not in readers:
        known = ", ".join(reader.__name__ for reader in readers)
        raise LayoutError(
            f"cannot shard under {type(zero).__name__}: set zero_optimization.stage to 1, 2 or 3 ({known})"
        )
    _refuse_options(engine)
    names: dict[Tensor, str] = {parameter: name for name, parameter in engine.module.named_parameters()}
    pieces = list(readers[type(zero)](zero, names))
    placed = [span.name for span in pieces]
    trained = {name for parameter, name in names.items() if parameter.requires_grad and _whole_numel(parameter)}
    if len(set(placed)) != len(placed) or set(placed) != trained:
        raise LayoutError(
            "each trained parameter must stand in one group of the optimizer; "
            f"missing: {sorted(trained - set(placed))[:10]}, not trained: {sorted(set(placed) - trained)[:10]}, "
            f"repeated: {sorted({name for name in placed if placed.count(name) > 1})[:10]}"
        )
    return pieces


def model_flats(engine: Engine) -> Iterator[tuple[Tensor, dist.ProcessGroup]]:
    """The model's own weights of stages 1 and 2: flat, and the processes of which each steps an equal part of it."""
    zero = engine.optimizer
    flats = zero.bf16_groups_flat if isinstance(zero, BF16_Optimizer) else zero.bit16_groups_flat
    yield from zip(flats, zero.real_dp_process_group, strict=True)


def _refuse_options(engine: Engine) -> None:
    zero = engine.optimizer
    refused = {
        # DeepSpeed then reorders the tensors, but maps its own fragments and checkpoints as if it had not.
        "zero_optimization.round_robin_gradients = true": engine.zero_round_robin_gradients(),
        # Masters are in memory during the step alone, so that `bind` could prove nothing of them.
        "zero_optimization.offload_optimizer.device = nvme": getattr(zero, "swap_optimizer", False),
        # DeepSpeed steps the other share by a torch.optim.AdamW of its own (`stage3.py`, `backup_optimizer`).
        "zero_optimization.offload_optimizer.ratio < 1": hasattr(zero, "backup_optimizer"),
        "zenflow": getattr(zero, "zenflow", False),
        # Tensors are then cut over processes that the all-reduce of `bind` does not reach; so are those of experts.
        "tensor parallelism": engine.mpu is not None or engine.autotp_size() > 1,
        "mixture of experts": engine.has_moe_layers,
        "master weights in 16 bits": getattr(zero, "low_precision_master_weights_and_grads", False),
    }
    for option, used in refused.items():
        if used:
            raise LayoutError(f"the DeepSpeed configuration has {option}, which cannot be projected exactly: remove it")


def _stage_1_and_2(zero: Stage12Optimizer, names: dict[Tensor, str]) -> Iterator[Span]:
    for group, flat in enumerate(zero.single_partition_of_fp32_groups):
        # The order in which DeepSpeed lays tensors out: that of the group, as round robin is refused above.
        parameters = zero.round_robin_bit16_groups[group]
        offsets = zero.round_robin_bit16_offsets[group]
        rank = dist.get_rank(zero.real_dp_process_group[group])
        yield from _cut(parameters, offsets, zero.bit16_groups_flat[group], flat, rank, names)


def _bf16_optimizer(zero: BF16Optimizer, names: dict[Tensor, str]) -> Iterator[Span]:
    for group, flat in enumerate(zero.fp32_groups_flat_partition):
        # It keeps no offsets: its flat is the plain concatenation, with the padding at the end.
        parameters, offsets = zero.bf16_groups[group], [0]
        for parameter in parameters:
            offsets.append(offsets[-1] + parameter.numel())
        rank = dist.get_rank(zero.real_dp_process_group[group])
        yield from _cut(parameters, offsets[:-1], zero.bf16_groups_flat[group], flat, rank, names)


def _cut(
    parameters: Sequence[Tensor],
    offsets: Sequence[int],
    model_flat: Tensor,
    flat: Tensor,
    rank: int,
    names: dict[Tensor, str],
) -> Iterator[Span]:
    """Pieces of tensors that lie at `offsets` in a concatenation of which process `rank` owns the rank-th part."""
    # All parts are of one length: DeepSpeed pads the concatenation, not the parts.
    left = rank * flat.numel()
    for parameter, offset in zip(parameters, offsets, strict=True):
        begin = max(offset, left)
        numel = max(min(offset + parameter.numel(), left + flat.numel()) - begin, 0)
        start = begin - offset if numel else 0
        # Also where nothing is owned: the columns of the all-reduce are one list, the same in every process.
        yield Span(
            name=names[parameter],
            shape=tuple(parameter.shape),
            flat=flat,
            offset=begin - left if numel else 0,
            start=start,
            numel=numel,
            weight=parameter.detach().view(-1)[start : start + numel],
            in_place=_lies_at(parameter, model_flat, offset),
        )


def _stage_3(zero: Stage3Optimizer, names: dict[Tensor, str]) -> Iterator[Span]:
    for sub_group, flat in enumerate(zero.fp32_partitioned_groups_flat):
        # Masters lie as the shards do, and shards are aligned: offsets count padded lengths, spans true ones.
        offset = 0
        for parameter in zero.fp16_groups[sub_group]:
            group = getattr(parameter, "ds_process_group", zero.dp_process_group)
            if dist.get_process_group_ranks(group) != dist.get_process_group_ranks(zero.dp_process_group):
                raise LayoutError(f"{names[parameter]} is partitioned over a process group of its own")
            shard = parameter.ds_tensor
            # The last shards are padded, and the padding is never initialised.
            start = min(dist.get_rank(zero.dp_process_group) * shard.ds_numel, parameter.ds_numel)
            numel = min(shard.ds_numel, parameter.ds_numel - start)
            yield Span(
                name=names[parameter],
                shape=tuple(parameter.ds_shape),
                flat=flat,
                offset=offset,
                start=start,
                numel=numel,
                weight=shard.detach().view(-1)[:numel],
                in_place=_lies_at(shard, zero.fp16_partitioned_groups_flat[sub_group], offset),
            )
            offset += shard.ds_numel


def _lies_at(tensor: Tensor, flat: Tensor, offset: int) -> bool:
    # Equal weights alone would not tell two tensors of zeros apart.
    return tensor.data_ptr() == flat.data_ptr() + offset * flat.element_size()


def _whole_numel(parameter: Tensor) -> int:
    # Between uses ZeRO-3 leaves a parameter empty, and keeps its number of elements beside it.
    return int(getattr(parameter, "ds_numel", parameter.numel()))
