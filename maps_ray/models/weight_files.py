"""Reading tensors of `.pt` and safetensors files, and writing checkpoint folders that are never half there."""

from __future__ import annotations

import json
import math
import pickle
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from maps_ray.models.errors import CheckpointError, Shape, refuse_shape_faults, shape_faults
from maps_ray.models.module_files import ModuleFile, check_module, strip_module
from maps_ray.models.safetensors_files import MappedTensors, read_header


def read_pt(path: Path, *, mapped: bool = False) -> Any:
    """The contents of a `.pt` file: tensors and plain containers, never pickled code.

    Args:
        path: the file.
        mapped: leave the tensors in the memory-mapped file until they are used.

    Raises:
        CheckpointError: unreadable, or holding anything else.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"cannot read {path}: {reason} (only tensors are read from a .pt file, never pickled code)"
        ) from None


def read_module(file: ModuleFile, expected: Mapping[str, Shape]) -> dict[str, Tensor]:
    """The tensors of a module's file without the prefix `module.`; nothing shares memory with the file.

    Raises:
        CheckpointError: unreadable, or not exactly the tensors expected.
    """
    if file.is_safetensors:
        infos = read_header(file.path)
        check_module(file, expected, {key: info.shape for key, info in infos.items()})
        mapped = MappedTensors(infos)
        return {strip_module(key): mapped.read(key).clone() for key in infos}
    loaded = read_pt(file.path)
    if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise CheckpointError(f"{file.path}: expected a dictionary of tensors")
    check_module(file, expected, {key: tuple(value.shape) for key, value in loaded.items()})
    return {strip_module(key): value for key, value in loaded.items()}


def refuse_not_finite(where: str, tensors: Mapping[str, Tensor]) -> None:
    """Raises `CheckpointError` where a weight is NaN or infinite: whatever the input, so would be the actions."""
    broken = [name for name, tensor in tensors.items() if not _is_finite(tensor)]
    if broken:
        more = f" and {len(broken) - 3} more" if len(broken) > 3 else ""
        raise CheckpointError(
            f"{where}: values that are not finite in {', '.join(broken[:3])}{more}: the file was damaged, or the "
            "training that wrote it diverged; take another checkpoint"
        )


def look_at_weights(folder: Path, most_bytes: int) -> None:
    """Raises `CheckpointError` where a checkpoint's files of modules hold NaN or infinities; and its model, where that
    has at most `most_bytes`: a larger one is looked at when it is loaded.

    Files that cannot be read are not its business, nor are `.pt` files of whole models.
    """
    modules = sorted(folder.glob("*--*_checkpoint.*"))
    model = sorted(folder.glob("model*.safetensors"))
    if sum(path.stat().st_size for path in model) <= most_bytes:
        modules += model
    for path in modules:
        if path.suffix == ".safetensors":
            mapped = MappedTensors(read_header(path))
            for key in mapped:
                refuse_not_finite(str(path), {key: mapped.read(key)})
            mapped.give_back()
        elif path.suffix == ".pt":
            loaded = read_pt(path, mapped=True)
            tensors = loaded.items() if isinstance(loaded, dict) else ()
            refuse_not_finite(str(path), {key: value for key, value in tensors if isinstance(value, Tensor)})


def _is_finite(tensor: Tensor) -> bool:
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    # One pass without a tensor of its own; NaN passes through.
    return all(math.isfinite(bound.item()) for bound in torch.aminmax(tensor))


def stand_in(shape: Shape, dtype: torch.dtype) -> Tensor:
    """A tensor of NaN that takes the memory of one element: never write to it."""
    return torch.full((1,), torch.nan, dtype=dtype).expand(shape)


def load_weights(policy: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copies weights under the policy's names (`policy.state_dict()`) into the policy, cast to its dtype.

    Raises:
        CheckpointError: a name or shape does not fit; the policy is unchanged then.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in policy.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    refuse_shape_faults("weights of the policy", shape_faults(expected, found))
    policy.load_state_dict(state)


def write_tensors(tensors: Mapping[str, Tensor], path: Path, dtype: torch.dtype) -> None:
    """Writes a safetensors file."""
    stored = {key: tensor.detach().to("cpu", dtype).contiguous() for key, tensor in tensors.items()}
    save_file(stored, path, metadata={"format": "pt"})


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes a JSON object, indented."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `path` when the block ends and vanishes when it fails.

    Raises:
        CheckpointError: `path` exists and is not an empty folder.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise CheckpointError(f"{path} exists already; choose another folder or remove it")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        partial.chmod(0o755)
        yield partial
        if path.exists():
            path.rmdir()
        partial.rename(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
