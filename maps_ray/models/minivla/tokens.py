"""Instructions as Qwen's chat prompt."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from tokenizers import Tokenizer

from maps_ray.models.checkpoint_faults import CheckpointError
from maps_ray.models.files.folders import read_tokenizer
from maps_ray.models.minivla.config import ACTION_TOKENS

SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
# The system's line is what Qwen2.5's chat template puts in where none is given.
PROMPT = (
    "<|im_start|>system\n" + SYSTEM + "<|im_end|>\n"
    "<|im_start|>user\nWhat action should the robot take to {instruction}?<|im_end|>\n"
    "<|im_start|>assistant\n"
)
END_OF_TURN, END_OF_TEXT = "<|im_end|>", "<|endoftext|>"


class ChatPrompt:
    """Instruction -> ids of MiniVLA's prompt."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        # A data set has few sentences and many samples.
        self.encode = lru_cache(maxsize=4096)(self._encode)

    def __getstate__(self) -> str:
        # Without the cache, which cannot be pickled.
        return self._tokenizer.to_str()

    def __setstate__(self, state: str) -> None:
        self.__init__(Tokenizer.from_str(state))  # type: ignore[misc]

    @classmethod
    def from_file(cls, path: Path, tokenizer_size: int) -> ChatPrompt:
        """Reads a `tokenizer.json`: Qwen2.5's, with MiniVLA's action tokens or without them.

        Args:
            path: the file.
            tokenizer_size: ids with the action tokens, which are the last ones.

        Raises:
            CheckpointError: no such file, not one that the tokenizers library reads, or of another vocabulary.
        """
        tokenizer = read_tokenizer(path, "Qwen/Qwen2.5-0.5B")
        missing = [
            token for token in ("<|im_start|>", END_OF_TURN, END_OF_TEXT) if tokenizer.token_to_id(token) is None
        ]
        if missing:
            raise CheckpointError(f"{path} does not know {', '.join(missing)}: it is not Qwen's tokenizer")
        first = tokenizer_size - ACTION_TOKENS
        # The greatest id and not the number of ids, between which there may be gaps.
        ids = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        fits = (
            ids <= first
            if tokenizer.token_to_id("<|extra_0|>") is None
            else (
                tokenizer.token_to_id("<|extra_0|>") == first
                and tokenizer.token_to_id(f"<|extra_{ACTION_TOKENS - 1}|>") == tokenizer_size - 1
            )
        )
        if not fits:
            raise CheckpointError(
                f"{path} has {ids} ids, and its action tokens are not {first} to {tokenizer_size - 1}: it is not the "
                "tokenizer of this checkpoint"
            )
        return cls(tokenizer)

    def token(self, name: str) -> int:
        """The id of a special token that `from_file` looked for."""
        number = self._tokenizer.token_to_id(name)
        assert number is not None
        return number

    def _encode(self, instruction: str) -> tuple[int, ...]:
        """The prompt's ids; the first is `<|im_start|>`."""
        text = PROMPT.format(instruction=instruction.lower())
        return tuple(self._tokenizer.encode(text, add_special_tokens=False).ids)
