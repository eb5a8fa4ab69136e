"""From an order of modules to the proximity strength of each layer and tensor. No torch.

Two recipes: the paper's (MAPS, arXiv 2511.19878, section 3) gives one strength to each layer of the stack; the
authors' released code (MAPS-VLA, June 2026) counts numbered blocks alone and gives one to each tensor.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Literal, NotRequired, TypedDict

from maps_ray.proximity.stack import StackLayer
from maps_ray.spec import ProximitySpec
from maps_ray.spec.problems import nearest

Shape = Literal["linear", "cosine", "constant"]
Granularity = Literal["layer", "module"]

# Share of lambda_max that is left at `position`, 0 for the first layer and 1 for the last.
_SHAPES: dict[str, Callable[[float], float]] = {
    "linear": lambda position: 1.0 - position,
    "cosine": lambda position: 0.5 * (1.0 + math.cos(math.pi * position)),
    "constant": lambda position: 1.0,
}
_GRANULARITIES = ("layer", "module")
# Modules of the released code that have no pretrained weights, by the names of their parameters.
_NEW = re.compile(r"(action_head|proprio_projector|noisy_action_projector)\.")
_QUERIES = "action_queries"
# A part of the name that is a number; digits inside a part, as in `fc1` or `norm1`, are none.
_NUMBERED = re.compile(r"(?:.*?\.)??\d+(?=\.|$)")


class ScheduleError(ValueError):
    """An order that does not address each pretrained layer exactly once, or a value out of range."""

    def __init__(self, message: str, field: str = "order") -> None:
        self.field = field
        """The field of `ProximitySpec` that is at fault."""
        super().__init__(message)


class StrengthRow(TypedDict):
    """One layer in the table of `maps-ray strengths`."""

    module: str
    strength: float
    """The highest of its trained tensors; 0 where all are frozen."""
    tensors: int
    parameters: int
    frozen: NotRequired[bool]
    """There, and true, where the weights never change."""
    strengths: NotRequired[dict[str, int]]
    """There where its trained tensors have several strengths: each, to 6 digits -> number of tensors."""
    frozen_tensors: NotRequired[int]
    """There where some of its tensors never change, and others do."""


def schedule(
    stack: Sequence[StackLayer],
    order: Sequence[str],
    shape: Shape,
    lambda_max: float,
    granularity: Granularity,
) -> dict[str, float]:
    """The proximity strength lambda_k of each layer.

    The pretrained layers are put in line: all layers of the order's first entry, in forward order, then those of the
    second, and so on. With k counted along that line, `linear` gives lambda_max * (1 - (k - 1) / (|L| - 1)), `cosine`
    the half-cosine from lambda_max to 0, `constant` lambda_max throughout. With granularity `module`, k counts the
    entries of the order, and all layers of an entry share its strength. A line of one gets lambda_max.

    Args:
        stack: layers in forward order.
        order: modules from the one held most to the one held least, named as in `StackLayer.modules`.
        shape: how the strength falls along the line.
        lambda_max: strength of the first layer, at least 0.
        granularity: one strength for each layer, or for each entry of the order.

    Returns:
        layer name -> strength, in the order of `stack`; 0 for layers without pretrained weights.

    Raises:
        ScheduleError: an unknown module, a layer addressed twice or not at all, a module without pretrained weights,
            or a shape, granularity or lambda_max out of range.
    """
    _check(shape, lambda_max)
    if granularity not in _GRANULARITIES:
        raise ScheduleError(f"granularity = {granularity!r}: {nearest(str(granularity), _GRANULARITIES)}")
    entries = _layers_of_entries(stack, order)
    line = entries if granularity == "module" else [[name] for names in entries for name in names]
    last = max(len(line) - 1, 1)
    strengths = {layer.name: 0.0 for layer in stack}
    for index, names in enumerate(line):
        strengths.update(dict.fromkeys(names, lambda_max * _SHAPES[shape](index / last)))
    return strengths


def released_strengths(
    tensors: Mapping[str, int],
    lambda_max: float = 1.0,
    shape: Shape = "linear",
    *,
    layer_of: Callable[[str], str | None] | None = None,
) -> dict[str, float]:
    """The strength of each tensor under the authors' released code.

    Tensors with a number in their name, a whole part between dots as in `blocks.3.norm1.weight`, belong to the layer
    that the name has up to its first number. The K layers are counted in order of appearance: i = 0 .. K - 1; those of
    which biases alone are trained are not counted. All tensors without a number share one last place, i = K, also where
    there is no layer or nothing else. `linear` gives lambda_max (1 - i / (K + 1)), `cosine` lambda_max / 2 (1 + cos(pi
    i / (K + 1))); norms and LayerScale are held like the rest of their layer. `constant` gives lambda_max to tensors of
    two and more dimensions, 0 to the others. Biases and new modules get 0 under every shape; the action queries of
    VLA-Adapter too, but lambda_max under `constant`.

    Args:
        tensors: name in the published Hugging Face layout -> number of dimensions, for every trained tensor, in the
            order of the model. Frozen tensors are left out: their layers are then not counted. Names of adapters may
            begin with `base_model.model.`.
        lambda_max: strength of the first layer, at least 0.
        shape: how the strength falls along the layers.
        layer_of: name of a tensor -> the layer that it is counted with, None for the last place; none takes the name up
            to its first number.

    Returns:
        name -> strength, in the order of `tensors`.

    Raises:
        ScheduleError: a shape or lambda_max out of range.
    """
    _check(shape, lambda_max)
    layer_of = layer_of or _numbered_layer
    free = {name for name in tensors if name.endswith(".bias") or _NEW.match(name.removeprefix("base_model.model."))}
    held = {name: layer_of(name) for name in tensors if name not in free and _QUERIES not in name}
    line = list(dict.fromkeys(layer for layer in held.values() if layer is not None))
    places = {layer: place for place, layer in enumerate(line)}
    strengths = {}
    for name, dimensions in tensors.items():
        if shape == "constant":
            share = float(_QUERIES in name or (name not in free and dimensions > 1))
        elif name not in held:
            share = 0.0
        else:
            layer = held[name]
            share = _SHAPES[shape]((len(line) if layer is None else places[layer]) / (len(line) + 1))
        strengths[name] = lambda_max * share
    return strengths


def layer_strengths(stack: Sequence[StackLayer], proximity: ProximitySpec) -> dict[str, float]:
    """The strength of each layer as a spec wants it: the schedule, then the strengths given by module.

    Under the released recipe a layer is given what its block's weights are held by; frozen layers are not counted.
    Groups, which may hold a part of a layer, are left aside: `tensor_strengths` has all.

    Returns:
        layer name -> strength, in the order of `stack`.

    Raises:
        ScheduleError: as `schedule`, or a strength is given for a module that the model lacks, or for a layer twice.
    """
    proximity, shape = _set_by_hand(proximity)
    if proximity.recipe == "released":
        # A stand-in for each layer's weights: of two dimensions, under the layer's own name.
        own = {layer.name: layer for layer in stack}
        frozen = frozen_layers(stack, proximity.freeze)
        trained = {name: 2 for name, layer in own.items() if layer.pretrained and name not in frozen}
        strengths = {**dict.fromkeys(own, 0.0), **_released(stack, own, trained, proximity, str)}
    else:
        strengths = schedule(stack, proximity.order, shape, proximity.lambda_max, proximity.granularity)
    given_by: dict[str, str] = {}
    for module, strength in proximity.strengths.items():
        for name in _layers_of(stack, module, "strengths"):
            if name in given_by:
                raise ScheduleError(f"strengths: {given_by[name]!r} and {module!r} both hold {name}", "strengths")
            given_by[name] = module
            strengths[name] = strength
    return strengths


def tensor_strengths(
    stack: Sequence[StackLayer],
    owners: Mapping[str, StackLayer],
    dimensions: Mapping[str, int],
    proximity: ProximitySpec,
    published: Callable[[str], str],
) -> dict[str, float]:
    """The strength of each trained tensor as a spec wants it, under either recipe.

    Args:
        stack: layers in forward order.
        owners: parameter name -> its layer, for every parameter, as `assign` returns it.
        dimensions: parameter name -> number of dimensions, for every trained tensor, in the order of the model;
            adapters under the names that they have in the policy.
        proximity: the spec's section.
        published: parameter name -> name in the published Hugging Face layout.

    Returns:
        parameter name -> strength, in the order of `dimensions`.

    Raises:
        ScheduleError: as `schedule`, or a strength is given for a module that the model lacks, or for a tensor twice.
    """
    proximity, shape = _set_by_hand(proximity)
    if proximity.recipe == "released":
        strengths = _released(stack, owners, dimensions, proximity, published)
    else:
        layers = schedule(stack, proximity.order, shape, proximity.lambda_max, proximity.granularity)
        strengths = {name: layers[owners[name].name] for name in dimensions}
    given = module_tensors(stack, owners, proximity.strengths, "strengths")
    for name, module in given.items():
        # Strengths by module stand for the release's `robust_ft_layers`, under which no bias is held either.
        if name in strengths and not (proximity.recipe == "released" and name.endswith(".bias")):
            strengths[name] = proximity.strengths[module]
    return strengths


def module_tensors(
    stack: Sequence[StackLayer],
    owners: Mapping[str, StackLayer],
    modules: Iterable[str],
    field: str,
    *,
    new: bool = False,
) -> dict[str, str]:
    """The tensors of modules and groups.

    Args:
        stack: layers in forward order.
        owners: parameter name -> its layer, for every parameter.
        modules: names of modules or groups; no tensor may belong to two of them.
        field: of the spec that names them, for messages.
        new: also take modules without pretrained weights, such as `action_head`.

    Returns:
        parameter name -> the module that names it, for the tensors of these modules, in the order of `owners`.

    Raises:
        ScheduleError: no layer belongs to one of them, or two of them hold the same tensor.
    """
    modules = list(modules)
    for module in modules:
        # For its error alone: a name that is nobody's would match no tensor in silence.
        _layers_of(stack, module, field, new=new)
    tensors: dict[str, str] = {}
    for name, layer in owners.items():
        holding = [module for module in modules if layer.holds(module, name) and (new or layer.pretrained)]
        if len(holding) > 1:
            raise ScheduleError(f"{field}: {holding[0]!r} and {holding[1]!r} both hold {layer.name}: {name}", field)
        if holding:
            tensors[name] = holding[0]
    return tensors


def frozen_layers(stack: Sequence[StackLayer], modules: Iterable[str]) -> frozenset[str]:
    """Names of the layers that belong to one of `modules`; those of which a group holds a part are left aside.

    Raises:
        ScheduleError: no pretrained layer belongs to one of them.
    """
    return frozenset(name for module in modules for name in _layers_of(stack, module, "freeze"))


def frozen_tensors(
    stack: Sequence[StackLayer], owners: Mapping[str, StackLayer], modules: Iterable[str]
) -> frozenset[str]:
    """Names of the parameters that belong to one of `modules`, which may be groups and may overlap.

    Raises:
        ScheduleError: no pretrained layer belongs to one of them.
    """
    return frozenset(name for module in modules for name in module_tensors(stack, owners, [module], "freeze"))


def strength_table(
    stack: Sequence[StackLayer],
    owners: Mapping[str, StackLayer],
    strengths: Mapping[str, float],
    sizes: Mapping[str, int],
    frozen: Collection[str] = (),
) -> list[StrengthRow]:
    """The schedule as rows, one for each layer in the order of `stack`.

    Args:
        stack: layers in forward order.
        owners: parameter name -> its layer, for every parameter.
        strengths: parameter name -> strength, for every trained tensor, adapters too.
        sizes: parameter name -> number of elements, for every parameter but adapters.
        frozen: names of the parameters whose weights never change because the spec says so.

    Returns:
        rows of `module` (the layer's name), `strength`, `tensors` and `parameters` (elements in all its tensors);
        adapters are not counted there.
    """
    members: dict[str, list[str]] = {layer.name: [] for layer in stack}
    for name, layer in owners.items():
        members[layer.name].append(name)
    rows = []
    for layer in stack:
        own = members[layer.name]
        # As text: two places of a schedule that agree in six digits are one strength to who reads the table.
        held = Counter(f"{strengths[name]:.6g}" for name in own if name in strengths)
        stored = [name for name in own if name in sizes]
        row = StrengthRow(
            module=layer.name,
            strength=max((strengths[name] for name in own if name in strengths), default=0.0),
            tensors=len(stored),
            parameters=sum(sizes[name] for name in stored),
        )
        still = sum(name in frozen for name in stored)
        if still == len(stored):
            row["frozen"] = True
        elif still:
            row["frozen_tensors"] = still
        if len(held) > 1:
            row["strengths"] = dict(sorted(held.items(), key=lambda item: -float(item[0])))
        rows.append(row)
    return rows


def _set_by_hand(proximity: ProximitySpec) -> tuple[ProximitySpec, Shape]:
    """The section and its shape; where radii are learned, strength 1 for each tensor that has a radius."""
    if proximity.shape != "learned":
        return proximity, proximity.shape
    return proximity.model_copy(update={"shape": "constant", "lambda_max": 1.0}), "constant"


def _check(shape: str, lambda_max: float) -> None:
    if shape not in _SHAPES:
        raise ScheduleError(f"shape = {shape!r}: {nearest(str(shape), _SHAPES)}", "shape")
    if not (math.isfinite(lambda_max) and lambda_max >= 0):
        raise ScheduleError(f"lambda_max = {lambda_max!r}: must be a finite number, at least 0", "lambda_max")


def _numbered_layer(name: str) -> str | None:
    match = _NUMBERED.match(name)
    return match and match[0]


def _released(
    stack: Sequence[StackLayer],
    owners: Mapping[str, StackLayer],
    dimensions: Mapping[str, int],
    proximity: ProximitySpec,
    published: Callable[[str], str],
) -> dict[str, float]:
    """`released_strengths` under the names of the policy, with the layers in the order that the spec gives."""
    entries = _layers_of_entries(stack, proximity.order, numbered_only=True)
    entry_of = {name: str(index) for index, names in enumerate(entries) for name in names}
    place = {name: index for index, name in enumerate(name for names in entries for name in names)}
    # Queries have no pretrained weights, and the release holds them all the same under `constant`: to zero, their
    # start.
    known = {name for name in dimensions if owners[name].pretrained or _QUERIES in name}
    # The release counts layers as they appear: sorted, stably, they appear in the spec's order.
    names = {published(name): name for name in sorted(known, key=lambda name: place.get(owners[name].name, len(place)))}

    def entry(name: str) -> str | None:
        return entry_of.get(owners[names[name]].name) if _numbered_layer(name) else None

    strengths = released_strengths(
        {name: dimensions[own] for name, own in names.items()},
        proximity.lambda_max,
        _set_by_hand(proximity)[1],
        layer_of=entry if proximity.granularity == "module" else None,
    )
    return {name: strengths[published(name)] if name in known else 0.0 for name in dimensions}


def _layers_of(stack: Sequence[StackLayer], module: str, field: str, *, new: bool = False) -> list[str]:
    """Names of the layers that are in a module; empty for a group, which may hold a part of each."""
    known = [layer for layer in stack if layer.pretrained or new]
    allowed = dict.fromkeys(name for layer in known for name in layer.names)
    if module not in allowed:
        what = "no module" if new else "no pretrained module"
        raise ScheduleError(
            f"{field} names {module!r}, which is {what} of this model: {nearest(module, allowed)}", field
        )
    return [layer.name for layer in known if module in layer.modules]


def _layers_of_entries(
    stack: Sequence[StackLayer], order: Sequence[str], *, numbered_only: bool = False
) -> list[list[str]]:
    """Names of the layers that each entry of `order` addresses; with `numbered_only` it may leave out the others."""
    pretrained = [layer for layer in stack if layer.pretrained]
    allowed = list(dict.fromkeys(name for layer in pretrained for name in layer.modules))
    untrained = {name for layer in stack if not layer.pretrained for name in (layer.name, *layer.modules)}
    addressed_by: dict[str, str] = {}
    entries = []
    for entry in order:
        layers = [layer.name for layer in pretrained if entry in layer.modules]
        if not layers and entry in untrained:
            raise ScheduleError(
                f"order names {entry!r}, which has no pretrained weights to stay near: leave it out; "
                f"allowed: {', '.join(allowed)}"
            )
        if not layers:
            raise ScheduleError(f"order names {entry!r}, which is no module of this model: {nearest(entry, allowed)}")
        for name in layers:
            if name in addressed_by:
                first = addressed_by[name]
                why = f"{entry!r} is named twice" if first == entry else f"{first!r} and {entry!r} both hold {name}"
                raise ScheduleError(f"order addresses a layer twice: {why}; leave one of them out")
            addressed_by[name] = entry
        entries.append(layers)
    # The release gives all layers without a number one last place, so that no order can move them.
    needed = [layer for layer in pretrained if not numbered_only or layer.name[-1].isdigit()]
    missing = [layer for layer in needed if layer.name not in addressed_by]
    if missing:
        modules = dict.fromkeys(_shortest_name(layer, missing, pretrained) for layer in missing)
        raise ScheduleError(f"order leaves out {', '.join(modules)}: each pretrained module must stand in it once")
    return entries


def _shortest_name(layer: StackLayer, missing: Sequence[StackLayer], pretrained: Sequence[StackLayer]) -> str:
    """The broadest module name of `layer` that addresses missing layers only."""
    absent = {other.name for other in missing}
    for module in layer.modules:
        if all(other.name in absent for other in pretrained if module in other.modules):
            return module
    return layer.name
