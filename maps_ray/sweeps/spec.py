"""The sweep spec: which schedules are tried on which base run, how they are searched, and for how long. Plain data."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from maps_ray.spec import Problem, RunSpec, SpecError, apply_overrides, expand, parse, read_yaml, take_credentials
from maps_ray.spec.paths import absolute
from maps_ray.spec.run_spec import Count, NonNegative, NonNegativeInt, Positive, Section, _each_once

MUTATING = ("pbt", "pb2")
"""Schedulers that copy a trial onto another one and change its schedule."""
PAUSING = (*MUTATING, "hyperband", "bohb")
"""Schedulers that set trials aside and continue them, so that their state must be saved when they say so."""


_BOHB = (("hpbandster", "hpbandster"), ("ConfigSpace", "ConfigSpace"))
SEARCHERS: dict[str, tuple[tuple[str, str], ...]] = {
    "optuna": (),
    "tpe": (),
    "random": (),
    "grid": (),
    "bohb": _BOHB,
    "hebo": (("hebo", "HEBO"),),
    "hyperopt": (("hyperopt", "hyperopt"),),
    "ax": (("ax", "ax-platform"), ("sqlalchemy", "sqlalchemy")),
    "bayesopt": (("bayes_opt", "'bayesian-optimization<2'"),),
    "nevergrad": (("nevergrad", "nevergrad"),),
    "zoopt": (("zoopt", "zoopt"),),
}
"""Name -> modules that it needs beside what this package needs, each with its package."""
SCHEDULERS: dict[str, tuple[tuple[str, str], ...]] = {
    "none": (),
    "asha": (),
    "hyperband": (),
    "median": (),
    "bohb": _BOHB,
    "pbt": (),
    "pb2": (("GPy", "GPy"), ("sklearn", "scikit-learn")),
}
"""The same of schedulers."""


class SearcherSpec(Section):
    """How schedules are chosen."""

    name: str = "optuna"
    """`optuna` (`tpe` is its default sampler), `random`, `grid`, `bohb`, `hebo`, `hyperopt`, `ax`, `bayesopt`,
    `nevergrad`, `zoopt`."""
    options: dict[str, Any] = Field(default={})
    """Of Tune's searcher; of `optuna`: `sampler`, a class of optuna.samplers, and its options."""


class SchedulerSpec(Section):
    """Which trials end early, or change their strengths while they train."""

    name: str = "none"
    """`asha`, `hyperband`, `bohb`, `median`, `pbt`, `pb2`, or `none`. All judge by the first objective, at the steps
    that measure it."""
    options: dict[str, Any] = Field(default={})
    """Of Tune's scheduler, times in optimizer steps, such as `grace_period` and `reduction_factor` of `asha`."""

    @model_validator(mode="before")
    @classmethod
    def _options_of_asha(cls, raw: Any) -> Any:
        """Earlier specs had two options of `asha` as fields."""
        if not isinstance(raw, dict):
            return raw
        former = {"grace_steps": "grace_period", "reduction_factor": "reduction_factor"}
        moved = {new: raw[old] for old, new in former.items() if raw.get(old) is not None}
        kept = {name: value for name, value in raw.items() if name not in former}
        return {**kept, "options": {**moved, **kept.get("options", {})}} if moved else kept


class SweepSpec(Section):
    """One sweep over proximity schedules."""

    name: str
    """Folder under the base's `cluster.storage`, and name of the MLflow parent run."""
    base: Path
    """Run spec that every trial starts from; relative to the sweep's file."""
    overrides: tuple[str, ...] = ()
    """`field=value` changes of the base for all trials, such as fewer steps than a full run."""
    space: Annotated[list[str], Field(min_length=1)]
    """Names of files in `tune_spaces/`, or paths of such files; they are combined."""
    searcher: SearcherSpec = SearcherSpec()
    scheduler: SchedulerSpec = SchedulerSpec()
    objectives: Annotated[tuple[str, ...], Field(min_length=1)] = ("eval/ood/action_l1",)
    """Metrics to minimise, or to maximise where they end in `/success`; several give a Pareto set."""
    num_samples: Annotated[int, Field(ge=1)] | None = None
    """Schedules in all, those in `known_strengths` included, repeats, seeds and baselines not. `grid` needs none."""
    time_budget_s: Positive | None = None
    """Seconds after which running trials are ended, as they are, and none is begun."""
    worker_hours: Positive | None = None
    """Hours that all trials hold workers, baselines included, after which none is begun; what runs is finished."""
    workers_per_trial: Count | None = None
    """Ray Train workers of a trial; none takes the base's `cluster.workers`."""
    max_concurrent: Count | None = None
    """Trials at once. None takes as many as the cluster holds, and on one that grows (`cluster.autoscaling`) all."""
    seeds: Count = 1
    """Runs of each schedule, with the base's seed and the seeds after it."""
    baselines: tuple[str, ...] = ()
    """Names from `tune_spaces/baselines.yaml`; always run, after the known schedules."""
    known_strengths: tuple[NonNegative, ...] = (0.5, 1.0, 3.0)
    """Run first: the base's order and the linear shape with these values of lambda_max."""
    seed: NonNegativeInt = 0
    """Of the searcher."""
    callbacks: tuple[str, ...] = ()
    """`module:Class` of callbacks of Ray Tune, made without arguments in the driver."""
    seconds_per_step: Positive | None = None
    """Of a trial, for the estimate of `--dry-run`."""
    measured_run: Path | None = None
    """Folder of an earlier run of the same model and workers, to take seconds_per_step from."""

    @field_validator("objectives", "baselines", "space", "callbacks")
    @classmethod
    def _named_once(cls, names: Sequence[str]) -> Sequence[str]:
        _each_once(list(names), "entry")
        return names

    @field_validator("name")
    @classmethod
    def _name_is_a_folder(cls, name: str) -> str:
        return RunSpec._name_is_a_folder(name)

    @model_validator(mode="before")
    @classmethod
    def _earlier_form(cls, raw: Any) -> Any:
        """A name alone stands for a searcher or scheduler; `budget` had the limits of earlier specs."""
        if not isinstance(raw, dict):
            return raw
        raw = dict(raw)
        for part in ("searcher", "scheduler"):
            if isinstance(raw.get(part), str):
                raw[part] = {"name": raw[part]}
        budget = raw.pop("budget", None)
        if budget is None:
            return raw
        known = {"trials": "num_samples", "worker_hours": "worker_hours"}
        if not isinstance(budget, dict) or budget.keys() - known.keys():
            raise ValueError("budget is no section any more: give num_samples, time_budget_s or worker_hours")
        if twice := [new for old, new in known.items() if old in budget and new in raw]:
            raise ValueError(f"budget is no section any more, and {', '.join(twice)} is given too: leave budget out")
        return raw | {known[name]: value for name, value in budget.items()}

    @model_validator(mode="after")
    def _ends(self) -> SweepSpec:
        limits = (self.num_samples, self.time_budget_s, self.worker_hours)
        if all(limit is None for limit in limits) and self.searcher.name != "grid":
            raise ValueError("give num_samples, time_budget_s or worker_hours: a sweep must end")
        if self.num_samples is not None and self.num_samples < len(self.known_strengths):
            raise ValueError(
                f"num_samples = {self.num_samples} is less than the {len(self.known_strengths)} schedules of "
                "known_strengths: raise it or shorten that list"
            )
        return self


def load_sweep(path: str | Path, overrides: Iterable[str] = ()) -> SweepSpec:
    """Reads a sweep spec; paths in it become absolute.

    Args:
        path: YAML file; `base`, `measured_run` and spaces given as paths are relative to it.
        overrides: `field=value` changes of the sweep spec.

    Raises:
        SpecError: the file cannot be read, or a field is unknown, missing or out of range.
    """
    folder = Path(path).resolve().parent
    raw = apply_overrides(read_yaml(path), overrides)
    for name in ("base", "measured_run"):
        if isinstance(raw.get(name), str):
            raw[name] = _expanded(name, raw[name], folder)
    if isinstance(raw.get("overrides"), list):
        raw["overrides"] = [_without_credentials(text) for text in raw["overrides"]]
    spec = parse(SweepSpec, raw)
    return spec.model_copy(update={"space": [_space_path(name, folder) for name in spec.space]})


def _expanded(field: str, text: str, folder: Path | None = None) -> str:
    try:
        return expand(text) if folder is None else absolute(text, folder)
    except ValueError as error:
        raise SpecError([Problem(field, text, str(error))]) from None


def _without_credentials(override: Any) -> Any:
    """An override of the base without the password of MLflow, which this process's environment then has."""
    field, equals, value = str(override).partition("=")
    return f"{field}{equals}{take_credentials(value)}" if field.strip() == "tracking.uri" else override


def _space_path(name: str, folder: Path) -> str:
    """The space's file: beside the sweep's, in a `tune_spaces` folder near it, or in one of the working directory."""
    name = _expanded("space", name)
    candidates = [folder / name]
    candidates += [root / "tune_spaces" / f"{name}.yaml" for root in (folder, *folder.parents[:2], Path.cwd())]
    found = next((candidate for candidate in candidates if candidate.is_file()), None)
    return str(found.resolve()) if found else name
