"""What one forward and backward pass takes in memory and operations, found on meta tensors: nothing is computed.

The policy's own code runs with weights and images that have shapes and no values. Ids, masks and labels keep their
values, since the code asks for them. Attention stands for torch's fused kernels, as on a GPU.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry

Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class PassProfile:
    """One forward and backward pass of one batch."""

    batch: int
    kept: int
    """Bytes of activations at the end of the forward pass."""
    peak: int
    """Most bytes of activations and temporaries at any moment, the gradient of one parameter at a time included."""
    forward_flops: float
    """Operations of the forward pass; a multiply-add counts as two."""
    flops: float
    """Of both passes, with what activation checkpointing computes again."""
    without_gradient: frozenset[str]
    """Parameters that ask for a gradient and get none."""


def run_pass(policy: nn.Module, inputs: Batch, batch: int) -> PassProfile:
    """Runs a policy on the meta device, forward and backward.

    Args:
        policy: with all parameters on the meta device, in training mode.
        inputs: keyword arguments of its `forward`, which gives a `loss`; ids and masks on the CPU, all else meta.
        batch: how many samples these are.
    """
    reached: set[str] = set()
    handles = []
    for name, parameter in policy.named_parameters():
        if parameter.requires_grad:
            # ZeRO takes each gradient away as it comes; what it keeps of them is counted elsewhere.
            handles.append(parameter.register_post_accumulate_grad_hook(_drop(reached, name)))
    follower = _Follower([*policy.parameters(), *policy.buffers()])
    try:
        with follower, _fused_attention():
            loss = policy(**inputs).loss
            kept, forward = follower.current, follower.flops
            loss.backward()
    finally:
        for handle in handles:
            handle.remove()
    asked = frozenset(name for name, parameter in policy.named_parameters() if parameter.requires_grad)
    return PassProfile(batch, kept, follower.peak, forward, follower.flops, asked - reached)


def _drop(reached: set[str], name: str) -> Callable[[Tensor], None]:
    def hook(parameter: Tensor) -> None:
        reached.add(name)
        parameter.grad = None

    return hook


class _Follower(TorchDispatchMode):
    """Follows the storages of meta tensors from birth to death, and adds up operations by torch's own formulas.

    Tensors with values may take part in operations on meta tensors. torch's `FlopCounterMode` would count the same, but
    keeps what checkpointed blocks compute again alive.
    """

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.current = self.peak = 0
        self.flops = 0.0
        self._alive: dict[int, int] = {tensor.untyped_storage()._cdata: 0 for tensor in known}
        self._references: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Sequence[type],
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default:
            asked = args[0]
            if isinstance(asked, Tensor) and asked.is_meta and asked.dtype == torch.bool:
                # A library asks of a mask that it has moved to the device whether nothing is padded.
                return True
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if any(tensor.is_meta for tensor in tensors) and not all(tensor.is_meta for tensor in tensors):
            args = _with_indices(func, args)
            args, kwargs = tree_map_only(Tensor, lambda tensor: tensor.to("meta"), (args, kwargs))
        out = func(*args, **kwargs)
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            self.flops += count(*args, **kwargs, out_val=out)
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.is_meta:
                self._follow(leaf)
        return out

    def _follow(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        # The address of torch's own storage: each call of `untyped_storage` makes another Python object for it.
        key = storage._cdata
        if key in self._alive:
            return
        self._alive[key] = storage.nbytes()
        self.current += storage.nbytes()
        self.peak = max(self.peak, self.current)
        self._references[key] = weakref.ref(storage, lambda _: self._forget(key))

    def _forget(self, key: int) -> None:
        self.current -= self._alive.pop(key, 0)
        self._references.pop(key, None)


def _with_indices(func: OpOverload, args: tuple[object, ...]) -> tuple[object, ...]:
    """Boolean masks as the indices that they select: how many those are, only their values say."""
    if func not in (torch.ops.aten.index.Tensor, torch.ops.aten.index_put.default, torch.ops.aten.index_put_.default):
        return args
    indices: list[Tensor | None] = []
    for index in cast(Sequence[Tensor | None], args[1]):
        if index is not None and index.dtype == torch.bool and not index.is_meta:
            indices += index.nonzero(as_tuple=True)
        else:
            indices.append(index)
    return (args[0], indices, *args[2:])


@contextmanager
def _fused_attention() -> Iterator[None]:
    """Torch's fused attention kernels, which keep the log-sum-exp of each row and no attention weights.

    The meta device would take the plain form. A mode that catches the function sleeps during `backward`, where
    checkpointed blocks call it again; so the name itself is lent.
    """
    plain = functional.scaled_dot_product_attention
    functional.scaled_dot_product_attention = _attend
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = plain


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`scaled_dot_product_attention` of (B, heads, S, width) by the kernels that CUDA takes."""
    if enable_gqa and key.shape[1] != query.shape[1]:
        repeats = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    aten = torch.ops.aten
    if attn_mask is None:
        attended: Tensor = aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal)[0]
        return attended
    shape = (*query.shape[:3], key.shape[2])
    # The kernel takes no boolean mask: torch makes a bias of it first, which has memory of its own.
    bias = torch.empty(attn_mask.shape, dtype=query.dtype, device=query.device).expand(shape)
    # With the log-sum-exp, which `backward` needs and which therefore stays.
    attended = aten._scaled_dot_product_efficient_attention(query, key, value, bias, True, dropout_p, is_causal)[0]
    return attended
