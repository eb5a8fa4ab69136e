"""The files of a VLA-Adapter's checkpoint folder, or of the MiniVLA it starts from, and whether they fit. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Unpack

from maps_ray.models.checkpoint_faults import CheckpointError
from maps_ray.models.files.folders import check_weights, read_config
from maps_ray.models.files.formats import TensorInfo, read_folder_headers
from maps_ray.models.info import ModelInfo, Survey
from maps_ray.models.minivla.folder import WeightFile
from maps_ray.models.minivla.folder import find_weights as find_minivla_weights
from maps_ray.models.minivla.tokens import ChatPrompt
from maps_ray.models.openvla_oft.tensors import checkpoint_key
from maps_ray.models.sizes import PolicySizes
from maps_ray.models.vla_adapter.config import PolicyConfig, is_adapter_config
from maps_ray.models.vla_adapter.tensors import (
    EMBEDDING,
    QUERIES,
    TIED_HEAD,
    module_shapes,
    parameter_shapes,
    pretrained_shapes,
    published_key,
    query_shapes,
    stack,
)


@dataclass(frozen=True)
class Weights:
    """Where the weights of a policy's backbone are."""

    stored: dict[str, str]
    """Key in a published VLA-Adapter checkpoint -> key of that tensor in this folder's file."""
    infos: dict[str, TensorInfo]
    """The pretrained tensors under published keys, without the tied head."""
    queries: TensorInfo | None
    """The action queries; none where the folder has none yet."""
    tied_head: str | None
    """The key under which the embedding is stored once more, in this folder's file."""
    minivla: WeightFile | None
    """The files of a MiniVLA; none for a VLA-Adapter."""


def find_weights(folder: Path, raw: dict[str, object]) -> Weights:
    """The backbone's weights.

    Args:
        folder: the checkpoint.
        raw: contents of its `config.json`.

    Raises:
        CheckpointError: no weights, several, or a file that cannot be read.
    """
    minivla = None
    if is_adapter_config(raw):
        headers = read_folder_headers(folder)
    else:
        minivla = find_minivla_weights(folder)
        headers = minivla.infos
    stored = {key if minivla is None else published_key(key): key for key in headers}
    infos = {key: headers[name] for key, name in stored.items()}
    queries = infos.pop(QUERIES, None)
    tied = infos.pop(TIED_HEAD, None)
    if tied is not None and EMBEDDING in infos and tied.shape != infos[EMBEDDING].shape:
        raise CheckpointError(
            f"{folder}: {TIED_HEAD} is {list(tied.shape)}, the embedding {list(infos[EMBEDDING].shape)}: the head is "
            "tied to the embedding"
        )
    return Weights(stored, infos, queries, None if tied is None else stored[TIED_HEAD], minivla)


def read_checkpoint_config(
    path: str | Path, **sizes: Unpack[PolicySizes]
) -> tuple[Path, dict[str, object], PolicyConfig]:
    """The folder, the contents of its `config.json` and the sizes of the policy.

    Raises:
        CheckpointError: no such folder, or a configuration that describes no policy.
    """
    folder, raw = read_config(path)
    # Published configurations do not say how many: 64, or 56 in the constants of MAPS' authors.
    if is_adapter_config(raw) and "queries" not in raw:
        try:
            queries = find_weights(folder, raw).queries
        except CheckpointError:
            queries = None  # said when the weights are looked at
        if queries is not None and len(queries.shape) == 2:
            raw = {**raw, "queries": queries.shape[0]}
    return folder, raw, PolicyConfig.from_dict(raw, folder, **sizes)


def check_backbone(folder: Path, config: PolicyConfig, weights: Weights) -> None:
    """Raises `CheckpointError` unless these are exactly the tensors expected of backbone and action queries."""
    expected, stored = pretrained_shapes(config), dict(weights.infos)
    if weights.queries is not None:
        expected, stored = expected | query_shapes(config), stored | {QUERIES: weights.queries}
    check_weights(folder, expected, stored)


def describe(path: str | Path, **sizes: Unpack[PolicySizes]) -> ModelInfo:
    """What a checkpoint folder holds, from `config.json` and the headers of its weights.

    `sizes` are described by `PolicySizes`.

    Raises:
        CheckpointError: no folder, or a configuration that describes no policy. Faults of the weights are listed as
            `problems` instead.
    """
    folder, raw, config = read_checkpoint_config(path, **sizes)
    survey = Survey(folder, raw)
    weights = survey.look(lambda: find_weights(folder, raw), None)
    infos = {} if weights is None else weights.infos
    if weights is not None:
        survey.look(partial(check_backbone, folder, config, weights), None)
    survey.look(lambda: ChatPrompt.from_file(folder / "tokenizer.json", config.tokenizer_size), None)
    shapes, modules = parameter_shapes(config), module_shapes(config)
    fresh = ["action_queries"] if weights is not None and weights.queries is None else []
    return survey.info(
        "vla_adapter", config.image_size, infos, stack(config), shapes, modules, checkpoint_key, fresh=fresh
    )
