"""What a sweep tries next, and which trials end early: searcher and scheduler over the journal."""

from __future__ import annotations

from dataclasses import replace
from statistics import fmean

from maps_ray.sweeps.journal import Journal
from maps_ray.sweeps.plan import Plan, Trial, decision_steps
from maps_ray.sweeps.results import evaluations
from maps_ray.sweeps.schedules import Schedule
from maps_ray.sweeps.search import Halving, make_searcher

# Points in a row that mean a schedule which was decided already: the space holds no other, or hardly any.
_MOST_REPEATS = 200


class Decisions:
    """Decides the known schedules when it is made, and tells searcher and scheduler what the journal holds."""

    def __init__(self, plan: Plan, journal: Journal) -> None:
        self._plan = plan
        self._journal = journal
        self._told: set[int] = set()
        self._seen: dict[str, int] = {}
        self._identities = {
            plan.facts(schedule.proximity).identity: number
            for number, schedule in journal.schedules.items()
            if schedule.same_as is None
        }
        for schedule in plan.known():
            if schedule.number not in journal.schedules:
                self._decide(schedule)
        points = {s.number: s.point for s in journal.schedules.values() if s.point is not None}
        self._searcher = make_searcher(plan.spec, plan.space, points)
        self._halving = None
        if plan.spec.scheduler.name == "asha":
            _, every = decision_steps(plan.spec.objectives[0], plan.base)
            self._halving = Halving(plan.spec, every, plan.base.training.max_steps)
        for ended in journal.ended.values():
            self._judge(ended.trial, journal.schedules[ended.schedule])
        for number in list(journal.schedules):
            self._tell(number)

    def unfinished(self) -> list[Trial]:
        """Trials of decided schedules that have not ended."""
        return [trial for s in self._journal.schedules.values() if s.same_as is None for trial in self._left(s)]

    def next_trials(self, worker_hours: float) -> list[Trial]:
        """The trials of a newly decided schedule; empty when the budget is spent or the space holds no further one.

        Args:
            worker_hours: spent so far.
        """
        for _ in range(_MOST_REPEATS):
            schedules = self._journal.schedules
            tried = [s for s in schedules.values() if s.source != "baseline" and s.same_as is None]
            budget = self._plan.spec.budget
            if budget.trials is not None and len(tried) >= budget.trials:
                return []
            if budget.worker_hours is not None and worker_hours >= budget.worker_hours:
                return []
            number = max(schedules, default=-1) + 1
            point = self._searcher.suggest(number)
            if point is None:
                return []
            schedule = self._decide(self._plan.searched(number, point))
            if schedule.same_as is None:
                return self._left(schedule)
            self._tell(number)
        return []

    def judge(self, trial: Trial) -> bool:
        """Shows new evaluations of a trial to the scheduler; returns whether the trial should end now.

        Those made under an earlier driver count like others.
        """
        return self._judge(trial.name, trial.schedule)

    def ended(self, number: int) -> None:
        """A trial of schedule `number` is in the journal now."""
        for schedule in list(self._journal.schedules.values()):
            if number in (schedule.number, schedule.same_as):
                self._tell(schedule.number)

    def _judge(self, name: str, schedule: Schedule) -> bool:
        if self._halving is None or schedule.source == "baseline":
            return False
        first = self._plan.spec.objectives[0]
        # A step counts once it has the objective: rollouts are rarer than offline evaluations, and end later.
        found = evaluations(self._plan.folder / "trials" / name)
        steps = [(step, values[first]) for step, values in found if first in values]
        new = steps[self._seen.get(name, 0) :]
        self._seen[name] = len(steps)
        last = self._plan.base.training.max_steps
        ends = [self._halving.report(name, step, value) and step < last for step, value in new]
        return any(ends)

    def _left(self, schedule: Schedule) -> list[Trial]:
        return [trial for trial in self._plan.trials(schedule) if trial.name not in self._journal.ended]

    def _decide(self, schedule: Schedule) -> Schedule:
        identity = self._plan.facts(schedule.proximity).identity
        if schedule.source == "searched" and identity in self._identities:
            schedule = replace(schedule, same_as=self._identities[identity])
        else:
            self._identities.setdefault(identity, schedule.number)
        self._journal.decide(schedule)
        return schedule

    def _tell(self, number: int) -> None:
        """Tells the searcher a schedule's mean over seeds, once, when all its trials have ended."""
        results = self._journal.results(number)
        if self._journal.schedules[number].point is None or number in self._told:
            return
        if len(results) < self._plan.spec.seeds:
            return
        self._told.add(number)
        names = self._plan.spec.objectives
        # A trial that was stopped before it had each of them says nothing.
        usable = [r.values for r in results if r.status != "failed" and all(name in r.values for name in names)]
        self._searcher.tell(number, {name: fmean(v[name] for v in usable) for name in names} if usable else None)
