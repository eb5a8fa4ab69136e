"""Checkpoint folders of every backbone, without torch: which one a path means, what its configuration, processor and
tokenizer say, which modules have files of their own, and whether all of it fits."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maps_ray.files import remedy
from maps_ray.models.checkpoint_faults import CheckpointError, Shape, refuse_shape_faults, shape_faults
from maps_ray.models.files.formats import TensorInfo, read_header, read_json, read_pt_header
from maps_ray.models.hub import HubError, local_copy

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# `dtype` is the newer name, which transformers writes from 4.56 on.
_DTYPE_NAMES = ("torch_dtype", "dtype")


def local_folder(path: str | Path) -> Path:
    """A checkpoint folder as it is; of one on the Hub (`hf://OWNER/NAME@REVISION`), a copy in the Hub's cache.

    Raises:
        CheckpointError: it cannot be had.
    """
    try:
        return Path(local_copy(path))
    except HubError as error:
        raise CheckpointError(str(error)) from None


def checkpoint_folder(path: str | Path) -> Path:
    """The checkpoint that a path means: itself, the trained weights of a finished run, or a copy from the Hub.

    Raises:
        CheckpointError: no such folder, a run that is not finished, or nothing on the Hub.
    """
    path = local_folder(path)
    # What is no folder goes on as it is: whoever reads it says so, and of what.
    if _there(path / "config.json") or not _there(path, Path.is_dir):
        return path
    if _there(path / "final" / "config.json"):
        return path / "final"
    if _there(path / "checkpoints", Path.is_dir):
        raise CheckpointError(f"{path} is a run that has not finished: continue it with --resume first")
    raise CheckpointError(f"{path} is neither a checkpoint folder nor a run")


def read_config(path: str | Path) -> tuple[Path, dict[str, Any]]:
    """The folder and the contents of its `config.json`.

    Raises:
        CheckpointError: no such folder, or no readable configuration.
    """
    folder = Path(path)
    if not _there(folder, Path.is_dir):
        raise CheckpointError(f"no checkpoint folder {folder}; one on the Hub is named hf://OWNER/NAME")
    return folder, read_json(folder / "config.json")


def _there(path: Path, look: Callable[[Path], bool] = Path.is_file) -> bool:
    """`look(path)`; raises `CheckpointError` where this user may not look."""
    try:
        return look(path)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error}") from None


def check_weights(folder: Path, expected: Mapping[str, Shape], infos: Mapping[str, TensorInfo]) -> None:
    """Raises `CheckpointError` unless `infos` are exactly the tensors expected of the model, in floating point."""
    stored = {key: info.shape for key, info in infos.items()}
    refuse_shape_faults(f"{folder}: model weights", shape_faults(expected, stored))
    for key, info in infos.items():
        if info.dtype not in ("bfloat16", "float16", "float32"):
            raise CheckpointError(f"{folder}: {key} is stored as {info.dtype}; expected bfloat16, float16 or float32")


def main_dtype(infos: Mapping[str, TensorInfo], config: Mapping[str, object]) -> str:
    """The dtype of most of the stored values; without any, what the contents of `config.json` say, or `unknown`."""
    values: Counter[str] = Counter()
    for info in infos.values():
        values[info.dtype] += math.prod(info.shape)
    return values.most_common(1)[0][0] if values else str(config.get("torch_dtype") or config.get("dtype", "unknown"))


def published_config(config: Mapping[str, object], dtype: str) -> dict[str, object]:
    """A `config.json` that the published scripts read as transformers 5 does: the dtype of its weights said once, as
    `torch_dtype`, also in the sections that say one, and the base of rotary positions as `rope_theta`.

    Transformers writes `dtype` from version 4.56 on, and `rope_parameters` from 5 on; it reads both forms.
    """
    return {**_published(config, dtype), "torch_dtype": dtype}


def _published(section: Mapping[str, object], dtype: str) -> dict[str, object]:
    written: dict[str, object] = {}
    for name, value in section.items():
        if name in _DTYPE_NAMES:
            written["torch_dtype"] = dtype
        else:
            written[name] = _published(value, dtype) if isinstance(value, Mapping) else value
    rotary = section.get("rope_parameters")
    if isinstance(rotary, Mapping) and "rope_theta" in rotary:
        written.setdefault("rope_theta", rotary["rope_theta"])
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


def read_tokenizer(path: Path, source: str = "") -> Tokenizer:
    """A tokenizer that neither pads nor cuts, whatever its file says.

    Args:
        path: the file.
        source: where the right one can be copied from, for the message.

    Raises:
        CheckpointError: no such file, or not one that the tokenizers library reads.
    """
    from tokenizers import Tokenizer

    if not path.is_file():
        whose = f" (that of {source})" if source else ""
        raise CheckpointError(f"{path} is missing: the checkpoint folder must hold its tokenizer{whose}")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises a bare Exception
        raise CheckpointError(f"cannot read {path}: {error}; {remedy(path, 'copy it again')}") from None
    # A tokenizer saved after batched use pads and cuts from then on.
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


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
    files = {}
    for path in sorted(folder.glob(f"{name}--*checkpoint.*")):
        match = re.fullmatch(rf"{name}--(?:(\d+|latest)_)?checkpoint\.(pt|safetensors)", path.name)
        if match:
            # `latest` is what openvla-oft writes with `save_latest_checkpoint_only`.
            step = -1 if match[1] in (None, "latest") else int(match[1])
            files[step, match[2]] = ModuleFile(path, step)
    if len({step for step, _ in files}) > 1:
        names = ", ".join(file.path.name for file in files.values())
        raise CheckpointError(f"{folder} has {name} files of several steps: {names}; keep one")
    # By the alphabet: `pt` stands before `safetensors`.
    return files[max(files, key=lambda key: key[1])] if files else None


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


def check_module(file: ModuleFile, expected: Mapping[str, Shape], stored: Mapping[str, Shape]) -> None:
    """Raises `CheckpointError` unless the module's file holds exactly the tensors expected."""
    shapes = {strip_module(key): shape for key, shape in stored.items()}
    refuse_shape_faults(str(file.path), shape_faults(expected, shapes))
