"""Intervals and tests against scipy."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import binomtest

from maps_ray.evaluation.rollouts.statistics import Paired, Rate, detectable_difference


@pytest.mark.parametrize(
    ("successes", "episodes"), [(0, 1), (0, 20), (1, 1), (3, 10), (50, 50), (137, 500), (499, 500)]
)
def test_wilson_interval(successes: int, episodes: int) -> None:
    expected = binomtest(successes, episodes).proportion_ci(confidence_level=0.95, method="wilson")
    assert Rate(successes, episodes).interval == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert Rate(successes, episodes).value == successes / episodes


def test_a_rate_of_nothing_is_no_number() -> None:
    assert math.isnan(Rate(0, 0).value) and Rate(0, 0).interval == (0, 1)


@pytest.mark.parametrize(("first_only", "second_only"), [(0, 0), (1, 0), (5, 0), (6, 0), (3, 3), (9, 2), (40, 61)])
def test_exact_mcnemar(first_only: int, second_only: int) -> None:
    pair = Paired(200, first_only, second_only)
    disagree = first_only + second_only
    expected = binomtest(first_only, disagree).pvalue if disagree else 1.0
    assert pair.p_value == pytest.approx(expected, abs=1e-12)
    assert pair.difference == pytest.approx((first_only - second_only) / 200)
    assert (pair.warning() is None) == (expected < 0.05)


def test_pairs_are_counted_episode_by_episode() -> None:
    pair = Paired.of([True, True, False, False, True], [True, False, True, False, False])
    assert pair == Paired(5, 2, 1)
    with pytest.raises(ValueError):
        Paired.of([True], [])


@pytest.mark.parametrize("disagree", [*range(6, 40), 200])
def test_the_smallest_difference_is_just_beyond_chance(disagree: int) -> None:
    episodes = 400
    gap = round(Paired(episodes, disagree, 0).smallest_difference * episodes)
    first = (disagree + gap) // 2
    assert (disagree + gap) % 2 == 0 and gap >= 1
    assert binomtest(first, disagree).pvalue < 0.05
    assert gap <= 2 or binomtest(first - 1, disagree).pvalue >= 0.05


def test_too_few_episodes_never_tell() -> None:
    pair = Paired.of([True] * 5, [False] * 5)
    assert pair.difference == 1 and not pair.told_apart and pair.smallest_difference == 6 / 5
    warning = pair.warning()
    assert warning is not None and "5 episodes cannot tell the two apart" in warning
    assert Paired.of([True] * 6, [False] * 6).told_apart


def test_detectable_difference_has_the_promised_power() -> None:
    episodes = 200
    difference = detectable_difference(episodes)
    random = np.random.default_rng(0)
    first = random.binomial(episodes, 0.5 - difference / 2, 20_000) / episodes
    second = random.binomial(episodes, 0.5 + difference / 2, 20_000) / episodes
    mean = (first + second) / 2
    found = np.abs(second - first) > 1.96 * np.sqrt(2 * mean * (1 - mean) / episodes)
    assert found.mean() == pytest.approx(0.8, abs=0.03)
