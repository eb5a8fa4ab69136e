"""Instructions and actions as token ids."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray
from tokenizers import Tokenizer

from maps_ray.models.files.folders import read_tokenizer

if TYPE_CHECKING:
    from torch import Tensor

PROMPT = "In: What action should the robot take to {instruction}?\nOut: "
LLAMA_SPACE = 29871
"""Llama-2's id of the lone word boundary, with which a prompt ends before the actions."""


class ActionTokenizer:
    """Bins normalised action values; the bins are the last ids of the tokenizer, the greatest value the lowest id."""

    def __init__(self, tokenizer_size: int, bins: int = 256) -> None:
        self.tokenizer_size = tokenizer_size
        self.bins = np.linspace(-1.0, 1.0, bins)
        self.bin_centers = (self.bins[:-1] + self.bins[1:]) / 2

    def encode(self, actions: ArrayLike) -> NDArray[np.int64]:
        """Normalised actions, clipped to -1..1 -> ids of the same shape."""
        values = np.clip(np.asarray(actions, np.float64), -1.0, 1.0)
        # 256 edges make 255 bins: a value of exactly 1 alone gets the 256th number, which `decode` takes for the last
        # bin. OpenVLA's own `ActionTokenizer` (arXiv 2406.09246) does so too.
        return self.tokenizer_size - np.digitize(values, self.bins).astype(np.int64)

    def decode(self, ids: ArrayLike) -> NDArray[np.float64]:
        """Ids -> bin centers; ids out of range give the nearest bin."""
        bins = self.tokenizer_size - np.asarray(ids, np.int64) - 1
        return self.bin_centers[np.clip(bins, 0, len(self.bin_centers) - 1)]


def decode_ids(ids: Tensor, tokenizer_size: int, bins: int) -> Tensor:
    """`ActionTokenizer.decode` on the ids' device: int64 ids -> fp32 bin centers of the same shape."""
    width = 2 / (bins - 1)
    return -1 + width * ((tokenizer_size - ids - 1).clamp(0, bins - 2) + 0.5)


class PromptTokenizer:
    """Instruction -> ids of OpenVLA's prompt."""

    def __init__(self, tokenizer: Tokenizer, bos: int) -> None:
        self._tokenizer = tokenizer
        self._bos = bos
        # Other tokenizers, such as the tiny one, have another token there or none.
        self._ends_with_space = tokenizer.id_to_token(LLAMA_SPACE) == "▁"
        # A data set has few sentences and many samples.
        self.encode = lru_cache(maxsize=4096)(self._encode)

    def __getstate__(self) -> tuple[str, int]:
        # Without the cache, which cannot be pickled.
        return self._tokenizer.to_str(), self._bos

    def __setstate__(self, state: tuple[str, int]) -> None:
        self.__init__(Tokenizer.from_str(state[0]), state[1])  # type: ignore[misc]

    @property
    def size(self) -> int:
        """Number of ids, added tokens included."""
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    @classmethod
    def from_file(cls, path: Path, bos: int) -> PromptTokenizer:
        """Reads a `tokenizer.json`.

        Raises:
            CheckpointError: no such file, or not one that the tokenizers library reads.
        """
        return cls(read_tokenizer(path), bos)

    def _encode(self, instruction: str) -> tuple[int, ...]:
        """The prompt's ids, BOS first; on Llama's tokenizer the last is the lone word boundary."""
        # Lower case, as upstream's `RLDSBatchTransform` trains.
        ids = self._tokenizer.encode(PROMPT.format(instruction=instruction.lower())).ids
        # By a post-processor, which a `tokenizer.json` may lack.
        ids = ids if ids[:1] == [self._bos] else [self._bos, *ids]
        if self._ends_with_space and ids[-1] != LLAMA_SPACE:
            # In training it stands before the answer; the published `predict_action` appends it too.
            ids = [*ids, LLAMA_SPACE]
        return tuple(ids)
