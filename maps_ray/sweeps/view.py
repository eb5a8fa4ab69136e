"""The sweep in the terminal: a table that stands still, or a line for each trial in a log."""

from __future__ import annotations

import sys
import time

from rich.box import SIMPLE
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from maps_ray.sweeps.journal import Ended, Journal
from maps_ray.sweeps.objectives import cost
from maps_ray.sweeps.plan import Plan, Trial
from maps_ray.training.progress import read_progress

_BEST = 8
_REFRESH_S = 1.0


class View:
    """Shows running trials and the best ended ones."""

    def __init__(self, plan: Plan, shown: bool) -> None:
        self._plan = plan
        console = Console(stderr=True)
        self._plain = shown and not console.is_terminal
        self._live = Live(console=console, auto_refresh=False) if shown and console.is_terminal else None
        self._last = 0.0

    def __enter__(self) -> View:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def show(self, journal: Journal, running: list[Trial], waiting: int, last: bool = False) -> None:
        """Redraws, at most once a second unless it is the last time."""
        if self._live is None or (time.monotonic() - self._last < _REFRESH_S and not last):
            return
        self._last = time.monotonic()
        self._live.update(Group(*self._lines(journal, running, waiting)), refresh=True)

    def ended(self, ended: Ended) -> None:
        """A trial has ended: a line where there is no table."""
        if self._plain:
            values = "  ".join(f"{name} {ended.values[name]:.4f}" for name in self._objectives(ended))
            error = f"  {ended.error}" if ended.error else ""
            line = f"{ended.trial}: {ended.status} at step {ended.step}  {values}  {ended.seconds:.0f} s{error}"
            print(line, file=sys.stderr, flush=True)

    def _lines(self, journal: Journal, running: list[Trial], waiting: int) -> list[Text | Table]:
        objectives = self._plan.spec.objectives
        table = Table("trial", "", *objectives, title=self._plan.spec.name, title_justify="left", box=SIMPLE)
        first = objectives[0]
        complete = [ended for ended in journal.ended.values() if first in ended.values]
        for ended in sorted(complete, key=lambda e: (e.status != "finished", cost(first, e.values[first])))[:_BEST]:
            values = [f"{ended.values[name]:.4f}" if name in ended.values else "" for name in objectives]
            table.add_row(ended.trial, f"{ended.status}, step {ended.step}", *values)
        lines: list[Text | Table] = [table]
        for trial in running:
            state = read_progress(trial.run_dir)
            steps = f"step {state['step']}/{state['max_steps']}" if "step" in state else ""
            loss = f"loss {state['loss']:.4f}" if "loss" in state else ""
            lines.append(Text("  ".join(filter(None, [trial.name, state.get("phase", "starting"), steps, loss]))))
        spec = self._plan.spec
        trials = spec.budget.trials
        most = f" of at most {(trials + len(spec.baselines)) * spec.seeds}" if trials is not None else ""
        lines.append(Text(f"{len(journal.ended)}{most} ended, {len(running)} running, {waiting} waiting", style="dim"))
        return lines

    def _objectives(self, ended: Ended) -> list[str]:
        return [name for name in self._plan.spec.objectives if name in ended.values]
