"""The sweep spec: which schedules are tried on which base run, how they are searched, and for how long. Plain data."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from maps_ray.spec import Problem, RunSpec, SpecError, apply_overrides, expand, parse, read_yaml, take_credentials
from maps_ray.spec.paths import absolute
from maps_ray.spec.run_spec import Count, NonNegative, NonNegativeInt, Positive, Section, _each_once


class SchedulerSpec(Section):
    """Whether poor trials end early."""

    name: Literal["none", "asha"] = "none"
    """`asha`: asynchronous successive halving over optimizer steps, by the first objective (arXiv 1810.05934)."""
    grace_steps: Count | None = None
    """No trial ends before this step; none means the first evaluation."""
    reduction_factor: Annotated[float, Field(gt=1)] = 3
    """At each rung about one trial in so many goes on."""


class BudgetSpec(Section):
    """When no further schedule is begun; what runs is finished. Baselines run whatever the budget."""

    trials: Annotated[int, Field(ge=1)] | None = None
    """Schedules in all, those in `known_strengths` included, repeats and baselines not."""
    worker_hours: Positive | None = None
    """Hours that all trials hold workers, baselines included."""

    @model_validator(mode="after")
    def _some_limit(self) -> BudgetSpec:
        if self.trials is None and self.worker_hours is None:
            raise ValueError("give trials, worker_hours or both: a sweep must end")
        return self


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
    searcher: Literal["tpe", "random", "grid"] = "tpe"
    """How schedules are chosen; `grid` takes all, in order."""
    scheduler: SchedulerSpec = SchedulerSpec()
    objectives: Annotated[tuple[str, ...], Field(min_length=1)] = ("eval/ood/action_l1",)
    """Metrics to minimise, or to maximise where they end in `/success`; several give a Pareto set."""
    budget: BudgetSpec
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
    seconds_per_step: Positive | None = None
    """Of a trial, for the estimate of `--dry-run`."""
    measured_run: Path | None = None
    """Folder of an earlier run of the same model and workers, to take seconds_per_step from."""

    @field_validator("objectives", "baselines", "space")
    @classmethod
    def _named_once(cls, names: Sequence[str]) -> Sequence[str]:
        _each_once(list(names), "entry")
        return names

    @field_validator("name")
    @classmethod
    def _name_is_a_folder(cls, name: str) -> str:
        return RunSpec._name_is_a_folder(name)

    @model_validator(mode="after")
    def _known_within_budget(self) -> SweepSpec:
        if self.budget.trials is not None and self.budget.trials < len(self.known_strengths):
            raise ValueError(
                f"budget.trials = {self.budget.trials} is less than the {len(self.known_strengths)} schedules of "
                "known_strengths: raise the budget or shorten that list"
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
