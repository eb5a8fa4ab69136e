"""Reading `tokenizer.json`."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer

from maps_ray.models.errors import CheckpointError


def read_tokenizer(path: Path, source: str = "") -> Tokenizer:
    """A tokenizer that neither pads nor cuts, whatever its file says.

    Args:
        path: the file.
        source: where the right one can be copied from, for the message.

    Raises:
        CheckpointError: no such file, or not one that the tokenizers library reads.
    """
    if not path.is_file():
        whose = f" (that of {source})" if source else ""
        raise CheckpointError(f"{path} is missing: the checkpoint folder must hold its tokenizer{whose}")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises a bare Exception
        raise CheckpointError(f"cannot read {path}: {error}") from None
    # A tokenizer saved after batched use pads and cuts from then on.
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer
