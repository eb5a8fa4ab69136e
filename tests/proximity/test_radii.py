"""Learned radii against the equations of FTP written out for one tensor, and what they refuse."""

from __future__ import annotations

import math

import pytest
import torch

from maps_ray.proximity.radii import Radii

RATE = 0.05


def by_hand(steps: list[tuple[float, float, float]]) -> list[tuple[float, float]]:
    """(gamma, share of c_t that is taken back) after each step, from (<g, d>, |d|, |c_t|)."""
    gamma = floor = first = second = 0.0
    found = []
    count = 0
    for inner, distance, length in steps:
        if gamma == 0:
            gamma = floor = length
            found.append((gamma, 0.0))
            continue
        count += 1
        gradient = inner / distance
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        change = RATE * (first / (1 - 0.9**count)) / (math.sqrt(second / (1 - 0.999**count)) + 1e-8)
        gamma = min(max(gamma - change, floor), max(length, floor))
        found.append((gamma, max(0.0, 1 - gamma / length)))
    return found


def sums(steps: list[tuple[float, float, float]]) -> list[torch.Tensor]:
    return [
        torch.tensor([[inner], [distance**2], [length**2 - distance**2]], dtype=torch.float64)
        for inner, distance, length in steps
    ]


def test_a_radius_follows_the_gradients_of_the_paper() -> None:
    # Out against the gradient, on the way gone, then back.
    steps = [(0.0, 0.0, 0.1), (-0.3, 0.1, 0.2), (-0.2, 0.18, 0.3), (0.4, 0.25, 0.28), (0.5, 0.2, 0.22), (0.1, 0.2, 0.5)]
    radii = Radii([True], RATE, torch.device("cpu"))
    for given, (gamma, share) in zip(sums(steps), by_hand(steps), strict=True):
        assert radii.pulls(given).item() == pytest.approx(share, abs=1e-12)
        assert radii.values.item() == pytest.approx(gamma, abs=1e-12)
    gammas = [gamma for gamma, _ in by_hand(steps)]
    assert gammas[2] > gammas[1] > gammas[0] and gammas[5] < gammas[4]


def test_what_has_no_radius_is_never_taken_back_and_a_tensor_that_never_moves_has_none() -> None:
    radii = Radii([False, True], RATE, torch.device("cpu"))
    for _ in range(3):
        pulls = radii.pulls(torch.tensor([[-1.0, 0.0], [1.0, 0.0], [3.0, 0.0]], dtype=torch.float64))
        assert pulls.tolist() == [0.0, 0.0] and radii.values.tolist() == [0.0, 0.0]


def test_they_go_on_from_their_state() -> None:
    steps = [(0.0, 0.0, 0.1), (-0.3, 0.1, 0.2), (-0.2, 0.18, 0.3), (0.4, 0.25, 0.28)]
    whole, first, second = (Radii([True], RATE, torch.device("cpu")) for _ in range(3))
    for given in sums(steps):
        expected = whole.pulls(given)
    for given in sums(steps[:2]):
        first.pulls(given)
    second.load_state(first.state())
    for given in sums(steps[2:]):
        found = second.pulls(given)
    assert torch.equal(found, expected) and torch.equal(second.values, whole.values)


@pytest.mark.parametrize("rate", [0.0, -0.1, math.inf, math.nan])
def test_a_rate_that_moves_nothing_or_everything_is_refused(rate: float) -> None:
    with pytest.raises(ValueError, match=rf"radius_rate = {rate!r}: must be a finite number above 0"):
        Radii([True], rate, torch.device("cpu"))


@pytest.mark.parametrize("rows", [[[math.nan, 0, 0, 0, 0]], [[math.inf, 0, 0, 0, 0]], [[0.1, 0.1, 0, 0, 1]] * 2])
def test_a_state_that_is_not_finite_or_of_other_tensors_is_refused_and_nothing_changes(rows: list[list[float]]) -> None:
    radii = Radii([True], RATE, torch.device("cpu"))
    radii.pulls(sums([(0.0, 0.0, 0.1)])[0])
    with pytest.raises(ValueError, match=r"must be finite: use another checkpoint"):
        radii.load_state(rows)
    assert radii.values.item() == pytest.approx(0.1)
