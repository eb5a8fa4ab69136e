"""The rule under DeepSpeed ZeRO 1, 2 and 3, where every process owns a slice of every tensor.

Build `ShardedAdamSPD` over the model's parameters, give it to `deepspeed.initialize` as the client optimizer, and
`bind` it to the engine before the first step. Where a model's weights are still in a file, `place_weights` comes first.
"""

import maps_ray.proximity.zero.deepspeed_import  # noqa: F401 -- first, see there

# isort: split
from maps_ray.proximity.zero.averaging import averaged
from maps_ray.proximity.zero.binding import BindError, Binding, TensorStatistics, bind
from maps_ray.proximity.zero.optimizer import ShardedAdamSPD
from maps_ray.proximity.zero.placement import place_weights

__all__ = ["BindError", "Binding", "ShardedAdamSPD", "TensorStatistics", "averaged", "bind", "place_weights"]
