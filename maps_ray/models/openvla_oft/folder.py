"""The files of an OpenVLA-OFT checkpoint folder, and whether they fit the configuration. No torch."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from maps_ray.models.errors import CheckpointError, Shape, refuse_shape_faults, shape_faults
from maps_ray.models.info import ModelInfo
from maps_ray.models.module_files import check_module, find_module
from maps_ray.models.openvla_oft.config import PolicyConfig
from maps_ray.models.openvla_oft.layout import (
    action_head_shapes,
    model_shapes,
    parameter_shapes,
    proprio_projector_shapes,
)
from maps_ray.models.openvla_oft.stack import stack
from maps_ray.models.safetensors_files import TensorInfo, read_folder_headers, read_header, read_json


def read_config(path: str | Path) -> tuple[Path, dict[str, Any]]:
    """The folder and the contents of its `config.json`.

    Raises:
        CheckpointError: no such folder, or no readable configuration.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise CheckpointError(f"no checkpoint folder {folder}")
    return folder, read_json(folder / "config.json")


def module_shapes(config: PolicyConfig) -> dict[str, dict[str, Shape]]:
    """Of each module that has a file of its own, the tensors it needs."""
    shapes = {"action_head": action_head_shapes(config)}
    if config.use_proprio:
        shapes["proprio_projector"] = proprio_projector_shapes(config)
    return shapes


def check_model(folder: Path, config: PolicyConfig, infos: Mapping[str, TensorInfo]) -> None:
    """Raises `CheckpointError` unless `infos` are exactly the tensors of the model, in floating point."""
    found = {key: info.shape for key, info in infos.items()}
    refuse_shape_faults(f"{folder}: model weights", shape_faults(model_shapes(config), found))
    for key, info in infos.items():
        if info.dtype not in ("bfloat16", "float16", "float32"):
            raise CheckpointError(f"{folder}: {key} is stored as {info.dtype}; expected bfloat16, float16 or float32")


def describe(
    path: str | Path,
    *,
    num_images: int = 1,
    use_proprio: bool = False,
    chunk: int = 8,
    action_dim: int = 7,
    proprio_dim: int = 8,
) -> ModelInfo:
    """What a checkpoint folder holds, from `config.json` and the safetensors headers.

    A head stored as `.pt` is not opened here.

    Raises:
        CheckpointError: no folder, or a configuration that describes no policy. Faults of the weights are listed as
            `problems` instead.
    """
    folder, raw = read_config(path)
    config = PolicyConfig.from_dict(
        raw,
        num_images=num_images,
        use_proprio=use_proprio,
        chunk=chunk,
        action_dim=action_dim,
        proprio_dim=proprio_dim,
    )
    problems: list[str] = []
    infos: dict[str, TensorInfo] = {}
    fresh = []
    try:
        infos = read_folder_headers(folder)
        check_model(folder, config, infos)
    except CheckpointError as error:
        problems.append(str(error))
    for name, expected in module_shapes(config).items():
        try:
            file = find_module(folder, name)
            if file is None:
                fresh.append(name)
            elif file.is_safetensors:
                check_module(file, expected, {key: info.shape for key, info in read_header(file.path).items()})
        except CheckpointError as error:
            problems.append(str(error))
    sizes: Counter[str] = Counter()
    for info in infos.values():
        sizes[info.dtype] += math.prod(info.shape)
    return ModelInfo(
        name="openvla_oft",
        path=folder,
        stack=stack(config),
        parameters=parameter_shapes(config),
        dtype=sizes.most_common(1)[0][0] if sizes else str(raw.get("torch_dtype", "unknown")),
        image_size=config.image_size,
        fresh_modules=tuple(fresh),
        problems=problems,
    )
