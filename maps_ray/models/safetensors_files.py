"""Reading safetensors: headers without torch, tensors from memory-mapped files.

Format: 8 bytes little-endian header length, a JSON header `{key: {dtype, shape, data_offsets}}`, then the data.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maps_ray.models.errors import CheckpointError

if TYPE_CHECKING:
    import torch

DTYPE_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies and what it is."""

    file: Path
    shape: tuple[int, ...]
    dtype: str
    """As torch spells it: `bfloat16`."""


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        CheckpointError: the file is missing, unreadable or no JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file, from its header alone.

    Raises:
        CheckpointError: missing, truncated or corrupt file.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
            if 8 + length > size:
                raise CheckpointError(f"{path} is corrupt: {size} bytes cannot hold its header; copy it again")
            header = json.loads(file.read(length))
        tensors = {key: value for key, value in header.items() if key != "__metadata__"}
        end = 8 + length + max((value["data_offsets"][1] for value in tensors.values()), default=0)
        infos = {
            key: TensorInfo(path, tuple(value["shape"]), DTYPE_NAMES.get(value["dtype"], value["dtype"]))
            for key, value in tensors.items()
        }
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error}") from None
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} is corrupt: no safetensors header ({error})") from None
    if end != size:
        state = "truncated" if end > size else "corrupt"
        raise CheckpointError(f"{path} is {state}: its header speaks of {end} bytes, it has {size}; copy it again")
    return infos


def read_folder_headers(folder: Path) -> dict[str, TensorInfo]:
    """The tensors of `model.safetensors`, or of the shards that `model.safetensors.index.json` lists.

    Raises:
        CheckpointError: neither is there, a shard is missing, or index and shards disagree.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        return read_header(single)
    if not index.exists():
        raise CheckpointError(f"{folder} has neither model.safetensors nor model.safetensors.index.json")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{index}: `weight_map` must map each key to a file name")
    headers = {name: read_header(folder / Path(name).name) for name in sorted(set(weight_map.values()))}
    wrong = [key for key, name in weight_map.items() if key not in headers[name]]
    if wrong:
        raise CheckpointError(f"{index}: {wrong[0]} is not in {weight_map[wrong[0]]} ({len(wrong)} such keys)")
    return {key: info for header in headers.values() for key, info in header.items()}


class MappedTensors:
    """Tensors of one or several safetensors files, mapped into memory on first use; picklable."""

    def __init__(self, infos: Mapping[str, TensorInfo]) -> None:
        self._infos = dict(infos)
        self._handles: dict[Path, Any] = {}

    def __contains__(self, key: str) -> bool:
        return key in self._infos

    def __iter__(self) -> Iterator[str]:
        return iter(self._infos)

    def __getstate__(self) -> dict[str, Any]:
        return {"_infos": self._infos, "_handles": {}}

    def shape(self, key: str) -> tuple[int, ...]:
        """The tensor's shape, from the header."""
        return self._infos[key].shape

    def read(self, key: str) -> torch.Tensor:
        """The tensor in the file's dtype. Its memory is the mapped file: read it or copy it, never write to it.

        Raises:
            CheckpointError: the file changed or cannot be read any more.
        """
        from safetensors import SafetensorError, safe_open

        file = self._infos[key].file
        try:
            if file not in self._handles:
                self._handles[file] = safe_open(file, framework="pt")
            tensor: torch.Tensor = self._handles[file].get_tensor(key)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"cannot read {key} from {file}: {error}") from None
        return tensor
