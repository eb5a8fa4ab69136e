"""How far a run is: what rank 0 says through the mailbox, on record in a small file, shown as a progress bar."""

from __future__ import annotations

import json
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Unpack, cast

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from maps_ray.files import write_json
from maps_ray.training.mailbox import Progress as Standing
from maps_ray.training.mailbox import ProgressValues

_NAME = "progress.json"
_LINE_S = 10.0


class ProgressRecord(Standing, total=False):
    """What the file holds."""

    max_steps: int


class ProgressWriter:
    """The record: at most one file in `interval_s`, and one at once when the phase changes."""

    def __init__(self, run_dir: Path, max_steps: int, interval_s: float = 0.2) -> None:
        self._path = run_dir / _NAME
        self._max_steps = max_steps
        self._interval_s = interval_s
        self._last = 0.0
        self._phase = ""

    def write(self, phase: str, step: int, **values: Unpack[ProgressValues]) -> None:
        """Records where the run stands."""
        now = time.monotonic()
        if phase == self._phase and now - self._last < self._interval_s:
            return
        self._last, self._phase = now, phase
        state: ProgressRecord = {"phase": phase, "step": step, "max_steps": self._max_steps, **values}
        # Several times a second: not worth a sync each, and lost with the machine it would be out of date.
        write_json(self._path, state, durable=False)


def read_progress(run_dir: Path) -> ProgressRecord:
    """The last recorded state; empty when there is none yet."""
    try:
        state = json.loads((run_dir / _NAME).read_text())
    except (OSError, ValueError):
        return {}
    return cast(ProgressRecord, state) if isinstance(state, dict) else {}


class ProgressBar:
    """Step, loss, samples per second and time left, shown and put on record.

    A bar in a terminal; elsewhere, as in the log of a job, a line for each phase and one in `_LINE_S` seconds. A
    terminal that has gone, a pipe that nobody reads, or a log on a full disk costs what would be shown, and no run.
    """

    def __init__(self, run_dir: Path, max_steps: int, title: str, shown: bool = True) -> None:
        console = Console(stderr=True)
        self._record = ProgressWriter(run_dir, max_steps)
        self._max_steps = max_steps
        self._title = title
        self._plain = shown and (not console.is_terminal or console.is_dumb_terminal)
        self._phase = ""
        self._last_line = 0.0
        self._bar = Progress(
            # Paths and sentences may have brackets, which are rich's markup.
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[values]}", markup=False),
            TimeElapsedColumn(),
            console=console,
            disable=not shown or self._plain,
        )
        self._task = self._bar.add_task(title, total=max_steps, values="")
        self.say("starting Ray")

    def __enter__(self) -> ProgressBar:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):
            self._bar.stop()

    def say(self, phase: str) -> None:
        """Shows what is being done before the workers report by themselves."""
        self._show({"phase": phase})

    def update(self, state: Standing) -> None:
        """Shows and records what the workers said last."""
        if state:
            self._record.write(**state)
            self._show({**state, "max_steps": self._max_steps})

    def _show(self, state: ProgressRecord) -> None:
        values = []
        if "loss" in state:
            values.append(f"loss {state['loss']:.4f}")
        if pace := state.get("samples_per_second"):
            values.append(f"{pace:.1f} samples/s")
        if "episodes" in state:
            values.append(f"{state['episodes']}/{state['all_episodes']} episodes")
        if (left := state.get("seconds_left")) is not None:
            values.append(f"{_clock(left)} left")
        description, text = f"{self._title}: {state['phase']}", "  ".join(values)
        self._bar.update(self._task, completed=state.get("step"), description=description, values=text)
        now = time.monotonic()
        if self._plain and (state["phase"] != self._phase or now - self._last_line > _LINE_S):
            steps = f"step {state['step']}/{state['max_steps']}" if "step" in state else ""
            with suppress(OSError):
                print("  ".join(part for part in (description, steps, text) if part), file=sys.stderr, flush=True)
            self._phase, self._last_line = state["phase"], now


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
