"""Success rates of runs side by side: what their last rollouts left, as rows of a table."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from maps_ray.evaluation.rollouts.statistics import Paired, Rate

_IN_DISTRIBUTION = "none"
_CHANGES = {
    "none": "In distribution",
    "position": "Out of distribution: other positions",
    "language": "Out of distribution: other words",
    "look": "Out of distribution: another look",
    "distractor": "Out of distribution: more things",
    "task": "Out of distribution: another task",
    "camera": "Out of distribution: another viewpoint",
    "robot": "Out of distribution: another start pose",
    "layout": "Out of distribution: another layout",
    "light": "Out of distribution: another light",
    "background": "Out of distribution: another background",
    "noise": "Out of distribution: noisy pictures",
    "object": "Out of distribution: new objects",
    "category": "Out of distribution: new kinds of objects",
}
Key = tuple[str, int, int]
"""Suite, task, initial state."""


@dataclass(frozen=True)
class SuiteResult:
    """The rollouts of one run in one suite."""

    name: str
    change: str
    """What the suite changes against the one that was trained on; `none` is in distribution."""
    success: Rate
    sub_goals: Mapping[str, float] = field(default_factory=dict)
    """Part of the task, in order, to the share of episodes that reached it."""
    tasks: Mapping[str, Rate] = field(default_factory=dict)
    """By sentence."""


@dataclass(frozen=True)
class RolloutRecord:
    """The last rollouts of one run."""

    suites: Mapping[str, SuiteResult]
    episodes: Mapping[Key, bool]
    """Whether each one reached its goal."""

    @classmethod
    def read(cls, run_dir: Path) -> RolloutRecord | None:
        """Those of the run's last step that has all of its episodes; None where there is none.

        Raises:
            ValueError: a file is damaged; names it.
        """
        complete = sorted((run_dir / "rollouts").glob("step-*/evaluation.json"))
        if not complete:
            return None
        try:
            suites = json.loads(complete[-1].read_text())["suites"]
            lines = [json.loads(line) for line in complete[-1].with_name("episodes.jsonl").read_text().splitlines()]
            ended = [line for line in lines if "episode" in line]
            return cls(
                {name: _suite(name, result) for name, result in suites.items()},
                {
                    (e["suite"], e["task"], e["initial_state"]): line["success"]
                    for line in ended
                    if (e := line["episode"])
                },
            )
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"{complete[-1].parent}: its rollouts cannot be read: {error!r}") from None

    def side(self, in_distribution: bool) -> list[str]:
        """Names of the suites in distribution, or of those out of it."""
        return [n for n, suite in self.suites.items() if (suite.change == _IN_DISTRIBUTION) == in_distribution]

    def against(self, other: RolloutRecord, suites: Collection[str]) -> Paired | None:
        """Both on the same episodes of some suites; None where they ran different ones, or none."""
        mine, theirs = (
            {key: success for key, success in record.episodes.items() if key[0] in suites} for record in (self, other)
        )
        if not mine or mine.keys() != theirs.keys():
            return None
        return Paired.of(list(mine.values()), [theirs[key] for key in mine])


@dataclass(frozen=True)
class SuccessCell:
    """One run's rate, and how it differs from the baseline's."""

    value: float
    rate: Rate | None = None
    """None for a part of the task, of which only the share is known."""
    paired: Paired | None = None

    @property
    def text(self) -> str:
        if self.rate is None:
            return f"{self.value:.0%}"
        low, high = self.rate.interval
        return f"{self.value:.1%} [{low:.0%}, {high:.0%}], {self.rate.successes} of {self.rate.episodes}"

    @property
    def difference(self) -> str | None:
        """Against the baseline, in percentage points, with the p-value of the exact McNemar test."""
        if self.paired is None:
            return None
        return f"{points(self.paired.difference)}, {sureness(self.paired)}"

    @property
    def tone(self) -> str:
        """The colour of the difference: `better`, `worse` or `unclear`."""
        return "unclear" if self.paired is None else tone(self.paired)


def points(difference: float) -> str:
    """The difference of two rates in percentage points: `+12.3 points`, with a real minus sign."""
    return f"{100 * difference:+.1f} points".replace("-", "\N{MINUS SIGN}")


def tone(paired: Paired) -> str:
    """The colour of a difference: `better`, `worse`, or `unclear` where chance may have made it."""
    if not paired.told_apart:
        return "unclear"
    return "better" if paired.difference > 0 else "worse"


def sureness(paired: Paired) -> str:
    """How likely chance made a difference, in words."""
    return f"p = {paired.p_value:.2g}" + ("" if paired.told_apart else ": not told apart")


@dataclass(frozen=True)
class SuccessRow:
    group: str
    label: str
    cells: tuple[SuccessCell | None, ...]
    """One for each run."""
    headline: bool = False


def success_rows(runs: Iterable[RolloutRecord | None], baseline: RolloutRecord | None) -> list[SuccessRow]:
    """A headline for each suite, in distribution first, then its parts and tasks."""
    runs = list(runs)
    suites = {name: suite for run in runs if run for name, suite in run.suites.items()}
    order = list(_CHANGES)
    rows = []
    for name in sorted(suites, key=lambda name: order.index(suites[name].change)):
        group = f"{_CHANGES[suites[name].change]}: {name}"
        results = [run.suites.get(name) if run else None for run in runs]
        pairs = [run.against(baseline, [name]) if run and baseline and run is not baseline else None for run in runs]
        cells = [
            SuccessCell(suite.success.value, suite.success, pair) if suite else None
            for suite, pair in zip(results, pairs, strict=True)
        ]
        rows.append(SuccessRow(group, "success", tuple(cells), headline=True))
        for part in dict.fromkeys(part for suite in results if suite for part in suite.sub_goals):
            shares = [suite.sub_goals.get(part) if suite else None for suite in results]
            rows.append(SuccessRow(group, f"{part} reached", tuple(_share(share) for share in shares)))
        for task in dict.fromkeys(task for suite in results if suite for task in suite.tasks):
            rates = [suite.tasks.get(task) if suite else None for suite in results]
            rows.append(SuccessRow(group, task, tuple(_task(rate) for rate in rates)))
    return rows


def _share(value: float | None) -> SuccessCell | None:
    return None if value is None else SuccessCell(value)


def _task(rate: Rate | None) -> SuccessCell | None:
    return None if rate is None else SuccessCell(rate.value, rate)


def _suite(name: str, result: Mapping[str, object]) -> SuiteResult:
    tasks = result["tasks"]
    assert isinstance(tasks, list)
    goals = result["sub_goals"]
    assert isinstance(goals, dict)
    by_sentence = {f"{task['task']}: {task['sentence']}": _rate(task) for task in tasks}
    return SuiteResult(name, str(result["change"]), _rate(result), goals, by_sentence)


def _rate(numbers: Mapping[str, object]) -> Rate:
    return Rate(int(str(numbers["successes"])), int(str(numbers["episodes"])))
