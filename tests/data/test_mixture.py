"""Against `mixtures.json` of the published pipeline: two LIBERO sets of 142 and 44 steps, 3000 draws each."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from maps_ray.data.mixture import Order, epoch_length, shares

STEPS = [142, 44]
# weights, balanced, probabilities, length of an epoch, drawn from the first
PUBLISHED = [
    ([1.0, 1.0], True, [0.7634408602150538, 0.23655913978494625], 186, 2289),
    ([1.0, 1.0], False, [0.5, 0.5], 284, 1482),
    ([1.0, 3.0], True, [0.5182481751824818, 0.48175182481751827], 274, 1538),
    ([0.5, 1.0], True, [0.6173913043478261, 0.3826086956521739], 115, 1841),
    ([1.0, 2.5], False, [0.2857142857142857, 0.7142857142857143], 497, 854),
]


@pytest.mark.parametrize(("weights", "balance", "expected", "length", "drawn"), PUBLISHED)
def test_shares_and_epochs_are_the_published_ones(weights, balance, expected, length, drawn) -> None:
    found = shares(weights, STEPS, balance)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-15)
    assert epoch_length(weights, STEPS, balance) == length
    order = Order([100, 30], found, seed=7)
    mine = sum(order.at(position)[0] == 0 for position in range(3000))
    # Independent draws: five standard deviations of a difference of two such counts.
    assert abs(mine - drawn) < 5 * np.sqrt(2 * 3000 * expected[0] * expected[1])


def test_an_epoch_without_a_weight_of_one_has_no_length() -> None:
    assert epoch_length([0.5, 2.0], STEPS, True) is None


def test_draws_are_independent_and_follow_the_shares() -> None:
    order = Order([5, 7, 11], [0.2, 0.3, 0.5], seed=0)
    sources = np.array([order.at(position)[0] for position in range(60_000)])
    for first in range(3):
        for second in range(3):
            pairs = np.mean((sources[:-1] == first) & (sources[1:] == second))
            assert abs(pairs - [0.2, 0.3, 0.5][first] * [0.2, 0.3, 0.5][second]) < 0.01


def test_order_is_a_function_of_position_alone() -> None:
    sizes, parts = [13, 40], [0.25, 0.75]
    places = [0, 1, 2, 65_535, 65_536, 65_537, 200_001, 131_072]
    forward = Order(sizes, parts, seed=3)
    expected = {position: forward.at(position) for position in range(200_002)}
    back = Order(sizes, parts, seed=3)
    for position in [*reversed(places), *places]:
        assert back.at(position) == expected[position]
    assert [Order(sizes, parts, seed=4).at(p) for p in range(50)] != [expected[p] for p in range(50)]


def test_no_sample_comes_twice_before_all_have_come() -> None:
    sizes = [13, 40]
    order = Order(sizes, [0.25, 0.75], seed=3)
    seen: dict[int, list[int]] = {0: [], 1: []}
    for position in range(70_000):
        source, sample = order.at(position)
        seen[source].append(sample)
    for source, size in enumerate(sizes):
        passes = [seen[source][start : start + size] for start in range(0, len(seen[source]) - size, size)]
        assert len(passes) > 1000
        assert all(Counter(one) == dict.fromkeys(range(size), 1) for one in passes)
        assert passes[0] != passes[1]


def test_one_source_keeps_the_order_of_its_permutations() -> None:
    order = Order([17], [1.0], seed=5)
    for turn in range(3):
        expected = np.random.default_rng([5, turn]).permutation(17)
        assert [order.at(17 * turn + place) for place in range(17)] == [(0, int(i)) for i in expected]
