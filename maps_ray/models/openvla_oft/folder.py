"""The files of an OpenVLA-OFT checkpoint folder, and whether they fit the configuration: weights, what the processor
does to images, the tokenizer. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Unpack

from maps_ray.models.checkpoint_faults import CheckpointError
from maps_ray.models.files.folders import (
    ModuleFile,
    check_weights,
    find_module,
    read_config,
    read_preprocessor,
)
from maps_ray.models.files.formats import TensorInfo, read_folder_headers, read_json
from maps_ray.models.images import ImageTransform
from maps_ray.models.info import ModelInfo, Survey
from maps_ray.models.openvla_oft.config import PolicyConfig, PolicySizes
from maps_ray.models.openvla_oft.tensors import checkpoint_key, model_shapes, module_shapes, parameter_shapes, stack
from maps_ray.models.openvla_oft.tokens import PromptTokenizer


def read_weights(folder: Path) -> dict[str, TensorInfo]:
    """The tensors of the model, see `read_folder_headers`.

    Raises:
        CheckpointError: they are missing or corrupt; or there is only an adapter.
    """
    try:
        return read_folder_headers(folder)
    except CheckpointError as error:
        if list(folder.glob("model*.safetensors")) or not (folder / "lora_adapter").is_dir():
            raise
        raise CheckpointError(
            f"{error}, only an adapter that was not merged: load the base model with adapter={folder / 'lora_adapter'}"
        ) from None


FILM_FILE = "vision_backbone"


def find_film(folder: Path, config: PolicyConfig) -> ModuleFile | None:
    """The file of the towers with FiLM, where the policy has FiLM.

    Raises:
        CheckpointError: files of several training steps, or a file that the policy would leave aside.
    """
    file = find_module(folder, FILM_FILE)
    if file is not None and not config.film:
        raise CheckpointError(f"{file.path.name}: {folder} was trained with FiLM: load it with film=True")
    return file


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


def read_prompts(folder: Path, raw: Mapping[str, object], config: PolicyConfig) -> tuple[PromptTokenizer, int, int]:
    """The tokenizer of prompts, the id that ends a sequence, and the one that fills up shorter ones.

    Args:
        folder: with `tokenizer.json` and, if there, `generation_config.json`.
        raw: contents of `config.json`.
        config: what it says.

    Raises:
        CheckpointError: a file is missing or malformed, or the tokenizer is that of another model.
    """
    path = folder / "tokenizer.json"
    # Llama-2's, where no file says otherwise. `generation_config.json` comes after `config.json`, as in transformers.
    special: dict[str, object] = {"bos_token_id": 1, "eos_token_id": 2, **config.text}
    generation = folder / "generation_config.json"
    if generation.is_file():
        special |= read_json(generation)
    special["pad_token_id"] = raw.get("pad_token_id", special.get("pad_token_id"))
    rows = int(config.text["vocab_size"])
    ids: list[int] = []
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        given = special[name]
        # A list of ids that end a text: the first is the one that training wrote.
        token = given[0] if isinstance(given, list) and given else given
        if not isinstance(token, int) or not 0 <= token < rows:
            raise CheckpointError(f"{folder}: {name} = {token!r}: must be an id, 0 to {rows - 1}")
        ids.append(token)
    begin, end, pad = ids
    prompts = PromptTokenizer.from_file(path, begin)
    first, last = config.action_token_begin + 1, config.tokenizer_size - 1
    if not config.tokenizer_size <= prompts.size <= rows:
        raise CheckpointError(
            f"{path} has {prompts.size} ids: the model's action tokens are {first} to {last}, and its embedding has "
            f"{rows} rows; copy the tokenizer from the checkpoint's source"
        )
    # The number of ids says nothing of the greatest.
    strange = max(prompts.encode("pick up the object"))
    if strange >= rows:
        raise CheckpointError(f"{path} gives the id {strange}, and the model's embedding has {rows} rows: not its own")
    return prompts, end, pad


def describe(path: str | Path, **sizes: Unpack[PolicySizes]) -> ModelInfo:
    """What a checkpoint folder holds, from `config.json` and the safetensors headers.

    The towers with FiLM are not opened here. `sizes` are described by `PolicySizes`.

    Raises:
        CheckpointError: no folder, or a configuration that describes no policy. Faults of the weights are listed as
            `problems` instead.
    """
    folder, raw = read_config(path)
    config = PolicyConfig.from_dict(raw, **sizes)
    survey = Survey(folder, raw)
    infos = survey.look(lambda: read_weights(folder), None)
    if infos is not None:
        survey.look(partial(check_weights, folder, model_shapes(config), infos), None)
    film = survey.look(lambda: find_film(folder, config), None)
    survey.look(lambda: read_images(folder, config), None)
    survey.look(lambda: read_prompts(folder, raw, config), None)
    return survey.info(
        "openvla_oft",
        config.image_size,
        infos or {},
        stack(config),
        parameter_shapes(config),
        module_shapes(config),
        checkpoint_key,
        fresh=["film"] if config.film and film is None else [],
    )
