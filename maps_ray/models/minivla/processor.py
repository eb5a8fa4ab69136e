"""Samples -> the policy's input: prompt and action tokens, pixels, right-padded batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from maps_ray.models.collate import Sample, check_chunk, collate, make_sample
from maps_ray.models.images import ImageTransform
from maps_ray.models.minivla.config import ACTION_TOKENS, Kind
from maps_ray.models.minivla.folder import VQ_FOLDER, check_vq, read_checkpoint_config
from maps_ray.models.minivla.tokens import END_OF_TEXT, END_OF_TURN, ChatPrompt
from maps_ray.models.minivla.vq import VQActionTokenizer, load_vq
from maps_ray.models.openvla_oft.tokens import ActionTokenizer

# ImageNet's statistics for DINOv2, exact (OpenVLA's saved processor carries them rounded), and SigLIP's.
MEANS = ((0.485, 0.456, 0.406), (0.5, 0.5, 0.5))
DEVIATIONS = ((0.229, 0.224, 0.225), (0.5, 0.5, 0.5))


@dataclass(frozen=True)
class Processor:
    """Makes the policy's input; picklable, so that a data worker can own one."""

    prompts: ChatPrompt
    action_tokens: ActionTokenizer | VQActionTokenizer
    """Bins, which only mark the slots of MiniVLA-OFT, or MiniVLA-VQ's codes."""
    images: ImageTransform
    chunk: int
    action_dim: int
    stop: tuple[int, ...]
    """Ids that end a sequence."""
    pad: int

    @classmethod
    def from_checkpoint(
        cls, path: str | Path, *, kind: Kind | None = None, chunk: int = 8, action_dim: int = 7
    ) -> Processor:
        """Reads `config.json`, `tokenizer.json` and, for MiniVLA-VQ, `vq/`.

        Raises:
            CheckpointError: a file is missing or malformed, or the VQ tokenizer is for chunks of another shape.
        """
        folder, _, config = read_checkpoint_config(path, kind, chunk=chunk, action_dim=action_dim, use_proprio=False)
        check_vq(folder, config)
        prompts = ChatPrompt.from_file(folder / "tokenizer.json", config.tokenizer_size)
        size = (config.image_size, config.image_size)
        return cls(
            prompts=prompts,
            action_tokens=VQActionTokenizer(load_vq(folder / VQ_FOLDER), config.tokenizer_size - 1)
            if config.kind == "vq"
            else ActionTokenizer(config.tokenizer_size, ACTION_TOKENS),
            images=image_transform(size),
            chunk=chunk,
            action_dim=action_dim,
            stop=(prompts.token(END_OF_TURN), prompts.token(END_OF_TEXT)),
            pad=prompts.token(END_OF_TEXT),
        )

    def encode(
        self,
        instruction: str,
        images: Sequence[NDArray[np.uint8]],
        proprio: NDArray[np.floating[Any]] | None = None,
        actions: NDArray[np.floating[Any]] | None = None,
    ) -> Sample:
        """One sample.

        Args:
            instruction: the task's sentence.
            images: RGB, (H, W, 3) uint8 of any size, primary camera first.
            proprio: (proprio_dim,) normalised.
            actions: (chunk, action_dim) normalised; None where they are to be predicted. MiniVLA-OFT then gets slots
                that hold any action token, MiniVLA-VQ the prompt alone.

        Returns:
            `pixel_values` (6 * images, height, width) float32, `input_ids` and `labels` (L,) int64, and `proprio` and
            `actions` float32 where given. Labels keep the action tokens and what ends the sequence.

        Raises:
            ValueError: an image or the actions have another shape.
        """
        check_chunk(actions, (self.chunk, self.action_dim))
        return make_sample(
            self.prompts.encode(instruction), self._answer(actions), self.images.all(images), proprio, actions
        )

    def _answer(self, actions: NDArray[np.floating[Any]] | None) -> NDArray[np.int64]:
        tokens: NDArray[np.int64]
        if isinstance(self.action_tokens, ActionTokenizer):
            values = np.zeros((self.chunk, self.action_dim)) if actions is None else actions
            tokens = self.action_tokens.encode(values).ravel()
        elif actions is None:
            return np.empty(0, np.int64)
        else:
            tokens = self.action_tokens.encode(torch.as_tensor(np.asarray(actions, np.float32))[None])[0].numpy()
        return np.concatenate([tokens, np.asarray(self.stop, np.int64)])

    def collate(self, samples: Sequence[Mapping[str, NDArray[Any]]]) -> dict[str, Tensor]:
        """Samples of `encode` -> the keyword arguments of the policy's `forward`, padded on the right.

        Raises:
            ValueError: no samples, or samples of which only some have proprio or actions.
        """
        return collate(samples, self.pad)


def image_transform(size: tuple[int, int]) -> ImageTransform:
    """MiniVLA's preprocessing: bicubic to `size` = (height, width) without keeping the aspect, then normalised."""
    return ImageTransform.from_config(
        {
            "image_resize_strategy": "resize-naive",
            "input_sizes": [[3, *size]] * 2,
            "interpolations": ["bicubic"] * 2,
            "means": MEANS,
            "stds": DEVIATIONS,
        }
    )
