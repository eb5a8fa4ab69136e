"""From a checkpoint folder to a policy and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Unpack

import torch
from torch import Tensor, nn

from maps_ray.models.checkpoint_faults import CheckpointError
from maps_ray.models.decoder import Attention
from maps_ray.models.files.folders import read_config
from maps_ray.models.files.formats import MappedTensors, read_folder_headers
from maps_ray.models.files.weights import (
    BaseTensors,
    SaveOptions,
    base_state,
    module_state,
    new_checkpoint,
    split_modules,
)
from maps_ray.models.lora import merge_adapters
from maps_ray.models.minivla.checkpoint import COMPANIONS as MINIVLA_COMPANIONS
from maps_ray.models.minivla.checkpoint import open_weights as open_minivla_weights
from maps_ray.models.openvla_oft.heads import ProprioProjector
from maps_ray.models.openvla_oft.tensors import checkpoint_key, parameter_name
from maps_ray.models.policy import assemble, with_random_weights
from maps_ray.models.sizes import PolicySizes
from maps_ray.models.vla_adapter.bridge import BridgePolicy
from maps_ray.models.vla_adapter.config import PolicyConfig, full_config
from maps_ray.models.vla_adapter.folder import Weights, check_backbone, find_weights, read_checkpoint_config
from maps_ray.models.vla_adapter.model import VLAAdapter
from maps_ray.models.vla_adapter.tensors import (
    EMBEDDING,
    QUERIES,
    TIED_HEAD,
    module_shapes,
    pretrained_shapes,
    query_shapes,
)

# Files beside the weights that a saved checkpoint takes over from the one it started from.
COMPANIONS = (*MINIVLA_COMPANIONS, "preprocessor_config.json", "processor_config.json")
_FRESH: dict[str, type[nn.Module]] = {"action_head": BridgePolicy, "proprio_projector": ProprioProjector}


class PublishedNames:
    """The pretrained tensors of a folder under the keys of published VLA-Adapter checkpoints; picklable.

    The action queries are left out: they are trained from zeros and have no anchor.
    """

    def __init__(self, base: BaseTensors, weights: Weights) -> None:
        self._base = base
        self._names = {key: weights.stored[key] for key in weights.infos}

    def __contains__(self, key: str) -> bool:
        return key in self._names

    def read(self, key: str) -> Tensor:
        """The tensor in the file's dtype. Its memory may be the mapped file: read it or copy it, never write to it.

        Raises:
            CheckpointError: the file changed or cannot be read any more.
        """
        return self._base.read(self._names[key])

    def give_back(self) -> None:
        """Takes what was read last out of memory."""
        self._base.give_back()


def open_folder(folder: Path, weights: Weights) -> BaseTensors:
    """The tensors of a folder under its own keys.

    Raises:
        CheckpointError: a stored output head is not the embedding.
    """
    if weights.minivla is not None:
        return open_minivla_weights(folder, weights.minivla)
    base = MappedTensors(read_folder_headers(folder))
    if weights.tied_head is not None and not torch.equal(base.read(weights.tied_head), base.read(EMBEDDING)):
        raise CheckpointError(f"{folder}: {TIED_HEAD} differs from the embedding: the head is tied to it")
    return base


def load_policy(
    path: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    attention: Attention = "sdpa",
    deferred: bool = False,
    **sizes: Unpack[PolicySizes],
) -> VLAAdapter:
    """Loads a policy on the CPU.

    Args:
        path: folder with `config.json`, `model.safetensors` (or shards) and, where they were trained,
            `action_head--N_checkpoint` and `proprio_projector--N_checkpoint` (`.safetensors` or `.pt`); or that of a
            MiniVLA, from which a training starts.
        dtype: of the parameters, whatever the files hold.
        seed: for the modules that the folder has no weights for; `policy.fresh_modules` names them.
        attention: `sdpa` or `eager`.
        deferred: leave the pretrained weights in their file; see `policy.deferred`.
        sizes: what the policy is for, see `PolicySizes`. Those left out are the checkpoint's own, where it says them,
            else one image, no proprioception, 8 actions of 7 dimensions.

    Returns:
        the policy in training mode: it draws noise there, and has no dropout.

    Raises:
        CheckpointError: anything missing, corrupt or of another shape. Nothing is half loaded.
    """
    folder, raw, config = read_checkpoint_config(path, **sizes)
    weights = find_weights(folder, raw)
    check_backbone(folder, config, weights)
    opened = open_folder(folder, weights)
    base = PublishedNames(opened, weights)
    state, fresh = module_state(folder, module_shapes(config), lambda name: _FRESH[name](config), seed, dtype)
    if weights.queries is None:
        fresh.insert(0, "action_queries")
        state[QUERIES] = torch.zeros(query_shapes(config)[QUERIES], dtype=dtype)
    else:
        state |= base_state(str(folder), opened, {weights.stored[QUERIES]: QUERIES}, dtype)
    shapes, modules = pretrained_shapes(config), (state, fresh)
    return assemble(
        lambda: VLAAdapter(config, attention, base), folder, raw, base, shapes, parameter_name, modules, dtype, deferred
    )


def create_policy(
    config: Mapping[str, object],
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    attention: Attention = "sdpa",
    **given: Unpack[PolicySizes],
) -> VLAAdapter:
    """Builds a policy with random weights: timm's initialisation for the towers, Qwen2's for the language model.

    Args:
        config: contents of a `config.json`.
        seed: the same seed gives the same weights; the global generator is left as it was.

    The other arguments are those of `load_policy`; `given` are its `sizes`.

    Raises:
        CheckpointError: a field of `config` is missing, unknown or out of range.
    """
    sizes = PolicyConfig.from_dict(config, **given)
    return with_random_weights(lambda: VLAAdapter(sizes, attention), dtype, seed)


def save_policy(
    state: Mapping[str, Tensor],
    base: str | Path,
    out: str | Path,
    **options: Unpack[SaveOptions],
) -> None:
    """Writes a checkpoint folder that `load_policy` reads back bit by bit.

    Args:
        state: every parameter under the policy's names, as `policy.state_dict()` gives them. Adapters are merged.
        base: folder whose configuration and tokenizer are taken over.
        out: new folder. It appears only when it is complete.
        options: see `SaveOptions`; no published folder of this backbone has a file of adapters.

    Raises:
        CheckpointError: `out` exists and is not empty, or `state` does not fit the base's configuration.
        OSError: nothing could be written, for instance because the disk is full; `out` does not exist then.
    """
    folder, raw = read_config(base)
    modules, rest = split_modules(merge_adapters(state, options.get("lora_alpha")), _FRESH)
    config = _config_of(raw, modules, rest)
    model = {checkpoint_key(name): tensor for name, tensor in rest.items()}
    expected = pretrained_shapes(config) | query_shapes(config)
    with new_checkpoint(out, folder, COMPANIONS, full_config(raw, config), model, modules, expected, **options):
        pass


def open_tensors(path: str | Path) -> tuple[BaseTensors, Callable[[str], str]]:
    """The stored tensors of a folder but the action queries, and name of a parameter -> its key among them.

    Raises:
        CheckpointError: no weights of such a policy.
    """
    folder, raw = read_config(path)
    weights = find_weights(folder, raw)
    return PublishedNames(open_folder(folder, weights), weights), checkpoint_key


def _config_of(
    raw: Mapping[str, object], modules: Mapping[str, Mapping[str, Tensor]], rest: Mapping[str, Tensor]
) -> PolicyConfig:
    """The base's configuration, with the queries and the kind of policy that the weights show."""
    shown: dict[str, object] = {}
    if QUERIES in rest:
        shown["queries"] = len(rest[QUERIES])
    head = modules.get("action_head")
    if head:
        shown["bridge"] = "pro" if any(".k_self." in key for key in head) else "original"
    return PolicyConfig.from_dict({**raw, **shown})
