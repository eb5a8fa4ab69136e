"""Checkpoint folders of every backbone: which one a path means, what it says, whether its weights fit. No torch."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from maps_ray.models.errors import CheckpointError, Shape, refuse_shape_faults, shape_faults
from maps_ray.models.safetensors_files import TensorInfo, read_json

_DTYPE_NAMES = ("torch_dtype", "dtype")


def checkpoint_folder(path: Path) -> Path:
    """The checkpoint that a path means: itself, or the trained weights of a finished run.

    Raises:
        CheckpointError: no such folder, or a run that is not finished.
    """
    if (path / "config.json").is_file() or not path.is_dir():
        return path
    if (path / "final" / "config.json").is_file():
        return path / "final"
    if (path / "checkpoints").is_dir():
        raise CheckpointError(f"{path} is a run that has not finished: continue it with --resume first")
    raise CheckpointError(f"{path} is neither a checkpoint folder nor a run")


def read_config(path: str | Path) -> tuple[Path, dict[str, Any]]:
    """The folder and the contents of its `config.json`.

    Raises:
        CheckpointError: no such folder, or no readable configuration.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise CheckpointError(f"no checkpoint folder {folder}")
    return folder, read_json(folder / "config.json")


def check_weights(folder: Path, expected: Mapping[str, Shape], infos: Mapping[str, TensorInfo]) -> None:
    """Raises `CheckpointError` unless `infos` are exactly the tensors expected of the model, in floating point."""
    found = {key: info.shape for key, info in infos.items()}
    refuse_shape_faults(f"{folder}: model weights", shape_faults(expected, found))
    for key, info in infos.items():
        if info.dtype not in ("bfloat16", "float16", "float32"):
            raise CheckpointError(f"{folder}: {key} is stored as {info.dtype}; expected bfloat16, float16 or float32")


def main_dtype(infos: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> str:
    """The dtype of most of the stored values; without any, what the contents of `config.json` say, or `unknown`."""
    values: Counter[str] = Counter()
    for info in infos.values():
        values[info.dtype] += math.prod(info.shape)
    return values.most_common(1)[0][0] if values else str(config.get("torch_dtype") or config.get("dtype", "unknown"))


def with_dtype(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """A `config.json` that says the dtype of its weights once, as `torch_dtype`, also in the sections that say one.

    Transformers writes `dtype` from version 4.56 on and reads both; the published scripts know `torch_dtype` alone.
    """
    return {**_without_dtype(config, dtype), "torch_dtype": dtype}


def _without_dtype(section: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    written: dict[str, Any] = {}
    for name, value in section.items():
        if name in _DTYPE_NAMES:
            written["torch_dtype"] = dtype
        else:
            written[name] = _without_dtype(value, dtype) if isinstance(value, Mapping) else value
    return written


def read_preprocessor(folder: Path) -> dict[str, Any]:
    """What a folder's processor does to images: `preprocessor_config.json`, or from transformers 5 on a section of
    `processor_config.json`.

    Raises:
        CheckpointError: neither is there, or cannot be read.
    """
    own, whole = folder / "preprocessor_config.json", folder / "processor_config.json"
    if own.is_file():
        return read_json(own)
    if not whole.is_file():
        raise CheckpointError(f"{own} is missing: copy it from the checkpoint's source")
    section = read_json(whole).get("image_processor")
    if not isinstance(section, dict):
        raise CheckpointError(f"{whole} has no object `image_processor`, and {own.name} is not there either")
    return section
