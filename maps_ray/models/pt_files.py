"""Headers of `.pt` files, without torch and without running anything that a pickle asks for.

A `.pt` file is a zip archive: `data.pkl` describes the tensors, `data/N` holds their values. What may stand in
`data.pkl` is a short list; anything else is refused by name.
"""

from __future__ import annotations

import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from maps_ray.models.errors import CheckpointError
from maps_ray.models.safetensors_files import TensorInfo

_STORAGES = {
    "FloatStorage": "float32",
    "BFloat16Storage": "bfloat16",
    "HalfStorage": "float16",
    "DoubleStorage": "float64",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}


def read_pt_header(path: Path) -> Any:
    """The contents of a `.pt` file with a `TensorInfo` in place of each tensor.

    Raises:
        CheckpointError: missing, corrupt, or with anything but tensors and plain containers.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = [name for name in archive.namelist() if name.count("/") == 1 and name.endswith("/data.pkl")]
            if len(members) != 1:
                raise CheckpointError(f"{path} is no .pt file: it has no data.pkl")
            with archive.open(members[0]) as file:
                return _HeaderReader(file, path).load()
    except (OSError, zipfile.BadZipFile, EOFError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"cannot read {path}: {error}; copy it again") from None
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} is corrupt: {type(error).__name__} in its header; copy it again") from None


class _HeaderReader(pickle.Unpickler):
    def __init__(self, file: IO[bytes], path: Path) -> None:
        super().__init__(file)
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        known: dict[tuple[str, str], Callable[..., Any]] = {
            ("torch._utils", "_rebuild_tensor_v2"): self._tensor,
            ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
        }
        if (module, name) in known:
            return known[module, name]
        raise CheckpointError(
            f"{self._path} asks for {module}.{name}: only tensors are read from a .pt file, never pickled code"
        )

    def persistent_load(self, pid: Any) -> str:
        return str(pid[1])

    def _tensor(self, dtype: str, _offset: int, size: tuple[int, ...], *_: Any) -> TensorInfo:
        return TensorInfo(self._path, tuple(size), dtype)
