"""What tests of training share besides fixtures."""

from __future__ import annotations

from collections.abc import Callable

from maps_ray.spec import RunSpec

MakeSpec = Callable[..., RunSpec]
# Long enough to be hit in the middle, after several checkpoints.
LONG = {"max_steps": 60, "checkpoint_every": 5}
