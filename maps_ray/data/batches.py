"""Which samples make which batch: a pure function of seed and position, whatever the number of workers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from maps_ray.data.augment import augment, augmentation_rng
from maps_ray.data.samples import Samples


class Processor(Protocol):
    """Turns samples into a policy's inputs."""

    def encode(
        self,
        instruction: str,
        images: Sequence[np.ndarray],
        proprio: np.ndarray | None,
        actions: np.ndarray | None,
    ) -> Any:
        """One sample: tokens, pixel values, normalised proprio (D,) and actions (chunk, A)."""

    def collate(self, samples: Sequence[Any]) -> Any:
        """A batch of encoded samples, padded to equal length."""


class Batches:
    """Endless training batches with random access.

    The samples form an endless sequence of epochs; the order within epoch e is a permutation given by (seed, e) alone.
    Position p is the p-th sample of that sequence. Optimizer step s takes positions s B .. s B + B - 1, where B is the
    global batch size; they are cut into `micro_batches` forward passes, and each of these into one part per worker.
    So any number of workers sees the same samples in the same step, and a run is resumed by its step number.

    Args:
        samples: the train split.
        processor: of the policy.
        seed: of the permutations.
        global_batch_size: B, samples per optimizer step over all workers.
        rank: of this worker.
        world_size: number of workers.
        micro_batches: gradient accumulation.
        augment: change the images at random, by (seed, position) alone.

    Raises:
        ValueError: B does not divide evenly.
    """

    def __init__(
        self,
        samples: Samples,
        processor: Processor,
        *,
        seed: int,
        global_batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        micro_batches: int = 1,
        augment: bool = False,
    ) -> None:
        if global_batch_size % (world_size * micro_batches):
            raise ValueError(
                f"global batch size {global_batch_size} does not divide by {world_size} workers x {micro_batches} "
                "micro-batches"
            )
        self._samples, self._processor = samples, processor
        self._seed, self._rank, self._world_size = seed, rank, world_size
        self.global_batch_size, self.micro_batches = global_batch_size, micro_batches
        self._augment = augment
        self._local = global_batch_size // (world_size * micro_batches)
        self._orders: dict[int, np.ndarray] = {}

    def sample_at(self, position: int) -> int:
        """Index of the sample at a position of the endless sequence."""
        epoch, place = divmod(position, len(self._samples))
        order = self._orders.get(epoch)
        if order is None:
            order = np.random.default_rng([self._seed, epoch]).permutation(len(self._samples))
            # A batch crosses from one epoch into the next; older orders are not needed again.
            self._orders = {e: kept for e, kept in self._orders.items() if e == epoch - 1} | {epoch: order}
        return int(order[place])

    def indices(self, step: int, micro: int = 0) -> list[int]:
        """Samples of this worker in forward pass `micro` of optimizer step `step`."""
        return [self.sample_at(position) for position in self._positions(step, micro)]

    def batch(self, step: int, micro: int = 0) -> Any:
        """The collated batch of `indices(step, micro)`, its images changed at random where the batches augment."""
        indices = self.indices(step, micro)
        if not self._augment:
            return encode_batch(self._samples, self._processor, indices)
        rngs = [augmentation_rng(self._seed, position) for position in self._positions(step, micro)]
        return encode_batch(self._samples, self._processor, indices, rngs)

    def _positions(self, step: int, micro: int) -> range:
        start = step * self.global_batch_size + (micro * self._world_size + self._rank) * self._local
        return range(start, start + self._local)

    def between(self, first: int, stop: int) -> Iterator[Any]:
        """All batches of steps first .. stop - 1, `micro_batches` for each step, in order."""
        for step in range(first, stop):
            for micro in range(self.micro_batches):
                yield self.batch(step, micro)


@dataclass(frozen=True)
class EvaluationBatch:
    """One worker's share of an evaluation step."""

    batch: Any
    indices: list[int]
    """Sample of each row."""
    weights: np.ndarray
    """float32 (rows,): 1, or 0 for rows that only fill the batch up."""


def evaluation_batches(
    samples: Samples,
    processor: Processor,
    *,
    batch_size: int,
    max_samples: int,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[EvaluationBatch]:
    """Evenly spaced samples of a split, each once over all workers.

    Every worker gets the same number of batches of the same size, as forward passes under ZeRO-3 are collective.
    """
    count = min(len(samples), max_samples)
    chosen = np.linspace(0, len(samples) - 1, count).round().astype(int)
    rows = batch_size * world_size
    padded = -(-count // rows) * rows
    chosen = np.concatenate([chosen, np.full(padded - count, chosen[-1])])
    weights = (np.arange(padded) < count).astype(np.float32)
    for start in range(0, padded, rows):
        mine = slice(start + rank, start + rows, world_size)
        indices = [int(index) for index in chosen[mine]]
        yield EvaluationBatch(encode_batch(samples, processor, indices), indices, weights[mine])


def encode_batch(
    samples: Samples, processor: Processor, indices: Sequence[int], rngs: Sequence[np.random.Generator] | None = None
) -> Any:
    """Encodes and collates the samples named; with a generator for each, its images are augmented."""
    encoded = []
    for place, index in enumerate(indices):
        sample = samples[index]
        images = sample.images if rngs is None else [augment(image, rngs[place]) for image in sample.images]
        encoded.append(processor.encode(sample.instruction, images, sample.proprio, sample.actions))
    return processor.collate(encoded)
