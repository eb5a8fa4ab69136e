"""Searchers by their names: Tune's, random points and the grid; their options, and what of them cannot work."""

from __future__ import annotations

import inspect
import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from ray import tune
from ray.tune.search import create_searcher

from maps_ray.spec import Problem, SpecError, nearest
from maps_ray.spec.sweep_spec import SEARCHERS, SweepSpec
from maps_ray.sweeps.objectives import maximised
from maps_ray.sweeps.space import Dimension, Point, Space

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler
    from ray.tune.search.sample import Domain

OWN = ("random", "grid")
"""That learn nothing from results."""
OPTUNA = ("optuna", "tpe")
# Given by the sweep, not by its options.
_GIVEN = ("self", "space", "metric", "mode", "points_to_evaluate", "evaluated_rewards", "sampler", "kwargs", "args")


class PointSearcher(Protocol):
    """What proposes points: one of Tune's searchers, or random points, or a grid. Ids are schedule numbers."""

    def suggest(self, trial_id: str) -> Point | str | None:
        """The next point; no mapping when there is none now."""

    def on_trial_complete(self, trial_id: str, result: Mapping[str, float] | None = None, error: bool = False) -> None:
        """Takes what the point of this id came to."""

    def add_evaluated_point(self, point: Point, value: float) -> None:
        """Takes what a point came to that it did not propose."""

    def save(self, path: str) -> None:
        """Writes what it knows into a file."""

    def restore(self, path: str) -> None:
        """Reads what `save` wrote."""


def make_searcher(spec: SweepSpec, space: Space, known: Sequence[Point] = ()) -> PointSearcher:
    """The searcher of a sweep's spec.

    Args:
        spec: the sweep.
        space: what is searched.
        known: points that it proposes first. Random points and the grid do not: nothing is learned from them.
    """
    name = spec.searcher.name
    if name == "random":
        return _Random(spec.seed, space)
    if name == "grid":
        return _Grid(space)
    modes = ["max" if maximised(objective) else "min" for objective in spec.objectives]
    several = len(modes) > 1
    metric, mode = (list(spec.objectives), modes) if several else (spec.objectives[0], modes[0])
    options = _sampled(spec) if name in OPTUNA else dict(spec.searcher.options)
    for seed in {"seed", "random_state_seed"} & {*_parameters(name)} if name not in OPTUNA else ():
        options.setdefault(seed, spec.seed)
    if known:
        options["points_to_evaluate"] = [dict(point) for point in known]
    searcher = create_searcher("optuna" if name in OPTUNA else name, **options)
    searcher.set_search_properties(metric, mode, {d.name: domain(d) for d in space.dimensions})
    proposes: PointSearcher = searcher
    return proposes


def searcher_problems(spec: SweepSpec, space: Space) -> list[Problem]:
    """What is wrong with the searcher's name, its options, what is installed, or with the sweep for it."""
    name, options = spec.searcher.name, spec.searcher.options
    problems = method_problems("searcher", name, options, SEARCHERS, lambda: _parameters(name, options.get("sampler")))
    if not problems and len(spec.objectives) > 1 and name not in (*OWN, *OPTUNA):
        return [Problem("objectives", spec.objectives, f"{name} searches by one; optuna, random and grid take several")]
    return problems or _proposal_problems(spec, space)


def _proposal_problems(spec: SweepSpec, space: Space) -> list[Problem]:
    """What a searcher says itself to the values of its options. Optuna's look at some when they propose a second
    point."""
    name, options = spec.searcher.name, spec.searcher.options
    if name in OWN or not space.dimensions:
        return []
    try:
        searcher = make_searcher(spec, space)
        for number in ("0", "1") if name in OPTUNA else ():
            searcher.suggest(number)
            searcher.on_trial_complete(number, result=dict.fromkeys(spec.objectives, 0.0))
    except ModuleNotFoundError as error:
        return [Problem("searcher.options", options, f"{error.name} is not installed: pip install {error.name}")]
    except Exception as error:
        return [Problem("searcher.options", options, f"{name} refuses them: {error}")]
    return []


def method_problems(
    part: str,
    name: str,
    options: Mapping[str, object],
    table: Mapping[str, tuple[tuple[str, str], ...]],
    parameters: Callable[[], Mapping[str, object]],
) -> list[Problem]:
    """A name that is unknown, what is not installed, options that are not there or are of another kind.

    Args:
        part: `searcher` or `scheduler`.
        name: of it.
        options: that are given.
        table: name -> modules that it needs, each with its package.
        parameters: gives the options that there are with their defaults, once all modules are known to be there.
    """
    if name not in table:
        return [Problem(f"{part}.name", name, f"unknown; {nearest(name, table)}")]
    missing = [module for module, _ in table[name] if find_spec(module) is None]
    if missing:
        packages = " ".join(package for _, package in table[name])
        return [Problem(f"{part}.name", name, f"{', '.join(missing)} is not installed: pip install {packages}")]
    try:
        known = parameters()
    except SpecError as error:
        return error.problems
    problems = []
    for option, value in options.items():
        default = known.get(option)
        if option not in known:
            there = nearest(option, known) if known else "it takes none: leave options out"
            message = f"{name} has no such option; {there}"
        elif isinstance(default, bool) and not isinstance(value, bool):
            message = f"must be true or false; by default {str(default).lower()}"
        elif isinstance(default, (int, float)) and not isinstance(value, (int, float)):
            message = f"must be a number; by default {default:g}"
        else:
            continue
        problems.append(Problem(f"{part}.options.{option}", value, message))
    return problems


def _parameters(name: str, sampler: object = None) -> dict[str, object]:
    """The options that a searcher takes, with their defaults."""
    if name in OWN:
        return {}
    if name in OPTUNA:
        return {"sampler": None, **defaults(_sampler(sampler), _GIVEN)}
    from ray.tune.search import SEARCH_ALG_IMPORT

    return defaults(SEARCH_ALG_IMPORT[name](), _GIVEN)


def defaults(kind: Callable[..., object], given: Sequence[str]) -> dict[str, object]:
    """What a class is made with, but for what is given, each with its default."""
    parameters = inspect.signature(kind).parameters
    return {name: parameter.default for name, parameter in parameters.items() if name not in given}


def _sampler(name: object) -> type[BaseSampler]:
    import optuna

    samplers = {kind: getattr(optuna.samplers, kind) for kind in optuna.samplers.__all__ if kind.endswith("Sampler")}
    chosen = name or "TPESampler"
    if not isinstance(chosen, str) or chosen not in samplers:
        raise SpecError([Problem("searcher.options.sampler", name, f"unknown; {nearest(str(chosen), samplers)}")])
    return samplers[chosen]


def _sampled(spec: SweepSpec) -> dict[str, object]:
    """What OptunaSearch is made with."""
    import warnings

    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    # Optuna 4 calls both options below experimental, each time they are given.
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    options = dict(spec.searcher.options)
    kind = _sampler(options.pop("sampler", None))
    if kind is optuna.samplers.TPESampler:
        # constant_liar (Ginsbourger et al. 2010): trials that still run count as poor, so that concurrent ones differ.
        # multivariate: an order is a matter of all keys together, which an estimate of each alone cannot tell.
        options = {"multivariate": True, "constant_liar": True, **options}
    if "seed" in inspect.signature(kind).parameters:
        options.setdefault("seed", spec.seed)
    return {"sampler": kind(**options)}


def domain(dimension: Dimension) -> Domain:
    """A dimension as Tune has it."""
    if dimension.values is not None:
        return tune.choice(list(dimension.values))
    return (tune.loguniform if dimension.log else tune.uniform)(dimension.low, dimension.high)


class _Own:
    """A searcher that learns nothing."""

    def on_trial_complete(self, trial_id: str, result: Mapping[str, float] | None = None, error: bool = False) -> None:
        pass

    def add_evaluated_point(self, point: Point, value: float) -> None:
        pass

    def save(self, path: str) -> None:
        pass

    def restore(self, path: str) -> None:
        pass


class _Random(_Own):
    """A point depends on the seed and its number alone, so the order in which trials end does not matter."""

    def __init__(self, seed: int, space: Space) -> None:
        self._seed, self._space = seed, space

    def suggest(self, trial_id: str) -> Point:
        source = random.Random(f"{self._seed}/{trial_id}")
        return {dimension.name: dimension.sample(source) for dimension in self._space.dimensions}


class _Grid(_Own):
    """Point after point; one that a known schedule has already is found to be a repeat, and left out."""

    def __init__(self, space: Space) -> None:
        self._space, self._place = space, 0

    def suggest(self, trial_id: str) -> Point | None:
        point = next(itertools.islice(self._space.grid(), self._place, None), None)
        self._place += 1
        return point

    def save(self, path: str) -> None:
        Path(path).write_text(str(self._place))

    def restore(self, path: str) -> None:
        self._place = int(Path(path).read_text())
