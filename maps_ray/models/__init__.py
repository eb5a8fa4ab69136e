"""One folder per VLA; each names its modules in stack order and reads upstream checkpoints.

Importing this package imports no torch; `describe` needs none.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maps_ray.models.errors import CheckpointError
from maps_ray.models.info import ModelInfo
from maps_ray.models.safetensors_files import read_json

if TYPE_CHECKING:
    import torch

    from maps_ray.models.openvla_oft.model import OpenVLAOFT
    from maps_ray.models.openvla_oft.processor import Processor

__all__ = [
    "CheckpointError",
    "ModelInfo",
    "create_policy",
    "describe",
    "load_policy",
    "load_processor",
    "load_weights",
    "save_policy",
]

# `model_type` of a config.json -> the backbone's folder.
_BACKBONES = {"openvla": "openvla_oft"}


def describe(path: str | Path, **sizes: Any) -> ModelInfo:
    """What a checkpoint folder holds, without torch: see `openvla_oft.folder.describe`."""
    info: ModelInfo = _part(path, "folder").describe(path, **sizes)
    return info


def load_policy(path: str | Path, **options: Any) -> OpenVLAOFT:
    """Loads a policy from a checkpoint folder: see `openvla_oft.checkpoint.load_policy` for the options."""
    policy: OpenVLAOFT = _part(path, "checkpoint").load_policy(path, **options)
    return policy


def load_processor(path: str | Path, **sizes: Any) -> Processor:
    """Text and images to tensors, as the checkpoint asks for: see `openvla_oft.processor.Processor`."""
    processor: Processor = _part(path, "processor").Processor.from_checkpoint(path, **sizes)
    return processor


def create_policy(config: Mapping[str, Any], **options: Any) -> OpenVLAOFT:
    """A policy with random weights: see `openvla_oft.init.create_policy`."""
    policy: OpenVLAOFT = _backbone(config, "init").create_policy(config, **options)
    return policy


def load_weights(policy: OpenVLAOFT, state: Mapping[str, torch.Tensor]) -> None:
    """Copies weights that training wrote into a policy: see `openvla_oft.checkpoint.load_weights`."""
    from maps_ray.models.openvla_oft.checkpoint import load_weights as load

    load(policy, state)


def save_policy(state: Mapping[str, torch.Tensor], base: str | Path, out: str | Path, **options: Any) -> None:
    """Writes a checkpoint folder: see `openvla_oft.checkpoint.save_policy` for the options."""
    _part(base, "checkpoint").save_policy(state, base, out, **options)


def _part(path: str | Path, part: str) -> Any:
    folder = Path(path)
    if not folder.is_dir():
        raise CheckpointError(f"no checkpoint folder {folder}")
    return _backbone(read_json(folder / "config.json"), part)


def _backbone(config: Mapping[str, Any], part: str) -> Any:
    kind = config.get("model_type")
    if kind not in _BACKBONES:
        raise CheckpointError(f"config.json: model_type = {kind!r}; known: {', '.join(_BACKBONES)}")
    return import_module(f"maps_ray.models.{_BACKBONES[kind]}.{part}")
