"""Which data set each training sample comes from, and which of its samples: a function of seed and position alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

# Keeps the draws of sources apart from the orders within them, which come from the same seed.
_STREAM = 0x50C
_BLOCK = 1 << 16


def shares(weights: Sequence[float], steps: Sequence[int], balance: bool) -> np.ndarray:
    """The probability that a sample comes from each source, float64.

    As the published pipeline has it: w_i n_i / sum(w n) where balanced, else w_i / sum(w); n_i is the number of steps
    of a data set as its transform leaves it, those that start no sample included.

    Args:
        weights: of each source, more than 0.
        steps: n_i.
        balance: `data.balance`.
    """
    mass = np.asarray(weights, np.float64) * (np.asarray(steps, np.float64) if balance else 1.0)
    return mass / mass.sum()


def epoch_length(weights: Sequence[float], steps: Sequence[int], balance: bool) -> int | None:
    """Samples after which the sources of weight 1 have been seen once: the published length of a mixture's epoch.

    None where no source has a weight of exactly 1: the published code fails then.
    """
    parts = shares(weights, steps, balance)
    whole = [n / share for weight, n, share in zip(weights, steps, parts, strict=True) if weight == 1.0]
    return int(max(whole)) if whole else None


class Order:
    """An endless sequence of samples with random access.

    Position p draws its source by the shares, independently of all others. A source shows its samples in passes: the
    k-th sample drawn from it is number k modulo n of a permutation given by seed and pass alone, so that none comes a
    second time before all have come once. One source is never drawn: its passes follow one another.

    Args:
        sizes: number of samples of each source.
        shares: as `shares` gives them.
        seed: of draws and permutations.
    """

    def __init__(self, sizes: Sequence[int], shares: Sequence[float], seed: int) -> None:
        self._sizes, self._seed = list(sizes), seed
        self._bounds = np.cumsum(np.asarray(shares, np.float64))
        # Drawn from each source before block b, for every block up to the furthest one asked for.
        self._before = [np.zeros(len(self._sizes), np.int64)]
        self._block: tuple[int, np.ndarray, np.ndarray] | None = None
        self._permutations: dict[tuple[int, int], np.ndarray] = {}

    def at(self, position: int) -> tuple[int, int]:
        """(source, sample of it) at a position."""
        if len(self._sizes) == 1:
            return 0, self._sample(0, position)
        block, place = divmod(position, _BLOCK)
        drawn, ranks = self._draws(block)
        source = int(drawn[place])
        return source, self._sample(source, int(self._before[block][source] + ranks[place]))

    def _draws(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Source of each position of a block, and how often that source was drawn before within the block."""
        if self._block is None or self._block[0] != block:
            while len(self._before) <= block:
                drawn = self._sources(len(self._before) - 1)
                self._before.append(self._before[-1] + np.bincount(drawn, minlength=len(self._sizes)))
            drawn = self._sources(block)
            ranks = np.empty(_BLOCK, np.int64)
            for source in range(len(self._sizes)):
                mine = drawn == source
                ranks[mine] = np.arange(np.count_nonzero(mine))
            self._block = block, drawn, ranks
        return self._block[1:]

    def _sources(self, block: int) -> np.ndarray:
        uniform = np.random.default_rng([self._seed, _STREAM, block]).random(_BLOCK)
        # Rounding may leave the last bound a little below 1.
        return np.minimum(np.searchsorted(self._bounds, uniform, side="right"), len(self._sizes) - 1)

    def _sample(self, source: int, number: int) -> int:
        turn, place = divmod(number, self._sizes[source])
        order = self._permutations.get((source, turn))
        if order is None:
            # A source alone has no number in its key: by this key runs of one source are recorded and resumed.
            entropy = [self._seed, turn] if len(self._sizes) == 1 else [self._seed, turn, source]
            # A batch crosses from one pass into the next; older ones are not needed again.
            for old in [key for key in self._permutations if key[0] == source and key[1] != turn - 1]:
                del self._permutations[old]
            # int32 takes half the memory, and two passes of each source are kept.
            order = np.arange(self._sizes[source], dtype=np.int32 if self._sizes[source] < 2**31 else np.int64)
            np.random.default_rng(entropy).shuffle(order)
            self._permutations[source, turn] = order
        return int(order[place])
