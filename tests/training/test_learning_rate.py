"""The learning rate as a function of the step."""

from __future__ import annotations

import math

import pytest

from maps_ray.spec import TrainingSpec
from maps_ray.training.loop import learning_rate


def rates(**fields: object) -> list[float]:
    training = TrainingSpec(learning_rate=2.0, max_steps=10, **fields)
    return [learning_rate(step, training) for step in range(10)]


def test_warm_up_climbs_linearly_and_reaches_the_full_rate() -> None:
    assert rates(warmup_steps=4, schedule="constant") == pytest.approx([0.5, 1.0, 1.5, 2.0] + [2.0] * 6)


def test_linear_decay_would_reach_zero_one_step_after_the_last() -> None:
    assert rates(warmup_steps=2, schedule="linear")[2:] == pytest.approx([2.0 * (8 - k) / 8 for k in range(8)])


def test_cosine_decay_is_the_half_cosine() -> None:
    expected = [1 + math.cos(math.pi * k / 10) for k in range(10)]
    assert rates(schedule="cosine") == pytest.approx(expected)
