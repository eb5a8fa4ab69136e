"""From a checkpoint folder to a policy and back."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Unpack

import torch
from torch import Tensor, nn

from maps_ray.models.checkpoint_faults import CheckpointError
from maps_ray.models.decoder import Attention
from maps_ray.models.files.folders import check_weights, read_config
from maps_ray.models.files.formats import MappedTensors, read_folder_headers
from maps_ray.models.files.weights import (
    BaseTensors,
    SaveOptions,
    module_state,
    new_checkpoint,
    read_pt,
    split_modules,
)
from maps_ray.models.lora import merge_adapters
from maps_ray.models.minivla.backbone import MiniVLA
from maps_ray.models.minivla.config import Kind, PolicyConfig, VQConfig, full_config
from maps_ray.models.minivla.folder import (
    VQ_FOLDER,
    WeightFile,
    check_vq,
    find_weights,
    read_checkpoint_config,
)
from maps_ray.models.minivla.model import MiniVLAOFT, MiniVLAVQ
from maps_ray.models.minivla.tensors import (
    EMBEDDING,
    TIED_HEAD,
    checkpoint_key,
    model_shapes,
    module_shapes,
    parameter_name,
)
from maps_ray.models.minivla.vq import ActionVQ, VQActionTokenizer, load_vq
from maps_ray.models.openvla_oft.heads import L1ActionHead, ProprioProjector
from maps_ray.models.policy import assemble, with_random_weights
from maps_ray.models.sizes import PolicySizes

# Files beside the weights that a saved checkpoint takes over from the one it started from.
COMPANIONS = ("dataset_statistics.json", "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt")
_FRESH: dict[str, type[nn.Module]] = {"action_head": L1ActionHead, "proprio_projector": ProprioProjector}


class PublishedTensors:
    """Tensors of a published `.pt`, mapped into memory on first use; picklable."""

    def __init__(self, path: Path, keys: frozenset[str]) -> None:
        self._path = path
        self._keys = keys
        self._modules: Mapping[str, Mapping[str, Tensor]] | None = None

    def __contains__(self, key: str) -> bool:
        return key in self._keys

    def __getstate__(self) -> dict[str, object]:
        return {"_path": self._path, "_keys": self._keys, "_modules": None}

    def read(self, key: str) -> Tensor:
        """The tensor in the file's dtype. Its memory is the mapped file: read it or copy it, never write to it.

        Raises:
            CheckpointError: the file changed or cannot be read any more.
        """
        if self._modules is None:
            self._modules = read_pt(self._path, mapped=True)["model"]
        module, _, name = key.partition("|")
        return self._modules[module][name]

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
    check_weights(folder, model_shapes(config), file.infos)
    base = open_weights(folder, file)
    modules = module_state(folder, module_shapes(config), lambda name: _FRESH[name](config), seed, dtype)
    # Its weights are no parameters of the policy, and it is built where tensors are real.
    vq = VQActionTokenizer(load_vq(folder / VQ_FOLDER), config.tokenizer_size - 1) if config.kind == "vq" else None

    def make() -> MiniVLA:
        return MiniVLAOFT(config, attention, base) if vq is None else MiniVLAVQ(config, vq, attention, base)

    return assemble(make, folder, raw, base, model_shapes(config), parameter_name, modules, dtype, deferred)


def create_policy(
    config: Mapping[str, object],
    *,
    kind: Kind | None = None,
    action_vq: ActionVQ | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    attention: Attention = "sdpa",
    **given: Unpack[PolicySizes],
) -> MiniVLA:
    """Builds a policy with random weights: timm's initialisation for the towers, Qwen2's for the language model.

    Args:
        config: contents of a `config.json`.
        action_vq: MiniVLA-VQ's tokenizer; none makes a random one.
        seed: the same seed gives the same weights; the global generator is left as it was.

    The other arguments are those of `load_policy`; `given` are its `sizes`.

    Raises:
        CheckpointError: a field of `config` is missing, unknown or out of range.
    """
    sizes = PolicyConfig.from_dict(config, kind=kind, **given)

    def make() -> MiniVLA:
        if sizes.kind == "oft":
            return MiniVLAOFT(sizes, attention)
        vq = action_vq or ActionVQ(VQConfig(sizes.chunk, sizes.action_dim))
        return MiniVLAVQ(sizes, VQActionTokenizer(vq, sizes.tokenizer_size - 1), attention)

    return with_random_weights(make, dtype, seed)


def save_policy(
    state: Mapping[str, Tensor],
    base: str | Path,
    out: str | Path,
    *,
    kind: Kind | None = None,
    **options: Unpack[SaveOptions],
) -> None:
    """Writes a checkpoint folder that `load_policy` reads back bit by bit.

    Args:
        state: every parameter under the policy's names, as `policy.state_dict()` gives them. Adapters are merged.
        base: folder whose configuration, tokenizer and VQ tokenizer are taken over.
        out: new folder. It appears only when it is complete.
        kind: none takes what `state` shows: `oft` where it has an action head.
        options: see `SaveOptions`; no published folder of this backbone has a file of adapters.

    Raises:
        CheckpointError: `out` exists and is not empty, or `state` does not fit the base's configuration.
        OSError: nothing could be written, for instance because the disk is full; `out` does not exist then.
    """
    folder, raw = read_config(base)
    weights = merge_adapters(state, options.get("lora_alpha"))
    modules, rest = split_modules(weights, _FRESH)
    kind = kind or ("oft" if "action_head" in modules else "vq")
    model = {checkpoint_key(name): tensor for name, tensor in rest.items()}
    config = PolicyConfig.from_dict(raw, kind=kind)
    trained_for = options.get("trained_for")
    if trained_for and kind == "oft":
        # A checkpoint that does not say its mask counts as one from before there was a choice.
        options["trained_for"] = {"attention_mask": config.attention_mask, **trained_for}
    written, expected = full_config(raw, kind), model_shapes(config)
    with new_checkpoint(out, folder, COMPANIONS, written, model, modules, expected, **options) as made:
        if (folder / VQ_FOLDER).is_dir():
            shutil.copytree(folder / VQ_FOLDER, made / VQ_FOLDER)


def open_tensors(path: str | Path) -> tuple[BaseTensors, Callable[[str], str]]:
    """The stored tensors of a folder, and name of a parameter -> its key among them.

    Raises:
        CheckpointError: no weights of such a policy.
    """
    folder, _ = read_config(path)
    return open_weights(folder, find_weights(folder)), checkpoint_key


def open_weights(folder: Path, file: WeightFile) -> BaseTensors:
    """The backbone's tensors.

    Raises:
        CheckpointError: a stored output head is not the embedding.
    """
    if file.published is None:
        base: BaseTensors = MappedTensors(read_folder_headers(folder))
    else:
        keys = frozenset(file.infos) | ({TIED_HEAD} if file.tied_head else set())
        base = PublishedTensors(file.published, keys)
    if file.tied_head and not torch.equal(base.read(TIED_HEAD), base.read(EMBEDDING)):
        raise CheckpointError(f"{folder}: {TIED_HEAD} differs from the embedding: MiniVLA's head is tied to it")
    return base
