"""The ordered stack of a model: which layer owns which parameter. Plain Python, no torch."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


class StackError(ValueError):
    """Parameters and layers do not cover each other exactly."""


@dataclass(frozen=True)
class StackLayer:
    """One layer l_k of the stack (MAPS, section 3), or one group of parameters without pretrained weights."""

    name: str
    """For instance `dinov2.0`, `projector`, `language.31`."""
    modules: tuple[str, ...]
    """Names under which an order may address it, broadest first: `("language", "language_early")`."""
    pattern: str
    """Regular expression that must match the whole of each owned parameter's name."""
    pretrained: bool = True
    """False for a head, a proprio projector, FiLM: no anchor, strength 0."""
    groups: tuple[tuple[str, str], ...] = ()
    """(name, regular expression of the parameters' whole names) of groups that reach into this layer. `freeze` and
    `strengths` may name them, an order may not: a group may hold a part of a layer."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the modules and groups that reach into this layer."""
        return (*self.modules, *(name for name, _ in self.groups))

    def holds(self, module: str, parameter: str) -> bool:
        """Whether one of this layer's parameters belongs to a module or group."""
        return module in self.modules or any(
            name == module and re.fullmatch(pattern, parameter) is not None for name, pattern in self.groups
        )


def assign(stack: Sequence[StackLayer], parameters: Iterable[str]) -> dict[str, StackLayer]:
    """The layer of each parameter.

    Args:
        stack: layers in forward order.
        parameters: every parameter name of the model.

    Returns:
        name -> its layer, in the order of `parameters`.

    Raises:
        StackError: a parameter with no owner or several, or a layer without a parameter (first ten of each).
    """
    patterns = [(layer, re.compile(layer.pattern)) for layer in stack]
    owners = {name: [layer for layer, pattern in patterns if pattern.fullmatch(name)] for name in parameters}
    owned = {layer.name for layers in owners.values() for layer in layers}
    faults = [f"no layer owns parameter {name}" for name, layers in owners.items() if not layers]
    faults += [
        f"parameter {name} is owned by {', '.join(layer.name for layer in layers)}"
        for name, layers in owners.items()
        if len(layers) > 1
    ]
    faults += [
        f"layer {layer.name} matches no parameter: {layer.pattern}" for layer in stack if layer.name not in owned
    ]
    if faults:
        more = f"\n... and {len(faults) - 10} more" if len(faults) > 10 else ""
        raise StackError("\n".join(faults[:10]) + more)
    return {name: layers[0] for name, layers in owners.items()}
