"""A policy for use onto its devices: straight from the mapped file to one, over several, or partly on the CPU.

Weights go from the file to their place one by one, so that a policy never lies whole in the host's memory on its way
to a GPU. accelerate chooses the places and moves inputs between them.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from accelerate import dispatch_model, infer_auto_device_map
from accelerate.utils import check_device_map, get_max_memory, set_module_tensor_to_device

from maps_ray.models import load_policy
from maps_ray.models.checkpoint_faults import CheckpointError
from maps_ray.models.policy import BasePolicy

# Blocks with a residual connection, which must lie on one device.
_WHOLE = ["Block", "FiLMBlock", "LlamaDecoderLayer", "Qwen2DecoderLayer", "ResidualMLP"]


def load_for_use(
    path: str | Path, *, dtype: torch.dtype, device_map: str = "auto", name: str | None = None, **options: object
) -> BasePolicy:
    """Loads a policy in evaluation mode onto devices.

    Args:
        path: checkpoint folder.
        dtype: of the weights.
        device_map: `auto`: the GPU that holds all of it, else several and then the CPU, or the CPU where there is no
            GPU; `cpu`; `cuda` or `cuda:N`; or JSON, of modules and their devices, such as
            `{"vision_backbone": "cuda:0", "language_model": "cpu", ...}`, or of limits:
            `{"max_memory": {"0": "20GiB", "cpu": "60GiB"}}`.
        name, options: as `load_policy`.

    Raises:
        CheckpointError: the checkpoint cannot be used, or the map names no device or module, or leaves some out.
    """
    policy = load_policy(path, name=name, dtype=dtype, deferred=True, **options).eval()
    return place(policy, _devices(policy, device_map, dtype), dtype)


def place(policy: BasePolicy, devices: dict[str, str], dtype: torch.dtype, *, hooks: bool = False) -> BasePolicy:
    """Fills a deferred policy, each weight on its device.

    Args:
        policy: as `load_policy(..., deferred=True)` gives it.
        devices: module (`""` for all) -> device.
        dtype: of the weights.
        hooks: let accelerate move inputs even where all is on one device.

    Returns:
        the policy; inputs go to `policy.runs_on`.
    """
    # Of a module and a part of it that both have an entry, the part's own holds: so accelerate reads a map
    # (`load_checkpoint_in_model`).
    places = sorted(devices.items(), key=lambda item: -len(item[0]))
    for name, parameter in list(policy.named_parameters()):
        device = next(device for module, device in places if not module or f"{name}.".startswith(f"{module}."))
        value = policy.read_anchor(name) if name in policy.deferred else parameter.detach()
        assert value is not None  # what is deferred has pretrained weights
        # A copy: what was read is a view of the file.
        set_module_tensor_to_device(policy, name, device, value=value.to(dtype, copy=True), dtype=dtype)
    policy.close_base()
    policy.deferred = frozenset()
    accelerators = [device for device in devices.values() if torch.device(device).type != "cpu"]
    policy.runs_on = torch.device(accelerators[0] if accelerators else "cpu")
    if len(set(devices.values())) == 1 and not hooks:
        # For the buffers, which are no parameters: frequencies of rotary positions.
        return policy.to(policy.runs_on)
    dispatched: BasePolicy = dispatch_model(policy, devices, main_device=policy.runs_on, force_hooks=hooks)
    return dispatched


def _devices(policy: BasePolicy, wanted: str, dtype: torch.dtype) -> dict[str, str]:
    """Module -> device, as torch spells it."""
    if wanted == "auto":
        return _auto(policy, dtype, None) if torch.cuda.is_available() else {"": "cpu"}
    if not wanted.lstrip().startswith("{"):
        return {"": _device(wanted)}
    try:
        given = json.loads(wanted)
    except json.JSONDecodeError as error:
        raise CheckpointError(f"device map = {wanted!r}: no JSON: {error}") from None
    if set(given) == {"max_memory"} and isinstance(given["max_memory"], dict):
        # JSON has no numbers for keys, and accelerate knows GPUs by number alone.
        limits = {int(name) if str(name).isdigit() else name: size for name, size in given["max_memory"].items()}
        return _auto(policy, dtype, limits)
    devices = {str(module): _device(device) for module, device in given.items()}
    known = {name for name, _ in policy.named_modules()}
    unknown = [module for module in devices if module not in known]
    if unknown:
        names = ", ".join(name for name, _ in policy.named_children())
        raise CheckpointError(f"device map: no module is named {unknown[0]!r}; the policy has {names}, and their parts")
    try:
        check_device_map(policy, devices)
    except ValueError as error:
        raise CheckpointError(f"device map: it leaves parts out: {error}") from None
    return devices


def _auto(policy: BasePolicy, dtype: torch.dtype, limits: dict[int | str, object] | None) -> dict[str, str]:
    try:
        placed = infer_auto_device_map(policy, get_max_memory(limits), no_split_module_classes=_WHOLE, dtype=dtype)
    except (ValueError, RuntimeError) as error:
        raise CheckpointError(f"device map: {error}") from None
    # accelerate gives to the disk what fits nowhere else, and says nothing.
    if "disk" in placed.values():
        raise CheckpointError("device map: the policy fits neither the GPUs nor the CPU within these limits")
    return {
        module: _device(f"cuda:{device}" if isinstance(device, int) else device) for module, device in placed.items()
    }


def _device(name: object) -> str:
    """A device that is there, as torch spells it."""
    try:
        device = torch.device(int(str(name)) if str(name).isdigit() else str(name))
    except (RuntimeError, ValueError):
        raise CheckpointError(f"device = {name!r}: must be cpu, cuda or cuda:N") from None
    if device.type == "cpu":
        return "cpu"
    if device.type != "cuda":
        raise CheckpointError(f"device = {name!r}: must be cpu, cuda or cuda:N")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    index = device.index or 0
    if index >= count:
        raise CheckpointError(f"device = {name!r}: this machine has {count} GPUs that torch can use")
    return f"cuda:{index}"
