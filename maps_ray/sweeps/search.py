"""What Tune tries next: known schedules, baselines and seeds, and between them one of Tune's searchers by its name.

The journal has the last word. A schedule that was decided keeps its point, whatever the searcher would say to it after
a restart, and a trial that is asked for again goes on in its own folder: a lost driver changes nothing.
"""

from __future__ import annotations

import math
import pickle
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean

from ray.tune.experiment import Trial
from ray.tune.search import Searcher

from maps_ray.spec.sweep_spec import PAUSING
from maps_ray.sweeps.folder import Sweep
from maps_ray.sweeps.objectives import cost, known_values
from maps_ray.sweeps.schedules import TRIED, Schedule, Source, TrialFacts, facts_of
from maps_ray.sweeps.searchers import OPTUNA, OWN, PointSearcher, make_searcher
from maps_ray.sweeps.space import MergeSpace, Point

# Points in a row that mean a schedule which was decided already: the space holds no other, or hardly any.
_MOST_REPEATS = 200


class SweepSearch(Searcher):
    """All trials of a sweep, in the order in which they are begun."""

    def __init__(self, sweep: Sweep | None = None) -> None:
        super().__init__(metric="cost", mode="min")
        self._sweep: Sweep = sweep  # type: ignore[assignment]  # what Tune has stored is given it by `attach`
        self._issued: dict[str, tuple[str, int]] = {}
        """Tune's id of a trial -> its name, and the number of its schedule."""
        self._ended: dict[str, dict[str, float] | None] = {}
        """Name -> objective values, None where it failed or has not all of them."""
        self._complete: set[str] = set()
        self._told: set[int] = set()
        self._suggested: dict[int, Point] = {}
        """What the searcher itself has for a schedule."""
        self._inner: dict[str, PointSearcher] = {}
        """Source of schedules -> what proposes their points."""
        self._room: Callable[[int], bool] = lambda running: True
        self._hours: Callable[[], float] = lambda: 0.0

    def attach(
        self,
        sweep: Sweep,
        room: Callable[[int], bool],
        hours: Callable[[], float],
        trials: Iterable[Trial],
    ) -> None:
        """Says what only the driver knows.

        Args:
            sweep: that it searches for.
            room: whether a trial may be begun beside so many.
            hours: worker-hours spent so far.
            trials: that Tune has stored. It stores them and its searcher one after the other, and a driver may be lost
                in between: which there are, and which of them have ended, is what it has of the trials.
        """
        self._sweep, self._room, self._hours = sweep, room, hours
        for trial in trials:
            facts = facts_of(trial.config)
            self._issued[trial.trial_id] = facts["name"], facts["schedule"]
            if trial.is_finished():
                self._complete.add(trial.trial_id)

    def suggest(self, trial_id: str) -> dict[str, object] | str | None:
        running = len(self._issued) - len(self._complete)
        pausing = self._sweep.plan.spec.scheduler.name in PAUSING
        # Trials that are set aside would count as running here: with such schedulers it is Tune's own count that limits
        # those that run (`share` in `driver._tuner`).
        if not pausing and not self._room(running):
            return None
        issued = {name for name, _ in self._issued.values()}
        for schedule in self._schedules():
            for index, name in enumerate(self._sweep.plan.names(schedule) if schedule.same_as is None else ()):
                if name not in issued:
                    self._issued[trial_id] = name, schedule.number
                    seed = self._sweep.plan.base.training.seed + index
                    facts: TrialFacts = {
                        "name": name,
                        "seed": seed,
                        "source": schedule.source,
                        "schedule": schedule.number,
                        "proximity": schedule.proximity,
                    }
                    point = self._sweep.journal.point(name, schedule.number) if schedule.source in TRIED else None
                    return {"trial": facts, **(point or {})}
        # Nothing is left to begin: a searcher that waits for results says nothing yet, as do merges.
        waits = self._waits or self._sweep.plan.spec.merge is not None
        return None if waits and running else Searcher.FINISHED

    def on_trial_complete(self, trial_id: str, result: dict[str, object] | None = None, error: bool = False) -> None:
        name, number = self._issued[trial_id]
        self._complete.add(trial_id)
        failed = error or (result or {}).get("status") == "failed"
        # From the record, and not from the last result alone: of several objectives not each is measured at every step.
        values = known_values(self._sweep.trial_dir(name), result or {})
        objectives = self._sweep.plan.spec.objectives
        complete = not failed and all(math.isfinite(values.get(objective, math.nan)) for objective in objectives)
        self._ended[name] = {objective: values[objective] for objective in objectives} if complete else None
        for schedule in list(self._sweep.journal.schedules.values()):
            if number in (schedule.number, schedule.same_as):
                self._tell(schedule)

    def on_trial_result(self, trial_id: str, result: dict[str, object]) -> None:
        """A result on the way says nothing to a searcher but BOHB, which learns from each budget."""
        if self._sweep.plan.spec.searcher.name == "bohb" and (number := self._issued[trial_id][1]) in self._suggested:
            inner = self._searcher("searched")
            assert isinstance(inner, Searcher)
            inner.on_trial_result(str(number), {**result, "hyperband_info": result.get("hyperband_info")})

    def on_pause(self, trial_id: str) -> None:
        inner, number = self._searcher("searched"), self._issued[trial_id][1]
        if number in self._suggested and hasattr(inner, "on_pause"):
            inner.on_pause(str(number))

    def on_unpause(self, trial_id: str) -> None:
        inner, number = self._searcher("searched"), self._issued[trial_id][1]
        if number in self._suggested and hasattr(inner, "on_unpause"):
            inner.on_unpause(str(number))

    def save(self, checkpoint_path: str) -> None:
        # What was issued comes from the trials that Tune stores (`attach`).
        names = ("_ended", "_told", "_suggested")
        state = {name: getattr(self, name) for name in names}
        with tempfile.TemporaryDirectory() as folder:
            for source, inner in self._inner.items():
                inner.save(f"{folder}/{source}")
            state["inner"] = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
        Path(checkpoint_path).write_bytes(pickle.dumps(state))

    def restore(self, checkpoint_path: str) -> None:
        state = pickle.loads(Path(checkpoint_path).read_bytes())
        inner = state.pop("inner")
        self.__dict__.update(state)
        with tempfile.TemporaryDirectory() as folder:
            for source, content in inner.items():
                Path(folder, source).write_bytes(content)
                self._searcher(source).restore(f"{folder}/{source}")

    def __getstate__(self) -> dict[str, object]:
        # Tune pickles what its `Tuner` was given. A sweep in hand is this driver's own, and `save` has the rest.
        return {}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__init__()  # type: ignore[misc]

    @property
    def _waits(self) -> bool:
        return self._sweep.plan.spec.searcher.name not in (*OWN, *OPTUNA)

    def _schedules(self) -> Iterable[Schedule]:
        """The schedules in order: on record, known, searched as long as the limits allow, then merged."""
        decided = self._sweep.journal.schedules
        for schedule in self._sweep.plan.known():
            if schedule.number not in decided:
                self._decide(schedule)
        for schedule in list(decided.values()):
            if schedule.source == "searched" or schedule.point is not None:
                self._follow(schedule)
        yield from list(decided.values())
        while self._sweep.plan.space.dimensions and (drawn := self._next("searched")) is not None:
            yield drawn
        while self._merges() and (drawn := self._next("merged")) is not None:
            yield drawn

    def _merges(self) -> bool:
        """Whether there is something to merge: a given run, or the best when all that is trained has ended."""
        merge, journal = self._sweep.plan.spec.merge, self._sweep.journal
        if merge is None:
            return False
        if merge.run is None and journal.merged is None:
            trained = [s for s in journal.schedules.values() if s.same_as is None]
            if not all(name in journal.ended for schedule in trained for name in self._sweep.plan.names(schedule)):
                return False
            if best := self._best(trained)[: merge.best]:
                journal.merge([schedule.tag for schedule in best])
        return merge.run is not None or bool(journal.merged)

    def _best(self, schedules: Sequence[Schedule]) -> list[Schedule]:
        """Those of the search that finished with every seed, the least cost first."""
        first = self._sweep.plan.spec.objectives[0]
        costs = {}
        for schedule in schedules:
            ended = self._sweep.journal.results(schedule.number)
            values = [e.values.get(first, math.nan) for e in ended if e.status == "finished"]
            if schedule.source in TRIED and len(values) == len(ended) and all(map(math.isfinite, values)):
                costs[schedule.number] = cost(first, fmean(values))
        return sorted((s for s in schedules if s.number in costs), key=lambda s: costs[s.number])

    def open(self, source: Source) -> bool:
        """Whether the limits allow a further schedule to be searched or merged."""
        spec, merge = self._sweep.plan.spec, self._sweep.plan.spec.merge
        sources: tuple[str, ...] = TRIED
        most, asked = spec.num_samples, bool(spec.space)
        if source == "merged":
            sources, most, asked = (source,), merge.num_samples if merge else None, merge is not None
        tried = [s for s in self._sweep.journal.schedules.values() if s.source in sources and s.same_as is None]
        # A run that is merged as it is was given, not drawn.
        count = len([s for s in tried if source == "searched" or s.point is not None])
        spent = spec.worker_hours is not None and self._hours() >= spec.worker_hours
        return asked and not spent and (most is None or count < most)

    def _next(self, source: Source) -> Schedule | None:
        """A schedule that was not decided before; None when the limits or the space allow no further one."""
        decided = self._sweep.journal.schedules
        for _ in range(_MOST_REPEATS):
            if not self.open(source):
                return None
            number = max(decided, default=-1) + 1
            point = self._searcher(source).suggest(str(number))
            if not isinstance(point, dict):
                return None
            self._suggested[number] = dict(point)
            schedule = self._decide(self._sweep.plan.drawn(number, dict(point), self._merge_space(source)))
            if schedule.same_as is None:
                return schedule
            self._tell(schedule)
        return None

    def _follow(self, schedule: Schedule) -> None:
        """Brings the searcher to where the journal is: it draws as it drew, and what it knows is what was run."""
        if schedule.number in self._told:
            return
        # These are not given the known points (`make_searcher`): to ask here would use up one of the grid.
        if schedule.source == "known" and self._sweep.plan.spec.searcher.name in OWN:
            return
        if schedule.number not in self._suggested:
            point = self._searcher(schedule.source).suggest(str(schedule.number))
            if not isinstance(point, dict):
                return
            self._suggested[schedule.number] = dict(point)
        for ended in self._sweep.journal.results(schedule.number):
            values = {name: ended.values.get(name, math.nan) for name in self._sweep.plan.spec.objectives}
            usable = ended.status != "failed" and all(map(math.isfinite, values.values()))
            self._ended.setdefault(ended.trial, values if usable else None)
        self._tell(schedule)

    def _decide(self, schedule: Schedule) -> Schedule:
        if schedule.source in ("searched", "merged"):
            identity = self._sweep.plan.identity(schedule.proximity)
            for other in self._sweep.journal.schedules.values():
                if other.same_as is None and self._sweep.plan.identity(other.proximity) == identity:
                    schedule = replace(schedule, same_as=other.number)
                    break
        self._sweep.journal.decide(schedule)
        return schedule

    def _tell(self, schedule: Schedule) -> None:
        """Tells the searcher a schedule's mean over seeds, once, when all its trials have ended."""
        number = schedule.number
        original = self._sweep.journal.schedules[number if schedule.same_as is None else schedule.same_as]
        names = self._sweep.plan.names(original)
        if number in self._told or number not in self._suggested or not all(name in self._ended for name in names):
            return
        self._told.add(number)
        complete = [values for name in names if (values := self._ended[name]) is not None]
        objectives = self._sweep.plan.spec.objectives
        means = {name: fmean(values[name] for values in complete) for name in objectives} if complete else None
        inner, own = self._searcher(schedule.source), self._suggested[number]
        assert schedule.point is not None
        # After a restart the searcher may draw otherwise than the journal has it: its own draw is then given up, and
        # what was run in its place told beside it.
        drawn = own == schedule.point
        inner.on_trial_complete(str(number), result=means if drawn else None, error=means is None or not drawn)
        if means is not None and not drawn and len(objectives) == 1:
            inner.add_evaluated_point(dict(schedule.point), means[objectives[0]])

    def _searcher(self, source: str) -> PointSearcher:
        """What proposes the points of searched schedules, known ones among them, or of merges."""
        source = "merged" if source == "merged" else "searched"
        if source not in self._inner:
            known = [schedule.point for schedule in self._sweep.plan.known() if schedule.point is not None]
            chosen = known if source == "searched" else []
            space = self._merge_space(source) or self._sweep.plan.space
            self._inner[source] = make_searcher(self._sweep.plan.spec, space, chosen)
        return self._inner[source]

    def _merge_space(self, source: str) -> MergeSpace | None:
        merge = self._sweep.plan.spec.merge
        return MergeSpace(merge, self._sweep.journal.merged or ()) if merge is not None and source == "merged" else None
