"""How much of an objective's variance each part of a schedule explains, by Optuna's PED-ANOVA or fANOVA."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from statistics import fmean
from typing import Any

from maps_ray.sweeps.objectives import maximised
from maps_ray.sweeps.record import ScheduleResult, SweepRecord

# Fewer say nothing of a variance.
_LEAST = 8


@dataclass(frozen=True)
class Importance:
    """A share of the variance."""

    name: str
    """`place of <module>`, `strength of <module>` or `shape`."""
    mean: float
    """0 .. 1; all of them add up to 1."""
    low: float | None
    """The least that one seed's trials alone give; None with one seed."""
    high: float | None


def coordinates(record: SweepRecord, result: ScheduleResult) -> dict[str, Any]:
    """What may explain a schedule's result: places from 1 on, mean strengths, and the shape."""
    found: dict[str, Any] = {f"place of {module}": place for module, place in result.positions.items()}
    found |= {f"strength of {module}": value for module, value in result.strengths.items()}
    if not result.proximity.get("strengths"):
        found["shape"] = result.proximity.get("shape", record.base.proximity.shape)
    return found


def importances(record: SweepRecord, objective: str) -> list[Importance]:
    """The shares of one objective, the largest first; empty with fewer than 8 finished schedules of the search.

    fANOVA (Hutter et al. 2014) where scikit-learn is installed, else PED-ANOVA (arXiv 2304.10255).
    """
    tried = record.tried()
    points = [coordinates(record, result) for result in tried]
    names = [name for name in (points[0] if points else ()) if len({str(point.get(name)) for point in points}) > 1]
    if len(tried) < _LEAST or not names:
        return []
    each = [[seed[objective] for seed in result.seeds] for result in tried]
    count = min(map(len, each))
    whole = _shares(points, names, [fmean(values) for values in each], objective)
    parts = [_shares(points, names, [v[i] for v in each], objective) for i in range(count)] if count > 1 else []
    found = [
        Importance(
            name,
            whole[name],
            min((part[name] for part in parts), default=None),
            max((part[name] for part in parts), default=None),
        )
        for name in names
    ]
    return sorted(found, key=lambda share: -share.mean)


def _shares(
    points: Sequence[Mapping[str, Any]], names: Sequence[str], values: Sequence[float], objective: str
) -> dict[str, float]:
    import optuna
    from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    columns = {name: [point[name] for point in points] for name in names}
    ranges: dict[str, BaseDistribution] = {
        name: CategoricalDistribution(sorted(set(column)))
        if isinstance(column[0], str)
        else FloatDistribution(float(min(column)), float(max(column)))
        for name, column in columns.items()
    }
    study = optuna.create_study(direction="maximize" if maximised(objective) else "minimize")
    for row, value in enumerate(values):
        params = {name: column[row] if isinstance(column[row], str) else float(column[row])
                  for name, column in columns.items()}  # fmt: skip
        study.add_trial(optuna.trial.create_trial(params=params, distributions=ranges, value=value))
    evaluator: Any = (
        optuna.importance.FanovaImportanceEvaluator(seed=0)
        if find_spec("sklearn") is not None
        else optuna.importance.PedAnovaImportanceEvaluator()
    )
    found = optuna.importance.get_param_importances(study, evaluator=evaluator)
    return {name: float(found.get(name, 0.0)) for name in names}
