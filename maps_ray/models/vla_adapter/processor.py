"""A sentence and images to VLA-Adapter's input, and a batch of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from maps_ray.models.collate import Sample, check_chunk, collate, make_sample
from maps_ray.models.files.folders import read_preprocessor
from maps_ray.models.images import ImageTransform
from maps_ray.models.minivla.processor import image_transform
from maps_ray.models.minivla.tokens import END_OF_TEXT, ChatPrompt
from maps_ray.models.vla_adapter.folder import read_checkpoint_config


@dataclass(frozen=True)
class Processor:
    """Makes the policy's input; picklable, so that a data worker can own one."""

    prompts: ChatPrompt
    images: ImageTransform
    chunk: int
    action_dim: int
    slots: tuple[int, ...]
    """Ids that hold the places of the action queries.

    Published training puts the ids of the true actions there. The queries replace their embeddings, so only the
    attention mask could tell them apart, and does where an action's id happens to be the padding's: a fault that one
    fixed id avoids.
    """
    pad: int

    @classmethod
    def from_checkpoint(cls, path: str | Path, *, chunk: int = 8, action_dim: int = 7) -> Processor:
        """Reads `config.json`, `tokenizer.json` and, where there is one, the processor's file.

        Raises:
            CheckpointError: a file is missing or malformed.
        """
        folder, _, config = read_checkpoint_config(path, chunk=chunk, action_dim=action_dim)
        prompts = ChatPrompt.from_file(folder / "tokenizer.json", config.tokenizer_size)
        size = (config.image_size, config.image_size)
        names = ("preprocessor_config.json", "processor_config.json")
        stored = any((folder / name).is_file() for name in names)
        return cls(
            prompts=prompts,
            images=ImageTransform.from_config(read_preprocessor(folder)) if stored else image_transform(size),
            chunk=chunk,
            action_dim=action_dim,
            slots=(_slot_id(config.action_token_begin, prompts.token(END_OF_TEXT)),) * config.queries,
            pad=prompts.token(END_OF_TEXT),
        )

    def encode(
        self,
        instruction: str,
        images: Sequence[NDArray[np.uint8]],
        proprio: NDArray[np.floating] | None = None,
        actions: NDArray[np.floating] | None = None,
    ) -> Sample:
        """One sample, see `contracts.Processor`. Labels mark the places of the action queries."""
        check_chunk(actions, (self.chunk, self.action_dim))
        slots = np.asarray(self.slots, np.int64)
        return make_sample(self.prompts.encode(instruction), slots, self.images.all(images), proprio, actions)

    def collate(self, samples: Sequence[Mapping[str, NDArray[np.generic]]]) -> dict[str, Tensor]:
        """A batch of samples, see `contracts.Processor`."""
        return collate(samples, self.pad)


def _slot_id(begin: int, pad: int) -> int:
    """The first id that marks a slot and is not the padding's."""
    return begin + 1 if begin + 1 != pad else begin + 2
