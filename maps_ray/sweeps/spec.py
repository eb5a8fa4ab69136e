"""The sweep spec: which schedules are tried on which base run, how they are searched, and for how long. Plain data."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from maps_ray.spec import RunSpec, apply_overrides, parse, read_yaml
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
    spec = parse(SweepSpec, apply_overrides(read_yaml(path), overrides))
    folder = Path(path).resolve().parent
    return spec.model_copy(
        update={
            "base": folder / spec.base,
            "measured_run": folder / spec.measured_run if spec.measured_run else None,
            "space": [_space_path(name, folder) for name in spec.space],
        }
    )


def _space_path(name: str, folder: Path) -> str:
    """The space's file: beside the sweep's, in a `tune_spaces` folder near it, or in one of the working directory."""
    candidates = [folder / name]
    candidates += [root / "tune_spaces" / f"{name}.yaml" for root in (folder, *folder.parents[:2], Path.cwd())]
    found = next((candidate for candidate in candidates if candidate.is_file()), None)
    return str(found.resolve()) if found else name
