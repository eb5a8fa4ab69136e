"""Which point comes next: Ray Tune's Optuna searcher (multivariate TPE), random points, or a grid.

What was proposed and measured before is told again when a sweep is resumed, so a searcher keeps no state on disk.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from typing import Any, Protocol

from maps_ray.sweeps.objectives import cost, maximised
from maps_ray.sweeps.space import Dimension, Point, Space
from maps_ray.sweeps.spec import SweepSpec


class Searcher(Protocol):
    def suggest(self, number: int) -> Point | None:
        """The point of schedule `number`; None when there is no further one."""

    def tell(self, number: int, values: Mapping[str, float] | None) -> None:
        """The objective values of a schedule; None when it failed."""


def make_searcher(spec: SweepSpec, space: Space, earlier: Mapping[int, Point]) -> Searcher:
    """The searcher of a sweep.

    Args:
        spec: the sweep.
        space: what is searched.
        earlier: number -> point of the schedules that were decided already, the known ones included.
    """
    if spec.searcher == "grid":
        return _Grid(space, earlier)
    if spec.searcher == "random":
        return _Random(spec.seed, space)
    return _Tpe(spec, space, earlier)


class _Grid:
    def __init__(self, space: Space, earlier: Mapping[int, Point]) -> None:
        taken = list(earlier.values())
        self._left = (point for point in space.grid() if point not in taken)

    def suggest(self, number: int) -> Point | None:
        return next(self._left, None)

    def tell(self, number: int, values: Mapping[str, float] | None) -> None:
        pass


class _Random:
    """A point depends on the seed and its number alone, so the order in which trials end does not matter."""

    def __init__(self, seed: int, space: Space) -> None:
        self._seed, self._space = seed, space

    def suggest(self, number: int) -> Point | None:
        source = random.Random(f"{self._seed}/{number}")
        return {dimension.name: dimension.sample(source) for dimension in self._space.dimensions}

    def tell(self, number: int, values: Mapping[str, float] | None) -> None:
        pass


class _Tpe:
    def __init__(self, spec: SweepSpec, space: Space, earlier: Mapping[int, Point]) -> None:
        import warnings

        import optuna
        from ray.tune.search.optuna import OptunaSearch

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
        # A resumed sweep must not draw again what it has drawn before.
        seed = random.Random(f"{spec.seed}/{len(earlier)}").getrandbits(31) if earlier else spec.seed
        self._objectives = spec.objectives
        modes = ["max" if maximised(name) else "min" for name in spec.objectives]
        self._search = OptunaSearch(
            {dimension.name: _distribution(dimension) for dimension in space.dimensions},
            metric=list(spec.objectives) if len(spec.objectives) > 1 else spec.objectives[0],
            mode=modes if len(modes) > 1 else modes[0],
            points_to_evaluate=list(earlier.values()),
            # constant_liar: trials that still run count as poor, so that concurrent ones differ.
            sampler=optuna.samplers.TPESampler(seed=seed, multivariate=True, constant_liar=True),
        )
        for number in earlier:
            self._search.suggest(str(number))

    def suggest(self, number: int) -> Point | None:
        return dict(self._search.suggest(str(number)))

    def tell(self, number: int, values: Mapping[str, float] | None) -> None:
        usable = values is not None and all(math.isfinite(values[name]) for name in self._objectives)
        self._search.on_trial_complete(str(number), dict(values) if values and usable else None, error=not usable)


def _distribution(dimension: Dimension) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    if dimension.values is not None:
        return CategoricalDistribution(list(dimension.values))
    return FloatDistribution(dimension.low, dimension.high, log=dimension.log)


class Halving:
    """Ray Tune's ASHA over optimizer steps, fed by the sweep's driver with costs of the first objective."""

    def __init__(self, spec: SweepSpec, first_step: int, max_steps: int) -> None:
        from ray.tune.schedulers import ASHAScheduler

        self._objective = spec.objectives[0]
        self._known: dict[str, _Named] = {}
        self._scheduler = ASHAScheduler(
            time_attr="step",
            metric="cost",
            mode="min",
            max_t=max_steps,
            grace_period=spec.scheduler.grace_steps or first_step,
            reduction_factor=spec.scheduler.reduction_factor,
            stop_last_trials=False,
        )

    def report(self, trial: str, step: int, value: float) -> bool:
        """The first objective at one evaluation of a trial; returns whether the trial should end now."""
        if trial not in self._known:
            self._known[trial] = _Named(trial)
            self._scheduler.on_trial_add(None, self._known[trial])
        result = {"step": step, "cost": cost(self._objective, value)}
        decision = self._scheduler.on_trial_result(None, self._known[trial], result)
        return decision == self._scheduler.STOP


class _Named:
    """All that the scheduler reads of a trial."""

    def __init__(self, trial_id: str) -> None:
        self.trial_id = trial_id
