"""The policy of an evaluation: one Ray actor, whose forward passes serve all environments.

An answer must not depend on who else asks. So every forward pass has the same number of rows, filled up where fewer
wait; sequences are padded by their own length alone; and noise is drawn from the seed that comes with an observation.
With equal shapes a row still may depend on its place: vectorised loops treat the last elements of an array in another
way. Padding the whole sequence to a multiple of 32 avoids that in all the models here, and what remains is looked for
when the server starts: where a row's bits depend on its place, rows are computed one by one.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
from numpy.typing import NDArray

from maps_ray.evaluation.rollouts.checkpoint import PolicyFacts

if TYPE_CHECKING:
    from maps_ray.models.collate import Sample

_LENGTH_STEP = 32
_GPU_ROWS = 4


# Told apart by identity: `==` of samples would compare arrays, which have no one truth value.
@dataclass(frozen=True, eq=False)
class _Waiting:
    sample: Sample
    length: int
    seed: int
    answer: asyncio.Future[NDArray[np.float32]]


class PolicyServer:
    """Loads a checkpoint and answers observations.

    Args:
        facts: which checkpoint, and how it is read.
        rows: of every forward pass; None chooses for the device.
        threads: of torch on a CPU.
        device_map: where the weights lie, see `maps_ray.models.device_map`.
    """

    def __init__(self, facts: PolicyFacts, rows: int | None, threads: int, device_map: str = "auto") -> None:
        import torch

        from maps_ray.models.device_map import load_for_use
        from maps_ray.models.predict import Codec

        # Part of an evaluation's identity: sums that other threads share out differ in their last bits.
        torch.set_num_threads(threads)
        folder = Path(facts.folder)
        self._policy = load_for_use(folder, dtype=getattr(torch, facts.dtype), device_map=device_map, **facts.sizes)
        self._codec = self._policy.codec = Codec.read(self._policy, **facts.codec)
        self._runs_on = self._policy.runs_on or torch.device("cpu")
        self.device = self._runs_on.type
        self.rows = rows or (1 if self.device == "cpu" else _GPU_ROWS)
        self.forwards = 0
        self.answers = 0
        self._extra_tokens = self._tokens_beyond_text()
        if not self.rows_are_alike():
            self.rows = 1
        self._waiting: list[_Waiting] = []
        self._worker: asyncio.Task[None] | None = None

    def facts(self) -> dict[str, object]:
        """Device, rows of a forward pass, forward passes and answers so far."""
        return {"device": self.device, "rows": self.rows, "forwards": self.forwards, "answers": self.answers}

    async def act(
        self, images: list[NDArray[np.uint8]], sentence: str, proprio: NDArray[np.float32] | None, seed: int
    ) -> NDArray[np.float32]:
        """Actions (chunk, action_dim) in the units of the training data.

        Args:
            images: as `Codec.encode`.
            sentence: the instruction.
            proprio: in recorded units, or None for a policy that does not read it.
            seed: of the noise, for a head that draws any.

        Raises:
            ValueError: an observation that does not fit.
        """
        # In threads, so that requests come in while others are computed.
        sample = await asyncio.to_thread(self._codec.encode, images, sentence, proprio)
        answer = asyncio.get_running_loop().create_future()
        self._waiting.append(_Waiting(sample, self.padded_length(sample), seed, answer))
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._answer_all())
        return cast(NDArray[np.float32], await answer)

    async def _answer_all(self) -> None:
        while self._waiting:
            length = self._waiting[0].length
            group = [waiting for waiting in self._waiting if waiting.length == length][: self.rows]
            self._waiting = [waiting for waiting in self._waiting if waiting not in group]
            try:
                samples, seeds = [one.sample for one in group], [one.seed for one in group]
                actions = await asyncio.to_thread(self.forward, samples, seeds, length)
            except Exception as error:
                for waiting in group:
                    waiting.answer.set_exception(error)
                continue
            for waiting, row in zip(group, actions, strict=True):
                waiting.answer.set_result(row)

    def forward(self, samples: list[Sample], seeds: list[int], length: int) -> NDArray[np.float32]:
        """One pass over `rows` rows, of which the first are the samples: (samples, chunk, action_dim)."""
        spare = self.rows - len(samples)
        filled = samples + samples[:1] * spare
        actions = self._policy.predict_batch(filled, length=length, seeds=seeds + seeds[:1] * spare)
        self.forwards += 1
        self.answers += len(samples)
        return actions[: len(samples)]

    def padded_length(self, sample: Sample) -> int:
        """Tokens of the sequence that a sample is padded to.

        The mean that FiLM takes counts padding, and a causal policy may take another path where there is none: those
        are not padded, and share a pass with sequences of their own length only.
        """
        length = len(sample["input_ids"])
        config = self._policy.config
        if getattr(config, "film", False) or getattr(config, "kind", "oft") != "oft":
            return length
        total = length + self._extra_tokens
        return length + -total % _LENGTH_STEP

    def rows_are_alike(self) -> bool:
        """Whether an observation gets the same bits in every row, next to any others."""
        if self.rows == 1:
            return True
        samples = [self._probe(number) for number in range(self.rows)]
        seeds, length = list(range(self.rows)), self.padded_length(samples[0])
        expected = self.forward(samples, seeds, length)
        for shift in range(1, self.rows):
            moved = self.forward(samples[shift:] + samples[:shift], seeds[shift:] + seeds[:shift], length)
            if not np.array_equal(np.roll(moved, shift, axis=0), expected):
                return False
        alone = [self.forward([sample], [seed], length)[0] for sample, seed in zip(samples, seeds, strict=True)]
        return np.array_equal(np.stack(alone), expected)

    def _probe(self, seed: int) -> Sample:
        generator = np.random.default_rng(seed)
        codec = self._codec
        images = [generator.integers(0, 256, (*codec.image_size, 3), np.uint8) for _ in range(codec.num_images)]
        proprio = None
        if codec.use_proprio and codec.units.proprio is not None:
            proprio = generator.uniform(codec.units.proprio.low, codec.units.proprio.high)
        return codec.encode(images, "pick up the object", proprio)

    def _tokens_beyond_text(self) -> int:
        """Image patches and what else the language model reads besides the text."""
        import torch

        batch = self._codec.batch([self._probe(0)])
        with torch.no_grad():
            output = self._policy(**{name: tensor.to(self._runs_on) for name, tensor in batch.items()})
        return int(output.hidden.shape[1] - batch["input_ids"].shape[1])
