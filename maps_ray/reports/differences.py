"""How sure a difference between two runs is: bootstrap over episodes.

Episodes, not samples, are drawn: the samples of one demonstration resemble each other. Two runs that were evaluated on
the same episodes are compared pair by pair. Each run is one training run, so the interval says nothing about the
spread between training seeds.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from maps_ray.reports.records import OVERALL, EpisodeError, SplitResult

RESAMPLES = 10_000
CONFIDENCE = 0.95
_FEWEST_EPISODES = 2


@dataclass(frozen=True)
class Interval:
    low: float
    high: float

    @property
    def covers_zero(self) -> bool:
        return self.low <= 0 <= self.high


@dataclass(frozen=True)
class Difference:
    """Error of a run against a baseline's, relative to the baseline's: -0.1 is a tenth less error."""

    relative: float
    interval: Interval | None
    """95 %; None where fewer than two episodes were evaluated."""
    paired: bool
    """Both runs saw the same episodes, and were compared one by one."""


def mean_interval(result: SplitResult, part: str = OVERALL) -> Interval | None:
    """95 % interval of a mean error; None with fewer than two episodes that tell the error of that part."""
    episodes = _with(part, result)
    if len(episodes) < _FEWEST_EPISODES:
        return None
    return _interval(_means(*_columns(list(episodes.values()), part), _draws(len(episodes), seed=0)))


def difference(run: SplitResult, baseline: SplitResult, part: str = OVERALL) -> Difference:
    """Compares two results on one split. A baseline's error of 0 gives an infinite difference, or NaN against 0."""
    ours, theirs = _with(part, run), _with(part, baseline)
    paired = ours.keys() == theirs.keys() and all(ours[index].samples == theirs[index].samples for index in ours)
    relative = _ratio(np.array(run.errors[part]), np.array(baseline.errors[part]))
    if min(len(ours), len(theirs)) < _FEWEST_EPISODES:
        return Difference(float(relative), None, paired)
    indices = list(ours)
    draws = _draws(len(ours), seed=0)
    base_draws = draws if paired else _draws(len(theirs), seed=1)
    base_episodes = [theirs[index] for index in indices] if paired else list(theirs.values())
    means = _means(*_columns([ours[index] for index in indices], part), draws)
    base_means = _means(*_columns(base_episodes, part), base_draws)
    return Difference(float(relative), _interval(_ratio(means, base_means)), paired)


def _with(part: str, result: SplitResult) -> dict[str, EpisodeError]:
    return {episode.episode: episode for episode in result.episodes if part in episode.errors}


def _columns(episodes: list[EpisodeError], part: str) -> tuple[np.ndarray, np.ndarray]:
    weights = np.array([episode.samples for episode in episodes], dtype=np.float64)
    return weights, np.array([episode.errors[part] for episode in episodes], dtype=np.float64)


def _draws(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(count, size=(RESAMPLES, count))


def _means(weights: np.ndarray, errors: np.ndarray, draws: np.ndarray) -> np.ndarray:
    drawn = weights[draws]
    means: np.ndarray = (drawn * errors[draws]).sum(1) / drawn.sum(1)
    return means


def _ratio(values: np.ndarray, base: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(values / base - 1)


def _interval(values: np.ndarray) -> Interval | None:
    if not np.isfinite(values).all():
        return None
    low, high = np.quantile(values, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval(float(low), float(high))
