"""Tune's schedulers by their names, over all trials but baselines, in optimizer steps and by the first objective."""

from __future__ import annotations

import inspect
import io
import pickle
from collections.abc import Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, cast

from ray import cloudpickle
from ray.tune.experiment import Trial
from ray.tune.schedulers import SCHEDULER_IMPORT, FIFOScheduler, TrialScheduler

from maps_ray.ray_internals import awaited_checkpoint, read_trial_checkpoint
from maps_ray.spec import Problem
from maps_ray.spec.sweep_spec import MUTATING, PAUSING, SCHEDULERS
from maps_ray.sweeps.folder import GIVEN, Sweep
from maps_ray.sweeps.journal import Change
from maps_ray.sweeps.objectives import cost, decision_steps, evaluations
from maps_ray.sweeps.schedules import TRIED, Plan, TrialConfig, TrialFacts, facts_of
from maps_ray.sweeps.searchers import defaults, domain, method_problems
from maps_ray.sweeps.space import Dimension, Point, Value, number_at

if TYPE_CHECKING:
    from ray.tune.execution.tune_controller import TuneController
    from ray.tune.search.sample import Domain

    from maps_ray.sweeps.trial import Standing

STATE_FILE = "scheduler.pkl"
# In place of a checkpoint that a trial was asked for.
_AWAITED = "awaited"
_AWAITED_KIND = awaited_checkpoint()
_CLASSES = {
    "asha": "async_hyperband",
    "hyperband": "hyperband",
    "bohb": "hb_bohb",
    "median": "median_stopping_rule",
    "pbt": "pbt",
    "pb2": "pb2",
}
_GIVEN = ("self", "time_attr", "metric", "mode", "reward_attr", "hyperparam_mutations", "hyperparam_bounds",
          "custom_explore_fn", "kwargs", "args")  # fmt: skip


def make_scheduler(plan: Plan, sweep: Sweep | None = None) -> TrialScheduler:
    """The scheduler of a plan; one that is asked for its word needs the sweep in hand, then or by `Judge.attach`."""
    name, options = plan.spec.scheduler.name, dict(plan.spec.scheduler.options)
    if name == "none":
        return FIFOScheduler()
    _, every = decision_steps(plan.spec.objectives[0], plan.base)
    steps = plan.base.training.max_steps
    given: dict[str, object] = {"time_attr": "step", "metric": "cost", "mode": "min"}
    if name == "asha":
        # Without `stop_last_trials`, `max_t` places the rungs and ends nothing: a trial ends by itself, with its
        # weights.
        given |= {"max_t": steps, "grace_period": every, "reduction_factor": 3, "stop_last_trials": False}
    elif name in ("hyperband", "bohb"):
        given |= {"max_t": steps}
    elif name == "median":
        given |= {"grace_period": every}
    else:
        # The journal has all changes; PBT's own log would lie in Ray's session folder.
        given |= {"perturbation_interval": every, "log_config": False}
        if name == "pbt":
            given["hyperparam_mutations"] = {d.name: _mutations(d) for d in plan.space.dimensions}
            ranges = {d.name: (d.low, d.high) for d in plan.space.dimensions if d.values is None}
            given["custom_explore_fn"] = partial(_within, ranges)
        else:
            given["hyperparam_bounds"] = {d.name: [d.low, d.high] for d in plan.space.dimensions}
    return Judge(sweep, _class(name)(**{**given, **options}))


def scheduler_problems(plan: Plan) -> list[Problem]:
    """What is wrong with the scheduler's name, its options, what is installed, or with the sweep for it."""
    spec = plan.spec
    name, options = spec.scheduler.name, spec.scheduler.options
    problems = method_problems("scheduler", name, options, SCHEDULERS, lambda: _parameters(name))
    if name == "none" or name not in SCHEDULERS or _missing(name):
        return problems
    if not spec.space:
        message = "judges trials in training, and this sweep trains none: set it to none"
        return [Problem("scheduler.name", name, message)]
    problems += _time_problems(plan)
    if (name == "bohb") != (spec.searcher.name == "bohb"):
        problems.append(Problem("scheduler.name", name, "searcher and scheduler bohb belong together: name it in both"))
    if name in MUTATING:
        drawn = spec.num_samples
        if spec.searcher.name == "grid" and plan.space.grid_size is not None:
            drawn = min(drawn or plan.space.grid_size, plan.space.grid_size)
        if drawn is None:
            message = f"{name} trains a population of a known size, all of it to the end: give it, 4 or more"
            problems.append(Problem("num_samples", None, message))
        elif drawn * spec.seeds < 2:
            message = (
                f"copies trials from one another, and there is {drawn * spec.seeds}: set num_samples to 4 or more"
                + (", in a space of as many points" if spec.num_samples != drawn else "")
            )
            problems.append(Problem("scheduler.name", name, message))
        if plan.spec.known_strengths:
            message = f"{name} changes schedules of the space while they train: set known_strengths to []"
            problems.append(Problem("known_strengths", spec.known_strengths, message))
        if name == "pb2" and any(d.values is not None for d in plan.space.dimensions):
            problems.append(Problem("scheduler.name", name, "takes ranges only: give low and high in place of values"))
    return problems or _construction_problems(plan)


class Judge(TrialScheduler):
    """One of Tune's schedulers, without the trials that it must not judge.

    Tune does not store schedulers. What this one knows is in `scheduler.pkl` before anything acts on it, and a new
    driver takes it from there; where Tune had to begin anew, with other ids, it is shown the evaluations on record. A
    copied trial keeps its name and seed; Tune copies all of the configuration.
    """

    def __init__(self, sweep: Sweep | None, inner: TrialScheduler) -> None:
        self._sweep: Sweep = sweep  # type: ignore[assignment]  # what Tune has stored is given it by `attach`
        self._inner = inner
        self._facts: dict[str, TrialFacts] = {}
        """Id -> the trial's own facts."""
        self._restored = False

    def attach(self, sweep: Sweep) -> None:
        self._sweep = sweep

    @property
    def supports_buffered_results(self) -> bool:
        # Workers wait for the word on each result: one that is kept back would keep them waiting.
        return False

    def set_search_properties(self, metric: str | None, mode: str | None, **spec: object) -> bool:
        # Both are given where the scheduler is made; False would have Tune refuse them.
        return True

    def on_trial_add(self, tune_controller: TuneController, trial: Trial) -> None:
        if not _judged(trial):
            return
        new = trial.trial_id not in self._facts
        self._facts.setdefault(trial.trial_id, facts_of(trial.config).copy())
        view = _View(tune_controller, self._inner)
        self._inner.on_trial_add(view, trial)
        self._note_change(trial)
        seen = (trial.last_result or {}).get("step", 0)
        spec = self._sweep.plan.spec
        if new and seen and spec.scheduler.name not in PAUSING:
            for step, values in evaluations(self._sweep.trial_dir(facts_of(trial.config)["name"])):
                if step <= seen and spec.objectives[0] in values:
                    result = {"step": step, "cost": cost(spec.objectives[0], values[spec.objectives[0]])}
                    self._inner.on_trial_result(view, trial, {**trial.last_result, **result})

    def on_trial_result(self, tune_controller: TuneController, trial: Trial, result: dict[str, object]) -> str:
        # One that failed ends with its next step, as an error.
        if not _judged(trial) or result.get("status") == "failed":
            return TrialScheduler.CONTINUE
        decision = str(self._ask(tune_controller, "on_trial_result", trial, result))
        # All of them: with `synch` PBT changes several trials at the result of the last.
        for other in tune_controller.get_trials():
            if _judged(other):
                self._note_change(other)
        return decision

    def on_trial_complete(self, tune_controller: TuneController, trial: Trial, result: dict[str, object]) -> None:
        if _judged(trial):
            self._ask(tune_controller, "on_trial_complete", trial, result)

    def on_trial_error(self, tune_controller: TuneController, trial: Trial) -> None:
        if _judged(trial):
            self._ask(tune_controller, "on_trial_error", trial)

    def on_trial_remove(self, tune_controller: TuneController, trial: Trial) -> None:
        if _judged(trial):
            self._ask(tune_controller, "on_trial_remove", trial)

    def choose_trial_to_run(self, tune_controller: TuneController) -> Trial | None:
        # Tune begins baselines, as all that is pending, by itself.
        self._restore(tune_controller)
        return self._inner.choose_trial_to_run(_View(tune_controller, self._inner))

    def debug_string(self) -> str:
        return str(self._inner.debug_string())

    def __getstate__(self) -> dict[str, object]:
        # Tune stores what a sweep begins with; a driver that has it knows nothing yet.
        return {**vars(self), "_restored": False, "_sweep": None}

    def _ask(self, controller: TuneController, what: str, *details: object) -> object:
        self._restore(controller)
        answer = getattr(self._inner, what)(_View(controller, self._inner), *details)
        # Before the answer is given: whatever Tune does by it, a driver that comes after this one knows of it.
        content = io.BytesIO()
        pickler = _Pickler(content)
        # Apart and first: whether all trials are there must be known before the second part is loaded, which asks for
        # each.
        pickler.dump(list(self._facts))
        pickler.dump(self._inner)
        self._sweep.write(STATE_FILE, content.getvalue())
        return answer

    def _restore(self, controller: TuneController) -> None:
        """Takes what the driver before this one knew, when all trials that it had are there again."""
        if self._restored:
            return
        self._restored = True
        path = self._sweep.folder / STATE_FILE
        if not path.exists():
            return
        trials = {trial.trial_id: trial for trial in controller.get_trials()}
        stored = _Unpickler(path, trials)
        known = stored.load()
        # Then Tune has begun anew, with other ids: `on_trial_add` shows them the record.
        if not trials.keys() >= set(known):
            return
        self._inner = stored.load()
        for trial in trials.values():
            # Added after the state was written for the last time.
            if _judged(trial) and trial.trial_id not in known:
                self._inner.on_trial_add(_View(controller, self._inner), trial)
        for trial, state in getattr(self._inner, "_trial_state", {}).items():
            # What it waited for when the driver was lost.
            if getattr(state, "last_checkpoint", None) == _AWAITED:
                state.last_checkpoint = trial.checkpoint

    def _note_change(self, trial: Trial) -> None:
        """Records that a trial goes on from another one's weights, or under other strengths than on record."""
        space, journal, own = self._sweep.plan.space, self._sweep.journal, self._facts[trial.trial_id]
        point: Point = {d.name: trial.config[d.name] for d in space.dimensions if d.name in trial.config}
        source = facts_of(trial.config)["name"]
        if source == own["name"] and (not point or point == journal.point(own["name"], own["schedule"])):
            return
        trial.set_config({**trial.config, "trial": own})
        step = int((trial.last_result or {}).get("step", 0))
        if source != own["name"]:
            with trial.checkpoint.as_directory() as stored:
                copied = cast("Standing", read_trial_checkpoint(Path(stored)))
            step, kept = copied["seen"], str(copied["kept"])
            # Beside its own: who kept it may not keep it so long.
            given = f"trials/{own['name']}/{GIVEN}"
            self._sweep.copies.prune(given)
            self._sweep.copies.copy(kept, f"{given}/{PurePosixPath(kept).name}")
        journal.change(Change(own["name"], step, source, space.decode(point), point))


class _Pickler(cloudpickle.Pickler):
    """Of a scheduler, by the ids of its trials."""

    def persistent_id(self, value: object) -> str | None:
        if isinstance(value, Trial):
            return str(value.trial_id)
        return _AWAITED if isinstance(value, _AWAITED_KIND) else None


class _Unpickler(pickle.Unpickler):
    def __init__(self, path: Path, trials: Mapping[str, Trial]) -> None:
        super().__init__(io.BytesIO(path.read_bytes()))
        self._trials = trials

    def persistent_load(self, key: str) -> Trial | str:
        return _AWAITED if key == _AWAITED else self._trials[key]


class _View:
    """Tune's controller as a scheduler sees it: without the trials that it does not judge, and without a searcher,
    which PBT would refuse."""

    def __init__(self, controller: TuneController, inner: TrialScheduler) -> None:
        self._controller = controller
        mutating = isinstance(inner, tuple(_class(name) for name in MUTATING if not _missing(name)))
        self.search_alg = None if mutating else controller.search_alg

    def get_trials(self) -> list[Trial]:
        return [trial for trial in self._controller.get_trials() if _judged(trial)]

    def get_live_trials(self) -> set[Trial]:
        return {trial for trial in self._controller.get_live_trials() if _judged(trial)}

    def __getattr__(self, name: str) -> object:
        attribute: object = getattr(self._controller, name)
        return attribute


def _judged(trial: Trial) -> bool:
    return facts_of(trial.config)["source"] in TRIED


def _missing(name: str) -> bool:
    return any(find_spec(module) is None for module, _ in SCHEDULERS[name])


def _class(name: str) -> type[TrialScheduler]:
    scheduler = SCHEDULER_IMPORT[_CLASSES[name]]
    # Tune has those that need other packages behind a function that imports them.
    return scheduler() if inspect.isfunction(scheduler) else scheduler


def _parameters(name: str) -> dict[str, object]:
    """The options that a scheduler takes, with their defaults."""
    return {} if name == "none" else defaults(_class(name), _GIVEN)


def _mutations(dimension: Dimension) -> list[Value] | Domain:
    # PBT goes from one value of a list to a neighbour; it could not multiply what a `Domain` of words gives.
    return domain(dimension) if dimension.values is None else list(dimension.values)


def _within(ranges: dict[str, tuple[float, float]], config: TrialConfig) -> dict[str, object]:
    """PBT multiplies; a point stays in the space."""
    return {**config, **{name: min(max(number_at(config, name), low), high) for name, (low, high) in ranges.items()}}


def _time_problems(plan: Plan) -> list[Problem]:
    """A scheduler decides at evaluations before the last step."""
    spec, steps = plan.spec, plan.base.training.max_steps
    field, every = decision_steps(spec.objectives[0], plan.base)
    if not 0 < every < steps:
        message = (
            f"decides at evaluations before the last step; the base has {field} = {every} and "
            f"training.max_steps = {steps}: set {field} to a part of max_steps"
        )
        return [Problem("scheduler.name", spec.scheduler.name, message)]
    options, problems = spec.scheduler.options, []
    for name, least in (("grace_period", every), ("perturbation_interval", 1)):
        value = options.get(name)
        if isinstance(value, (int, float)) and not least <= value < steps:
            floor = f"{field} ({every})" if name == "grace_period" else "1 step"
            message = f"must be at least {floor} and less than training.max_steps ({steps})"
            problems.append(Problem(f"scheduler.options.{name}", value, message))
    factor = options.get("reduction_factor")
    if isinstance(factor, (int, float)) and factor <= 1:
        message = "one of so many trials goes on at each rung: give a number above 1, such as 3"
        problems.append(Problem("scheduler.options.reduction_factor", factor, message))
    if options.get("quantile_fraction") == 0:
        message = "no trial would go on from another one: give a share above 0, 0.5 at most"
        problems.append(Problem("scheduler.options.quantile_fraction", 0, message))
    return problems


def _construction_problems(plan: Plan) -> list[Problem]:
    """Tune's own check of the options' values."""
    try:
        make_scheduler(plan)
    except Exception as error:
        return [Problem("scheduler.options", plan.spec.scheduler.options, f"Ray Tune refuses them: {error}")]
    return []
