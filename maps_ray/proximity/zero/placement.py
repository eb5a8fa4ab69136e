"""Weights in a model under ZeRO: put there without a whole copy anywhere, and their average in their place.

Call `place_weights` on every process, before the optimizer is made. Under stage 3 a process reads the range of each
tensor that it will own; under stages 1 and 2 every process holds all weights, and they go to its device one by one.
`averaged` is for an evaluation or an export.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.partition_parameters import Init, is_zero_param
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from torch import Tensor, nn

from maps_ray.proximity.zero.deepspeed_engine import Engine
from maps_ray.proximity.zero.partitions import model_flats, spans


def place_weights(
    model: nn.Module, deferred: Collection[str], read: Callable[[str], Tensor], config: Mapping[str, Any]
) -> int:
    """Puts every parameter where DeepSpeed wants it, those without weights yet from where `read` finds them.

    Nothing is sent between processes: parameters that already have weights must be equal everywhere. The weights are
    those of a model that was loaded whole, bit for bit.

    Args:
        model: not yet given to `deepspeed.initialize`. Changed in place.
        deferred: names of parameters that have shape and dtype but no weights.
        read: gives the whole tensor of a deferred parameter, best as a view of a mapped file, in any dtype.
        config: what `deepspeed.initialize` will be given.

    Returns:
        how many bytes of what `read` gave this process has looked at.
    """
    source, device = _Source(deferred, read), torch.device(get_accelerator().current_device_name())
    # Those that take memory already come first: they become shards before the others are read.
    named: list[tuple[str, nn.Parameter]] = sorted(model.named_parameters(), key=lambda item: item[0] in deferred)
    if config["zero_optimization"]["stage"] == 3:
        _Partition(model, named, source, dict(config))
    else:
        for name, parameter in named:
            if name in deferred:
                parameter.data = source.fill(name, parameter, 0, parameter.numel(), device)
            else:
                parameter.data = parameter.data.to(device)
    # DeepSpeed leaves the buffers of a model that is partitioned already where they are.
    for buffer in model.buffers():
        buffer.data = buffer.data.to(device)
    return source.bytes_read


class _Source:
    def __init__(self, deferred: Collection[str], read: Callable[[str], Tensor]) -> None:
        self.deferred = deferred
        self.bytes_read = 0
        self._read = read

    def fill(self, name: str, parameter: Tensor, start: int, stop: int, device: torch.device) -> Tensor:
        """A tensor like the parameter of which only elements start .. stop - 1 are there."""
        weights = self._read(name)
        if weights.shape != parameter.shape:
            raise ValueError(f"{name}: its weights are {list(weights.shape)}, the parameter {list(parameter.shape)}")
        part = stop - start < parameter.numel()
        filled = (
            _sparse(parameter)
            if part and device.type == "cpu"
            else torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
        )
        filled.view(-1)[start:stop].copy_(weights.reshape(-1)[start:stop])
        self.bytes_read += (stop - start) * weights.element_size()
        return filled


def _sparse(like: Tensor) -> Tensor:
    """A tensor of its own pages, which take memory once they are written to and are gone with it.

    The allocator would put it among the shards, and leave holes there.
    """
    pages = mmap.mmap(-1, like.numel() * like.element_size())
    return torch.frombuffer(pages, dtype=like.dtype).view(like.shape)


class _Partition(Init):
    """`zero.Init` of a finished model. Its own broadcasts every parameter whole, and so must have it whole."""

    def __init__(
        self, model: nn.Module, named: list[tuple[str, nn.Parameter]], source: _Source, config: dict[str, object]
    ) -> None:
        self._named = named
        self._source = source
        super().__init__(module=model, config_dict_or_path=config)

    def _convert_to_zero_parameters(self, param_list: object) -> None:
        for name, parameter in self._named:
            if is_zero_param(parameter):
                continue
            self._convert_to_deepspeed_param(parameter)
            if name in self._source.deferred:
                numel: int = parameter.ds_numel  # type: ignore[attr-defined]
                # As `Init._partition_param` cuts: equal parts, of which the last ones may be short or empty.
                size = self._aligned_size(parameter) // self._partition_world_size(parameter)
                start = min(size * self._partition_rank(parameter), numel)
                stop = min(start + size, numel)
                parameter.data = self._source.fill(name, parameter, start, stop, self.local_device)
            else:
                parameter.data = parameter.data.to(self.local_device)
            parameter.partition()  # type: ignore[attr-defined]


@contextmanager
def averaged(engine: Engine) -> Iterator[None]:
    """Within it the model has the averaged weights that `bind(..., ema=...)` keeps; behind it the trained ones again.

    Every process calls it. The masters stay as they are; nothing may be trained meanwhile. Does nothing where no
    average is kept.
    """
    binding = engine.optimizer.optimizer.binding
    pieces = spans(engine)
    if not pieces or binding.averages(pieces[0].flat) is None:
        yield
        return
    _show(engine, binding.averages)
    try:
        yield
    finally:
        _show(engine, lambda flat: flat.detach())


@torch.no_grad()
def _show(engine: Engine, pick: Callable[[Tensor], Tensor]) -> None:
    """Gives the model what `pick` finds for each master partition, in the model's dtype."""
    for span in spans(engine):
        span.weight.copy_(pick(span.flat).narrow(0, span.offset, span.numel))
    zero = engine.optimizer
    if isinstance(zero, DeepSpeedZeroOptimizer_Stage3):
        # Some parameters are whole beside their shards: those that were used last, and small ones always.
        engine.empty_partition_cache()
        if zero.persistent_parameters:
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)
        return
    for flat, group in model_flats(engine):
        parts = list(flat.chunk(dist.get_world_size(group)))
        dist.all_gather(parts, parts[dist.get_rank(group)].clone(), group=group)
