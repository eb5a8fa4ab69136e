"""What loading and saving a policy share, whatever its backbone."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from maps_ray.models.folders import with_dtype
from maps_ray.models.module_files import find_module
from maps_ray.models.shapes import Shapes
from maps_ray.models.weight_files import read_module, refuse_not_finite, write_json, write_tensors


class BaseTensors(Protocol):
    """Tensors of a checkpoint under its own keys, read on demand."""

    def __contains__(self, key: str) -> bool: ...
    def read(self, key: str) -> Tensor: ...
    def give_back(self) -> None: ...


def base_state(where: str, base: BaseTensors, names: Mapping[str, str], dtype: torch.dtype) -> dict[str, Tensor]:
    """The pretrained weights under the policy's names; none shares memory with a file.

    Args:
        where: the checkpoint, for messages.
        base: its tensors.
        names: its keys -> names of parameters.
        dtype: of the parameters.

    Raises:
        CheckpointError: a weight is NaN or infinite.
    """
    state = {}
    for key, name in names.items():
        tensor = base.read(key)
        refuse_not_finite(where, {key: tensor})
        state[name] = tensor.to(dtype, copy=True)
    base.give_back()
    return state


def module_state(
    folder: Path, expected: Mapping[str, Shapes], make: Callable[[str], nn.Module], seed: int, dtype: torch.dtype
) -> tuple[dict[str, Tensor], list[str]]:
    """The weights of the modules that have files of their own, under the policy's names.

    Args:
        folder: the checkpoint.
        expected: of each module, the tensors it needs.
        make: builds the module of a name with random weights; called for those without a file.
        seed: of these weights.
        dtype: of the parameters.

    Returns:
        The weights, and the modules without a file.

    Raises:
        CheckpointError: a file cannot be read, does not hold what is expected, or holds NaN or infinities.
    """
    state: dict[str, Tensor] = {}
    fresh = []
    for name, shapes in expected.items():
        file = find_module(folder, name)
        if file is None:
            fresh.append(name)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                tensors = make(name).state_dict()
        else:
            tensors = read_module(file, shapes)
            refuse_not_finite(str(file.path), tensors)
        state |= {f"{name}.{key}": tensor.to(dtype) for key, tensor in tensors.items()}
    return state, fresh


def split_modules(
    weights: Mapping[str, Tensor], names: Iterable[str]
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Weights under the policy's names -> those of each module that has a file of its own, and the others.

    The modules' keys lose the module's name; a module that is not there is left out.
    """
    modules: dict[str, dict[str, Tensor]] = {name: {} for name in names}
    rest = {}
    for name, tensor in weights.items():
        module, _, key = name.partition(".")
        if module in modules:
            modules[module][key] = tensor
        else:
            rest[name] = tensor
    return {name: tensors for name, tensors in modules.items() if tensors}, rest


def write_checkpoint(
    out: Path,
    base: Path,
    companions: Iterable[str],
    config: Mapping[str, Any],
    model: Mapping[str, Tensor],
    modules: Mapping[str, Mapping[str, Tensor]],
    *,
    dtype: torch.dtype,
    step: int,
    statistics: Mapping[str, Any] | None,
    trained_for: Mapping[str, Any] | None,
) -> None:
    """Writes configuration, statistics, weights and what is taken over from the base into a folder.

    Args:
        out: the folder.
        base: the checkpoint that training started from.
        companions: its files that are copied where they are there.
        config: contents of `config.json`.
        model: tensors of `model.safetensors`.
        modules: tensors of each `<module>--<step>_checkpoint.safetensors`.
        dtype: of the stored weights.
        step: training step.
        statistics: contents of `dataset_statistics.json`; none leaves the base's.
        trained_for: becomes `policy` in `config.json`.
    """
    for name in companions:
        if (base / name).is_file():
            shutil.copyfile(base / name, out / name)
    if statistics is not None:
        write_json(out / "dataset_statistics.json", statistics)
    written = with_dtype(config, str(dtype).removeprefix("torch."))
    write_json(out / "config.json", written | ({"policy": dict(trained_for)} if trained_for else {}))
    for name, tensors in modules.items():
        prefixed = {f"module.{key}": tensor for key, tensor in tensors.items()}
        write_tensors(prefixed, out / f"{name}--{step}_checkpoint.safetensors", dtype)
    write_tensors(model, out / "model.safetensors", dtype)
