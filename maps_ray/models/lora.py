"""Low-rank adapters (LoRA, arXiv 2106.09685): into a policy, out of a checkpoint, and merged.

peft puts them into a policy and names their parameters: `<layer>.base_layer.weight` for the frozen weight,
`<layer>.lora_A.default.weight` and `<layer>.lora_B.default.weight` for the adapter.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn

from maps_ray.models.checkpoint_faults import CheckpointError
from maps_ray.models.files.formats import MappedTensors, read_header, read_json
from maps_ray.models.torchvision_import import ensure_torchvision
from maps_ray.proximity.stack import assign

_A, _B, _BASE = ".lora_A.default.weight", ".lora_B.default.weight", ".base_layer."
# Before every key in peft's files: its `PeftModel` holds a `LoraModel` holds the model.
_ROOT = "base_model.model."

LoraInit = Literal["gaussian", "kaiming"]
"""How A starts: normal with standard deviation 1 / rank, or uniform as a linear layer of torch."""
Adapted = TypeVar("Adapted", bound=nn.Module)

# What an adapter may ask for beyond W + scale * B A, with the values that ask for nothing.
_PLAIN = {
    "use_dora": (False, None),
    "fan_in_fan_out": (False, None),
    "bias": ("none", None),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "modules_to_save": ([], None),
}


# Ways to start whose product peft subtracts from the base before training.
_CHANGE_THE_BASE = ("pissa", "olora", "corda", "lora_ga", "loftq")


def default_alpha(rank: int) -> int:
    """The published recipe's alpha: the rank, at most 16."""
    return min(rank, 16)


def add_adapters(
    policy: Adapted,
    rank: int,
    alpha: float | None = None,
    targets: Iterable[str] | None = None,
    seed: int = 0,
    init: LoraInit = "gaussian",
) -> Adapted:
    """Puts adapters into a policy, freezes the layers under them and leaves modules without pretrained weights as is.

    The adapters start as a zero change: A as `init` says, B zero. The paper's anchor is zero, the released code's the
    start, see `adapter_starts`.

    Args:
        policy: with a `stack()` that says which parameters are pretrained. Changed in place.
        rank: of each adapter.
        alpha: the adapter is scaled by alpha / rank; none means `default_alpha(rank)`.
        targets: last parts of layer names, such as `q_proj`; none means every linear layer and patch embedding of the
            pretrained modules, but for a head that shares its weight with the embedding.
        seed: of the adapters; the global generator is left as it was.
        init: how A starts.

    Returns:
        `policy`.

    Raises:
        ValueError: a target that names no layer.
    """
    ensure_torchvision()
    # Here alone: who reads or merges adapters needs no peft, which takes long to import.
    from peft import LoraConfig, inject_adapter_in_model

    # Before the adapters are in: the weights under them are called otherwise then, have no owner, and are frozen below.
    owners = assign(policy.stack(), [name for name, _ in policy.named_parameters()])  # type: ignore[operator]
    layers = _adaptable(policy, {name for name, layer in owners.items() if layer.pretrained})
    if targets is not None:
        wanted = list(targets)
        known = {name.rpartition(".")[2] for name in layers}
        unknown = [target for target in wanted if target not in known]
        if unknown or not wanted:
            raise ValueError(f"LoRA targets {unknown or wanted}: no layer has such a name; known: {sorted(known)}")
        layers = [name for name in layers if name.rpartition(".")[2] in wanted]
    config = LoraConfig(
        r=rank,
        lora_alpha=default_alpha(rank) if alpha is None else alpha,  # type: ignore[arg-type]
        lora_dropout=0.0,
        # Full names, and not `all-linear`: that takes the new modules too, and leaves out convolutions (peft 0.21),
        # which the published adapters have in patch embeddings.
        target_modules=layers,
        init_lora_weights="gaussian" if init == "gaussian" else True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # `get_peft_model` would wrap the policy, and put `base_model.model.` before all of its names.
        inject_adapter_in_model(config, policy)
    for name, parameter in policy.named_parameters():
        layer = owners.get(name)
        parameter.requires_grad_(is_adapter(name) or (layer is not None and not layer.pretrained))
    return policy


def adapter_starts(policy: nn.Module) -> dict[str, Tensor]:
    """The values that adapters start with, for those of them that are trained; what is left out starts at zero.

    Call it on the policy that `add_adapters` returned, before its weights are sharded, trained or loaded: the seed
    makes the same values again when a run is resumed. They are the anchors of the released code
    (`proximity.lora_anchor: init`).

    Returns:
        name of each A -> a copy of it, in its dtype, on the CPU.
    """
    return {
        name: parameter.detach().to("cpu", copy=True)
        for name, parameter in policy.named_parameters()
        if ".lora_A." in name and parameter.requires_grad
    }


def is_adapter(name: str) -> bool:
    """Whether a parameter belongs to an adapter."""
    return ".lora_A." in name or ".lora_B." in name


def base_name(name: str) -> str:
    """The name that a parameter had before adapters were put in."""
    return name.replace(_BASE, ".")


def low_rank_change(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """scale * B A in fp32.

    Args:
        a: (rank, in) of a linear layer, (rank, in, height, width) of a convolution.
        b: (out, rank), or (out, rank, 1, 1).

    Returns:
        (out, in) or (out, in, height, width).
    """
    return scale * (b.float().flatten(1) @ a.float().flatten(1)).view(len(b), *a.shape[1:])


def merge_adapters(state: Mapping[str, Tensor], alpha: float | None) -> dict[str, Tensor]:
    """The weights of a policy with adapters, the adapters added in fp32, under the names without adapters.

    Args:
        state: `policy.state_dict()`; without adapters it comes back as it is.
        alpha: as in `add_adapters`.
    """
    merged = {}
    for name, tensor in state.items():
        if is_adapter(name):
            continue
        layer = name.removesuffix(f"{_BASE}weight")
        if layer != name:
            a, b = state[layer + _A], state[layer + _B]
            rank = len(a)
            scale = (default_alpha(rank) if alpha is None else alpha) / rank
            tensor = (tensor.float() + low_rank_change(a, b, scale).to(tensor.device)).to(tensor.dtype)
        merged[base_name(name)] = tensor
    return merged


def adapter_files(
    state: Mapping[str, Tensor], alpha: float | None, key: Callable[[str], str]
) -> tuple[dict[str, object], dict[str, Tensor]]:
    """The contents of `adapter_config.json` and `adapter_model.safetensors`.

    Args:
        state: `policy.state_dict()` with adapters.
        alpha: as in `add_adapters`.
        key: name of a parameter in the policy -> checkpoint key.

    Raises:
        CheckpointError: `state` has no adapters.
    """
    layers = [name.removesuffix(_A) for name in state if name.endswith(_A)]
    if not layers:
        raise CheckpointError("there are no adapters to save: the policy was trained without LoRA")
    rank = len(state[layers[0] + _A])
    tensors = {}
    for layer in layers:
        stored = key(f"{layer}.weight").removesuffix(".weight")
        tensors[f"{_ROOT}{stored}.lora_A.weight"] = state[layer + _A]
        tensors[f"{_ROOT}{stored}.lora_B.weight"] = state[layer + _B]
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": default_alpha(rank) if alpha is None else alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        # So `PeftModel.save_pretrained` leaves it, whatever it trained with.
        "inference_mode": True,
        "init_lora_weights": "gaussian",
        "use_dora": False,
        "use_rslora": False,
        # Last names, as published: the base model, into which peft puts them, has no new modules that they could mean.
        "target_modules": sorted({layer.rpartition(".")[2] for layer in layers}),
        "task_type": None,
        "base_model_name_or_path": "",
    }
    return config, tensors


@dataclass(frozen=True)
class Adapter:
    """A stored adapter: what it adds to which weight of a checkpoint."""

    path: Path
    alpha: float
    scale: float
    """What B A is multiplied by: alpha / rank, or alpha / sqrt(rank) of a rank-stabilised adapter."""
    ranks: dict[str, tuple[str, str]] = field(repr=False)
    """Checkpoint key of the weight -> keys of A and B in the adapter's file."""
    tensors: MappedTensors = field(repr=False)

    @classmethod
    def read(cls, path: str | Path) -> Adapter:
        """Opens a folder with `adapter_config.json` and `adapter_model.safetensors`, as peft writes it.

        Weights of the layers themselves, which peft stores for an output head, are left aside.

        Raises:
            CheckpointError: a file is missing or corrupt, or the adapter is not a plain LoRA.
        """
        folder = Path(path)
        raw = read_json(folder / "adapter_config.json")
        if raw.get("peft_type") != "LORA":
            raise CheckpointError(f"{folder}: peft_type = {raw.get('peft_type')!r}: must be 'LORA'")
        for name, allowed in _PLAIN.items():
            if raw.get(name) not in allowed:
                raise CheckpointError(f"{folder}: {name} = {raw[name]!r}: only plain LoRA is read")
        init = str(raw.get("init_lora_weights")).lower()
        if init.startswith(_CHANGE_THE_BASE):
            raise CheckpointError(
                f"{folder}: init_lora_weights = {init!r}: it belongs to a base that peft has taken its start from; "
                "merge it with peft, or save it again as plain LoRA"
            )
        rank, alpha = raw.get("r"), raw.get("lora_alpha")
        if not isinstance(rank, int) or not isinstance(alpha, (int, float)) or rank < 1:
            raise CheckpointError(f"{folder}: r = {rank!r}, lora_alpha = {alpha!r}: must be numbers, r at least 1")
        infos = read_header(folder / "adapter_model.safetensors")
        pairs: dict[str, dict[str, str]] = {}
        for key in infos:
            # peft leaves the adapter's name (`default`) out when it saves; a plain state dictionary has it.
            match = re.fullmatch(rf"{re.escape(_ROOT)}(.+)\.lora_([AB])\.(?:default\.)?weight", key)
            if match:
                pairs.setdefault(f"{match[1]}.weight", {})[match[2]] = key
            elif _BASE not in key:
                raise CheckpointError(f"{folder}: unexpected tensor {key}")
        alone = [key for key, pair in pairs.items() if len(pair) != 2]
        if alone or not pairs:
            raise CheckpointError(f"{folder}: lora_A or lora_B is missing for {alone[:10] or 'every layer'}")
        for key, pair in pairs.items():
            a, b = infos[pair["A"]].shape, infos[pair["B"]].shape
            if a[0] != rank or b[1] != rank:
                raise CheckpointError(f"{folder}: {key}: A is {list(a)}, B is {list(b)}; r is {rank}")
        scale = alpha / rank**0.5 if raw.get("use_rslora") else alpha / rank
        ranks = {key: (pair["A"], pair["B"]) for key, pair in pairs.items()}
        return cls(folder, alpha, scale, ranks, MappedTensors(infos))

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raises `CheckpointError` unless each adapted weight is in `shapes` and fits."""
        faults = []
        for key, (a_key, b_key) in self.ranks.items():
            a, b = self.tensors.shape(a_key), self.tensors.shape(b_key)
            shape = (b[0], *a[1:])
            if shapes.get(key) != shape:
                faults.append(f"{key}: adapter for {list(shape)}, model has {list(shapes.get(key, ())) or 'no such'}")
        if faults:
            more = [f"... and {len(faults) - 10} more"] if len(faults) > 10 else []
            raise CheckpointError("\n  ".join([f"{self.path} does not fit the model", *faults[:10], *more]))

    def change(self, key: str) -> Tensor | None:
        """What the adapter adds to one weight, fp32; None where it adds nothing."""
        if key not in self.ranks:
            return None
        a, b = (self.tensors.read(name) for name in self.ranks[key])
        return low_rank_change(a, b, self.scale)


def _adaptable(policy: nn.Module, pretrained: set[str]) -> list[str]:
    """Names of the linear layers and patch embeddings whose weights are pretrained and not shared."""
    embeddings = {id(module.weight) for module in policy.modules() if isinstance(module, nn.Embedding)}
    return [
        name
        for name, module in policy.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d))
        and f"{name}.weight" in pretrained
        and id(module.weight) not in embeddings
    ]
