"""A sweep as its report shows it, read from its folder without MLflow and without the model; and how much of an
objective's variance each part of a schedule explains, by Optuna's PED-ANOVA or fANOVA."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean, stdev

from maps_ray.metrics import DRIFT
from maps_ray.spec import RunSpec
from maps_ray.spec.sweep_spec import SweepSpec
from maps_ray.sweeps.folder import place_of, read_base, read_spec
from maps_ray.sweeps.journal import Change, Journal
from maps_ray.sweeps.objectives import cost, maximised
from maps_ray.sweeps.schedules import TRIED
from maps_ray.sweeps.space import ScheduleFields, Value
from maps_ray.tracking.spool import RunHistory, read_history

LEAST = 8
"""Finished schedules; fewer say nothing of a variance."""


@dataclass(frozen=True)
class Measured:
    """Mean and spread of one metric over the seeds of a schedule."""

    mean: float
    spread: float | None
    """Standard deviation between seeds; None with one seed."""

    @classmethod
    def of(cls, values: list[float]) -> Measured:
        return cls(fmean(values), stdev(values) if len(values) > 1 else None)


@dataclass(frozen=True)
class ScheduleResult:
    """One schedule with all its ended trials."""

    label: str
    """As the trials are named, without the seed."""
    code: str
    source: str
    proximity: ScheduleFields
    """What the schedule changes in the base."""
    trials: tuple[str, ...]
    status: str
    """`finished` when all trials finished."""
    step: int
    """The least that a trial came to."""
    values: Mapping[str, Measured] = field(default_factory=dict)
    seeds: tuple[Mapping[str, float], ...] = ()
    """The values of each trial."""
    positions: Mapping[str, int] = field(default_factory=dict)
    strengths: Mapping[str, float] = field(default_factory=dict)
    drift: Mapping[str, float] = field(default_factory=dict)
    """Module -> relative distance from the pretrained weights, at the last record, mean over seeds."""

    @property
    def finished(self) -> bool:
        return self.status == "finished"


@dataclass(frozen=True)
class Moment:
    """What the cluster did from a time on."""

    minutes: float
    nodes: int
    running: int
    pending: int


@dataclass(frozen=True)
class SweepRecord:
    folder: Path
    place: str
    """Where others find it: the folder, or its address on an object store."""
    spec: SweepSpec
    base: RunSpec
    schedules: list[ScheduleResult]
    """In the order in which they were decided; those without an ended trial are left out."""
    timeline: list[Moment]
    worker_hours: float
    errors: Mapping[str, str]
    """Trial -> why it failed."""
    status: str
    changes: Sequence[Change] = ()

    def ranked(self) -> list[ScheduleResult]:
        """Finished schedules, the best first objective first."""
        first = self.spec.objectives[0]
        return sorted((s for s in self.schedules if s.finished), key=lambda s: cost(first, s.values[first].mean))

    def tried(self) -> list[ScheduleResult]:
        """Finished schedules that were trained by the search: they say what a module's place and strength do."""
        return [s for s in self.schedules if s.finished and s.source in TRIED]

    def pareto(self) -> list[ScheduleResult]:
        """Finished schedules that no other one is at least as good as in every objective, and better in one."""
        names = self.spec.objectives
        points = {id(s): [cost(name, s.values[name].mean) for name in names] for s in self.schedules if s.finished}

        def beaten(own: list[float]) -> bool:
            return any(
                other != own and all(a <= b for a, b in zip(other, own, strict=True)) for other in points.values()
            )

        return [s for s in self.schedules if s.finished and not beaten(points[id(s)])]


def read_sweep(folder: Path) -> SweepRecord:
    """Reads a sweep, finished or not."""
    journal = Journal(folder)
    spec = read_spec(folder)
    schedules = []
    for number, schedule in journal.schedules.items():
        # Not those of a schedule that it repeats: each trial stands in the report once.
        ended = [e for e in journal.results(number) if e.schedule == number]
        if not ended:
            continue
        histories = [history for e in ended if (history := _history(folder / "trials" / e.trial))]
        params = histories[0].params if histories else {}
        usable = [e.values for e in ended if e.values and all(math.isfinite(v) for v in e.values.values())]
        done = all(e.status == "finished" for e in ended) and len(usable) == len(ended)
        statuses = sorted({e.status for e in ended})
        schedules.append(
            ScheduleResult(
                label=schedule.tag,
                code=params.get("order_code", schedule.label),
                source=schedule.source,
                proximity=schedule.proximity,
                trials=tuple(e.trial for e in ended),
                status="finished" if done else ", ".join(statuses),
                step=min(e.step for e in ended),
                seeds=tuple(usable),
                values={name: Measured.of([v[name] for v in usable]) for name in _common(usable)},
                positions={k.removeprefix("pos_"): int(v) for k, v in params.items() if k.startswith("pos_")},
                strengths={k.removeprefix("lambda_"): float(v) for k, v in params.items() if k.startswith("lambda_")},
                drift=_drift(histories),
            )
        )
    sweep = _history(folder)
    return SweepRecord(
        folder=folder,
        place=place_of(folder),
        spec=spec,
        base=read_base(folder),
        schedules=schedules,
        timeline=_timeline(folder / "timeline.jsonl"),
        worker_hours=sum(e.seconds for e in journal.ended.values()) * read_base(folder).cluster.most_workers / 3600,
        errors={e.trial: e.error for e in journal.ended.values() if e.error},
        status=sweep.status if sweep else "RUNNING",
        changes=journal.changes,
    )


def _common(values: list[dict[str, float]]) -> list[str]:
    """Metrics that all trials have; one that was stopped early may lack those of rollouts."""
    return [name for name in (values[0] if values else ()) if all(name in each for each in values)]


def _history(run_dir: Path) -> RunHistory | None:
    try:
        return read_history(run_dir)
    except FileNotFoundError:
        return None


def _drift(histories: list[RunHistory]) -> dict[str, float]:
    names = dict.fromkeys(name for h in histories for name in h.metrics if name.startswith(DRIFT))
    return {
        name.removeprefix(DRIFT): fmean(h.metrics[name][-1][1] for h in histories if name in h.metrics)
        for name in names
    }


def _timeline(path: Path) -> list[Moment]:
    if not path.exists():
        return []
    # Without one that a kill cut short.
    lines = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
    start = lines[0]["time"] if lines else 0.0
    return [Moment((x["time"] - start) / 60, x["nodes"], x["running"], x["pending"]) for x in lines]


@dataclass(frozen=True)
class Importance:
    """A share of the variance."""

    name: str
    """`place of <module>`, `strength of <module>` or `shape`."""
    mean: float
    """0 .. 1; all of them add up to 1."""
    low: float | None
    """The least that the means over seeds or one seed's trials alone give; None with one seed."""
    high: float | None
    """The most."""


def coordinates(record: SweepRecord, result: ScheduleResult) -> dict[str, Value]:
    """What may explain a schedule's result: places from 1 on, mean strengths, and the shape."""
    values: dict[str, Value] = {f"place of {module}": place for module, place in result.positions.items()}
    values.update((f"strength of {module}", value) for module, value in result.strengths.items())
    if not result.proximity.get("strengths"):
        values["shape"] = result.proximity.get("shape", record.base.proximity.shape)
    return values


def varied(points: Sequence[Mapping[str, Value]]) -> list[str]:
    """The coordinates that all points have, and not all the same."""
    names = [name for name in (points[0] if points else ()) if all(name in point for point in points)]
    return [name for name in names if len({str(point[name]) for point in points}) > 1]


def importances(record: SweepRecord, objective: str) -> list[Importance]:
    """The shares of one objective, the largest first; empty with fewer than 8 finished schedules of the search.

    fANOVA (Hutter et al. 2014) where scikit-learn is installed, else PED-ANOVA (arXiv 2304.10255).
    """
    tried = record.tried()
    points = [coordinates(record, result) for result in tried]
    names = varied(points)
    if len(tried) < LEAST or not names:
        return []
    each = [[seed[objective] for seed in result.seeds] for result in tried]
    count = min(map(len, each))
    whole = _shares(points, names, [fmean(values) for values in each], objective)
    parts = [_shares(points, names, [v[i] for v in each], objective) for i in range(count)] if count > 1 else []
    explained = [
        Importance(
            name,
            whole[name],
            min(part[name] for part in (whole, *parts)) if parts else None,
            max(part[name] for part in (whole, *parts)) if parts else None,
        )
        for name in names
    ]
    return sorted(explained, key=lambda share: -share.mean)


def _shares(
    points: Sequence[Mapping[str, Value]], names: Sequence[str], values: Sequence[float], objective: str
) -> dict[str, float]:
    import optuna
    from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    columns = {name: [point[name] for point in points] for name in names}
    ranges: dict[str, BaseDistribution] = {
        name: CategoricalDistribution(sorted({str(value) for value in column}))
        if isinstance(column[0], str)
        else FloatDistribution(min(map(float, column)), max(map(float, column)))
        for name, column in columns.items()
    }
    study = optuna.create_study(direction="maximize" if maximised(objective) else "minimize")
    for row, value in enumerate(values):
        params = {name: column[row] if isinstance(column[row], str) else float(column[row])
                  for name, column in columns.items()}  # fmt: skip
        study.add_trial(optuna.trial.create_trial(params=params, distributions=ranges, value=value))
    evaluator: optuna.importance.BaseImportanceEvaluator = (
        # Its forest draws at random; a report that is written again says the same.
        optuna.importance.FanovaImportanceEvaluator(seed=0)
        if find_spec("sklearn") is not None
        else optuna.importance.PedAnovaImportanceEvaluator()
    )
    shares = optuna.importance.get_param_importances(study, evaluator=evaluator)
    return {name: float(shares.get(name, 0.0)) for name in names}
