"""From an order of modules to one proximity strength for each layer (MAPS, arXiv 2511.19878, section 3). No torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal, NotRequired, TypedDict

from maps_ray.proximity.stack import StackLayer, assign
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
    tensors: int
    parameters: int
    frozen: NotRequired[bool]
    """There, and true, where the weights never change."""


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
    if shape not in _SHAPES:
        raise ScheduleError(f"shape = {shape!r}: {nearest(str(shape), _SHAPES)}")
    if granularity not in _GRANULARITIES:
        raise ScheduleError(f"granularity = {granularity!r}: {nearest(str(granularity), _GRANULARITIES)}")
    if not (math.isfinite(lambda_max) and lambda_max >= 0):
        raise ScheduleError(f"lambda_max = {lambda_max!r}: must be a finite number, at least 0")
    entries = _layers_of_entries(stack, order)
    line = entries if granularity == "module" else [[name] for names in entries for name in names]
    last = max(len(line) - 1, 1)
    strengths = {layer.name: 0.0 for layer in stack}
    for index, names in enumerate(line):
        strengths.update(dict.fromkeys(names, lambda_max * _SHAPES[shape](index / last)))
    return strengths


def layer_strengths(stack: Sequence[StackLayer], proximity: ProximitySpec) -> dict[str, float]:
    """The strength of each layer as a spec wants it: the schedule, then the strengths given by module.

    Returns:
        layer name -> strength, in the order of `stack`.

    Raises:
        ScheduleError: as `schedule`, or a strength is given for a module that the model lacks, or for a layer twice.
    """
    strengths = schedule(stack, proximity.order, proximity.shape, proximity.lambda_max, proximity.granularity)
    given_by: dict[str, str] = {}
    for module, strength in proximity.strengths.items():
        for name in _layers_of(stack, module, "strengths"):
            if name in given_by:
                raise ScheduleError(f"strengths: {given_by[name]!r} and {module!r} both hold {name}", "strengths")
            given_by[name] = module
            strengths[name] = strength
    return strengths


def frozen_layers(stack: Sequence[StackLayer], modules: Iterable[str]) -> frozenset[str]:
    """Names of the layers that belong to one of `modules`.

    Raises:
        ScheduleError: no pretrained layer belongs to one of them.
    """
    return frozenset(name for module in modules for name in _layers_of(stack, module, "freeze"))


def strength_table(
    stack: Sequence[StackLayer],
    strengths: Mapping[str, float],
    parameters: Mapping[str, Sequence[int]],
    frozen: Iterable[str] = (),
) -> list[StrengthRow]:
    """The schedule as rows, one for each layer in the order of `stack`.

    Args:
        stack: layers in forward order.
        strengths: layer name -> strength, as `schedule` returns it.
        parameters: parameter name -> shape, for every parameter of the model.
        frozen: names of the layers whose weights never change.

    Returns:
        rows of `module` (the layer's name), `strength`, `tensors` and `parameters` (elements in all its tensors);
        those of frozen layers with `frozen`.

    Raises:
        StackError: stack and parameters do not cover each other.
    """
    rows = {
        layer.name: StrengthRow(module=layer.name, strength=strengths[layer.name], tensors=0, parameters=0)
        for layer in stack
    }
    for name, layer in assign(stack, parameters).items():
        rows[layer.name]["tensors"] += 1
        rows[layer.name]["parameters"] += math.prod(parameters[name])
    for name in frozen:
        rows[name]["frozen"] = True
    return list(rows.values())


def _layers_of(stack: Sequence[StackLayer], module: str, field: str) -> list[str]:
    pretrained = [layer for layer in stack if layer.pretrained]
    layers = [layer.name for layer in pretrained if module in layer.modules]
    if not layers:
        allowed = dict.fromkeys(name for layer in pretrained for name in layer.modules)
        raise ScheduleError(
            f"{field} names {module!r}, which is no pretrained module of this model: {nearest(module, allowed)}", field
        )
    return layers


def _layers_of_entries(stack: Sequence[StackLayer], order: Sequence[str]) -> list[list[str]]:
    """Names of the layers that each entry of `order` addresses."""
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
    missing = [layer for layer in pretrained if layer.name not in addressed_by]
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
