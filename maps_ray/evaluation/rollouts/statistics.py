"""How sure a success rate is, and whether two differ. Standard library only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Rate:
    """A share of successes with Wilson's interval (1927), which holds for few episodes and rates near 0 or 1."""

    successes: int
    episodes: int

    @property
    def value(self) -> float:
        """NaN without episodes."""
        return self.successes / self.episodes if self.episodes else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """Bounds at `CONFIDENCE`; 0 and 1 without episodes."""
        n = self.episodes
        if n == 0:
            return 0.0, 1.0
        z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
        center = (self.value + z**2 / (2 * n)) / (1 + z**2 / n)
        half = z / (1 + z**2 / n) * math.sqrt(self.value * (1 - self.value) / n + z**2 / (4 * n**2))
        # What the formula gives there but for rounding.
        low = 0.0 if self.successes == 0 else center - half
        high = 1.0 if self.successes == n else center + half
        return low, high

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.value:.1%} [{low:.1%}, {high:.1%}]"


@dataclass(frozen=True)
class MeanLength:
    """The mean number of instructions carried out in a row, CALVIN's average length."""

    counts: tuple[int, ...]
    """Chains of which 0, 1, 2, ... instructions were carried out."""

    @property
    def value(self) -> float:
        """NaN without chains."""
        chains = sum(self.counts)
        return sum(length * count for length, count in enumerate(self.counts)) / chains if chains else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """Bounds at `CONFIDENCE`: Wilson's interval with the length's own variance.

        A length in 0..n is n times a share. Wilson's interval of a rate takes the variance from the rate; here it is
        that of the chains seen, which is never more. Where all chains have one length it is a rate's interval.
        """
        chains, longest = sum(self.counts), len(self.counts) - 1
        if chains == 0:
            return 0.0, float(longest)
        share = self.value / longest
        variance = sum(count * (length / longest - share) ** 2 for length, count in enumerate(self.counts)) / chains
        spread = variance / (share * (1 - share)) if 0 < share < 1 else 1.0
        effective = chains / spread if spread > 0 else chains
        z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
        center = (share + z**2 / (2 * effective)) / (1 + z**2 / effective)
        half = z / (1 + z**2 / effective) * math.sqrt(share * (1 - share) / effective + z**2 / (4 * effective**2))
        return longest * max(center - half, 0.0), longest * min(center + half, 1.0)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.value:.2f} [{low:.2f}, {high:.2f}]"


@dataclass(frozen=True)
class Paired:
    """Two checkpoints on the same episodes."""

    episodes: int
    first_only: int
    """Episodes that only the first one solved."""
    second_only: int
    """Episodes that only the second one solved."""

    @classmethod
    def of(cls, first: Sequence[bool], second: Sequence[bool]) -> Paired:
        """From successes in the same order of episodes.

        Raises:
            ValueError: different lengths.
        """
        pairs = list(zip(first, second, strict=True))
        return cls(len(pairs), sum(a and not b for a, b in pairs), sum(b and not a for a, b in pairs))

    @property
    def difference(self) -> float:
        """Success rate of the first minus that of the second; NaN without episodes."""
        return (self.first_only - self.second_only) / self.episodes if self.episodes else math.nan

    @property
    def p_value(self) -> float:
        """Of the exact McNemar test, two-sided: how likely so uneven a split of the episodes that only one of both
        solved is, were each as likely to be solved by either."""
        return _two_sided(min(self.first_only, self.second_only), self.first_only + self.second_only)

    @property
    def smallest_difference(self) -> float:
        """The least difference of the rates that these episodes could have told from chance, given on how many of them
        the two disagree; where these are too few, the least with more of them. More than 1 when no result could."""
        disagree = self.first_only + self.second_only
        fewest = _fewest_to_tell()
        if disagree < fewest:
            return fewest / self.episodes if self.episodes else math.inf
        minority = max(k for k in range(disagree // 2 + 1) if _two_sided(k, disagree) < 1 - CONFIDENCE)
        return (disagree - 2 * minority) / self.episodes

    @property
    def told_apart(self) -> bool:
        """Whether the difference is beyond chance at `CONFIDENCE`."""
        return self.p_value < 1 - CONFIDENCE

    def warning(self) -> str | None:
        """In words, why these episodes do not tell the two apart; None when they do."""
        if self.told_apart:
            return None
        return (
            f"{self.episodes} episodes cannot tell the two apart (p = {self.p_value:.2g}): the rates differ by "
            f"{abs(self.difference):.1%}, and less than {self.smallest_difference:.1%} is within chance here; "
            "run more episodes"
        )


def detectable_difference(episodes: int, rate: float = 0.5, power: float = 0.8) -> float:
    """The difference of two success rates that so many episodes of each find with probability `power`, unpaired.

    Normal approximation: (z_{0.975} + z_power) sqrt(2 rate (1 - rate) / episodes). Pairing finds smaller ones where the
    two solve mostly the same episodes.

    Args:
        episodes: of each of both.
        rate: about which the two lie; 0.5 is the worst case.
        power: probability to find it.
    """
    z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2) + NormalDist().inv_cdf(power)
    return z * math.sqrt(2 * rate * (1 - rate) / episodes)


def _two_sided(fewer: int, disagree: int) -> float:
    """Two-sided binomial test of a fair coin: `fewer` heads or as uneven, of `disagree` throws."""
    tail = sum(math.comb(disagree, k) for k in range(fewer + 1))
    return min(1.0, 2 * tail / 2**disagree)


def _fewest_to_tell() -> int:
    disagree = 1
    while _two_sided(0, disagree) >= 1 - CONFIDENCE:
        disagree += 1
    return disagree
