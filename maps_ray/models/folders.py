"""Checkpoint folders of every backbone: which one a path means, what it says, whether its weights fit. No torch."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from maps_ray.models.errors import CheckpointError, Shape, refuse_shape_faults, shape_faults
from maps_ray.models.safetensors_files import TensorInfo, read_json


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
    return values.most_common(1)[0][0] if values else str(config.get("torch_dtype", "unknown"))
