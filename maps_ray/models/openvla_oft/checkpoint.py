"""From a checkpoint folder to a policy and back."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from maps_ray.models.attention import Attention
from maps_ray.models.errors import refuse_shape_faults, shape_faults
from maps_ray.models.module_files import find_module
from maps_ray.models.openvla_oft.config import PolicyConfig
from maps_ray.models.openvla_oft.folder import check_model, module_shapes, read_config
from maps_ray.models.openvla_oft.heads import L1ActionHead, ProprioProjector
from maps_ray.models.openvla_oft.layout import checkpoint_key, model_shapes, parameter_name
from maps_ray.models.openvla_oft.model import OpenVLAOFT
from maps_ray.models.safetensors_files import MappedTensors, read_folder_headers
from maps_ray.models.weight_files import new_folder, read_module, write_json, write_tensors

# Files beside the weights that a saved checkpoint takes over from the one it started from.
_COMPANIONS = (
    "preprocessor_config.json",
    "generation_config.json",
    "dataset_statistics.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
_FRESH = {"action_head": L1ActionHead, "proprio_projector": ProprioProjector}


def load_policy(
    path: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    num_images: int = 1,
    use_proprio: bool = False,
    chunk: int = 8,
    action_dim: int = 7,
    proprio_dim: int = 8,
    seed: int = 0,
    attention: Attention = "sdpa",
) -> OpenVLAOFT:
    """Loads a policy on the CPU.

    Args:
        path: folder with `config.json`, `model.safetensors` (or shards with an index) and, after OFT training,
            `action_head--N_checkpoint` and `proprio_projector--N_checkpoint` (`.safetensors` or `.pt`).
        dtype: of the parameters, whatever the files hold.
        num_images: images per sample, 1 to 3.
        use_proprio: whether the policy reads proprioception.
        chunk, action_dim, proprio_dim: of the data.
        seed: for the modules that the folder has no weights for; `policy.fresh_modules` names them.
        attention: `sdpa` or `eager`.

    Returns:
        The policy in training mode (it has no dropout). It reads the same bits on every call.

    Raises:
        CheckpointError: anything missing, corrupt or of another shape. Nothing is half loaded.
    """
    folder, raw = read_config(path)
    config = PolicyConfig.from_dict(
        raw,
        num_images=num_images,
        use_proprio=use_proprio,
        chunk=chunk,
        action_dim=action_dim,
        proprio_dim=proprio_dim,
    )
    infos = read_folder_headers(folder)
    check_model(folder, config, infos)
    base = MappedTensors(infos)
    state: dict[str, Tensor] = {}
    fresh = []
    for name in module_shapes(config):
        file = find_module(folder, name)
        if file is None:
            fresh.append(name)
            tensors = _fresh_module(name, config, seed).state_dict()
        else:
            tensors = read_module(file, module_shapes(config)[name])
        state |= {f"{name}.{key}": tensor.to(dtype) for key, tensor in tensors.items()}
    # Copies, so that no parameter shares memory with the file.
    state |= {parameter_name(key): base.read(key).to(dtype, copy=True) for key in infos}
    with torch.device("meta"):
        policy = OpenVLAOFT(config, attention, base)
    policy.load_state_dict(state, assign=True)
    policy.fresh_modules = tuple(fresh)
    return policy


def load_weights(policy: OpenVLAOFT, state: Mapping[str, Tensor]) -> None:
    """Copies weights under the policy's names (`policy.state_dict()`) into the policy, cast to its dtype.

    Raises:
        CheckpointError: a name or shape does not fit; the policy is unchanged then.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in policy.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    refuse_shape_faults("weights of the policy", shape_faults(expected, found))
    policy.load_state_dict(state)


def save_policy(
    state: Mapping[str, Tensor],
    base: str | Path,
    out: str | Path,
    *,
    dtype: torch.dtype,
    step: int = 0,
    statistics: Mapping[str, Any] | None = None,
) -> None:
    """Writes a checkpoint folder that `load_policy` reads back bit by bit.

    Args:
        state: every parameter under the policy's names, as `policy.state_dict()` gives them.
        base: folder whose configuration, tokenizer and processor files are taken over.
        out: new folder. It appears only when it is complete.
        dtype: of the stored weights.
        step: training step, part of the heads' file names.
        statistics: contents of `dataset_statistics.json`; none takes over the base's.

    Raises:
        CheckpointError: `out` exists and is not empty, or `state` does not fit the base's configuration.
        OSError: nothing could be written, for instance because the disk is full; `out` does not exist then.
    """
    folder, raw = read_config(base)
    modules = {name: _of_module(state, name) for name in _FRESH}
    model = {checkpoint_key(name): tensor for name, tensor in state.items() if name.partition(".")[0] not in modules}
    found = {key: tuple(tensor.shape) for key, tensor in model.items()}
    refuse_shape_faults("weights to save", shape_faults(model_shapes(PolicyConfig.from_dict(raw)), found))
    with new_folder(Path(out)) as partial:
        for name in _COMPANIONS:
            if (folder / name).is_file():
                shutil.copyfile(folder / name, partial / name)
        if statistics is not None:
            write_json(partial / "dataset_statistics.json", statistics)
        write_json(partial / "config.json", {**raw, "torch_dtype": str(dtype).removeprefix("torch.")})
        for name, tensors in modules.items():
            if tensors:
                tensors = {f"module.{key}": tensor for key, tensor in tensors.items()}
                write_tensors(tensors, partial / f"{name}--{step}_checkpoint.safetensors", dtype)
        write_tensors(model, partial / "model.safetensors", dtype)


def _of_module(state: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    prefix = f"{name}."
    return {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}


def _fresh_module(name: str, config: PolicyConfig, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _FRESH[name](config)
