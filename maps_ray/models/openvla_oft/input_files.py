"""What stands between a sample and the policy, from the files of a checkpoint folder, and whether it fits. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from maps_ray.models.errors import CheckpointError
from maps_ray.models.files.folders import read_preprocessor
from maps_ray.models.files.formats import read_json
from maps_ray.models.images import ImageTransform
from maps_ray.models.openvla_oft.config import PolicyConfig
from maps_ray.models.openvla_oft.tokens import PromptTokenizer


def read_images(folder: Path, config: PolicyConfig) -> ImageTransform:
    """What the processor does to images.

    Raises:
        CheckpointError: its file is missing or malformed, or makes images of another size than the towers take.
    """
    images = ImageTransform.from_config(read_preprocessor(folder))
    if images.size != (config.image_size, config.image_size):
        raise CheckpointError(
            f"{folder}: its processor makes images of {images.size}, the towers take "
            f"{config.image_size} x {config.image_size}"
        )
    return images


def read_prompts(folder: Path, raw: Mapping[str, Any], config: PolicyConfig) -> tuple[PromptTokenizer, int, int]:
    """The tokenizer of prompts, the id that ends a sequence, and the one that fills up shorter ones.

    Args:
        folder: with `tokenizer.json` and, if there, `generation_config.json`.
        raw: contents of `config.json`.
        config: what it says.

    Raises:
        CheckpointError: a file is missing or malformed, or the tokenizer is that of another model.
    """
    path = folder / "tokenizer.json"
    special = {"bos_token_id": 1, "eos_token_id": 2, **config.text}
    generation = folder / "generation_config.json"
    if generation.is_file():
        special |= read_json(generation)
    special["pad_token_id"] = raw.get("pad_token_id", special.get("pad_token_id"))
    rows = int(config.text["vocab_size"])
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        # A list of ids that end a text: the first is the one that training wrote.
        found = special[name][0] if isinstance(special[name], list) and special[name] else special[name]
        if not isinstance(found, int) or not 0 <= found < rows:
            raise CheckpointError(f"{folder}: {name} = {found!r}: must be an id, 0 to {rows - 1}")
        special[name] = found
    prompts = PromptTokenizer.from_file(path, special["bos_token_id"])
    first, last = config.action_token_begin + 1, config.tokenizer_size - 1
    if not config.tokenizer_size <= prompts.size <= rows:
        raise CheckpointError(
            f"{path} has {prompts.size} ids: the model's action tokens are {first} to {last}, and its embedding has "
            f"{rows} rows; copy the tokenizer from the checkpoint's source"
        )
    strange = max(prompts.encode("pick up the object"))
    if strange >= rows:
        raise CheckpointError(f"{path} gives the id {strange}, and the model's embedding has {rows} rows: not its own")
    return prompts, special["eos_token_id"], special["pad_token_id"]
