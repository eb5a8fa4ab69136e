"""The files of a MiniVLA checkpoint folder, and whether they fit the configuration. No torch.

Weights are `model.safetensors` (or shards), as this package writes them, or a published `.pt`: `latest-checkpoint.pt`
or the only one in `checkpoints/` or in the folder.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Unpack

from maps_ray.models.checkpoint_faults import CheckpointError
from maps_ray.models.files.folders import check_weights, read_config
from maps_ray.models.files.formats import TensorInfo, read_folder_headers, read_pt_header
from maps_ray.models.info import ModelInfo, Survey
from maps_ray.models.minivla.config import Kind, PolicyConfig, read_vq_config
from maps_ray.models.minivla.tensors import (
    EMBEDDING,
    MODULES,
    TIED_HEAD,
    model_shapes,
    module_shapes,
    parameter_shapes,
    published_name,
    stack,
)
from maps_ray.models.minivla.tokens import ChatPrompt
from maps_ray.models.sizes import PolicySizes

VQ_FOLDER = "vq"
"""Holds the VQ action tokenizer of a MiniVLA-VQ."""


@dataclass(frozen=True)
class WeightFile:
    """Where the backbone's weights are."""

    infos: dict[str, TensorInfo]
    """The tensors under checkpoint keys, without the tied head."""
    published: Path | None
    """The `.pt` file; none for safetensors."""
    tied_head: bool
    """Whether the embedding is stored once more as the output head."""


def read_checkpoint_config(
    path: str | Path, kind: Kind | None, **sizes: Unpack[PolicySizes]
) -> tuple[Path, dict[str, Any], PolicyConfig]:
    """The folder, the contents of its `config.json` and the sizes of the policy.

    Raises:
        CheckpointError: no such folder, or a configuration that describes no policy.
    """
    folder, raw = read_config(path)
    return folder, raw, PolicyConfig.from_dict(raw, kind=kind, **sizes)


def find_weights(folder: Path) -> WeightFile:
    """The backbone's weights.

    Raises:
        CheckpointError: no weights, several, or a file that cannot be read.
    """
    published = None
    if (folder / "model.safetensors").exists() or (folder / "model.safetensors.index.json").exists():
        infos = read_folder_headers(folder)
    else:
        published = _find_pt(folder)
        infos = _pt_infos(published)
    tied = infos.pop(TIED_HEAD, None)
    if tied is not None and EMBEDDING in infos and tied.shape != infos[EMBEDDING].shape:
        raise CheckpointError(
            f"{folder}: {TIED_HEAD} is {list(tied.shape)}, the embedding {list(infos[EMBEDDING].shape)}: "
            "MiniVLA's head is tied to the embedding"
        )
    return WeightFile(infos, published, tied is not None)


def check_vq(checkpoint: Path, config: PolicyConfig) -> None:
    """Raises `CheckpointError` unless a MiniVLA-VQ has its VQ tokenizer, for chunks of the policy's shape."""
    if config.kind != "vq":
        return
    folder = checkpoint / VQ_FOLDER
    sizes = read_vq_config(folder)
    if (sizes.input_dim_h, sizes.input_dim_w) != (config.chunk, config.action_dim):
        raise CheckpointError(
            f"{folder} encodes chunks of {sizes.input_dim_h} x {sizes.input_dim_w}, the data has {config.chunk} x "
            f"{config.action_dim}: set data.chunk, or train another tokenizer with jobs/train_vq.py"
        )


def describe(
    path: str | Path,
    *,
    kind: Kind | None = None,
    **sizes: Unpack[PolicySizes],
) -> ModelInfo:
    """What a checkpoint folder holds, from `config.json` and the headers of its weights.

    A head stored as `.pt` is not opened here. `sizes` are described by `PolicySizes`.

    Raises:
        CheckpointError: no folder, or a configuration that describes no policy. Faults of the weights are listed as
            `problems` instead.
    """
    folder, raw, config = read_checkpoint_config(path, kind, **sizes)
    survey = Survey(folder, raw)
    survey.look(lambda: check_vq(folder, config), None)
    file = survey.look(lambda: find_weights(folder), None)
    infos = {} if file is None else file.infos
    if file is not None:
        survey.look(partial(check_weights, folder, model_shapes(config), infos), None)
    survey.look(lambda: ChatPrompt.from_file(folder / "tokenizer.json", config.tokenizer_size), None)
    name, shapes = f"minivla_{config.kind}", parameter_shapes(config)
    modules = module_shapes(config)
    return survey.info(name, config.image_size, infos, stack(config), shapes, modules, published_name)


def _find_pt(folder: Path) -> Path:
    latest = folder / "checkpoints" / "latest-checkpoint.pt"
    candidates = sorted([*folder.glob("*.pt"), *(folder / "checkpoints").glob("*.pt")])
    # Files of the head and of the proprio projector.
    candidates = [path for path in candidates if not path.name.endswith("_checkpoint.pt")]
    # The one that upstream's `prismatic.load` takes of a run's folder, whatever lies beside it.
    if latest in candidates:
        return latest
    if len(candidates) != 1:
        names = ", ".join(str(path.relative_to(folder)) for path in candidates) or "none"
        raise CheckpointError(
            f"{folder} has no model.safetensors, and of .pt files it must hold exactly one; found: {names}"
        )
    return candidates[0]


def _pt_infos(path: Path) -> dict[str, TensorInfo]:
    header = read_pt_header(path)
    modules = header.get("model") if isinstance(header, dict) else None
    if not isinstance(modules, dict) or set(modules) != set(MODULES):
        contents = sorted(modules) if isinstance(modules, dict) else type(header).__name__
        raise CheckpointError(f"{path}: expected `model` with {', '.join(MODULES)}; found {contents}")
    infos = {f"{module}|{name}": info for module, tensors in modules.items() for name, info in tensors.items()}
    wrong = [key for key, info in infos.items() if not isinstance(info, TensorInfo)]
    if wrong:
        raise CheckpointError(f"{path}: {wrong[0]} is no tensor ({len(wrong)} such entries)")
    return infos
