"""Files of tensors: headers of safetensors and `.pt` files without torch, tensors of mapped safetensors files.

A safetensors file has 8 bytes little-endian header length, a JSON header `{key: {dtype, shape, data_offsets}}`, then
the data. A `.pt` file is a zip archive: `data.pkl` describes the tensors, `data/N` holds their values. What may stand
in `data.pkl` is a short list; anything else is refused by name, and nothing runs that a pickle asks for.
"""

from __future__ import annotations

import json
import math
import mmap
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from maps_ray.files import remedy
from maps_ray.models.checkpoint_faults import CheckpointError

if TYPE_CHECKING:
    import torch

# Of weights. Other codes stay as they are, for the message that refuses them.
DTYPE_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}

# Of a `.pt` file.
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


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies and what it is."""

    file: Path
    shape: tuple[int, ...]
    dtype: str
    """As torch spells it: `bfloat16`."""
    offset: int = 0
    """Of its first byte in a safetensors file."""


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        CheckpointError: the file is missing, unreadable or no JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error}") from None
    except ValueError as error:
        what = remedy(path, "correct it, or copy it again")
        raise CheckpointError(f"cannot read {path}: {error}; {what}") from None
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
            # Of a file too short for the length itself any header is too long.
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
            if 8 + length > size:
                raise CheckpointError(
                    f"{path} is corrupt: {size} bytes cannot hold its header; {remedy(path, 'copy it again')}"
                )
            header = json.loads(file.read(length))
        tensors = {key: value for key, value in header.items() if key != "__metadata__"}
        end = 8 + length + max((value["data_offsets"][1] for value in tensors.values()), default=0)
        infos = {
            key: TensorInfo(
                path,
                tuple(value["shape"]),
                DTYPE_NAMES.get(value["dtype"], value["dtype"]),
                8 + length + value["data_offsets"][0],
            )
            for key, value in tensors.items()
        }
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error}") from None
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} is corrupt: no safetensors header ({error})") from None
    # The format leaves no hole in the data and nothing behind it: the greatest end is the file's.
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
        pickled = "; convert its .bin files to safetensors" if any(folder.glob("pytorch_model*.bin")) else ""
        raise CheckpointError(f"{folder} has neither model.safetensors nor model.safetensors.index.json{pickled}")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{index}: `weight_map` must map each key to a file name")
    # The last part alone: an index may come from anywhere, and must not lead out of the folder.
    headers = {name: read_header(folder / Path(name).name) for name in sorted(set(weight_map.values()))}
    wrong = [key for key, name in weight_map.items() if key not in headers[name]]
    if wrong:
        raise CheckpointError(f"{index}: {wrong[0]} is not in {weight_map[wrong[0]]} ({len(wrong)} such keys)")
    return {key: info for header in headers.values() for key, info in header.items()}


class MappedTensors:
    """Tensors of one or several safetensors files, mapped into memory on first use; picklable.

    A mapped page takes memory only once it is looked at: who slices a tensor reads the slice alone. The pages of a
    tensor are given back when the next one is read, so that a file of any size takes the memory of its largest tensor.
    """

    def __init__(self, infos: Mapping[str, TensorInfo]) -> None:
        self._infos = dict(infos)
        self._maps: dict[Path, mmap.mmap] = {}
        self._last: tuple[mmap.mmap, int, int] | None = None

    def __contains__(self, key: str) -> bool:
        return key in self._infos

    def __iter__(self) -> Iterator[str]:
        return iter(self._infos)

    def __getstate__(self) -> dict[str, object]:
        # Maps cannot be pickled; another process makes its own.
        return {"_infos": self._infos, "_maps": {}, "_last": None}

    def shape(self, key: str) -> tuple[int, ...]:
        """The tensor's shape, from the header."""
        return self._infos[key].shape

    def read(self, key: str) -> torch.Tensor:
        """The tensor in the file's dtype. Its memory is the mapped file: read it or copy it, never write to it.

        Raises:
            CheckpointError: the file changed or cannot be read any more, or the tensor is of an unknown dtype.
        """
        import torch

        info = self._infos[key]
        dtype = getattr(torch, info.dtype, None)
        if dtype is None:
            raise CheckpointError(f"{info.file}: {key} is stored as {info.dtype}, which cannot be read")
        self.give_back()
        try:
            if info.file not in self._maps:
                self._maps[info.file] = _map(info.file, self._infos)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"cannot read {key} from {info.file}: {error}") from None
        numel = math.prod(info.shape)
        if not numel:
            # `frombuffer` refuses to make a tensor of no element.
            return torch.empty(info.shape, dtype=dtype)
        mapped = self._maps[info.file]
        self._last = mapped, info.offset, numel * dtype.itemsize
        return torch.frombuffer(mapped, dtype=dtype, count=numel, offset=info.offset).view(info.shape)

    def give_back(self) -> None:
        """Takes the tensor read last out of memory. It can still be used; its pages are then read again."""
        if self._last is not None:
            mapped, offset, size = self._last
            # The kernel takes a page's beginning alone. What a neighbour has in that page is read again when it is
            # asked for.
            begin = offset - offset % mmap.PAGESIZE
            mapped.madvise(mmap.MADV_DONTNEED, begin, offset + size - begin)
            self._last = None


def _map(file: Path, infos: Mapping[str, TensorInfo]) -> mmap.mmap:
    """Maps a file, privately, after a look whether it still is the one that `infos` describe."""
    header = read_header(file)
    changed = [key for key, info in infos.items() if info.file == file and header.get(key) != info]
    if changed:
        raise CheckpointError(f"{file} changed while it was in use: {changed[0]} is not where it was")
    with file.open("rb") as opened:
        # A read-only map would do, but `torch.frombuffer` warns of it. Nobody writes: `give_back` would lose it.
        return mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)


def read_pt_header(path: Path) -> Any:
    """The contents of a `.pt` file with a `TensorInfo` in place of each tensor.

    Raises:
        CheckpointError: missing, corrupt, or with anything but tensors and plain containers.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            # torch calls the folder in the archive after the file, which may have been renamed.
            members = [name for name in archive.namelist() if name.count("/") == 1 and name.endswith("/data.pkl")]
            if len(members) != 1:
                raise CheckpointError(f"{path} is no .pt file: it has no data.pkl")
            with archive.open(members[0]) as file:
                return _HeaderReader(file, path).load()
    except (OSError, zipfile.BadZipFile, EOFError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"cannot read {path}: {error}; {remedy(path, 'copy it again')}") from None
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} is corrupt: {type(error).__name__} in its header; copy it again") from None


class _HeaderReader(pickle.Unpickler):
    def __init__(self, file: IO[bytes], path: Path) -> None:
        super().__init__(file)
        self._path = path

    def find_class(self, module: str, name: str) -> object:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        known: dict[tuple[str, str], Callable[..., object]] = {
            ("torch._utils", "_rebuild_tensor_v2"): self._tensor,
            ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
        }
        if (module, name) in known:
            return known[module, name]
        raise CheckpointError(
            f"{self._path} asks for {module}.{name}: only tensors are read from a .pt file, never pickled code"
        )

    def persistent_load(self, pid: Sequence[object]) -> str:
        # `("storage", type, key, location, elements)`, as `torch.serialization._save` writes it.
        return str(pid[1])

    # `_rebuild_tensor_v2(storage, offset, size, stride, ...)`: of views too the shape is all that is asked.
    def _tensor(self, dtype: str, _offset: int, size: tuple[int, ...], *_: object) -> TensorInfo:
        return TensorInfo(self._path, tuple(size), dtype)
