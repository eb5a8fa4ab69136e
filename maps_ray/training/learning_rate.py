"""The learning rate as a pure function of the step: a resumed run needs no scheduler state."""

from __future__ import annotations

import math

from maps_ray.spec import TrainingSpec


def learning_rate(step: int, training: TrainingSpec) -> float:
    """Learning rate of one optimizer step.

    Linear warm-up over the first `warmup_steps` steps, whose last one has the full rate, then `constant`, `linear` or
    `cosine` decay. A decaying course would reach 0 at step `max_steps`, one after the last step.

    Args:
        step: optimizer steps done before this one, 0 .. max_steps - 1.
        training: `learning_rate`, `warmup_steps`, `max_steps` and `schedule`.
    """
    if step < training.warmup_steps:
        return training.learning_rate * (step + 1) / training.warmup_steps
    done = (step - training.warmup_steps) / (training.max_steps - training.warmup_steps)
    if training.schedule == "linear":
        return training.learning_rate * (1 - done)
    if training.schedule == "cosine":
        return training.learning_rate * 0.5 * (1 + math.cos(math.pi * done))
    return training.learning_rate
