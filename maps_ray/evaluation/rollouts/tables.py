"""Tables of an evaluation for the terminal, and as text for the record."""

from __future__ import annotations

import io
from collections.abc import Mapping

from rich.console import Console
from rich.table import Table

from maps_ray.evaluation.rollouts.statistics import Paired
from maps_ray.evaluation.rollouts.summary import Evaluation, Group


def rates(evaluation: Evaluation) -> Table:
    """Success by suite and task, suites grouped by what they change, with Wilson intervals and sub-goals."""
    table = Table(
        "changes", "suite", "task", "success", "95 %", "episodes", "reached", "steps", title=evaluation.checkpoint
    )
    for column in ("success", "95 %", "episodes", "steps"):
        next(found for found in table.columns if found.header == column).justify = "right"
    for name in evaluation.by_change():
        facts = evaluation.suites[name]
        tasks = evaluation.tasks_of(name)
        for index in tasks:
            sentence = f"{index}: {facts.tasks[index].sentence}"
            table.add_row(facts.suite.change, name, sentence, *_row(evaluation.task(name, index)))
        if len(tasks) > 1:
            table.add_row(facts.suite.change, name, "all", *_row(evaluation.suite(name)), style="bold")
        table.add_section()
    return table


def comparison(pairs: Mapping[str, Paired], second: str) -> Table:
    """Differences to another checkpoint on the same episodes, with the p-value of the exact McNemar test."""
    table = Table("suite", "difference", "only this one", "only the other", "p", title=f"against {second}")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, pair in pairs.items():
        counts = f"{pair.first_only} of {pair.episodes}", f"{pair.second_only} of {pair.episodes}"
        table.add_row(name, f"{pair.difference:+.1%}", *counts, f"{pair.p_value:.3g}")
    return table


def as_text(table: Table) -> str:
    """A table as plain text, 160 columns wide."""
    console = Console(file=io.StringIO(), width=160)
    console.print(table)
    file = console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


def _row(group: Group) -> tuple[str, ...]:
    low, high = group.success.interval
    reached = ", ".join(f"{name} {rate.value:.0%}" for name, rate in group.sub_goals.items())
    counts = f"{group.success.successes}/{group.success.episodes}"
    return f"{group.success.value:.1%}", f"{low:.0%} .. {high:.0%}", counts, reached, f"{group.steps:.0f}"
