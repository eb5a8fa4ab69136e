"""The files of an OpenVLA-OFT checkpoint folder, and whether they fit the configuration. No torch."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Unpack

from maps_ray.models.errors import CheckpointError
from maps_ray.models.files.folders import (
    ModuleFile,
    check_weights,
    find_module,
    read_config,
)
from maps_ray.models.files.formats import TensorInfo, read_folder_headers
from maps_ray.models.info import ModelInfo, Survey
from maps_ray.models.openvla_oft.config import PolicyConfig, PolicySizes
from maps_ray.models.openvla_oft.input_files import read_images, read_prompts
from maps_ray.models.openvla_oft.layout import checkpoint_key, model_shapes, module_shapes, parameter_shapes, stack


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
