"""Files of modules that OFT saves apart from the model, such as `action_head--150000_checkpoint.pt`. No torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from maps_ray.models.errors import CheckpointError, Shape, refuse_shape_faults, shape_faults
from maps_ray.models.pt_files import read_pt_header
from maps_ray.models.safetensors_files import TensorInfo, read_header


@dataclass(frozen=True)
class ModuleFile:
    """The file of one module that OFT saves apart: `action_head--150000_checkpoint.pt`."""

    path: Path
    step: int

    @property
    def is_safetensors(self) -> bool:
        return self.path.suffix == ".safetensors"


def find_module(folder: Path, name: str) -> ModuleFile | None:
    """The file of `action_head` or `proprio_projector`; safetensors before `.pt`.

    Published VLA-Adapters name no step: `action_head--checkpoint.pt`.

    Raises:
        CheckpointError: files of several training steps.
    """
    found = {}
    for path in sorted(folder.glob(f"{name}--*checkpoint.*")):
        match = re.fullmatch(rf"{name}--(?:(\d+|latest)_)?checkpoint\.(pt|safetensors)", path.name)
        if match:
            step = -1 if match[1] in (None, "latest") else int(match[1])
            found[step, match[2]] = ModuleFile(path, step)
    if len({step for step, _ in found}) > 1:
        names = ", ".join(file.path.name for file in found.values())
        raise CheckpointError(f"{folder} has {name} files of several steps: {names}; keep one")
    return found[max(found, key=lambda key: key[1])] if found else None


def stored_shapes(file: ModuleFile) -> dict[str, Shape]:
    """Keys and shapes of the file's tensors, from its header alone.

    Raises:
        CheckpointError: corrupt, or with anything but tensors.
    """
    header = read_header(file.path) if file.is_safetensors else read_pt_header(file.path)
    if not isinstance(header, dict) or not all(isinstance(info, TensorInfo) for info in header.values()):
        raise CheckpointError(f"{file.path}: expected a dictionary of tensors")
    return {key: info.shape for key, info in header.items()}


def survey_modules(folder: Path, expected: Mapping[str, Mapping[str, Shape]]) -> tuple[list[str], list[str]]:
    """Of the modules that a policy needs, which have no file yet, and what is wrong with the files of the others."""
    fresh, problems = [], []
    for name, tensors in expected.items():
        try:
            file = find_module(folder, name)
            if file is None:
                fresh.append(name)
            else:
                check_module(file, tensors, stored_shapes(file))
        except CheckpointError as error:
            problems.append(str(error))
    return fresh, problems


def strip_module(key: str) -> str:
    """The key without the prefix that DistributedDataParallel adds."""
    return key.removeprefix("module.")


def check_module(file: ModuleFile, expected: Mapping[str, Shape], found: Mapping[str, Shape]) -> None:
    """Raises `CheckpointError` unless the module's file holds exactly the tensors expected."""
    shapes = {strip_module(key): shape for key, shape in found.items()}
    refuse_shape_faults(str(file.path), shape_faults(expected, shapes))
