"""Samples -> the policy's input: prompt and action tokens, pixels, right-padded batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from maps_ray.models.collate import Sample, check_chunk, collate, make_sample
from maps_ray.models.files.folders import read_config
from maps_ray.models.images import ImageTransform
from maps_ray.models.openvla_oft.config import PolicyConfig
from maps_ray.models.openvla_oft.folder import read_images, read_prompts
from maps_ray.models.openvla_oft.tokens import ActionTokenizer, PromptTokenizer


@dataclass(frozen=True)
class Processor:
    """Makes the policy's input; picklable, so that a data worker can own one."""

    prompts: PromptTokenizer
    action_tokens: ActionTokenizer
    images: ImageTransform
    chunk: int
    action_dim: int
    stop: int
    """Id that ends a sequence."""
    pad: int

    @classmethod
    def from_checkpoint(cls, path: str | Path, *, chunk: int = 8, action_dim: int = 7) -> Processor:
        """Reads `config.json`, the processor's and the tokenizer's files and, if there, `generation_config.json`.

        Raises:
            CheckpointError: a file is missing or malformed, or images and policy differ in size.
        """
        folder, raw = read_config(path)
        config = PolicyConfig.from_dict(raw, chunk=chunk, action_dim=action_dim)
        images = read_images(folder, config)
        prompts, stop, pad = read_prompts(folder, raw, config)
        return cls(
            prompts=prompts,
            action_tokens=ActionTokenizer(config.tokenizer_size, config.action_bins),
            images=images,
            chunk=chunk,
            action_dim=action_dim,
            stop=stop,
            pad=pad,
        )

    def encode(
        self,
        instruction: str,
        images: Sequence[NDArray[np.uint8]],
        proprio: NDArray[np.floating] | None = None,
        actions: NDArray[np.floating] | None = None,
    ) -> Sample:
        """One sample, see `contracts.Processor`. Without actions the slots hold any action token, which the policy
        zeroes."""
        shape = (self.chunk, self.action_dim)
        check_chunk(actions, shape)
        slots = self.action_tokens.encode(np.zeros(shape) if actions is None else actions).ravel()
        answer = np.array([*slots, self.stop], np.int64)
        return make_sample(self.prompts.encode(instruction), answer, self.images.all(images), proprio, actions)

    def collate(self, samples: Sequence[Mapping[str, NDArray[np.generic]]]) -> dict[str, Tensor]:
        """A batch of samples, see `contracts.Processor`."""
        return collate(samples, self.pad)
