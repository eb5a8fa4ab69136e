"""Names and numbers that tell schedules apart: a short code, and the place and strength of each module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, Literal

from maps_ray.proximity.schedule import frozen_layers, layer_strengths
from maps_ray.proximity.stack import StackLayer
from maps_ray.spec import ProximitySpec

Source = Literal["known", "baseline", "searched", "merged"]
TRIED = ("known", "searched")
"""Sources of schedules that a scheduler judges, and that say what a module's place and strength do."""
_LETTERS = {"language_early": "E", "language_late": "L"}


@dataclass(frozen=True)
class Schedule:
    """One schedule of a sweep."""

    number: int
    source: Source
    label: str
    """The baseline's name, the code of the order, or `merged`."""
    proximity: dict[str, Any]
    """Fields of the base's `proximity` that it changes; `merge`, and sections that a baseline changes, beside them."""
    point: dict[str, Any] | None = None
    """Where the searcher has it; None where the space does not hold it."""
    same_as: int | None = None
    """An earlier schedule with the same strengths, whose result counts for this one too."""

    @property
    def tag(self) -> str:
        """What its trials are called, without the seed."""
        return self.label if self.source == "baseline" else f"{self.label}-{self.number:03d}"


@dataclass(frozen=True)
class ResolvedSchedule:
    """What a schedule means for a model, module by module; modules are the finest that the stack names."""

    code: str
    positions: Mapping[str, int] = field(default_factory=dict)
    """Module -> its place in the order, 1 for the one held most."""
    strengths: Mapping[str, float] = field(default_factory=dict)
    """Module -> mean strength of its layers."""
    frozen: tuple[str, ...] = ()
    merge: Mapping[str, Any] = field(default_factory=dict)
    """Of merged weights: what was merged and how."""

    def params(self) -> dict[str, Any]:
        """As MLflow parameters."""
        params: dict[str, Any] = {"order_code": self.code}
        params |= {f"merge_{name}": value for name, value in self.merge.items() if name != "weights"}
        params |= {f"merge_{module}": round(value, 6) for module, value in self.merge.get("weights", {}).items()}
        params |= {f"pos_{module}": place for module, place in self.positions.items()}
        return params | {f"lambda_{module}": round(value, 6) for module, value in self.strengths.items()}


def resolve_schedule(stack: Sequence[StackLayer], proximity: ProximitySpec) -> ResolvedSchedule:
    """What a schedule means for a model.

    Raises:
        ScheduleError: it does not fit the stack.
    """
    strengths = layer_strengths(stack, proximity)
    frozen = frozen_layers(stack, proximity.freeze)
    members: dict[str, list[str]] = {}
    names: dict[str, tuple[str, ...]] = {}
    for layer in stack:
        if layer.pretrained:
            members.setdefault(layer.modules[-1], []).append(layer.name)
            names[layer.modules[-1]] = layer.modules
    means = {module: fmean(strengths[name] for name in layers) for module, layers in members.items()}
    if proximity.strengths:
        line = sorted(members, key=lambda module: -means[module])
    else:
        line = [module for entry in proximity.order for module in members if entry in names[module]]
    letters = letters_of(list(members))
    return ResolvedSchedule(
        code="".join(letters[module] for module in line),
        positions={module: line.index(module) + 1 for module in members},
        strengths=means,
        frozen=tuple(module for module, layers in members.items() if frozen.issuperset(layers)),
    )


def letters_of(modules: Sequence[str]) -> dict[str, str]:
    """One letter for each module: D, S, P, E, L where the usual names are used."""
    letters: dict[str, str] = {}
    for module in modules:
        wanted = [_LETTERS.get(module, ""), *module.upper(), *"ABCDEFGHIJKLMNOPQRSTUVWXYZ"]
        letters[module] = next(c for c in wanted if c.isalpha() and c not in letters.values())
    return letters
