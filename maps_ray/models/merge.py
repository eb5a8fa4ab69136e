"""Weights between a base and what was trained from it: theta = (1 - a) theta0 + a theta, tensor by tensor.

WiSE-FT (arXiv 2109.01903) takes one a for all weights, RETAIN one for each module, LiNeS (arXiv 2410.17146) one that
grows with depth. It costs no training.
"""

from __future__ import annotations

import json
import math
import shutil
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from maps_ray.files import write_json
from maps_ray.models.checkpoint_faults import CheckpointError, refuse_shape_faults, shape_faults
from maps_ray.models.files.formats import DTYPE_NAMES, MappedTensors, TensorInfo, read_folder_headers
from maps_ray.models.files.weights import BaseTensors, new_folder

# Elements that are computed at once: 16 MiB in fp32.
_BLOCK = 1 << 22
# What a merge would leave stale, or does not reach.
_LEFT_OUT = ("lora_adapter", "model.safetensors", "model.safetensors.index.json")


def merge_folders(
    base: BaseTensors,
    trained: Path,
    out: Path,
    weight_of: Mapping[str, float],
    record: Mapping[str, object],
) -> Path:
    """Writes a checkpoint folder with merged weights; all else is the trained one's.

    One tensor is in memory at a time, and of what is computed a few MiB.

    Args:
        base: the weights that training started from, under the keys of `trained`.
        trained: checkpoint folder, as `save_policy` writes it; adapters are merged there.
        out: new folder. It appears only when it is complete.
        weight_of: key -> a in [0, 1]: 0 takes the base's weights, 1 the trained ones bit by bit. Keys that are left out
            are taken from `trained`.
        record: contents of `merge.json`, which says what was done.

    Returns:
        `out`.

    Raises:
        CheckpointError: the weights do not fit each other, towers with FiLM, or `out` exists and is not empty.
        OSError: nothing could be written; `out` does not exist then.
    """
    infos = read_folder_headers(trained)
    film = sorted(path.name for path in trained.glob("vision_backbone--*_checkpoint.*"))
    if film:
        raise CheckpointError(
            f"{trained / film[0]}: towers with FiLM have a file of their own, which a merge does not reach: train "
            "without model.film to merge"
        )
    _check_base(base, trained, {key: infos[key] for key in weight_of})
    ours = MappedTensors(infos)
    with new_folder(out) as made:
        for path in sorted(trained.iterdir()):
            if path.name in _LEFT_OUT or (path.suffix == ".safetensors" and path.name.startswith("model-")):
                continue
            if path.is_dir():
                shutil.copytree(path, made / path.name)
            else:
                shutil.copyfile(path, made / path.name)
        write_json(made / "merge.json", record)

        def write(key: str, file: BinaryIO) -> None:
            weight = weight_of.get(key, 1.0)
            _write_merged(base.read(key) if weight < 1 else None, ours.read(key), weight, file)
            base.give_back()
            ours.give_back()

        _write_tensors(made / "model.safetensors", infos, write)
    return out


def _check_base(base: BaseTensors, trained: Path, infos: Mapping[str, TensorInfo]) -> None:
    based = {key: tuple(base.read(key).shape) for key in infos if key in base}
    base.give_back()
    faults = shape_faults({key: info.shape for key, info in infos.items()}, based)
    refuse_shape_faults(f"the base of {trained}", faults)


def _write_merged(base: Tensor | None, trained: Tensor, weight: float, file: BinaryIO) -> None:
    """Writes the bytes of one tensor, in the trained one's dtype."""
    flat = trained.reshape(-1)
    other = None if base is None else base.reshape(-1)
    for start in range(0, flat.numel(), _BLOCK):
        block = flat[start : start + _BLOCK]
        if other is not None:
            theirs = other[start : start + _BLOCK].float()
            # Weight 0 is a branch of its own: 0 times what diverged to infinity would be NaN.
            block = ((1 - weight) * theirs + weight * block.float() if weight else theirs).to(flat.dtype)
        # As bytes, for numpy has no bfloat16.
        file.write(block.contiguous().view(torch.uint8).numpy().data)


# `safetensors.torch.save_file` asks for all tensors at once.
def _write_tensors(path: Path, infos: Mapping[str, TensorInfo], write: Callable[[str, BinaryIO], None]) -> None:
    """Writes a safetensors file, the bytes of each tensor as `write` gives them."""
    codes = {name: code for code, name in DTYPE_NAMES.items()}
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for key, info in infos.items():
        size = math.prod(info.shape) * getattr(torch, info.dtype).itemsize
        header[key] = {"dtype": codes[info.dtype], "shape": list(info.shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header, separators=(",", ":")).encode()
    # The format asks for data on an address that is a multiple of eight.
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for key in infos:
            write(key, file)
        if file.tell() != 8 + len(text) + end:
            raise OSError(f"{path}: {file.tell()} bytes were written, {8 + len(text) + end} belong there")
