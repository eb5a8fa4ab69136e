"""Tables of an evaluation for the terminal, and as text for the record."""

from __future__ import annotations

import io
from collections.abc import Mapping

from rich.console import Console
from rich.table import Table
from rich.text import Text

from maps_ray.evaluation.rollouts.statistics import Paired
from maps_ray.evaluation.rollouts.summary import Evaluation, Group


def rates(evaluation: Evaluation) -> Table:
    """Success by suite, those first that change nothing, with Wilson intervals and sub-goals."""
    table = _table("suite", "changes", title=evaluation.checkpoint)
    for name in evaluation.by_change():
        table.add_row(name, evaluation.suites[name].suite.change, *_row(evaluation.suite(name)))
    return table


def dimensions(evaluation: Evaluation) -> Table:
    """Mean success over the suites that change one thing, for each of the things that are changed."""
    table = Table("changes", "success", "suites", title="out of distribution")
    for change, (mean, names) in evaluation.dimensions().items():
        table.add_row(change, f"{mean:.1%}", ", ".join(names))
    return table


def tasks(evaluation: Evaluation, suite: str) -> Table:
    """Success by task of one suite."""
    table = _table("task", title=suite)
    for index in evaluation.tasks_of(suite):
        task = evaluation.suites[suite].tasks[index]
        level = "" if task.level is None else f" (level {task.level})"
        # Sentences and paths may have brackets, which are rich's markup in a plain string.
        table.add_row(Text(f"{index}: {task.sentence}{level}"), *_row(evaluation.task(suite, index)))
    return table


def comparison(pairs: Mapping[str, Paired], second: str) -> Table:
    """Differences to another checkpoint on the same episodes, with the p-value of the exact McNemar test."""
    table = Table("suite", "difference", "only this one", "only the other", "p", title=Text(f"against {second}"))
    for column in table.columns[1:]:
        column.justify = "right"
    for name, pair in pairs.items():
        counts = f"{pair.first_only} of {pair.episodes}", f"{pair.second_only} of {pair.episodes}"
        table.add_row(name, f"{pair.difference:+.1%}", *counts, f"{pair.p_value:.3g}")
    return table


def as_text(evaluation: Evaluation) -> str:
    """All tables of an evaluation as plain text, 160 columns wide."""
    console = Console(file=io.StringIO(), width=160)
    for table in (
        rates(evaluation),
        dimensions(evaluation),
        *(tasks(evaluation, name) for name in evaluation.by_change()),
    ):
        console.print(table)
    file = console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


def _table(*first: str, title: str) -> Table:
    table = Table(title=Text(title))
    for header in first:
        table.add_column(header, no_wrap=header == "suite")
    for header in ("success", "95 %", "episodes", "steps"):
        table.add_column(header, justify="right")
    table.add_column("reached")
    return table


def _row(group: Group) -> tuple[str, ...]:
    low, high = group.success.interval
    reached = ", ".join(f"{name} {rate.value:.0%}" for name, rate in group.sub_goals.items())
    counts = f"{group.success.successes}/{group.success.episodes}"
    return f"{group.success.value:.1%}", f"{low:.0%}..{high:.0%}", counts, f"{group.steps:.0f}", reached
