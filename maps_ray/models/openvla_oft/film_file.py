"""`vision_backbone--N_checkpoint`: the towers with FiLM, as OFT saves them.

Beside FiLM's `blocks.N.scale` and `blocks.N.shift`, a block's own tensors stand under `blocks.N.block`. Files of the
published training also carry the adapters that were never merged (`base_layer`, `lora_A.default`, `lora_B.default`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from maps_ray.models.checkpoint_faults import CheckpointError
from maps_ray.models.files.folders import ModuleFile, check_module, strip_module
from maps_ray.models.files.formats import MappedTensors, read_header
from maps_ray.models.files.weights import read_pt
from maps_ray.models.layers import Shapes
from maps_ray.models.lora import base_name, is_adapter, merge_adapters
from maps_ray.models.openvla_oft.config import PolicyConfig
from maps_ray.models.openvla_oft.tensors import film_shapes, model_shapes

_FILM = re.compile(r"\.blocks\.\d+\.(scale|shift)\.(weight|bias)$")
# What upstream's evaluation builds around the towers before it loads their file.
_PUBLISHED_RANK = 32


def is_film(name: str) -> bool:
    """Whether a tensor is FiLM's own."""
    return _FILM.search(name) is not None


def file_key(key: str) -> str:
    """Checkpoint key of a tower's tensor -> its key in the file."""
    return key if is_film(key) else re.sub(r"\.blocks\.(\d+)\.", r".blocks.\1.block.", key)


def film_file_shapes(config: PolicyConfig) -> Shapes:
    """The tensors of the file, adapters merged, under checkpoint keys."""
    towers = {key: shape for key, shape in model_shapes(config).items() if key.startswith("vision_backbone.")}
    return towers | film_shapes(config)


def read_film_file(file: ModuleFile, config: PolicyConfig, alpha: float | None = None) -> dict[str, Tensor]:
    """The tensors of the file under checkpoint keys, adapters merged; nothing shares memory with the file.

    Args:
        file: `.pt` or safetensors.
        config: sizes.
        alpha: of the adapters; none means the published recipe's.

    Raises:
        CheckpointError: unreadable, or not the tensors of the towers with FiLM.
    """
    if file.is_safetensors:
        mapped = MappedTensors(read_header(file.path))
        loaded = {key: mapped.read(key).clone() for key in mapped}
    else:
        loaded = read_pt(file.path)
        if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
            raise CheckpointError(f"{file.path}: expected a dictionary of tensors")
    state = {re.sub(r"(\.blocks\.\d+)\.block\.", r"\1.", strip_module(key)): value for key, value in loaded.items()}
    expected = film_file_shapes(config)
    plain = {base_name(key): tuple(value.shape) for key, value in state.items() if not is_adapter(key)}
    check_module(file, expected, plain)
    try:
        # Such a file does not say its alpha.
        merged = merge_adapters(state, alpha)
    except (KeyError, RuntimeError) as error:
        raise CheckpointError(f"{file.path}: its adapters are incomplete or do not fit: {error}") from None
    check_module(file, expected, {key: tuple(value.shape) for key, value in merged.items()})
    return merged


def published_film_file(towers: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The file as upstream's evaluation loads it: with adapters, which here change nothing.

    Args:
        towers: the towers with FiLM under checkpoint keys.
    """
    stored: dict[str, Tensor] = {}
    for key, tensor in towers.items():
        name = file_key(key)
        layer = name.rpartition(".")[0]
        # Two axes are a linear layer's, four a convolution's; position embedding, tokens and the pool's latent have
        # three, norms and LayerScale one.
        linear = f"{layer}.weight" == name and tensor.ndim in (2, 4) and not is_film(key)
        is_bias_of_linear = name.endswith(".bias") and towers.get(key.removesuffix("bias") + "weight", tensor).ndim > 1
        if is_film(key) or not (linear or is_bias_of_linear):
            stored[name] = tensor
            continue
        stored[f"{layer}.base_layer.{name.rpartition('.')[2]}"] = tensor
        if linear:
            point = (1, 1) if tensor.ndim == 4 else ()
            # Zeros: `load_state_dict` is strict upstream, and B A = 0 adds nothing.
            stored[f"{layer}.lora_A.default.weight"] = tensor.new_zeros(_PUBLISHED_RANK, *tensor.shape[1:])
            stored[f"{layer}.lora_B.default.weight"] = tensor.new_zeros(len(tensor), _PUBLISHED_RANK, *point)
    return stored
