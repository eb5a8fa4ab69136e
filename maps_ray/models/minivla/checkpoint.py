"""From a checkpoint folder to a policy and back."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from maps_ray.models.attention import Attention
from maps_ray.models.errors import CheckpointError, refuse_shape_faults, shape_faults
from maps_ray.models.lora import merge_adapters
from maps_ray.models.minivla.backbone import BaseTensors, MiniVLA
from maps_ray.models.minivla.config import Kind, PolicyConfig, full_config
from maps_ray.models.minivla.folder import (
    VQ_FOLDER,
    WeightFile,
    check_model,
    check_vq,
    find_weights,
    read_checkpoint_config,
)
from maps_ray.models.minivla.layout import (
    EMBEDDING,
    MODULES,
    TIED_HEAD,
    checkpoint_key,
    model_shapes,
    module_shapes,
    parameter_name,
)
from maps_ray.models.minivla.model import MiniVLAOFT, MiniVLAVQ
from maps_ray.models.minivla.vq import VQActionTokenizer, load_vq
from maps_ray.models.module_files import find_module
from maps_ray.models.openvla_oft.heads import L1ActionHead, ProprioProjector
from maps_ray.models.safetensors_files import MappedTensors, read_folder_headers, read_json
from maps_ray.models.sizes import PolicySizes
from maps_ray.models.weight_files import new_folder, read_module, read_pt, stand_in, write_json, write_tensors

# Files beside the weights that a saved checkpoint takes over from the one it started from.
_COMPANIONS = ("dataset_statistics.json", "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt")
_FRESH: dict[str, type[nn.Module]] = {"action_head": L1ActionHead, "proprio_projector": ProprioProjector}


class PublishedTensors:
    """Tensors of a published `.pt`, mapped into memory on first use; picklable."""

    def __init__(self, path: Path, keys: frozenset[str]) -> None:
        self._path = path
        self._keys = keys
        self._modules: dict[str, Any] | None = None

    def __contains__(self, key: str) -> bool:
        return key in self._keys

    def __getstate__(self) -> dict[str, Any]:
        return {"_path": self._path, "_keys": self._keys, "_modules": None}

    def read(self, key: str) -> Tensor:
        """The tensor in the file's dtype. Its memory is the mapped file: read it or copy it, never write to it.

        Raises:
            CheckpointError: the file changed or cannot be read any more.
        """
        if self._modules is None:
            self._modules = read_pt(self._path, mapped=True)["model"]
        module, _, name = key.partition("|")
        tensor: Tensor = self._modules[module][name]
        return tensor

    def give_back(self) -> None:
        """Closes the file; tensors that are still in use keep it mapped."""
        self._modules = None


def load_policy(
    path: str | Path,
    *,
    kind: Kind | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    attention: Attention = "sdpa",
    deferred: bool = False,
    **sizes: Unpack[PolicySizes],
) -> MiniVLA:
    """Loads a policy on the CPU.

    Args:
        path: folder with `config.json` and weights (see `folder`); MiniVLA-VQ needs `vq/`, and MiniVLA-OFT reads
            `action_head--N_checkpoint` and `proprio_projector--N_checkpoint` (`.safetensors` or `.pt`) if they are
            there.
        kind: `vq` or `oft`; none takes what `config.json` says, which for published files is `vq`.
        dtype: of the parameters, whatever the files hold.
        seed: for the modules that the folder has no weights for; `policy.fresh_modules` names them.
        attention: `sdpa` or `eager`.
        deferred: leave the pretrained weights in their file; see `policy.deferred`.
        sizes: what the policy is for, see `PolicySizes`; MiniVLA-VQ reads no proprioception. Those left out are the
            checkpoint's own, where its configuration says them, else one image, no proprioception, 8 actions of 7
            dimensions.

    Returns:
        `MiniVLAVQ` or `MiniVLAOFT` in training mode (it has no dropout).

    Raises:
        CheckpointError: anything missing, corrupt or of another shape. Nothing is half loaded.
    """
    folder, raw, config = read_checkpoint_config(path, kind, **sizes)
    check_vq(folder, config)
    file = find_weights(folder)
    check_model(folder, config, file.infos)
    base = _open(folder, file)
    state: dict[str, Tensor] = {}
    fresh = []
    for name, expected in module_shapes(config).items():
        module = find_module(folder, name)
        if module is None:
            fresh.append(name)
            tensors = _fresh_module(name, config, seed).state_dict()
        else:
            tensors = read_module(module, expected)
        state |= {f"{name}.{key}": tensor.to(dtype) for key, tensor in tensors.items()}
    later = {parameter_name(key): shape for key, shape in model_shapes(config).items()} if deferred else {}
    if deferred:
        state |= {name: stand_in(shape, dtype) for name, shape in later.items()}
    else:
        # Copies, so that no parameter shares memory with the file.
        state |= {parameter_name(key): base.read(key).to(dtype, copy=True) for key in file.infos}
        base.give_back()
    policy: MiniVLA
    if config.kind == "vq":
        tokenizer = VQActionTokenizer(load_vq(folder / VQ_FOLDER), config.tokenizer_size - 1)
        with torch.device("meta"):
            policy = MiniVLAVQ(config, tokenizer, attention, base)
    else:
        with torch.device("meta"):
            policy = MiniVLAOFT(config, attention, base)
    policy.load_state_dict(state, assign=True)
    policy.fresh_modules, policy.deferred = tuple(fresh), frozenset(later)
    policy.folder, policy.trained_for = folder, raw.get("policy", {})
    return policy


def save_policy(
    state: Mapping[str, Tensor],
    base: str | Path,
    out: str | Path,
    *,
    kind: Kind | None = None,
    dtype: torch.dtype,
    step: int = 0,
    statistics: Mapping[str, Any] | None = None,
    trained_for: Mapping[str, Any] | None = None,
    lora_alpha: float | None = None,
) -> None:
    """Writes a checkpoint folder that `load_policy` reads back bit by bit.

    Args:
        state: every parameter under the policy's names, as `policy.state_dict()` gives them. Adapters are merged.
        base: folder whose configuration, tokenizer and VQ tokenizer are taken over.
        out: new folder. It appears only when it is complete.
        kind: none takes what `state` shows: `oft` where it has an action head.
        dtype: of the stored weights.
        step: training step, part of the heads' file names.
        statistics: contents of `dataset_statistics.json`; none takes over the base's.
        trained_for: the entries of `PolicySizes`, `normalization` and `images` (see `predict`), which become `policy`
            in `config.json`; what `load_policy` and `predict` are not told, they take from there.
        lora_alpha: of the adapters in `state`; none means the published recipe's.

    Raises:
        CheckpointError: `out` exists and is not empty, or `state` does not fit the base's configuration.
        OSError: nothing could be written, for instance because the disk is full; `out` does not exist then.
    """
    folder = Path(base)
    raw = read_json(folder / "config.json")
    weights = merge_adapters(state, lora_alpha)
    modules = {name: _of_module(weights, name) for name in _FRESH}
    kind = kind or ("oft" if modules["action_head"] else "vq")
    model = {checkpoint_key(name): tensor for name, tensor in weights.items() if name.partition(".")[0] not in modules}
    found = {key: tuple(tensor.shape) for key, tensor in model.items()}
    refuse_shape_faults("weights to save", shape_faults(model_shapes(PolicyConfig.from_dict(raw, kind=kind)), found))
    with new_folder(Path(out)) as partial:
        for name in _COMPANIONS:
            if (folder / name).is_file():
                shutil.copyfile(folder / name, partial / name)
        if (folder / VQ_FOLDER).is_dir():
            shutil.copytree(folder / VQ_FOLDER, partial / VQ_FOLDER)
        if statistics is not None:
            write_json(partial / "dataset_statistics.json", statistics)
        written = {**full_config(raw, kind), "torch_dtype": str(dtype).removeprefix("torch.")}
        write_json(partial / "config.json", written | ({"policy": dict(trained_for)} if trained_for else {}))
        for name, tensors in modules.items():
            if tensors:
                tensors = {f"module.{key}": tensor for key, tensor in tensors.items()}
                write_tensors(tensors, partial / f"{name}--{step}_checkpoint.safetensors", dtype)
        write_tensors(model, partial / "model.safetensors", dtype)


def export_published(path: str | Path, out: Path) -> None:
    """Writes the weights of a folder that `save_policy` made as a published `.pt`, in their stored dtype.

    Args:
        path: the folder.
        out: the new file, for instance `RUN/checkpoints/step-050000-epoch-00-loss=0.0000.pt`.

    Raises:
        CheckpointError: the folder's weights do not fit its configuration.
        FileExistsError: `out` is there already.
    """
    folder = Path(path)
    infos = read_folder_headers(folder)
    check_model(folder, PolicyConfig.from_dict(read_json(folder / "config.json")), infos)
    mapped = MappedTensors(infos)
    parts: dict[str, dict[str, Tensor]] = {module: {} for module in MODULES}
    for key in infos:
        module, _, name = key.partition("|")
        parts[module][name] = mapped.read(key)
    module, _, name = TIED_HEAD.partition("|")
    parts[module][name] = mapped.read(EMBEDDING)
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("xb") as file:
        torch.save({"model": parts}, file)


def _open(folder: Path, file: WeightFile) -> BaseTensors:
    """The backbone's tensors; a stored output head must be the embedding."""
    if file.published is None:
        base: BaseTensors = MappedTensors(read_folder_headers(folder))
    else:
        keys = frozenset(file.infos) | ({TIED_HEAD} if file.tied_head else set())
        base = PublishedTensors(file.published, keys)
    if file.tied_head and not torch.equal(base.read(TIED_HEAD), base.read(EMBEDDING)):
        raise CheckpointError(f"{folder}: {TIED_HEAD} differs from the embedding: MiniVLA's head is tied to it")
    return base


def _of_module(state: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    prefix = f"{name}."
    return {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}


def _fresh_module(name: str, config: PolicyConfig, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _FRESH[name](config)
