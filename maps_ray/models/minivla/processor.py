"""Samples -> the policy's input: prompt and action tokens, pixels, right-padded batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from maps_ray.models.checkpoint_faults import CheckpointError
from maps_ray.models.collate import IGNORED, Sample, check_chunk, collate, make_sample
from maps_ray.models.images import ImageTransform
from maps_ray.models.minivla.config import ACTION_TOKENS, Kind
from maps_ray.models.minivla.folder import VQ_FOLDER, check_vq, read_checkpoint_config
from maps_ray.models.minivla.tokens import END_OF_TEXT, END_OF_TURN, ChatPrompt
from maps_ray.models.minivla.vq import VQActionTokenizer, load_vq
from maps_ray.models.openvla_oft.tokens import ActionTokenizer
from maps_ray.models.sizes import AttentionMask, ReleasedFault

# ImageNet's statistics for DINOv2, exact (OpenVLA's saved processor carries them rounded), and SigLIP's.
MEANS = ((0.485, 0.456, 0.406), (0.5, 0.5, 0.5))
DEVIATIONS = ((0.229, 0.224, 0.225), (0.5, 0.5, 0.5))

EVALUATION_TOKEN = 29871
"""What the authors' evaluation puts behind the prompt: Llama's empty token, "NING" in Qwen."""
# What it puts into the slots and behind them.
_SLOT, _STOP = 1, 2


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
    released: bool = False
    """The sequence of the authors' MiniVLA-OFT: the labels keep the prompt's last id, nothing ends the sequence."""
    faults: tuple[ReleasedFault, ...] = ()
    """Of theirs that are repeated."""

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path,
        *,
        kind: Kind | None = None,
        chunk: int = 8,
        action_dim: int = 7,
        attention_mask: AttentionMask | None = None,
        released_faults: Sequence[ReleasedFault] | None = None,
    ) -> Processor:
        """Reads `config.json`, `tokenizer.json` and, for MiniVLA-VQ, `vq/`.

        Args:
            path: the checkpoint's folder.
            kind: `vq` or `oft`; none takes what `config.json` says.
            chunk, action_dim: of the data.
            attention_mask, released_faults: of MiniVLA-OFT, as in `PolicySizes`: they decide on the sequence.

        Raises:
            CheckpointError: a file is missing or malformed, or the VQ tokenizer is for chunks of another shape.
        """
        folder, _, config = read_checkpoint_config(
            path,
            kind,
            chunk=chunk,
            action_dim=action_dim,
            use_proprio=False,
            attention_mask=attention_mask,
            released_faults=released_faults,
        )
        check_vq(folder, config)
        released = config.kind == "oft" and config.attention_mask == "causal"
        if "evaluation_token" in config.released_faults and config.text["vocab_size"] <= EVALUATION_TOKEN:
            raise CheckpointError(
                f"released_faults = ['evaluation_token']: the vocabulary of {config.text['vocab_size']} ids has no "
                f"{EVALUATION_TOKEN}; leave it out"
            )
        # Counted with the added action tokens, as `from_file` asks; the release has none.
        size = config.action_token_end + ACTION_TOKENS if released else config.tokenizer_size
        prompts = ChatPrompt.from_file(folder / "tokenizer.json", size)
        return cls(
            prompts=prompts,
            action_tokens=VQActionTokenizer(load_vq(folder / VQ_FOLDER), config.tokenizer_size - 1)
            if config.kind == "vq"
            else ActionTokenizer(config.action_token_end, ACTION_TOKENS),
            images=image_transform((config.image_size, config.image_size)),
            chunk=chunk,
            action_dim=action_dim,
            stop=() if released else (prompts.token(END_OF_TURN), prompts.token(END_OF_TEXT)),
            pad=prompts.token(END_OF_TEXT),
            released=released,
            faults=config.released_faults,
        )

    def encode(
        self,
        instruction: str,
        images: Sequence[NDArray[np.uint8]],
        proprio: NDArray[np.floating] | None = None,
        actions: NDArray[np.floating] | None = None,
    ) -> Sample:
        """One sample, see `contracts.Processor`. Labels keep the action tokens and what ends the sequence.

        Without actions MiniVLA-OFT gets slots that hold any action token, MiniVLA-VQ the prompt alone.
        """
        check_chunk(actions, (self.chunk, self.action_dim))
        prompt, answer = self.prompts.encode(instruction), self._answer(actions)
        pixels = self.images.all(images)
        if actions is None and "evaluation_token" in self.faults:
            sample = make_sample((*prompt, EVALUATION_TOKEN), answer, pixels, proprio, None)
            slots = sample["labels"] != IGNORED
            ids = np.append(np.where(slots, _SLOT, sample["input_ids"]), _STOP)
            return sample | {"input_ids": ids, "labels": np.append(sample["labels"], IGNORED)}
        return make_sample(prompt, answer, pixels, proprio, actions, labelled=int(self.released))

    def _answer(self, actions: NDArray[np.floating] | None) -> NDArray[np.int64]:
        tokens: NDArray[np.int64]
        if isinstance(self.action_tokens, ActionTokenizer):
            values = np.zeros((self.chunk, self.action_dim)) if actions is None else actions
            tokens = self.action_tokens.encode(values).ravel()
        elif actions is None:
            return np.empty(0, np.int64)
        else:
            tokens = self.action_tokens.encode(torch.as_tensor(np.asarray(actions, np.float32))[None])[0].numpy()
        return np.concatenate([tokens, np.asarray(self.stop, np.int64)])

    def collate(self, samples: Sequence[Mapping[str, NDArray[np.generic]]]) -> dict[str, Tensor]:
        """A batch of samples, see `contracts.Processor`."""
        return collate(samples, self.pad, by_length=self.released and "masked_slot" not in self.faults)


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
