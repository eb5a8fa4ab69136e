"""The result of an evaluation: rates by suite, task and kind of change."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import get_args

from maps_ray.evaluation.rollouts.environment import SuiteFacts
from maps_ray.evaluation.rollouts.plan import Episode, RolloutError
from maps_ray.evaluation.rollouts.protocol import EpisodeResult
from maps_ray.evaluation.rollouts.statistics import MeanLength, Paired, Rate
from maps_ray.evaluation.simulators.base import Change
from maps_ray.metrics import ROLLOUT, success

CHANGES: tuple[Change, ...] = get_args(Change)
"""Order of the groups of suites in tables."""


@dataclass(frozen=True)
class Group:
    """Some of the episodes: a task's, a suite's."""

    results: tuple[EpisodeResult, ...]

    @property
    def success(self) -> Rate:
        """Share of episodes whose goal was reached."""
        return Rate(sum(result.success for result in self.results), len(self.results))

    @property
    def sub_goals(self) -> dict[str, Rate]:
        """Share of episodes that reached each part of the task, of those episodes whose task has it, in order."""
        names = list(dict.fromkeys(name for result in self.results for name in result.sub_goals))
        reached = {name: [r.sub_goals[name] for r in self.results if name in r.sub_goals] for name in names}
        return {name: Rate(sum(values), len(values)) for name, values in reached.items()}

    @property
    def steps(self) -> float:
        """Mean number of actions."""
        return sum(result.steps for result in self.results) / len(self.results) if self.results else math.nan


@dataclass(frozen=True)
class Evaluation:
    """All episodes of a request, each once."""

    checkpoint: str
    out: Path
    suites: Mapping[str, SuiteFacts]
    """In the order of the request."""
    results: tuple[EpisodeResult, ...]
    """In the order of the plan."""
    identity: Mapping[str, object]
    """What the results depend on, besides the episodes."""

    @classmethod
    def complete(
        cls,
        checkpoint: str,
        out: Path,
        suites: Mapping[str, SuiteFacts],
        plan: Iterable[Episode],
        results: Mapping[Episode, EpisodeResult],
        identity: Mapping[str, object],
    ) -> Evaluation:
        """Puts the results in the plan's order.

        Raises:
            RolloutError: an episode of the plan has no result.
        """
        episodes = list(plan)
        missing = [episode for episode in episodes if episode not in results]
        if missing:
            raise RolloutError(f"{len(missing)} of {len(episodes)} episodes have no result, the first is {missing[0]}")
        return cls(checkpoint, out, suites, tuple(results[episode] for episode in episodes), identity)

    def suite(self, name: str) -> Group:
        """The episodes of a suite."""
        return Group(tuple(result for result in self.results if result.episode.suite == name))

    def task(self, suite: str, index: int) -> Group:
        """The episodes of a task."""
        return Group(tuple(result for result in self.suite(suite).results if result.episode.task == index))

    def tasks_of(self, suite: str) -> list[int]:
        """Indices of the tasks that were run, in order."""
        return list(dict.fromkeys(result.episode.task for result in self.suite(suite).results))

    def by_change(self) -> list[str]:
        """Names of the suites, grouped by what they change."""
        return sorted(self.suites, key=lambda name: CHANGES.index(self.suites[name].suite.change))

    def metrics(self) -> dict[str, float]:
        """Rates by metric name.

        `rollout/<suite>/success`, `rollout/<suite>/<sub-goal>`, `rollout/<suite>/level-<n>/success` where tasks have
        published difficulties, and the means over suites that change nothing, `rollout/id/success`, over those that
        change something, `rollout/ood/success`, and over those that change one thing, `rollout/ood/<change>/success`.
        """
        values: dict[str, float] = {}
        sides: dict[str, list[float]] = {"id": [], "ood": []}
        for name, facts in self.suites.items():
            group = self.suite(name)
            values[success(name)] = group.success.value
            values |= {f"{ROLLOUT}{name}/{part}": rate.value for part, rate in group.sub_goals.items()}
            if (length := self.mean_length(name)) is not None:
                values[f"{ROLLOUT}{name}/mean_length"] = length.value
            values |= {success(f"{name}/level-{n}"): rate.value for n, rate in self.levels(name).items()}
            sides["id" if facts.suite.change == "none" else "ood"].append(group.success.value)
        values |= {success(side): sum(rates) / len(rates) for side, rates in sides.items() if rates}
        return values | {success(f"ood/{change}"): mean for change, (mean, _) in self.dimensions().items()}

    def dimensions(self) -> dict[Change, tuple[float, list[str]]]:
        """What suites change -> mean success over the suites that change it, and their names."""
        rates: dict[Change, tuple[float, list[str]]] = {}
        for change in CHANGES:
            names = [name for name, facts in self.suites.items() if facts.suite.change == change != "none"]
            if names:
                rates[change] = sum(self.suite(name).success.value for name in names) / len(names), names
        return rates

    def levels(self, suite: str) -> dict[int, Rate]:
        """Published difficulty -> success over the tasks that have it; empty where none is known."""
        tasks = self.suites[suite].tasks
        ended = [(tasks[result.episode.task].level, result) for result in self.suite(suite).results]
        return {
            level: Group(tuple(result for own, result in ended if own == level)).success
            for level in sorted({level for level, _ in ended if level is not None})
        }

    def mean_length(self, suite: str) -> MeanLength | None:
        """Instructions carried out in a row; None for a suite without chains."""
        if self.suites[suite].suite.instruction_steps is None:
            return None
        results = self.suite(suite).results
        lengths = [sum(result.sub_goals.values()) for result in results]
        longest = max((len(result.sub_goals) for result in results), default=0)
        return MeanLength(tuple(lengths.count(length) for length in range(longest + 1)))

    def left_out(self, suite: str) -> tuple[int, str]:
        """How many of a suite's tasks cannot run for want of files, and what the first of them lacks."""
        lacking = [task.missing for task in self.suites[suite].tasks if task.missing is not None]
        return len(lacking), lacking[0] if lacking else ""

    def against(self, other: Evaluation) -> dict[str, Paired]:
        """Suite -> comparison with another checkpoint on the same episodes; `all` is over all suites.

        Raises:
            ValueError: the other one ran other episodes.
        """
        if [result.episode for result in self.results] != [result.episode for result in other.results]:
            raise ValueError("the two evaluations ran different episodes")
        named = {name: (self.suite(name).results, other.suite(name).results) for name in self.suites}
        if len(named) > 1:
            named["all"] = (self.results, other.results)
        return {
            name: Paired.of([result.success for result in mine], [result.success for result in theirs])
            for name, (mine, theirs) in named.items()
        }

    def as_json(self) -> dict[str, object]:
        """Everything in the tables, as JSON values."""
        suites: dict[str, dict[str, object]] = {}
        for name, facts in self.suites.items():
            tasks = [
                {"task": index, "sentence": facts.tasks[index].sentence, **_numbers(self.task(name, index))}
                for index in self.tasks_of(name)
            ]
            suites[name] = {"change": facts.suite.change, **_numbers(self.suite(name)), "tasks": tasks}
            if (length := self.mean_length(name)) is not None:
                suites[name] |= {"mean_length": length.value, "mean_length_interval": list(length.interval)}
            if levels := self.levels(name):
                suites[name]["levels"] = {str(level): rate.value for level, rate in levels.items()}
            if left_out := self.left_out(name)[0]:
                suites[name]["tasks_without_files"] = left_out
        return {
            "checkpoint": self.checkpoint,
            "episodes": len(self.results),
            "metrics": self.metrics(),
            "suites": suites,
            "identity": dict(self.identity),
        }


def paired_as_json(comparison: Mapping[str, Paired]) -> dict[str, dict[str, object]]:
    """Numbers of `Evaluation.against`."""
    return {
        name: {
            **asdict(pair),
            "difference": pair.difference,
            "p_value": pair.p_value,
            "smallest_difference": pair.smallest_difference,
            "told_apart": pair.told_apart,
        }
        for name, pair in comparison.items()
    }


def _numbers(group: Group) -> dict[str, object]:
    return {
        "success": group.success.value,
        "interval": list(group.success.interval),
        "successes": group.success.successes,
        "episodes": group.success.episodes,
        "sub_goals": {name: rate.value for name, rate in group.sub_goals.items()},
        "mean_steps": group.steps,
    }
