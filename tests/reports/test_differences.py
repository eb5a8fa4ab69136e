"""The bootstrap: exact where it can be worked out, honest where the data say nothing."""

from __future__ import annotations

import math

import numpy as np
import pytest

from maps_ray.reports.differences import difference, mean_interval
from maps_ray.reports.records import EpisodeError, SplitResult


def result(errors: list[float], samples: list[int] | None = None, first: int = 0) -> SplitResult:
    weights = samples or [10] * len(errors)
    episodes = tuple(
        EpisodeError(str(first + index), {"action": error}, weight)
        for index, (error, weight) in enumerate(zip(errors, weights, strict=True))
    )
    return SplitResult("ood", sum(weights), {"action": float(np.average(errors, weights=weights))}, {}, episodes)


def test_interval_of_a_mean_matches_the_normal_approximation() -> None:
    errors = np.random.default_rng(1).normal(0.2, 0.03, 60)
    interval = mean_interval(result(list(errors)))
    assert interval is not None
    reach = 1.96 * errors.std() / math.sqrt(len(errors))
    assert interval.low == pytest.approx(errors.mean() - reach, abs=0.1 * reach)
    assert interval.high == pytest.approx(errors.mean() + reach, abs=0.1 * reach)


def test_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(2)
    held = 0
    for _ in range(100):
        base = rng.normal(0.2, 0.05, 20).clip(0.01)
        found = difference(result(list(0.9 * base + rng.normal(0, 0.01, 20))), result(list(base)))
        assert found.interval is not None
        held += found.interval.low <= -0.1 <= found.interval.high
    assert 85 <= held <= 100


def test_the_same_episodes_are_compared_pair_by_pair() -> None:
    base = list(np.random.default_rng(3).normal(0.2, 0.05, 24).clip(0.02))
    better = [0.95 * error for error in base]
    paired = difference(result(better), result(base))
    assert paired.paired and paired.interval is not None
    assert paired.relative == pytest.approx(-0.05)
    assert (paired.interval.low, paired.interval.high) == (pytest.approx(-0.05), pytest.approx(-0.05))
    apart = difference(result(better, first=100), result(base))
    assert not apart.paired and apart.interval is not None
    assert apart.interval.covers_zero, "24 other episodes cannot show a difference of 5 %"


def test_pairs_are_found_whatever_the_order() -> None:
    base = result([0.1, 0.2, 0.4])
    turned = SplitResult("ood", base.samples, base.errors, {}, base.episodes[::-1])
    found = difference(turned, base)
    assert found.paired and found.interval is not None and found.interval.low == found.interval.high == 0.0


def test_longer_episodes_weigh_more() -> None:
    interval = mean_interval(result([0.1, 0.1, 0.1, 0.5], samples=[100, 100, 100, 1]))
    assert interval is not None and interval.high < 0.2


@pytest.mark.parametrize("errors", [[], [0.2]])
def test_too_few_episodes_give_no_interval(errors: list[float]) -> None:
    episodes = result(errors).episodes if errors else ()
    one = SplitResult("ood", 10, {"action": 0.2}, {}, episodes)
    assert mean_interval(one) is None
    assert difference(one, result([0.2, 0.3])).interval is None


def test_a_part_without_errors_by_episode_gives_no_interval() -> None:
    whole = result([0.1, 0.2])
    parts = SplitResult("ood", 20, {"action": 0.15, "gripper": 0.3}, {}, whole.episodes)
    assert mean_interval(parts, "gripper") is None
    assert difference(parts, parts, "gripper").relative == 0.0


def test_a_perfect_baseline_is_no_crash() -> None:
    found = difference(result([0.1, 0.2]), result([0.0, 0.0]))
    assert math.isinf(found.relative) and found.interval is None
