"""What tests of training share besides fixtures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from maps_ray.spec import RunSpec

MakeSpec = Callable[..., RunSpec]
# Long enough to be hit in the middle, after several checkpoints.
LONG = {"max_steps": 60, "checkpoint_every": 5}
# Everything that a run carries along beside moments: tensors that begin late, an average, rates of their own, radii.
RIVALS: dict[str, dict[str, Any]] = {
    "training": {
        "freeze_until": {"modules": ["action_head"], "step": 5},
        "ema": 0.9,
        "layer_decay": 0.9,
        "learning_rates": {"projector": 5e-4},
    },
    "proximity": {"shape": "learned", "radius_rate": 1e-3},
    "evaluation": {"averaged": True},
}


def long_run(rivals: bool, **training: Any) -> dict[str, dict[str, Any]]:
    """Sections of a run of `LONG`; with `rivals` also those of `RIVALS`, whose head then trains alone for long enough
    to be hit there too."""
    sections = dict(RIVALS) if rivals else {}
    more = {"freeze_until": {"modules": ["action_head"], "step": 20}} if rivals else {}
    return {**sections, "training": {**sections.get("training", {}), **more, **LONG, **training}}
