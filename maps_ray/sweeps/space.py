"""The space of schedules: a few lines of YAML, checked against a model's stack, as dimensions that Optuna searches.

An order is encoded by random keys: a number in 0 .. 1 for each group, and the groups in ascending order of their keys.
Every point of the cube is then a valid order, and near points are similar orders.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypedDict, cast

from maps_ray.proximity.schedule import ScheduleError, frozen_layers, layer_strengths
from maps_ray.proximity.stack import StackLayer
from maps_ray.spec import Problem, ProximitySpec, SpecError, nearest, parse, read_yaml
from maps_ray.spec.sweep_spec import MergeSpec, NumberSpace, SpaceSpec

BASELINE_SECTIONS: tuple[Literal["training", "evaluation", "model"], ...] = ("training", "evaluation", "model")
"""Sections of a run spec that a baseline may change, beside the fields of `proximity`."""

Value = float | str
Point = dict[str, Value]
"""Dimension -> value."""


class MergeFields(TypedDict, total=False):
    """Weights between a trained run's and its base's: `of` or `run`, and `lines` or `weights`."""

    of: str
    """Tag of a schedule of the sweep."""
    run: str
    """Folder or address of a finished run."""
    lines: list[float]
    """Shares of the trained weights at the first and at the last layer of the order."""
    weights: dict[str, float]
    """Module or group -> share of the trained weights."""


class L2SpFields(TypedDict, total=False):
    """As `L2SpSpec`."""

    strength: float
    shape: str


class ScheduleFields(TypedDict, total=False):
    """What a schedule changes in the base: fields of `ProximitySpec`, `merge`, and sections that a baseline changes.

    Plain data, checked by `with_fields` when they are put into a spec; the journal holds them as they are.
    """

    recipe: str
    order: list[str]
    shape: str
    radius_rate: float
    lambda_max: float
    granularity: str
    strengths: dict[str, float]
    freeze: list[str]
    lora_anchor: str | None
    l2_sp: float | L2SpFields
    merge: MergeFields
    """Nothing is trained then."""
    training: dict[str, object]
    evaluation: dict[str, object]
    model: dict[str, object]


@dataclass(frozen=True)
class Dimension:
    """One coordinate: a number between `low` and `high`, or one of `values`."""

    name: str
    low: float = 0.0
    high: float = 1.0
    log: bool = False
    values: tuple[Value, ...] | None = None

    def sample(self, source: random.Random) -> Value:
        if self.values is not None:
            return source.choice(self.values)
        if self.log:
            return math.exp(source.uniform(math.log(self.low), math.log(self.high)))
        return source.uniform(self.low, self.high)

    def holds(self, value: Value) -> bool:
        if self.values is not None:
            return value in self.values
        return not isinstance(value, str) and self.low <= value <= self.high


class Space:
    """Points, and the changes of `proximity` that they stand for."""

    def __init__(self, spec: SpaceSpec) -> None:
        self.spec = spec
        self.dimensions: list[Dimension] = []
        if spec.order:
            self.dimensions += [Dimension(_key(group)) for group in spec.order.groups]
        if spec.lambda_max:
            self.dimensions.append(_number("lambda_max", spec.lambda_max))
        if spec.shape:
            self.dimensions.append(Dimension("shape", values=tuple(spec.shape)))
        if spec.recipe:
            self.dimensions.append(Dimension("recipe", values=tuple(spec.recipe)))
        if spec.strengths:
            self.dimensions += [_number(f"strength {group}", spec.strengths) for group in spec.strengths.groups]

    def decode(self, point: Mapping[str, Value]) -> ScheduleFields:
        """The fields of `proximity` that the point sets."""
        fields: ScheduleFields = {}
        if self.spec.order:
            # Random keys (Bean 1994): sorting makes an order of any numbers, so no searcher needs to know of orders.
            groups = sorted(self.spec.order.groups, key=lambda group: number_at(point, _key(group)))
            fields["order"] = self._order(groups)
        if self.spec.lambda_max:
            fields["lambda_max"] = number_at(point, "lambda_max")
        if self.spec.shape:
            fields["shape"] = str(point["shape"])
        if self.spec.recipe:
            fields["recipe"] = str(point["recipe"])
        if self.spec.strengths:
            fields["strengths"] = {
                module: number_at(point, f"strength {group}")
                for group in self.spec.strengths.groups
                for module in group.split("+")
            }
        return fields

    def encode(self, proximity: ProximitySpec) -> Point | None:
        """The point of a schedule; None when the space does not hold it, or holds free strengths."""
        if self.spec.strengths:
            return None
        point: Point = {}
        if self.spec.order:
            ranked = next(
                (p for p in itertools.permutations(self.spec.order.groups) if _same(self._order(p), proximity.order)),
                None,
            )
            if ranked is None:
                return None
            # The middle of each place's share of 0 .. 1: as far as can be from every other order.
            point |= {_key(group): (place + 0.5) / len(ranked) for place, group in enumerate(ranked)}
        if self.spec.lambda_max:
            point["lambda_max"] = proximity.lambda_max
        if self.spec.shape:
            point["shape"] = proximity.shape
        if self.spec.recipe:
            point["recipe"] = proximity.recipe
        return point if all(dimension.holds(point[dimension.name]) for dimension in self.dimensions) else None

    def grid(self) -> Iterator[Point]:
        """Every point once: all orders, the first group's place slowest, with all values."""
        order = self.spec.order
        orders: list[Point] = [{}]
        if order:
            count = len(order.groups)
            orders = [
                {_key(group): (place + 0.5) / count for place, group in enumerate(permutation)}
                for permutation in itertools.permutations(order.groups)
            ]
        others = [dimension for dimension in self.dimensions if dimension.values is not None]
        for keys in orders:
            for values in itertools.product(*(dimension.values or () for dimension in others)):
                yield {**keys, **{dimension.name: value for dimension, value in zip(others, values, strict=True)}}

    @property
    def grid_size(self) -> int | None:
        """Points of the grid; None where a range has no list of values."""
        if any(d.values is None and not d.name.startswith(_KEY) for d in self.dimensions):
            return None
        orders = math.factorial(len(self.spec.order.groups)) if self.spec.order else 1
        return orders * math.prod(len(d.values) for d in self.dimensions if d.values is not None)

    def check(self, stack: Sequence[StackLayer], base: ProximitySpec) -> list[Problem]:
        """What does not fit the model: modules that it lacks, or that no group holds."""
        where = "space.strengths.groups" if self.spec.strengths else "space.order"
        order = self.spec.order
        value = self.spec.strengths.groups if self.spec.strengths else order and order.model_dump(exclude_defaults=True)
        # Any point will do: all of them name the same modules.
        point = {dimension.name: dimension.sample(random.Random(0)) for dimension in self.dimensions}
        try:
            tried = with_fields(base, self.decode(point))
            layer_strengths(stack, tried)
            if self.spec.strengths:
                given = frozen_layers(stack, tried.strengths)
                left = [layer.name for layer in stack if layer.pretrained and layer.name not in given]
                if left:
                    names = ", ".join(dict.fromkeys(name.partition(".")[0] for name in left))
                    return [Problem(where, value, f"leaves out {names}: each pretrained module needs a strength")]
        except ScheduleError as error:
            return [Problem(where, value, str(error))]
        except SpecError as error:
            # Such as a module named twice.
            return [Problem(where, value, problem.message) for problem in error.problems]
        return []

    def _order(self, groups: Sequence[str]) -> list[str]:
        assert self.spec.order is not None
        middle = [module for group in groups for module in group.split("+")]
        return [*self.spec.order.first, *middle, *self.spec.order.last]


class MergeSpace(Space):
    """Points between trained weights and their base, and what `maps-ray merge` is told for them."""

    def __init__(self, merge: MergeSpec, best: Sequence[str]) -> None:
        """Takes the labels of the schedules whose weights are merged; none where they are those of `merge.run`."""
        super().__init__(SpaceSpec())
        self._merge = merge
        if best:
            self.dimensions.append(Dimension("of", values=tuple(best)))
        if merge.lines is not None:
            self.dimensions += [_number(name, getattr(merge.lines, name)) for name in ("first", "last")]
        self.dimensions += [_number(module, space) for module, space in merge.weights.items()]

    def decode(self, point: Mapping[str, Value]) -> ScheduleFields:
        trained: MergeFields = {"of": str(point["of"])} if "of" in point else {"run": str(self._merge.run)}
        if self._merge.lines is not None:
            return {"merge": {**trained, "lines": [number_at(point, name) for name in ("first", "last")]}}
        return {"merge": {**trained, "weights": {module: number_at(point, module) for module in self._merge.weights}}}

    def unmerged(self) -> ScheduleFields:
        """The weights as they were trained."""
        return self.decode({dimension.name: 1.0 for dimension in self.dimensions})


def with_fields(proximity: ProximitySpec, fields: Mapping[str, object]) -> ProximitySpec:
    """The schedule with some fields changed, checked again; other sections are left aside."""
    own = {name: value for name, value in fields.items() if name not in (*BASELINE_SECTIONS, "merge")}
    return parse(ProximitySpec, {**proximity.model_dump(), **own})


def number_at(point: Mapping[str, object], name: str) -> float:
    """The value of a dimension that has a range."""
    value = point[name]
    # numpy's double, which some of Tune's searchers and PB2 give, is a float.
    assert isinstance(value, int | float), f"{name} = {value!r} is no number"
    return float(value)


def load_space(files: Sequence[str]) -> Space:
    """The space that several files make up together.

    Raises:
        SpecError: a file cannot be read, has an unknown field, or sets what another file sets.
    """
    if not files:
        return Space(SpaceSpec())
    parts: dict[str, object] = {}
    origin: dict[str, str] = {}
    for file in files:
        if not Path(file).is_file():
            names = sorted({path.stem for path in Path("tune_spaces").glob("*.yaml")} - {"baselines"})
            near = f"; {nearest(file, names)}" if names else ""
            raise SpecError([Problem("space", file, f"no such file, and no such name in tune_spaces/{near}")])
        for name, value in read_yaml(file).items():
            if name in parts:
                raise SpecError([Problem(f"space.{name}", file, f"{origin[name]} sets it too; leave one of them out")])
            parts[name], origin[name] = value, file
    try:
        spec = parse(SpaceSpec, parts)
    except SpecError as error:
        raise SpecError([Problem(f"space.{p.field}".rstrip("."), p.value, p.message) for p in error.problems]) from None
    space = Space(spec)
    if not space.dimensions:
        raise SpecError(
            [Problem("space", list(files), "varies nothing: give order, lambda_max, shape, recipe or strengths")]
        )
    return space


_KEY = "key "


def _key(group: str) -> str:
    return _KEY + group


def _number(name: str, spec: NumberSpace) -> Dimension:
    if spec.values is not None:
        return Dimension(name, values=tuple(spec.values))
    assert spec.low is not None and spec.high is not None
    return Dimension(name, spec.low, spec.high, spec.scale == "log")


def _same(ours: Sequence[str], theirs: Sequence[str]) -> bool:
    """Whether two orders are equal when `language` stands for its halves, early before late."""
    return _halves(ours) == _halves(theirs)


def _halves(order: Sequence[str]) -> list[str]:
    return [part for name in order for part in ((f"{name}_early", f"{name}_late") if name == "language" else (name,))]


def baselines(spaces: Sequence[str]) -> dict[str, ScheduleFields]:
    """Baseline -> what it changes in `proximity`, and in sections under their names.

    Read from `baselines.yaml` beside the space's first file.

    Raises:
        SpecError: the file cannot be read, or a field is unknown.
    """
    path = Path(spaces[0]).with_name("baselines.yaml") if spaces else Path()
    if not path.is_file():
        path = Path.cwd() / "tune_spaces" / "baselines.yaml"
    changes: dict[str, ScheduleFields] = {}
    for name, fields in read_yaml(path).items():
        if not isinstance(fields, dict):
            raise SpecError([Problem(f"{path.name}: {name}", fields, "must be a mapping of fields of proximity")])
        try:
            parse(ProximitySpec, {key: value for key, value in fields.items() if key not in BASELINE_SECTIONS})
        except SpecError as error:
            faults = [Problem(f"{path.name}: {name}.{p.field}", p.value, p.message) for p in error.problems]
            raise SpecError(faults) from None
        changes[name] = cast(ScheduleFields, fields)
    return changes
