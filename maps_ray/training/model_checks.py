"""What the spec's `model` section asks of a checkpoint, and what of it cannot be done. No torch."""

from __future__ import annotations

import math
from importlib.util import find_spec

from maps_ray.models import ModelInfo
from maps_ray.models.sizes import PolicySizes
from maps_ray.proximity.schedule import ScheduleError, frozen_layers
from maps_ray.proximity.stack import assign
from maps_ray.spec import Problem, RunSpec, nearest


class PolicyOptions(PolicySizes, total=False):
    """What a spec asks of a policy; its sizes of action and proprioception the data says."""

    name: str


def policy_options(spec: RunSpec) -> PolicyOptions:
    """Keyword arguments of `maps_ray.models.describe` and `load_policy`, but for dimensions that the data says."""
    return {
        "name": spec.model.name,
        "num_images": len(spec.data.cameras),
        "use_proprio": spec.model.use_proprio,
        "chunk": spec.data.chunk,
        "head": spec.model.head,
        "film": spec.model.film,
        "attention_mask": spec.model.attention_mask,
        "released_faults": spec.model.released_faults or None,
    }


def model_problems(spec: RunSpec, info: ModelInfo) -> list[Problem]:
    """A head whose package is missing, LoRA targets that name no layer, and nothing left to train."""
    problems = []
    if _nothing_trained(spec, info):
        field, value = ("proximity.freeze", spec.proximity.freeze)
        if not value and spec.model.lora is not None:
            field, value = ("model.lora.targets", spec.model.lora.targets or [])
        message = (
            "nothing is left to train: every weight of the model is frozen; take a module out of the list, or choose a "
            "head with weights of its own, such as model.head=l1"
        )
        problems.append(Problem(field, value, message))
    if spec.model.head == "diffusion" and find_spec("diffusers") is None:
        problems.append(
            Problem("model.head", "diffusion", "needs diffusers: pip install 'maps_ray[diffusion]', on every node")
        )
    if spec.model.lora is not None and spec.model.lora.targets is not None:
        known = sorted({name.rpartition(".")[2] for name in _adaptable(info)})
        for target in spec.model.lora.targets:
            if target not in known:
                message = f"no layer has such a name; {nearest(target, known)}"
                problems.append(Problem("model.lora.targets", target, message))
    return problems


def _nothing_trained(spec: RunSpec, info: ModelInfo) -> bool:
    """Whether no weight would ever change: all that is there is frozen, or that adapters would be put into."""
    owners = assign(info.stack, info.parameters)
    try:
        frozen = frozen_layers(info.stack, spec.proximity.freeze)
    except ScheduleError:
        return False  # said of the field itself
    free = [name for name in info.parameters if owners[name].name not in frozen]
    if spec.model.lora is None:
        return not free
    targets = spec.model.lora.targets
    adapted = {f"{name}.weight" for name in _adaptable(info) if targets is None or name.rpartition(".")[2] in targets}
    return not any(name in adapted or not owners[name].pretrained for name in free)


def trained_parameters(spec: RunSpec, info: ModelInfo) -> int:
    """How many numbers the optimizer holds: all parameters, or those of adapters and new modules."""
    return sum(math.prod(shape) for shape in trained_shapes(spec, info).values())


def trained_shapes(spec: RunSpec, info: ModelInfo) -> dict[str, tuple[int, ...]]:
    """Every parameter that is trained unless it is frozen: name in the policy -> shape, in the order of the model.

    Under LoRA these are the new modules and, as `<layer>.lora_A.default.weight` and `.lora_B.`, the adapters.
    """
    lora = spec.model.lora
    if lora is None:
        return dict(info.parameters)
    owners = assign(info.stack, info.parameters)
    adaptable = _adaptable(info)
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in info.parameters.items():
        layer = name.removesuffix(".weight")
        if not owners[name].pretrained:
            shapes[name] = shape
        elif layer in adaptable and (lora.targets is None or layer.rpartition(".")[2] in lora.targets):
            kernel = tuple(1 for _ in shape[2:])
            shapes[f"{layer}.lora_A.default.weight"] = (lora.rank, *shape[1:])
            shapes[f"{layer}.lora_B.default.weight"] = (shape[0], lora.rank, *kernel)
    return shapes


def _adaptable(info: ModelInfo) -> dict[str, tuple[int, ...]]:
    """Linear layers and patch embeddings of the pretrained modules, with the shapes of their weights."""
    owners = assign(info.stack, info.parameters)
    return {
        name.removesuffix(".weight"): tuple(shape)
        for name, shape in info.parameters.items()
        if name.endswith(".weight")
        and len(shape) in (2, 4)
        and owners[name].pretrained
        # By its shape an embedding looks like a linear layer; it takes no adapter.
        and not name.endswith("embed_tokens.weight")
    }
