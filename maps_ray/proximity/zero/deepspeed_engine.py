"""What this package uses of DeepSpeed's engine and of its ZeRO optimizers, attribute by attribute.

DeepSpeed types nothing of it, and of the optimizers documents nothing: their attributes are private by every measure
but the underscore. All that the rooms read of them stands here, so that an upgrade is checked in one place; a test
looks for each name in the installed DeepSpeed. Read against 0.19.8; `bind` proves at run time that masters lie where
these say.

Two names are replaced, not read: `is_invalid_grad_norm` in the modules of the three optimizers (`finite`), and
`zero.Init._convert_to_zero_parameters` (`placement`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist
    from torch import Tensor, nn

    from maps_ray.proximity.zero.optimizer import ShardedAdamSPD

    class Shard(Tensor):
        """What a process has of a parameter of ZeRO-3: flat, and padded where the last processes own less."""

        ds_numel: int
        """Its elements, padding included."""

    class PartitionedParameter(nn.Parameter):
        """A parameter of ZeRO-3, empty between uses. One of an expert also has its `ds_process_group`."""

        ds_tensor: Shard
        ds_numel: int
        """Elements of the whole parameter."""
        ds_shape: torch.Size

        def all_gather(self, param_list: Sequence[PartitionedParameter]) -> None:
            """Makes all of `param_list` whole, in every process."""


class ZeroOptimizer(Protocol):
    """What `engine.optimizer` is: DeepSpeed's own, around the client optimizer."""

    optimizer: ShardedAdamSPD
    """The client optimizer. Its groups hold master partitions, not the model's parameters."""
    param_groups: list[dict[str, object]]
    dp_process_group: dist.ProcessGroup
    """The processes over which masters are cut."""
    _global_grad_norm: Tensor
    """Of the whole gradient before clipping; each optimizer sets it before it steps the client optimizer."""


class Stage12Optimizer(ZeroOptimizer, Protocol):
    """`deepspeed.runtime.zero.stage_1_and_2.DeepSpeedZeroOptimizer`. Sequences are by parameter group."""

    single_partition_of_fp32_groups: Sequence[Tensor]
    """This process's masters: an equal part of the group's tensors behind one another, padded at the end."""
    bit16_groups_flat: Sequence[Tensor]
    """The model's own weights, of which parameters are views."""
    round_robin_bit16_groups: Sequence[list[nn.Parameter]]
    """Parameters in the order in which they lie in the flat one; that of the group where round robin is off."""
    round_robin_bit16_offsets: Sequence[list[int]]
    """Where each of them begins there."""
    real_dp_process_group: Sequence[dist.ProcessGroup]
    low_precision_master_weights_and_grads: bool


class BF16Optimizer(ZeroOptimizer, Protocol):
    """`deepspeed.runtime.bf16_optimizer.BF16_Optimizer`: stage 1 in bf16 with fp32 sums of gradients."""

    fp32_groups_flat_partition: Sequence[Tensor]
    bf16_groups: Sequence[list[nn.Parameter]]
    bf16_groups_flat: Sequence[Tensor]
    real_dp_process_group: Sequence[dist.ProcessGroup]


class Stage3Optimizer(ZeroOptimizer, Protocol):
    """`deepspeed.runtime.zero.stage3.DeepSpeedZeroOptimizer_Stage3`. Sequences are by sub-group."""

    fp32_partitioned_groups_flat: Sequence[Tensor]
    """This process's masters: its shards of the sub-group's tensors behind one another, each padded by itself."""
    fp16_groups: Sequence[list[PartitionedParameter]]
    """Parameters of each."""
    fp16_partitioned_groups_flat: Sequence[Tensor]
    """The model's own shards, of any dtype in spite of the name."""
    persistent_parameters: list[PartitionedParameter]
    """Small ones, which stay whole on every process beside their shards."""
    swap_optimizer: bool
    """Whether masters are swapped to NVMe, and are not in memory between steps."""
    # Not declared, for it is there or not: `backup_optimizer`, where only a share of the masters is offloaded.


class Output(Protocol):
    """What a forward pass gives; a policy's named tuple, so that ZeRO-3 finds the tensors in it."""

    @property
    def loss(self) -> Any:
        """fp32 scalar; None without the true actions."""

    @property
    def actions(self) -> Any:
        """(B, chunk, action_dim), normalised; None in training of a policy that generates them."""


class Engine(Protocol):
    """`deepspeed.DeepSpeedEngine`."""

    module: nn.Module
    device: torch.device
    has_moe_layers: bool
    mpu: object | None
    """Of tensor parallelism."""

    @property
    def optimizer(self) -> Any:
        """A `ZeroOptimizer`; which one depends on stage and precision."""

    def __call__(self, **batch: Tensor) -> Output: ...

    def backward(self, loss: Tensor, /) -> object: ...

    def step(self) -> object: ...

    def destroy(self) -> None:
        """Takes hooks off the module, which would keep its memory from being freed."""

    def zero_optimization_stage(self) -> int: ...

    def zero_round_robin_gradients(self) -> bool: ...

    def autotp_size(self) -> int: ...

    def empty_partition_cache(self) -> None:
        """Under stage 3, gives up whole parameters that are kept beside their shards."""
