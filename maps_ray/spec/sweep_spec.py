"""The sweep spec: what is tried on which base run, how it is searched, for how long; and files of spaces."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from maps_ray.spec.credentials import take_credentials
from maps_ray.spec.load import apply_overrides, parse, read_yaml
from maps_ray.spec.paths import absolute, expand
from maps_ray.spec.problems import Problem, SpecError
from maps_ray.spec.run_spec import RunSpec
from maps_ray.spec.section import Count, NonNegative, NonNegativeInt, Positive, Section, StoragePlace, each_once

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
    # Ray 2.60 calls `UtilityFunction` of version 1 (`ray.tune.search.bayesopt.bayesopt_search`).
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


class NumberSpace(Section):
    """A range from `low` to `high`, or a list of `values`."""

    low: NonNegative | None = None
    """Least value."""
    high: NonNegative | None = None
    """Greatest value."""
    scale: Literal["linear", "log"] = "linear"
    """How the range is searched; `log` needs `low` above 0."""
    values: Annotated[list[NonNegative], Field(min_length=1)] | None = None
    """In place of a range."""

    @model_validator(mode="after")
    def _not_empty(self) -> NumberSpace:
        if self.values is not None:
            if self.low is not None or self.high is not None:
                raise ValueError("give low and high, or values, not both")
        elif self.low is None or self.high is None:
            raise ValueError("give low and high, or values")
        elif self.low >= self.high:
            raise ValueError(f"empty range: low ({self.low:g}) must be less than high ({self.high:g})")
        elif self.scale == "log" and self.low <= 0:
            raise ValueError("a logarithmic range must begin above 0")
        return self


class OrderSpace(Section):
    """All permutations of groups of modules; a group such as `siglip+projector` stays together."""

    groups: Annotated[list[str], Field(min_length=2)]
    first: tuple[str, ...] = ()
    """Modules that stand before all groups."""
    last: tuple[str, ...] = ()
    """Modules that stand after them."""

    @field_validator("groups")
    @classmethod
    def _groups_once(cls, groups: list[str]) -> list[str]:
        return each_once(groups, "group")


class FreeSpace(NumberSpace):
    """One strength for each group, without a schedule."""

    groups: Annotated[list[str], Field(min_length=1)]


class SpaceSpec(Section):
    """What is varied. A part that is left out stays as in the base spec."""

    order: OrderSpace | None = None
    lambda_max: NumberSpace | None = None
    shape: Annotated[list[Literal["linear", "cosine", "constant"]], Field(min_length=1)] | None = None
    recipe: Annotated[list[Literal["paper", "released"]], Field(min_length=1)] | None = None
    strengths: FreeSpace | None = None

    @model_validator(mode="after")
    def _parts_fit(self) -> SpaceSpec:
        varied = [name for name in ("order", "lambda_max", "shape", "recipe") if getattr(self, name) is not None]
        if self.strengths is not None and varied:
            raise ValueError(f"free strengths replace the schedule: leave out {', '.join(varied)}")
        return self


class LinesSpace(Section):
    """LiNeS (arXiv 2410.17146): `a` grows linearly along the order."""

    first: NumberSpace
    """Of the layer held most."""
    last: NumberSpace
    """Of the layer held least."""


class MergeSpec(Section):
    """Weights between trained ones and their base, theta = (1 - a) theta0 + a theta, with `a` in [0, 1]. A point is
    evaluated; nothing is trained."""

    run: StoragePlace | None = None
    """Finished run that started from the base's checkpoint: a folder that all nodes see, or its address. None takes the
    sweep's own best schedules, when all have ended."""
    best: Count = 1
    """How many of them, by the first objective; the searcher chooses among them."""
    weights: dict[str, NumberSpace] = Field(default={})
    """Module or group -> range or values of its `a`, the share of the training that it keeps; others keep all."""
    lines: LinesSpace | None = None
    """In place of weights."""
    num_samples: Count | None = None
    """Points, repeats not counted. `grid` needs none."""

    @model_validator(mode="after")
    def _possible(self) -> MergeSpec:
        if bool(self.weights) == (self.lines is not None):
            raise ValueError("give either weights or lines")
        numbers = {f"weights.{module}": space for module, space in self.weights.items()}
        if self.lines is not None:
            numbers = {"lines.first": self.lines.first, "lines.last": self.lines.last}
        for name, space in numbers.items():
            high = space.high if space.values is None else max(space.values)
            if high is None or high > 1:
                raise ValueError(f"{name}: must be in [0, 1]: 0 is the base, 1 the trained weights; found {high:g}")
        if self.run is not None and self.best != 1:
            raise ValueError("best chooses among the sweep's own schedules: leave it out, or leave out run")
        return self


class SearcherSpec(Section):
    """How schedules are chosen."""

    name: str = "optuna"
    """`optuna` (`tpe` is its default sampler), `random`, `grid`, `bohb`, `hebo`, `hyperopt`, `ax`, `bayesopt`,
    `nevergrad`, `zoopt`."""
    options: dict[str, object] = Field(default={})
    """Of Tune's searcher; of `optuna`: `sampler`, a class of optuna.samplers, and its options."""


class SchedulerSpec(Section):
    """Which trials end early, or change their strengths while they train."""

    name: str = "none"
    """`asha`, `hyperband`, `bohb`, `median`, `pbt`, `pb2`, or `none`. All judge by the first objective, at the steps
    that measure it."""
    options: dict[str, object] = Field(default={})
    """Of Tune's scheduler, times in optimizer steps, such as `grace_period` and `reduction_factor` of `asha`."""

    @model_validator(mode="before")
    @classmethod
    def _options_of_asha(cls, raw: object) -> object:
        """Earlier specs had two options of `asha` as fields."""
        if not isinstance(raw, dict) or not isinstance(raw.get("options") or {}, dict):
            return raw
        former = {"grace_steps": "grace_period", "reduction_factor": "reduction_factor"}
        moved = {new: raw[old] for old, new in former.items() if raw.get(old) is not None}
        kept = {name: value for name, value in raw.items() if name not in former}
        return {**kept, "options": {**moved, **(kept.get("options") or {})}} if moved else kept


class SweepSpec(Section):
    """One sweep over proximity schedules."""

    name: str
    """Folder under the base's `cluster.storage`, and name of the MLflow parent run."""
    base: Path
    """Run spec that every trial starts from; relative to the sweep's file."""
    overrides: tuple[str, ...] = ()
    """`field=value` changes of the base for all trials, such as fewer steps than a full run."""
    space: list[str] = Field(default=[])
    """Names of files in `tune_spaces/`, or paths of such files; they are combined. Empty where `merge.run` is given."""
    merge: MergeSpec | None = None
    searcher: SearcherSpec = SearcherSpec()
    scheduler: SchedulerSpec = SchedulerSpec()
    objectives: Annotated[tuple[str, ...], Field(min_length=1)] = ("eval/ood/action_l1",)
    """Metrics to minimise, or to maximise where they end in `/success`; several give a Pareto set."""
    num_samples: Count | None = None
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
    measured_run: StoragePlace | None = None
    """Earlier run of the same model and workers, to take seconds_per_step from: its folder, or its address."""

    @field_validator("objectives", "baselines", "space", "callbacks")
    @classmethod
    def _named_once(cls, names: Sequence[str]) -> Sequence[str]:
        each_once(list(names), "entry")
        return names

    @field_validator("name")
    @classmethod
    def _name_is_a_folder(cls, name: str) -> str:
        return RunSpec._name_is_a_folder(name)

    @model_validator(mode="before")
    @classmethod
    def _earlier_form(cls, raw: object) -> object:
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
        trains = bool(self.space)
        if self.merge is None or self.merge.run is None:
            if not trains:
                raise ValueError("give space, or merge.run: there is nothing to try")
        elif trains:
            raise ValueError("space and merge.run: give one; merge without run takes the best that the space gave")
        if not trains and self.num_samples is not None:
            raise ValueError("num_samples counts trained schedules, and space is empty: give merge.num_samples")
        limits = (self.time_budget_s, self.worker_hours)
        if all(limit is None for limit in limits) and self.searcher.name != "grid":
            if trains and self.num_samples is None:
                raise ValueError("give num_samples, time_budget_s or worker_hours: a sweep must end")
            if self.merge is not None and self.merge.num_samples is None:
                raise ValueError("give merge.num_samples, time_budget_s or worker_hours: a sweep must end")
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
    merge, changes = raw.get("merge"), raw.get("overrides")
    for part, name in ((raw, "base"), (raw, "measured_run"), (merge if isinstance(merge, dict) else {}, "run")):
        if isinstance(text := part.get(name), str):
            part[name] = _expanded("merge.run" if name == "run" else name, text, folder)
    if isinstance(changes, list):
        raw["overrides"] = [_without_credentials(text) for text in changes]
    spec = parse(SweepSpec, raw)
    return spec.model_copy(update={"space": [_space_path(name, folder) for name in spec.space]})


def _expanded(field: str, text: str, folder: Path | None = None) -> str:
    try:
        return expand(text) if folder is None else absolute(text, folder)
    except ValueError as error:
        raise SpecError([Problem(field, text, str(error))]) from None


def _without_credentials(override: object) -> object:
    """An override of the base without the password of MLflow, which this process's environment then has."""
    field, equals, value = str(override).partition("=")
    return f"{field}{equals}{take_credentials(value)}" if field.strip() == "tracking.uri" else override


def _space_path(name: str, folder: Path) -> str:
    """The space's file: beside the sweep's, in a `tune_spaces` folder near it, or in one of the working directory."""
    name = _expanded("space", name)
    candidates = [folder / name]
    candidates += [root / "tune_spaces" / f"{name}.yaml" for root in (folder, *folder.parents[:2], Path.cwd())]
    file = next((candidate for candidate in candidates if candidate.is_file()), None)
    return str(file.resolve()) if file else name
