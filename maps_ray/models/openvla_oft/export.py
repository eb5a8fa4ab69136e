"""A checkpoint as the published evaluation and deployment scripts load it.

That is: bfloat16 or whatever is stored in `model.safetensors` (shards with an index above 5 GB), `.pt` files of OFT's
modules with the prefix `module.`, `vision_backbone--N_checkpoint.pt` with FiLM, `dataset_statistics.json`, and the
configuration, processor and tokenizer of the base.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from maps_ray.files import write_json
from maps_ray.models.files.folders import (
    ModuleFile,
    check_weights,
    find_module,
    main_dtype,
    published_config,
    read_config,
    read_preprocessor,
    stored_shapes,
)
from maps_ray.models.files.formats import MappedTensors
from maps_ray.models.files.weights import cast, new_folder, published_name, trained_modules, write_modules
from maps_ray.models.lora import Adapter
from maps_ray.models.openvla_oft.checkpoint import COMPANIONS, MODULES, PretrainedWeights
from maps_ray.models.openvla_oft.config import PolicyConfig
from maps_ray.models.openvla_oft.film_file import is_film, published_film_file, read_film_file
from maps_ray.models.openvla_oft.folder import FILM_FILE, read_weights
from maps_ray.models.openvla_oft.tensors import model_shapes, module_shapes
from maps_ray.models.sizes import PolicySizes

# What transformers 4 allows a shard by default.
_SHARD_BYTES = 5_000_000_000


def export_checkpoint(
    folder: Path,
    out: Path,
    *,
    dtype: torch.dtype | None = None,
    adapter: str | Path | None = None,
    shard_bytes: int = _SHARD_BYTES,
) -> Path:
    """Writes a checkpoint folder in the published layout.

    Args:
        folder: of the checkpoint.
        out: new folder. It appears only when it is complete.
        dtype: of all weights; none keeps what is stored, bit by bit.
        adapter: folder of a LoRA adapter to merge.
        shard_bytes: most that one file of the model may hold.

    Returns:
        `out`.

    Raises:
        CheckpointError: `folder` is no complete checkpoint, or `out` exists and is not empty.
        OSError: nothing could be written; `out` does not exist then.
    """
    folder, raw = read_config(folder)
    modules = {name: find_module(folder, name) for name in MODULES}
    film = find_module(folder, FILM_FILE)
    config = PolicyConfig.from_dict(raw, **_sizes(raw, modules, film is not None))
    infos = read_weights(folder)
    check_weights(folder, model_shapes(config), infos)
    merged = Adapter.read(adapter) if adapter is not None else None
    if merged is not None:
        merged.check(model_shapes(config))
    trained = trained_modules(folder, module_shapes(config))
    towers = read_film_file(film, config) if film is not None else {}
    vision = {key: tensor for key, tensor in towers.items() if not is_film(key)}
    weights = PretrainedWeights(MappedTensors(infos), merged, vision)
    with new_folder(out) as partial:
        for name in COMPANIONS:
            if (folder / name).is_file():
                shutil.copyfile(folder / name, partial / name)
        # The stored one says nothing of weights into which another was merged.
        if adapter is None and (folder / "lora_adapter").is_dir():
            shutil.copytree(folder / "lora_adapter", partial / "lora_adapter")
        # The published processor reads no other file.
        write_json(partial / "preprocessor_config.json", read_preprocessor(folder))
        stored = str(dtype).removeprefix("torch.") if dtype is not None else main_dtype(infos, raw)
        write_json(partial / "config.json", published_config(raw, stored))
        write_modules(partial, trained, module_shapes(config), dtype)
        if film is not None:
            tensors = {key: cast(tensor, dtype) for key, tensor in published_film_file(towers).items()}
            torch.save(tensors, partial / published_name(FILM_FILE, film))
        _write_model(weights, partial, dtype, shard_bytes)
    return out


def _sizes(raw: Mapping[str, object], modules: Mapping[str, ModuleFile | None], film: bool) -> PolicySizes:
    """The sizes of a folder's policy, read off its files where its configuration does not say them."""
    sizes: PolicySizes = {
        "use_proprio": modules["proprio_projector"] is not None,
        "film": film,
        # Without the file of a head actions are tokens.
        "head": "discrete",
    }
    if modules["action_head"] is not None:
        shapes = stored_shapes(modules["action_head"])
        sizes["head"] = "diffusion" if any("noise_predictor" in key for key in shapes) else "l1"
        bias = next((shape for key, shape in shapes.items() if key.endswith("fc2.bias")), (7,))
        sizes["action_dim"] = bias[0]
    if modules["proprio_projector"] is not None:
        weight = next(
            (shape for key, shape in stored_shapes(modules["proprio_projector"]).items() if "fc1.weight" in key)
        )
        sizes["proprio_dim"] = weight[1]
    return sizes


def _write_model(weights: PretrainedWeights, folder: Path, dtype: torch.dtype | None, most: int) -> None:
    """Writes shard after shard, so that one is in memory at a time."""
    shards = list(_shards(weights, dtype, most))
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    total = 0
    for name, keys in zip(names, shards, strict=True):
        tensors = {key: _stored(weights, key, dtype) for key in keys}
        total += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        save_file(tensors, folder / name, metadata={"format": "pt"})
    if len(shards) > 1:
        weight_map = {key: name for name, keys in zip(names, shards, strict=True) for key in keys}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(folder / "model.safetensors.index.json", index)


def _stored(weights: PretrainedWeights, key: str, dtype: torch.dtype | None) -> Tensor:
    """The tensor in the dtype asked for, or in the one it is stored in, also where an adapter was merged into it."""
    return weights.read(key).to(weights.stored.read(key).dtype if dtype is None else dtype).contiguous()


def _shards(weights: PretrainedWeights, dtype: torch.dtype | None, most: int) -> Iterator[list[str]]:
    shard: list[str] = []
    size = 0
    for key in weights:
        tensor = weights.stored.read(key)
        each = tensor.numel() * (tensor.element_size() if dtype is None else dtype.itemsize)
        if shard and size + each > most:
            yield shard
            shard, size = [], 0
        shard.append(key)
        size += each
    yield shard
