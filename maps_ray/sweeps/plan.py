"""From a sweep spec to all that its driver needs, with every check that needs no cluster; no torch."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from maps_ray.data import data_sizes
from maps_ray.evaluation.simulators.suites import SUITES
from maps_ray.models import ModelInfo, local_folder
from maps_ray.proximity.schedule import ScheduleError, module_tensors
from maps_ray.proximity.stack import assign
from maps_ray.spec import Problem, ProximitySpec, RunSpec, SpecError, load_spec, nearest, parse, read_yaml
from maps_ray.spec.sweep_spec import SweepSpec
from maps_ray.sweeps.schedules import ResolvedSchedule, Schedule, resolve_schedule
from maps_ray.sweeps.space import BASELINE_SECTIONS, MergeSpace, Space, load_space, with_fields
from maps_ray.tracking.history import read_history
from maps_ray.tracking.store import resolve_uri
from maps_ray.training.merge import finished_run, same_base
from maps_ray.training.model_checks import model_problems
from maps_ray.training.preflight import check, model_info, training_rules

_PARTS = ("position", "rotation", "gripper")
_ARM_DIMENSIONS = 7


@dataclass(frozen=True)
class Plan:
    """A checked sweep."""

    spec: SweepSpec
    base: RunSpec
    """With the sweep's overrides and workers."""
    space: Space
    info: ModelInfo
    _identities: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def folder(self) -> Path:
        """All that the sweep writes, trials included: `cluster.storage / name`."""
        return self.base.cluster.local_storage / self.spec.name

    @property
    def tracking_uri(self) -> str:
        return resolve_uri(self.base.tracking.uri, self.base.cluster.local_storage)

    def resolved(self, fields: dict[str, Any]) -> ResolvedSchedule:
        """What a schedule means that changes these fields of the base's `proximity`."""
        if "merge" in fields:
            return ResolvedSchedule("merged", merge=fields["merge"])
        return resolve_schedule(self.info.stack, with_fields(self.base.proximity, fields))

    def identity(self, fields: dict[str, Any]) -> Any:
        """Equal for schedules that train alike, seeds aside: the rules of every tensor, and what else the run is told.

        Raises:
            SpecError: fields of a baseline that do not fit the base.
        """
        key = json.dumps(fields, sort_keys=True)
        if key not in self._identities:
            self._identities[key] = self._identity(fields)
        return self._identities[key]

    def _identity(self, fields: dict[str, Any]) -> Any:
        if "merge" in fields:
            return json.dumps(fields["merge"], sort_keys=True)
        spec = trial_spec(self.base, self.folder, self.spec.name, self.base.training.seed, fields)
        rules = training_rules(spec, model_info(spec) if "model" in fields else self.info)
        chosen, adapted = spec.proximity, spec.model.lora is not None
        learned = (chosen.radius_rate,) if chosen.shape == "learned" else ()
        anchor = chosen.lora_anchor or {"paper": "zero", "released": "init"}[chosen.recipe] if adapted else None
        rounded = [{name: round(value, 9) for name, value in part.items()} for part in vars(rules).values()]
        sections = {name: getattr(spec, name).model_dump(mode="json") for name in BASELINE_SECTIONS}
        return json.dumps([rounded, sections, learned, anchor], sort_keys=True)

    def known(self) -> list[Schedule]:
        """The base's order with the strengths of `known_strengths`, the baselines, and the run that is to be merged as
        it is."""
        return list(self._known)

    @cached_property
    def _known(self) -> list[Schedule]:
        schedules: list[Schedule] = []
        for strength in self.spec.known_strengths if self.spec.space else ():
            fields: dict[str, Any] = {"lambda_max": strength, "shape": "linear"}
            point = self.space.encode(with_fields(self.base.proximity, fields))
            schedules.append(Schedule(len(schedules), "known", self.resolved(fields).code, fields, point))
        chosen = baselines(self.spec.space)
        for name in self.spec.baselines:
            schedules.append(Schedule(len(schedules), "baseline", name, chosen[name]))
        if self.spec.merge is not None and self.spec.merge.run is not None:
            fields = MergeSpace(self.spec.merge, ()).unmerged()
            schedules.append(Schedule(len(schedules), "merged", "merged", fields))
        return schedules

    def drawn(self, number: int, point: dict[str, Any], merges: MergeSpace | None = None) -> Schedule:
        """The schedule of a point of the space, or of `merges`."""
        fields = (merges or self.space).decode(point)
        return Schedule(number, "merged" if merges else "searched", self.resolved(fields).code, fields, point)

    def names(self, schedule: Schedule) -> list[str]:
        """Of its trials: one for each seed, and one where a given run is merged."""
        name = schedule.tag
        once = self.spec.seeds == 1 or "run" in schedule.proximity.get("merge", {})
        return [name] if once else [f"{name}-s{index}" for index in range(self.spec.seeds)]

    def seconds_per_step(self) -> float | None:
        """As given, or as an earlier run measured it; None when neither is known."""
        if self.spec.seconds_per_step is not None or self.spec.measured_run is None:
            return self.spec.seconds_per_step
        rates = [value for _, value in read_history(self.spec.measured_run).metrics["train/samples_per_second"]]
        training = self.base.training
        samples = self.base.cluster.most_workers * training.batch_size * training.gradient_accumulation
        return samples / sorted(rates)[len(rates) // 2]

    def trial_hours(self) -> float | None:
        """Worker-hours of the steps of one trial; None where the time of a step is not known."""
        seconds = self.seconds_per_step()
        return seconds and seconds * self.base.training.max_steps * self.base.cluster.most_workers / 3600


def trial_spec(base: RunSpec, folder: Path, name: str, seed: int, proximity: dict[str, Any]) -> RunSpec:
    """The run of one trial.

    Args:
        base: with the sweep's overrides and workers.
        folder: of the sweep.
        name: of the trial.
        seed: of the run.
        proximity: fields that the trial changes; of a baseline also those of `BASELINE_SECTIONS`.

    Raises:
        SpecError: fields of a baseline that do not fit the base.
    """
    uri = resolve_uri(base.tracking.uri, base.cluster.local_storage)
    own = {
        section: {**getattr(base, section).model_dump(), **proximity.get(section, {})} for section in BASELINE_SECTIONS
    }
    if any(section in proximity for section in BASELINE_SECTIONS):
        # The whole spec is read again: what one section asks for may need another.
        base = parse(RunSpec, {**base.model_dump(), **own})
    return base.model_copy(
        update={
            "name": name,
            "proximity": with_fields(base.proximity, proximity),
            "training": base.training.model_copy(update={"seed": seed}),
            "tracking": base.tracking.model_copy(update={"uri": uri}),
            "cluster": base.cluster.model_copy(update={"storage": folder / "trials"}),
        }
    )


def fields_of(config: dict[str, Any], space: Space) -> dict[str, Any]:
    """What Tune's configuration of a trial changes in the base: its point, where it has one, stands above the rest."""
    fields = dict(config["trial"]["proximity"])
    pointed = "merge" not in fields and all(dimension.name in config for dimension in space.dimensions)
    return fields | space.decode(config) if pointed else fields


def make_plan(spec: SweepSpec) -> Plan:
    """Checks a sweep.

    Raises:
        SpecError: it cannot run; lists what was found, each with field, value and remedy.
    """
    base = load_spec(spec.base, spec.overrides)
    workers = spec.workers_per_trial or base.cluster.workers
    if not isinstance(workers, int):
        message = "every trial has the same number of workers, so that trials compare: give a number"
        raise SpecError([Problem("workers_per_trial", spec.workers_per_trial, message)])
    base = base.model_copy(update={"name": spec.name, "cluster": base.cluster.model_copy(update={"workers": workers})})
    problems: list[Problem] = []
    try:
        check(base)
    except SpecError as error:
        problems += [_of_base(problem, spec) for problem in error.problems]
    space = _collect(problems, lambda: load_space(spec.space))
    # What keeps the model from being described is among the problems already.
    info = _collect([], lambda: model_info(base))
    if not isinstance(base.cluster.storage, Path):
        message = "a sweep needs a folder that all nodes share; its runs alone can lie on an object store"
        problems.append(Problem("base: cluster.storage", base.cluster.storage, message))
    if base.cluster.autoscaling and spec.max_concurrent is None and spec.num_samples is None:
        message = "the cluster grows with the trials at once (cluster.autoscaling): give this, or num_samples"
        problems.append(Problem("max_concurrent", None, message))
    spaces = [*([space] if space else []), *([MergeSpace(spec.merge, ())] if spec.merge else [])]
    for searched in spaces if spec.searcher.name == "grid" else ():
        ranges = [d.name for d in searched.dimensions if d.values is None and not d.name.startswith("key ")]
        if ranges:
            problems.append(
                Problem("searcher", "grid", f"{', '.join(ranges)}: a grid needs `values` in place of low and high")
            )
    if space is None or info is None:
        raise SpecError(problems)
    plan = Plan(spec, base, space, info)
    problems += space.check(info.stack, base.proximity)
    problems += _merge_problems(plan)
    problems += _objective_problems(spec, base)
    problems += _method_problems(plan)
    problems += _callback_problems(spec)
    problems += _baseline_problems(plan)
    problems += _collect(problems, lambda: _budget_problems(plan)) or []
    if problems:
        raise SpecError(problems)
    return plan


def baselines(spaces: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Baseline -> what it changes in `proximity`, and in sections under their names.

    Read from `baselines.yaml` beside the space's first file.

    Raises:
        SpecError: the file cannot be read, or a field is unknown.
    """
    path = Path(spaces[0]).with_name("baselines.yaml") if spaces else Path()
    if not path.is_file():
        path = Path.cwd() / "tune_spaces" / "baselines.yaml"
    found = read_yaml(path)
    for name, fields in found.items():
        try:
            parse(ProximitySpec, {key: value for key, value in fields.items() if key not in BASELINE_SECTIONS})
        except SpecError as error:
            faults = [Problem(f"{path.name}: {name}.{p.field}", p.value, p.message) for p in error.problems]
            raise SpecError(faults) from None
    return found


def logged_metrics(base: RunSpec) -> Iterator[str]:
    """Metrics that the evaluation of a run logs, rollouts included."""
    whole = ["action"]
    if data_sizes(base.data, use_proprio=False)["action_dim"] == _ARM_DIMENSIONS:
        whole += _PARTS
    for split in ("held_out", "ood"):
        if getattr(base.data.splits, split) is not None:
            yield from (f"eval/{split}/{part}_l1" for part in whole)
    if base.evaluation.rollouts is not None:
        suites = [SUITES[name] for name in base.evaluation.rollouts.suites if name in SUITES]
        sides = dict.fromkeys("id" if suite.change == "none" else "ood" for suite in suites)
        sides |= dict.fromkeys(f"ood/{suite.change}" for suite in suites if suite.change != "none")
        yield from (f"rollout/{name}/success" for name in (*(suite.name for suite in suites), *sides))


def decision_steps(objective: str, base: RunSpec) -> tuple[str, int]:
    """The field that says how often an objective is measured, and its value: optimizer steps, 0 at the end alone."""
    rollouts = base.evaluation.rollouts
    if rollouts is not None and objective.startswith("rollout/"):
        return "evaluation.rollouts.every", rollouts.every
    return "evaluation.every", base.evaluation.every


def _of_base(problem: Problem, spec: SweepSpec) -> Problem:
    if problem.field == "cluster.workers" and spec.workers_per_trial is not None:
        return Problem("workers_per_trial", problem.value, problem.message)
    return Problem(f"base: {problem.field}", problem.value, problem.message)


def _collect(problems: list[Problem], action: Any) -> Any:
    try:
        return action()
    except SpecError as error:
        problems += error.problems
        return None


def _method_problems(plan: Plan) -> list[Problem]:
    from maps_ray.sweeps.scheduler import scheduler_problems
    from maps_ray.sweeps.search import searcher_problems

    return [*searcher_problems(plan.spec), *scheduler_problems(plan)]


def _callback_problems(spec: SweepSpec) -> list[Problem]:
    if not spec.callbacks:
        return []
    from maps_ray.sweeps.callbacks import load_callback

    problems: list[Problem] = []
    for name in spec.callbacks:
        _collect(problems, partial(load_callback, name))
    return problems


def _objective_problems(spec: SweepSpec, base: RunSpec) -> list[Problem]:
    logged = list(logged_metrics(base))
    if not logged:
        message = "the base evaluates nothing: give data.splits.held_out, data.splits.ood or evaluation.rollouts"
        return [Problem("objectives", spec.objectives, message)]
    rollouts = base.evaluation.rollouts
    by_rollouts = rollouts is not None and spec.objectives[0].startswith("rollout/")
    if rollouts is not None and by_rollouts and rollouts.when != "blocking" and spec.scheduler.name != "none":
        message = (
            f"the scheduler {spec.scheduler.name} decides by {spec.objectives[0]} at its step, where training must "
            "wait for it: set blocking, or scheduler none"
        )
        return [Problem("base: evaluation.rollouts.when", rollouts.when, message)]
    return [
        Problem("objectives", name, f"no evaluation of the base logs it; {nearest(name, logged)}")
        for name in spec.objectives
        if name not in logged
    ]


def _baseline_problems(plan: Plan) -> list[Problem]:
    try:
        found = baselines(plan.spec.space) if plan.spec.baselines else {}
    except SpecError as error:
        return error.problems
    problems = []
    for name in plan.spec.baselines:
        if name not in found:
            problems.append(Problem("baselines", name, f"unknown; {nearest(name, found)}"))
            continue
        faults: list[Problem] = []
        _collect(faults, partial(plan.identity, found[name]))
        if own := {"name", "checkpoint"} & found[name].get("model", {}).keys():
            message = f"a baseline starts from the sweep's base: leave out {' and '.join(sorted(own))}"
            faults = [Problem("model", found[name]["model"], message)]
        elif "model" in found[name] and not faults:
            spec = trial_spec(plan.base, plan.folder, name, 0, found[name])
            faults = model_problems(spec, model_info(spec))
        problems += [Problem(f"baselines: {name}.{p.field}", p.value, p.message) for p in faults]
    return problems


def _merge_problems(plan: Plan) -> list[Problem]:
    """Modules that the model lacks, a run that has not finished, another base."""
    merge = plan.spec.merge
    if merge is None:
        return []
    problems: list[Problem] = []
    if plan.base.model.film:
        message = "towers with FiLM have a file of their own, which a merge does not reach: leave merge out"
        problems.append(Problem("base: model.film", True, message))
    try:
        module_tensors(plan.info.stack, assign(plan.info.stack, plan.info.parameters), merge.weights, "merge.weights")
    except ScheduleError as error:
        problems.append(Problem("merge.weights", list(merge.weights), str(error)))
    if merge.run is not None:
        try:
            spec = finished_run(merge.run)
            if spec.model.name != plan.base.model.name:
                message = f"trained as {spec.model.name}, and the base of this sweep is {plan.base.model.name}"
                problems.append(Problem("merge.run", str(merge.run), message))
            same_base(merge.run, local_folder(plan.base.model.checkpoint), "base: model.checkpoint")
        except SpecError as error:
            problems += [Problem("merge.run" if p.field == "RUN" else p.field, p.value, p.message)
                         for p in error.problems]  # fmt: skip
    return problems


def _budget_problems(plan: Plan) -> list[Problem]:
    hours = plan.spec.worker_hours
    try:
        cost = plan.trial_hours()
    except (OSError, KeyError) as error:
        path = str(plan.spec.measured_run)
        return [Problem("measured_run", path, f"has no record of train/samples_per_second ({error!r})")]
    if hours is None or cost is None or cost <= hours:
        return []
    message = f"below one trial, which takes about {_rounded(cost)} worker-hours: raise the budget, or take fewer steps"
    return [Problem("worker_hours", hours, message)]


def _rounded(hours: float) -> str:
    return f"{hours:.{max(0, 2 - math.floor(math.log10(hours)))}f}" if hours > 0 else "0"
