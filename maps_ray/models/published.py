"""What exports of every backbone hold beside the model's weights: statistics and `.pt` files of modules."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from maps_ray.models.errors import CheckpointError
from maps_ray.models.module_files import ModuleFile, find_module
from maps_ray.models.shapes import Shapes
from maps_ray.models.weight_files import read_module


def trained_modules(folder: Path, names: Iterable[str]) -> dict[str, ModuleFile]:
    """The files of modules without which the policy predicts nothing.

    Raises:
        CheckpointError: one of them, or the statistics, are missing: the policy was not trained, or has no units.
    """
    found = {name: find_module(folder, name) for name in names}
    missing = [name for name, file in found.items() if file is None]
    if missing:
        raise CheckpointError(f"{folder} has no {', '.join(missing)}: there is nothing to evaluate; fine-tune it first")
    if not (folder / "dataset_statistics.json").is_file():
        raise CheckpointError(f"{folder} has no dataset_statistics.json: its actions would have no units")
    return {name: file for name, file in found.items() if file is not None}


def write_modules(
    out: Path, files: Mapping[str, ModuleFile], expected: Mapping[str, Shapes], dtype: torch.dtype | None
) -> None:
    """Writes each module's `<name>--<step>_checkpoint.pt`, with the prefix `module.`.

    Args:
        out: folder.
        files: of each module, the file to read.
        expected: of each module, the tensors it needs.
        dtype: none keeps what is stored.

    Raises:
        CheckpointError: a file does not hold what is expected.
    """
    for name, file in files.items():
        tensors = {f"module.{key}": cast(tensor, dtype) for key, tensor in read_module(file, expected[name]).items()}
        torch.save(tensors, out / published_name(name, file))


def published_name(module: str, file: ModuleFile) -> str:
    """Name of the `.pt` file of a module that was read from `file`."""
    return f"{module}--{'latest' if file.step < 0 else file.step}_checkpoint.pt"


def cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """The tensor in `dtype`, or as it is."""
    return tensor if dtype is None else tensor.to(dtype)
