"""Every check of a sweep that needs no cluster, before Ray starts; no torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

from maps_ray.metrics import ROLLOUT
from maps_ray.models import local_folder
from maps_ray.proximity.schedule import ScheduleError, module_tensors
from maps_ray.proximity.stack import assign
from maps_ray.run_copies import fetched
from maps_ray.spec import Problem, RunSpec, SpecError, load_spec, nearest
from maps_ray.spec.sweep_spec import SweepSpec
from maps_ray.sweeps.objectives import logged_metrics
from maps_ray.sweeps.schedules import Plan, trial_spec
from maps_ray.sweeps.space import MergeSpace, baselines, load_space
from maps_ray.training.cluster import client_problems
from maps_ray.training.merge import finished_run, same_base
from maps_ray.training.model_checks import model_problems
from maps_ray.training.preflight import check, model_info

Result = TypeVar("Result")


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
    if isinstance(base.cluster.storage, Path):
        problems += client_problems(base.cluster, "Ray Tune of a sweep works in the driver, on a node")
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


def _of_base(problem: Problem, spec: SweepSpec) -> Problem:
    if problem.field == "cluster.workers" and spec.workers_per_trial is not None:
        return Problem("workers_per_trial", problem.value, problem.message)
    return Problem(f"base: {problem.field}", problem.value, problem.message)


def _collect(problems: list[Problem], action: Callable[[], Result]) -> Result | None:
    try:
        return action()
    except SpecError as error:
        problems += error.problems
        return None


def _method_problems(plan: Plan) -> list[Problem]:
    # Not above: both import Ray Tune, and a report, which imports this file, needs none of it.
    from maps_ray.sweeps.scheduler import scheduler_problems
    from maps_ray.sweeps.searchers import searcher_problems

    return [*searcher_problems(plan.spec, plan.space), *scheduler_problems(plan)]


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
    by_rollouts = rollouts is not None and spec.objectives[0].startswith(ROLLOUT)
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
        changes = baselines(plan.spec.space) if plan.spec.baselines else {}
    except SpecError as error:
        return error.problems
    problems = []
    for name in plan.spec.baselines:
        if name not in changes:
            problems.append(Problem("baselines", name, f"unknown; {nearest(name, changes)}"))
            continue
        faults: list[Problem] = []
        _collect(faults, partial(plan.identity, changes[name]))
        if own := {"name", "checkpoint"} & changes[name].get("model", {}).keys():
            message = f"a baseline starts from the sweep's base: leave out {' and '.join(sorted(own))}"
            faults = [Problem("model", changes[name]["model"], message)]
        elif "model" in changes[name] and not faults:
            spec = trial_spec(plan.base, plan.folder, name, 0, changes[name])
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
            run = merge.run
            if not isinstance(run, Path):
                run = fetched(run, plan.base.cluster.scratch, without="rollouts|tracking", weights=False)
            spec = finished_run(run)
            if spec.model.name != plan.base.model.name:
                message = f"trained as {spec.model.name}, and the base of this sweep is {plan.base.model.name}"
                problems.append(Problem("merge.run", str(merge.run), message))
            same_base(run, local_folder(plan.base.model.checkpoint), "base: model.checkpoint")
        except SpecError as error:
            problems += [
                Problem("merge.run", str(merge.run), p.message) if p.field == "RUN" else p for p in error.problems
            ]
    return problems


def _budget_problems(plan: Plan) -> list[Problem]:
    """A budget that ends before a first trial does, where the time of a step is known."""
    hours, limit = plan.spec.worker_hours, plan.spec.time_budget_s
    try:
        cost = plan.trial_hours() if plan.spec.space else None
    except SpecError as error:
        return [Problem("measured_run", str(plan.spec.measured_run), p.message) for p in error.problems]
    except (OSError, KeyError) as error:
        path = str(plan.spec.measured_run)
        return [Problem("measured_run", path, f"has no record of train/samples_per_second ({error!r})")]
    remedy = "raise the budget, or take fewer steps"
    problems = []
    if hours is not None and cost is not None and cost > hours:
        message = f"below one trial, which takes about {_rounded(cost)} worker-hours: {remedy}"
        problems.append(Problem("worker_hours", hours, message))
    seconds = None if cost is None else cost * 3600 / plan.base.cluster.most_workers
    if limit is not None and seconds is not None and seconds > limit:
        message = f"below one trial, whose steps take about {_rounded(seconds)} s: {remedy}"
        problems.append(Problem("time_budget_s", limit, message))
    return problems


def _rounded(value: float) -> str:
    return f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}" if value > 0 else "0"
