"""The average of the weights in the model's place, for an evaluation or an export."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from torch import Tensor

from maps_ray.proximity.zero.deepspeed_engine import Engine
from maps_ray.proximity.zero.partitions import model_flats, spans


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
