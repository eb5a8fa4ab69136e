"""What the successes of several arms tell: a linear mixed model with arms fixed, and seeds and initial states crossed.

All arms share their seeds and their initial states. The success of arm a with seed s from state e is

    y[a, s, e] = arm[a] + seed[s] + (arm x seed)[a, s] + state[e] + (arm x state)[a, e] + rest,

states nested in strata (a task of a suite), whose weights make up a measure: `id` is the mean over its tasks, `ood` the
mean over suites of the mean over their tasks. The variance of a difference of two arms is estimated by the method of
moments, with arm x seed pooled over all arms, so that a t distribution with (arms - 1)(seeds - 1) degrees of freedom
goes with it (repeated measures, Searle, Casella and McCulloch, Variance Components, 1992, chapter 4). What seeds and
states do to all arms alike cancels. Holm's procedure corrects for the number of arms.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t

Floats = NDArray[np.float64]
POWER = 0.8
LEVEL = 0.05


@dataclass(frozen=True)
class Stratum:
    """Episodes of one task of one suite, or any other group of states."""

    weight: float
    """Of its mean in the measure; the weights of a measure add up to 1."""
    successes: Floats
    """(arms, seeds, states), 0 or 1."""


@dataclass(frozen=True)
class Difference:
    """An arm against the control."""

    arm: str
    mean: float
    """Difference of the measure."""
    error: float
    """Its standard error."""
    degrees: int
    p_value: float
    """Two-sided."""
    adjusted: float
    """By Holm over the arms of the table."""

    @property
    def interval(self) -> tuple[float, float]:
        """95 %, of this comparison alone."""
        half = float(t.ppf(1 - LEVEL / 2, self.degrees)) * self.error
        return self.mean - half, self.mean + half

    @property
    def told_apart(self) -> bool:
        """Whether the difference is significant at 5 % after the correction."""
        return self.adjusted < LEVEL


@dataclass(frozen=True)
class Comparison:
    """All arms of a measure."""

    means: dict[str, float]
    """Arm -> the measure."""
    intervals: dict[str, tuple[float, float]]
    """Arm -> 95 % interval of its own value, over seeds like these and states like these."""
    differences: tuple[Difference, ...]
    """Each arm against the control."""
    smallest: float
    """Difference that this design tells from none with a power of 80 %, at Holm's first step."""
    smallest_alone: float
    """The same of one comparison without a correction."""


def compare(arms: Sequence[str], control: str, strata: Sequence[Stratum]) -> Comparison:
    """Compares each arm with the control.

    Args:
        arms: names, in the order of the strata's first axis.
        control: one of them.
        strata: of one measure.

    Raises:
        ValueError: fewer than two arms or seeds, or weights that do not add up to 1.
    """
    count, seeds = strata[0].successes.shape[:2]
    if count < 2 or seeds < 2:
        raise ValueError(f"{count} arms with {seeds} seeds: a comparison takes two of each at least")
    if abs(sum(stratum.weight for stratum in strata) - 1) > 1e-9:
        raise ValueError("the weights of the strata must add up to 1")
    rows = sum(stratum.weight * stratum.successes.mean(axis=2) for stratum in strata)
    assert isinstance(rows, np.ndarray)
    means = rows.mean(axis=1)
    inside = rows - means[:, None] - rows.mean(axis=0)[None] + rows.mean()
    degrees = (count - 1) * (seeds - 1)
    of_seeds = float((inside**2).sum()) / degrees
    error = float(np.sqrt(2 * (of_seeds / seeds + sum(_states(stratum, count, seeds) for stratum in strata))))
    index = {arm: number for number, arm in enumerate(arms)}
    others = [arm for arm in arms if arm != control]
    shifts = [float(means[index[arm]] - means[index[control]]) for arm in others]
    # Without any variance there is nothing to test: arms that never differ are not told apart.
    tails = [1.0 if error == 0 else float(2 * t.sf(abs(shift) / error, degrees)) for shift in shifts]
    differences = tuple(
        Difference(arm, shift, error, degrees, tail, adjusted)
        for arm, shift, tail, adjusted in zip(others, shifts, tails, holm(tails), strict=True)
    )
    return Comparison(
        {arm: float(means[index[arm]]) for arm in arms},
        {arm: _interval(rows[index[arm]], strata, index[arm]) for arm in arms},
        differences,
        smallest_difference(error, degrees, len(others)),
        smallest_difference(error, degrees, 1),
    )


def holm(values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values (Scand. J. Stat. 6, 1979), in the order of `values`."""
    adjusted = [0.0] * len(values)
    largest = 0.0
    for rank, index in enumerate(np.argsort(values, kind="stable").tolist()):
        largest = max(largest, min(1.0, (len(values) - rank) * values[index]))
        adjusted[index] = largest
    return adjusted


def smallest_difference(error: float, degrees: int, comparisons: int) -> float:
    """The true difference that is told from none with a power of 80 %.

    Args:
        error: standard error of a difference.
        degrees: of freedom of that.
        comparisons: that Holm's first step divides 5 % by.
    """
    return error * float(t.ppf(1 - LEVEL / comparisons / 2, degrees) + t.ppf(POWER, degrees))


def planned_error(seed_deviation: float, rate: float, episodes: int, seeds: int) -> float:
    """Standard error of a difference that a design is expected to have.

    Args:
        seed_deviation: standard deviation between seeds of an arm's true rate.
        rate: of success.
        episodes: of each run.
        seeds: of each arm.
    """
    return float(np.sqrt(2 * (seed_deviation**2 + rate * (1 - rate) / episodes) / seeds))


def paired(values: Mapping[str, Sequence[float]], control: str) -> dict[str, tuple[float, float, float]]:
    """Of one number a run: arm -> mean difference from the control over seeds, and its 95 % t-interval."""
    found = {}
    for arm, own in values.items():
        shifts = np.array(own) - np.array(values[control])
        half = 0.0
        if len(shifts) > 1:
            half = float(t.ppf(1 - LEVEL / 2, len(shifts) - 1) * shifts.std(ddof=1) / np.sqrt(len(shifts)))
        found[arm] = float(shifts.mean()), float(shifts.mean()) - half, float(shifts.mean()) + half
    return found


def _states(stratum: Stratum, arms: int, seeds: int) -> float:
    """What arm x state adds to the variance of an arm's mean; chance within an episode is in arm x seed already."""
    values = stratum.successes
    states = values.shape[2]
    if states < 2:
        return 0.0
    cells = values.mean(axis=1)
    inside = cells - cells.mean(axis=1, keepdims=True) - cells.mean(axis=0, keepdims=True) + cells.mean()
    of_states = float((inside**2).sum()) / ((arms - 1) * (states - 1))
    rest = values - cells[:, None] - values.mean(axis=2, keepdims=True) + cells.mean(axis=1)[:, None, None]
    rest = rest - rest.mean(axis=0, keepdims=True)
    of_rest = float((rest**2).sum()) / ((arms - 1) * (seeds - 1) * (states - 1))
    # The method of moments may come out below 0 where there is nothing.
    return stratum.weight**2 * max(0.0, of_states - of_rest / seeds) / states


def _interval(rows: Floats, strata: Sequence[Stratum], arm: int) -> tuple[float, float]:
    """Of one arm's value: between its seeds, and between the states of its means."""
    seeds = len(rows)
    variance = float(rows.var(ddof=1)) / seeds
    for stratum in strata:
        cells = stratum.successes[arm]
        if cells.shape[1] > 1:
            rest = cells - cells.mean(axis=0) - cells.mean(axis=1, keepdims=True) + cells.mean()
            noise = float((rest**2).sum()) / ((seeds - 1) * (cells.shape[1] - 1)) / seeds
            between = max(0.0, float(cells.mean(axis=0).var(ddof=1)) - noise)
            variance += stratum.weight**2 * between / cells.shape[1]
    half = float(t.ppf(1 - LEVEL / 2, seeds - 1)) * float(np.sqrt(variance))
    mean = float(rows.mean())
    return max(0.0, mean - half), min(1.0, mean + half)
