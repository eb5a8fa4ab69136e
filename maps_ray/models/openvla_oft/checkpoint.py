"""From a checkpoint folder to a policy and back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Unpack

import torch
from torch import Tensor, nn

from maps_ray.files import write_json
from maps_ray.models.decoder import Attention
from maps_ray.models.files.folders import check_weights, read_config
from maps_ray.models.files.formats import MappedTensors
from maps_ray.models.files.weights import (
    BaseTensors,
    SaveOptions,
    module_state,
    new_checkpoint,
    refuse_not_finite,
    split_modules,
    write_tensors,
)
from maps_ray.models.lora import Adapter, adapter_files, merge_adapters
from maps_ray.models.openvla_oft.config import PolicyConfig, PolicySizes
from maps_ray.models.openvla_oft.diffusion import DiffusionActionHead, NoisyActionProjector
from maps_ray.models.openvla_oft.film_file import file_key, is_film, read_film_file
from maps_ray.models.openvla_oft.folder import FILM_FILE, find_film, read_weights
from maps_ray.models.openvla_oft.heads import L1ActionHead, ProprioProjector
from maps_ray.models.openvla_oft.model import OpenVLAOFT
from maps_ray.models.openvla_oft.tensors import (
    checkpoint_key,
    film_shapes,
    model_shapes,
    module_shapes,
    parameter_name,
)
from maps_ray.models.policy import assemble, with_random_weights

# Files beside the weights that a saved checkpoint takes over from the one it started from.
COMPANIONS = (
    "preprocessor_config.json",
    "processor_config.json",
    "generation_config.json",
    "dataset_statistics.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
MODULES = ("proprio_projector", "noisy_action_projector", "action_head")


@dataclass(frozen=True)
class PretrainedWeights:
    """The tensors that a policy starts from, under checkpoint keys: stored, merged with an adapter, or those of a FiLM
    backbone; nothing is held in memory but a FiLM backbone's. Picklable."""

    stored: MappedTensors
    """`model.safetensors` or its shards."""
    adapter: Adapter | None = None
    """Added to the stored weights as they are read."""
    vision: Mapping[str, Tensor] = field(default_factory=dict)
    """Tensors that stand in for stored ones."""

    def __contains__(self, key: str) -> bool:
        return key in self.stored

    def __iter__(self) -> Iterator[str]:
        return iter(self.stored)

    def give_back(self) -> None:
        """Takes the tensor read last out of memory, see `MappedTensors.give_back`."""
        self.stored.give_back()

    def read(self, key: str) -> Tensor:
        """The tensor in its stored dtype, or in fp32 where an adapter changes it. Never write to it: it may be a file.

        Raises:
            CheckpointError: the file changed or cannot be read any more.
        """
        if key in self.vision:
            return self.vision[key]
        weight = self.stored.read(key)
        change = self.adapter.change(key) if self.adapter is not None else None
        return weight if change is None else weight.float() + change


def load_policy(
    path: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    adapter: str | Path | None = None,
    seed: int = 0,
    attention: Attention = "sdpa",
    deferred: bool = False,
    **sizes: Unpack[PolicySizes],
) -> OpenVLAOFT:
    """Loads a policy on the CPU.

    Args:
        path: folder with `config.json`, `model.safetensors` (or shards with an index) and, after OFT training, files of
            its new modules (`action_head--N_checkpoint`, `proprio_projector--N_checkpoint`,
            `noisy_action_projector--N_checkpoint`, and `vision_backbone--N_checkpoint` of a policy with FiLM), each
            `.safetensors` or `.pt`.
        dtype: of the parameters, whatever the files hold.
        adapter: folder of a LoRA adapter for these weights, as peft stores it; it is merged into them. A `lora_adapter`
            folder beside weights that are merged already is left aside.
        seed: for the modules that the folder has no weights for; `policy.fresh_modules` names them.
        attention: `sdpa` or `eager`.
        deferred: leave the pretrained weights in their files; see `policy.deferred`.
        sizes: what the policy is for, see `PolicySizes`. Those left out are the checkpoint's own, where its
            configuration says them, else one image, no proprioception, 8 actions of 7 dimensions, an L1 head, no FiLM.

    Returns:
        The policy in training mode (it has no dropout). It reads the same bits on every call.

    Raises:
        CheckpointError: anything missing, corrupt or of another shape. Nothing is half loaded.
        ImportError: a diffusion head without diffusers.
    """
    folder, raw = read_config(path)
    config = PolicyConfig.from_dict(raw, **sizes)
    infos = read_weights(folder)
    check_weights(folder, model_shapes(config), infos)
    merged = Adapter.read(adapter) if adapter is not None else None
    if merged is not None:
        merged.check(model_shapes(config))
    state, fresh = module_state(folder, module_shapes(config), partial(_new_module, config), seed, dtype)
    film = find_film(folder, config)
    towers = read_film_file(film, config, merged.alpha if merged else None) if film is not None else {}
    if film is None and config.film:
        fresh = ["film", *fresh]
        towers = _new_film(config, seed)
    if film is not None:
        refuse_not_finite(str(film.path), towers)
    state |= {parameter_name(key): tensor.to(dtype) for key, tensor in towers.items() if is_film(key)}
    vision = {key: tensor for key, tensor in towers.items() if not is_film(key)}
    base = PretrainedWeights(MappedTensors(infos), merged, vision)
    shapes = model_shapes(config)
    return assemble(
        lambda: OpenVLAOFT(config, attention, base),
        folder,
        raw,
        base,
        shapes,
        parameter_name,
        (state, fresh),
        dtype,
        deferred,
    )


def create_policy(
    config: Mapping[str, object],
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    attention: Attention = "sdpa",
    **sizes: Unpack[PolicySizes],
) -> OpenVLAOFT:
    """Builds a policy with random weights: timm's initialisation for the towers, normal (0.02) for the language model.

    Args:
        config: contents of a `config.json`.
        seed: the same seed gives the same weights; the global generator is left as it was.

    The other arguments are those of `load_policy`; `sizes` are described by `PolicySizes`.

    Raises:
        CheckpointError: a field of `config` is missing, unknown or out of range.
    """
    complete = PolicyConfig.from_dict(config, **sizes)
    return with_random_weights(lambda: OpenVLAOFT(complete, attention), dtype, seed)


def save_policy(
    state: Mapping[str, Tensor],
    base: str | Path,
    out: str | Path,
    **options: Unpack[SaveOptions],
) -> None:
    """Writes a checkpoint folder that `load_policy` reads back bit by bit.

    Args:
        state: every parameter under the policy's names, as `policy.state_dict()` gives them. Adapters are merged.
        base: folder whose configuration, tokenizer and processor files are taken over.
        out: new folder. It appears only when it is complete.
        options: see `SaveOptions`.

    Raises:
        CheckpointError: `out` exists and is not empty, or `state` does not fit the base's configuration.
        OSError: nothing could be written, for instance because the disk is full; `out` does not exist then.
    """
    folder, raw = read_config(base)
    weights = merge_adapters(state, options.get("lora_alpha"))
    modules, rest = split_modules(weights, MODULES)
    film = {name: tensor for name, tensor in rest.items() if is_film(name)}
    model = {checkpoint_key(name): tensor for name, tensor in rest.items() if name not in film}
    expected = model_shapes(PolicyConfig.from_dict(raw))
    with new_checkpoint(out, folder, COMPANIONS, raw, model, modules, expected, **options) as made:
        if film:
            # The towers once more, beside FiLM's own: OFT's file holds the whole vision backbone, and its loader is
            # strict.
            towers = film | {key: tensor for key, tensor in model.items() if key.startswith("vision_backbone.")}
            stored = {file_key(key): tensor for key, tensor in towers.items()}
            write_tensors(
                stored, made / f"{FILM_FILE}--{options.get('step', 0)}_checkpoint.safetensors", options["dtype"]
            )
        if options.get("keep_adapter"):
            adapter_config, adapters = adapter_files(state, options.get("lora_alpha"), checkpoint_key)
            (made / "lora_adapter").mkdir()
            write_json(made / "lora_adapter" / "adapter_config.json", adapter_config)
            write_tensors(adapters, made / "lora_adapter" / "adapter_model.safetensors", torch.float32)


def open_tensors(path: str | Path) -> tuple[BaseTensors, Callable[[str], str]]:
    """The stored tensors of a folder, and name of a parameter -> its key among them.

    Raises:
        CheckpointError: no weights of such a policy.
    """
    folder, _ = read_config(path)
    return MappedTensors(read_weights(folder)), checkpoint_key


def _new_module(config: PolicyConfig, name: str) -> nn.Module:
    if name == "proprio_projector":
        return ProprioProjector(config)
    if name == "noisy_action_projector":
        return NoisyActionProjector(config)
    return L1ActionHead(config) if config.head == "l1" else DiffusionActionHead(config)


def _new_film(config: PolicyConfig, seed: int) -> dict[str, Tensor]:
    """Each scale and shift as torch initialises a linear layer, in the order of the towers."""
    tensors: dict[str, Tensor] = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name, shape in film_shapes(config).items():
            if name.endswith(".weight"):
                layer = nn.Linear(shape[1], shape[0])
                tensors |= {name: layer.weight.data, name.removesuffix("weight") + "bias": layer.bias.data}
    return tensors
