"""Which samples make which batch: a pure function of seed and position, whatever the number of workers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from maps_ray.data.augment import augment, augmentation_rng
from maps_ray.data.mixture import Order
from maps_ray.data.samples import Mixture
from maps_ray.models.contracts import Processor

if TYPE_CHECKING:
    from torch import Tensor


class Batches:
    """Endless training batches with random access.

    The samples form an endless sequence, see `Order`. Position p is the p-th sample of it. Optimizer step s takes
    positions s B .. s B + B - 1, where B is the global batch size; they are cut into `micro_batches` forward passes,
    and each of these into one part per worker. So any number of workers sees the same samples in the same step, and a
    run is resumed by its step number.

    Args:
        samples: the train split.
        processor: of the policy.
        seed: of draws, permutations and augmentation.
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
        samples: Mixture,
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
        self._samples = samples
        self._order = Order(samples.sizes, samples.shares, seed)
        self._rank, self._world_size = rank, world_size
        self.global_batch_size, self.micro_batches = global_batch_size, micro_batches
        self._local = global_batch_size // (world_size * micro_batches)
        self.encoder = Encoder(samples, processor, seed if augment else None)

    def sample_at(self, position: int) -> int:
        """Index of the sample at a position of the endless sequence."""
        return self._samples.index(*self._order.at(position))

    def indices(self, step: int, micro: int = 0) -> list[int]:
        """Samples of this worker in forward pass `micro` of optimizer step `step`."""
        return [index for _, index in self.plan(step, micro)]

    def batch(self, step: int, micro: int = 0) -> dict[str, Tensor]:
        """The collated batch of `indices(step, micro)`, its images changed at random where the batches augment."""
        return self.encoder[self.plan(step, micro)]

    def plan(self, step: int, micro: int = 0) -> list[tuple[int, int]]:
        """(position, sample) of each row of a batch."""
        start = step * self.global_batch_size + (micro * self._world_size + self._rank) * self._local
        return [(position, self.sample_at(position)) for position in range(start, start + self._local)]

    def plans(self, first: int, stop: int) -> Iterator[list[tuple[int, int]]]:
        """Of all batches of steps first .. stop - 1, `micro_batches` for each step, in order."""
        for step in range(first, stop):
            for micro in range(self.micro_batches):
                yield self.plan(step, micro)


class Encoder:
    """Reads, augments, encodes and collates samples by position; map-style, as `torch.utils.data.DataLoader` takes it.

    Args:
        samples: where the samples are read.
        processor: of the policy.
        seed: of the augmentation; None leaves the images alone.
    """

    def __init__(self, samples: Mixture, processor: Processor, seed: int | None = None) -> None:
        self._samples, self._processor, self._seed = samples, processor, seed

    def __getitem__(self, plan: Sequence[tuple[int, int]]) -> dict[str, Tensor]:
        """The collated batch of some (position, sample)."""
        encoded = []
        for position, index in plan:
            sample = self._samples[index]
            images = sample.images
            if self._seed is not None:
                # One generator for all views: each is changed otherwise, as upstream, which counts its seed up from
                # view to view (`obs_transforms.augment`).
                rng = augmentation_rng(self._seed, position)
                images = [
                    augment(image, rng) if seen else image for image, seen in zip(images, sample.seen, strict=True)
                ]
            encoded.append(self._processor.encode(sample.instruction, images, sample.proprio, sample.actions))
        return self._processor.collate(encoded)


class EvaluationBatches:
    """Evenly spaced samples of a split, each once over all workers.

    Every worker gets the same number of batches of the same size, as forward passes under ZeRO-3 are collective.

    Args:
        samples: of the split.
        processor: of the policy.
        batch_size: rows of a batch of one worker.
        max_samples: over all workers; fewer where the split has fewer.
        rank: of this worker.
        world_size: number of workers.
    """

    def __init__(
        self,
        samples: Mixture,
        processor: Processor,
        *,
        batch_size: int,
        max_samples: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.encoder = Encoder(samples, processor)
        count = min(len(samples), max_samples)
        chosen = np.linspace(0, len(samples) - 1, count).round().astype(int)
        rows = batch_size * world_size
        padded = -(-count // rows) * rows
        chosen = np.concatenate([chosen, np.full(padded - count, chosen[-1])])
        weights = (np.arange(padded) < count).astype(np.float32)
        mine = [slice(start + rank, start + rows, world_size) for start in range(0, padded, rows)]
        self.rows = [([int(index) for index in chosen[part]], weights[part]) for part in mine]
        """Of each batch: the sample of each row, and float32 (rows,): 1, or 0 for rows that only fill the batch up."""

    def __len__(self) -> int:
        return len(self.rows)

    def plans(self, first: int, stop: int) -> Iterator[list[tuple[int, int]]]:
        """As of `Batches`; a sample's position means nothing here."""
        for indices, _ in self.rows[first:stop]:
            yield list(enumerate(indices))
