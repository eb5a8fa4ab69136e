"""One folder per VLA; each names its modules in stack order and reads upstream checkpoints.

Importing this package imports no torch; `describe` needs none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from importlib import import_module, metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packaging.requirements import Requirement

from maps_ray.models.checkpoint_faults import CheckpointError
from maps_ray.models.contracts import Policy, Processor
from maps_ray.models.files.folders import checkpoint_folder, local_folder, read_config
from maps_ray.models.info import ModelInfo
from maps_ray.models.minivla.config import is_minivla
from maps_ray.models.vla_adapter.config import is_adapter_config

if TYPE_CHECKING:
    import torch

    from maps_ray.models.files.weights import BaseTensors
    from maps_ray.models.policy import BasePolicy

__all__ = [
    "EXPORT_FORMATS",
    "CheckpointError",
    "ModelInfo",
    "Policy",
    "Processor",
    "checkpoint_folder",
    "create_policy",
    "describe",
    "export_policy",
    "load_policy",
    "load_processor",
    "load_weights",
    "local_folder",
    "open_weights",
    "save_policy",
    "stock_config",
]

# Name of a policy, as `model.name` of a run spec gives it -> its folder here, and which of the folder's policies it is.
_POLICIES: dict[str, tuple[str, dict[str, object]]] = {
    "openvla_oft": ("openvla_oft", {}),
    "minivla_vq": ("minivla", {"kind": "vq"}),
    "minivla_oft": ("minivla", {"kind": "oft"}),
    "vla_adapter": ("vla_adapter", {}),
}
# `model_type` of a config.json -> the policy that it is loaded as, unless another of the same folder is asked for.
_MODEL_TYPES = {
    "openvla": "openvla_oft",
    "minivla_vq": "minivla_vq",
    "minivla_oft": "minivla_oft",
    "vla_adapter": "vla_adapter",
}
# A policy that can start from another backbone's checkpoints -> that backbone's folder.
_STARTS_FROM = {"vla_adapter": "minivla"}
# A parameter that only one policy has -> that policy. Trained weights say so what they are, whatever they started from.
_MARKS = {"action_queries.weight": "vla_adapter"}

# Format of an export, as `maps-ray export --format` names it -> the folder here that writes it.
EXPORT_FORMATS = {"openvla-oft": "openvla_oft", "minivla": "minivla", "vla-adapter": "vla_adapter"}

# What builds the networks: another version may compute something else, or name parameters otherwise, without an error.
_CHECKED = ("timm", "transformers")


def describe(path: str | Path, *, name: str | None = None, **sizes: object) -> ModelInfo:
    """What a checkpoint folder holds, without torch.

    Args:
        path: the folder.
        name: as `model.name` of a run spec; none takes what `config.json` says.
        sizes: see `describe` in the backbone's `folder`.

    Raises:
        CheckpointError: no such folder, or no checkpoint of that policy.
    """
    path = local_folder(path)
    backbone, kind = _of_folder(path, name)
    info: ModelInfo = _part(backbone, "folder").describe(path, **kind, **sizes)
    return info


def stock_config(name: str) -> dict[str, object]:
    """The contents of a `config.json` of the published base model that a policy starts from, without torch.

    Args:
        name: `openvla_oft`, `minivla_vq` or `minivla_oft`.

    Raises:
        CheckpointError: no policy of that name.
    """
    if name not in _POLICIES:
        raise CheckpointError(f"no policy is named {name!r}; known: {', '.join(_POLICIES)}")
    config: dict[str, object] = _part(_POLICIES[name][0], "config").STOCK_CONFIG
    return config


@cache
def check_versions() -> None:
    """Raises `CheckpointError` where timm or transformers is not in the range that this package asks for."""
    asked = [Requirement(text) for text in metadata.requires("maps_ray") or ()]
    for requirement in asked:
        if requirement.name in _CHECKED:
            installed = metadata.version(requirement.name)
            # Left out, `contains` refuses every pre-release, also one within the range.
            if not requirement.specifier.contains(installed, prereleases=True):
                raise CheckpointError(
                    f"{requirement.name} {installed} is installed; the models are tested with {requirement}: "
                    f"pip install '{requirement}'"
                )


def load_policy(path: str | Path, *, name: str | None = None, **options: object) -> BasePolicy:
    """Loads a policy from a checkpoint folder: see `load_policy` in the backbone's `checkpoint` for the options."""
    check_versions()
    path = local_folder(path)
    backbone, kind = _of_folder(path, name)
    policy: BasePolicy = _part(backbone, "checkpoint").load_policy(path, **kind, **options)
    return policy


def load_processor(path: str | Path, *, name: str | None = None, **sizes: object) -> Processor:
    """Text and images to tensors, as the checkpoint asks for: see the backbone's `processor`."""
    path = local_folder(path)
    backbone, kind = _of_folder(path, name)
    processor: Processor = _part(backbone, "processor").Processor.from_checkpoint(path, **kind, **sizes)
    return processor


def create_policy(config: Mapping[str, object], *, name: str | None = None, **options: object) -> BasePolicy:
    """A policy with random weights: see `create_policy` in the backbone's `checkpoint`."""
    check_versions()
    backbone, kind = _resolve(config, name)
    policy: BasePolicy = _part(backbone, "checkpoint").create_policy(config, **kind, **options)
    return policy


def load_weights(policy: BasePolicy, state: Mapping[str, torch.Tensor]) -> None:
    """Copies weights that training wrote into a policy: see `files.weights.load_weights`."""
    from maps_ray.models.files.weights import load_weights as load

    load(policy, state)


def open_weights(path: str | Path, *, name: str | None = None) -> tuple[BaseTensors, Callable[[str], str]]:
    """The pretrained tensors of a folder, read on demand, and name of a parameter of the policy -> its key there."""
    path = local_folder(path)
    backbone, _ = _of_folder(path, name)
    opened: tuple[BaseTensors, Callable[[str], str]] = _part(backbone, "checkpoint").open_tensors(path)
    return opened


def save_policy(state: Mapping[str, torch.Tensor], base: str | Path, out: str | Path, **options: object) -> None:
    """Writes a checkpoint folder: see `save_policy` in the backbone's `checkpoint` for the options."""
    marked = next((name for mark, name in _MARKS.items() if mark in state), None)
    base = local_folder(base)
    backbone, _ = _of_folder(base, marked)
    _part(backbone, "checkpoint").save_policy(state, base, out, **options)


def export_policy(source: str | Path, out: str | Path, layout: str, **options: object) -> Path:
    """Writes a checkpoint as its published evaluation scripts load it: see the backbone's `export`.

    Args:
        source: checkpoint folder, or the folder of a finished run.
        out: new folder. It appears only when it is complete.
        layout: one of `EXPORT_FORMATS`.
        options: `dtype` and `adapter`.

    Returns:
        `out`.

    Raises:
        CheckpointError: no complete checkpoint, a format of another backbone, or `out` exists and is not empty.
        OSError: nothing could be written; `out` does not exist then.
    """
    if layout not in EXPORT_FORMATS:
        raise CheckpointError(f"no format is named {layout!r}; known: {', '.join(EXPORT_FORMATS)}")
    folder = checkpoint_folder(Path(source))
    backbone, _ = _of_folder(folder, None)
    if EXPORT_FORMATS[layout] != backbone:
        fitting = ", ".join(name for name, part in EXPORT_FORMATS.items() if part == backbone)
        raise CheckpointError(f"{folder} cannot be written as {layout}; it is a checkpoint for --format {fitting}")
    written: Path = _part(backbone, "export").export_checkpoint(folder, Path(out), **options)
    return written


def _of_folder(path: str | Path, name: str | None) -> tuple[str, dict[str, object]]:
    _, config = read_config(path)
    return _resolve(config, name)


def _resolve(config: Mapping[str, object], name: str | None) -> tuple[str, dict[str, object]]:
    """The backbone's folder, and which of its policies `name` or else the configuration means."""
    model_type = config.get("model_type")
    stored = _MODEL_TYPES.get(str(model_type))
    # Published training runs of MiniVLA name no `model_type`.
    if model_type is None and is_minivla(config):
        stored = "minivla_vq"
    # Published VLA-Adapters call themselves `openvla`, whose layout they have: their language model tells them apart.
    elif is_adapter_config(config):
        stored = "vla_adapter"
    if stored is None:
        raise CheckpointError(f"config.json: model_type = {model_type!r}; known: {', '.join(_MODEL_TYPES)}")
    name = name or stored
    if name not in _POLICIES:
        raise CheckpointError(f"no policy is named {name!r}; known: {', '.join(_POLICIES)}")
    if _POLICIES[stored][0] not in (_POLICIES[name][0], _STARTS_FROM.get(name)):
        raise CheckpointError(f"config.json describes {stored}, not {name}: set model.name: {stored}")
    return _POLICIES[name]


def _part(backbone: str, part: str) -> Any:
    return import_module(f"maps_ray.models.{backbone}.{part}")
