"""The rule under DeepSpeed ZeRO 1, 2 and 3, where every process owns a slice of every tensor.

Build `ShardedAdamSPD` over the model's parameters, give it to `deepspeed.initialize` as the client optimizer, and
`bind` it to the engine before the first step. Where a model's weights are still in a file, `place_weights` comes first.
"""

import sys

# DeepSpeed 0.19's autotuner, which no run uses but every `import deepspeed` loads, imports MLflow where it is there: a
# quarter of the time that a worker takes to start, and 70 MiB of its memory. It goes without where that import fails.
if "mlflow" not in sys.modules:
    # None makes `import mlflow` fail.
    sys.modules["mlflow"] = None  # type: ignore[assignment]
    try:
        import deepspeed  # noqa: F401
    finally:
        del sys.modules["mlflow"]

# isort: split
from maps_ray.proximity.zero.binding import BindError, Binding, TensorStatistics, bind
from maps_ray.proximity.zero.optimizer import ShardedAdamSPD
from maps_ray.proximity.zero.placement import averaged, place_weights

__all__ = ["BindError", "Binding", "ShardedAdamSPD", "TensorStatistics", "averaged", "bind", "place_weights"]
