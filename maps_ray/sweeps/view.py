"""The sweep in the terminal: a table that stands still, or a line for each trial in a log."""

from __future__ import annotations

import sys

from rich.box import SIMPLE
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from maps_ray.sweeps.journal import Ended, Journal
from maps_ray.sweeps.objectives import cost
from maps_ray.sweeps.schedules import Plan

_BEST = 8


class View:
    """Shows running trials and the best ended ones."""

    def __init__(self, plan: Plan, shown: bool) -> None:
        self._plan = plan
        console = Console(stderr=True)
        self._plain = shown and not console.is_terminal
        self._live = Live(console=console, auto_refresh=False) if shown and console.is_terminal else None

    def __enter__(self) -> View:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def show(self, journal: Journal, running: list[tuple[str, int | None]]) -> None:
        """Draws the table again; `running` are names of trials and the steps of their last evaluations."""
        if self._live is not None:
            self._live.update(Group(*self._lines(journal, running)), refresh=True)

    def ended(self, ended: Ended) -> None:
        """A trial has ended: a line where there is no table."""
        if self._plain:
            names = [name for name in self._plan.spec.objectives if name in ended.values]
            values = "  ".join(f"{name} {ended.values[name]:.4f}" for name in names)
            error = f"  {ended.error}" if ended.error else ""
            line = f"{ended.trial}: {ended.status} at step {ended.step}  {values}  {ended.seconds:.0f} s{error}"
            print(line, file=sys.stderr, flush=True)

    def _lines(self, journal: Journal, running: list[tuple[str, int | None]]) -> list[Text | Table]:
        spec, steps = self._plan.spec, self._plan.base.training.max_steps
        table = Table("trial", "", *spec.objectives, title=spec.name, title_justify="left", box=SIMPLE)
        first = spec.objectives[0]
        complete = [ended for ended in journal.ended.values() if first in ended.values]
        for ended in sorted(complete, key=lambda e: (e.status != "finished", cost(first, e.values[first])))[:_BEST]:
            values = [f"{ended.values[name]:.4f}" if name in ended.values else "" for name in spec.objectives]
            table.add_row(ended.trial, f"{ended.status}, step {ended.step}", *values)
        lines: list[Text | Table] = [table]
        lines += [Text(f"{name}  " + (f"step {step}/{steps}" if step else "begun")) for name, step in running]
        most = f" of at most {(spec.num_samples + len(spec.baselines)) * spec.seeds}" if spec.num_samples else ""
        lines.append(Text(f"{len(journal.ended)}{most} ended, {len(running)} running", style="dim"))
        return lines
