"""What a sweep has decided and what has ended, on disk before anything acts on it.

A driver that is killed loses nothing: a schedule is written before its first trial starts, and a trial that is asked
for again after its end answers from here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from maps_ray.files import append_line, read_lines
from maps_ray.sweeps.schedules import Plan, Schedule
from maps_ray.sweeps.space import Point, ScheduleFields

Status = Literal["finished", "stopped early", "failed"]


@dataclass(frozen=True)
class Ended:
    """How one trial ended."""

    trial: str
    schedule: int
    seed: int
    status: Status
    step: int
    values: dict[str, float]
    """Each metric at the last evaluation that had it; empty when there was none."""
    seconds: float
    """That it held its workers, since this driver began it."""
    error: str | None = None


@dataclass(frozen=True)
class Change:
    """A trial that went on from another one's weights, or its own, under another schedule."""

    trial: str
    step: int
    source: str
    """The trial whose weights and moments it continued from."""
    proximity: ScheduleFields
    point: Point | None = None
    """Where the searcher has it."""


class Journal:
    """The journal of one sweep; read when it is opened.

    Args:
        folder: of the sweep.
        written: called after each line.
    """

    FILE = "journal.jsonl"

    def __init__(self, folder: Path, written: Callable[[], None] = lambda: None) -> None:
        self._path = folder / self.FILE
        self._written = written
        self.schedules: dict[int, Schedule] = {}
        self.ended: dict[str, Ended] = {}
        self.changes: list[Change] = []
        self.merged: list[str] | None = None
        """Labels of the schedules whose weights are merged, once that is decided."""
        for line in read_lines(self._path):
            if line["kind"] == "schedule":
                schedule = Schedule(**line["schedule"])
                self.schedules[schedule.number] = schedule
            elif line["kind"] == "change":
                self.changes.append(Change(**line["change"]))
            elif line["kind"] == "merge":
                self.merged = line["merge"]
            else:
                ended = Ended(**line["ended"])
                self.ended[ended.trial] = ended

    def trials(self, plan: Plan) -> list[str]:
        """Names of all trials that may have begun."""
        return [name for s in self.schedules.values() if s.same_as is None for name in plan.names(s)]

    def decide(self, schedule: Schedule) -> None:
        self._append({"kind": "schedule", "schedule": asdict(schedule)})
        self.schedules[schedule.number] = schedule

    def end(self, ended: Ended) -> None:
        self._append({"kind": "ended", "ended": asdict(ended)})
        self.ended[ended.trial] = ended

    def change(self, change: Change) -> None:
        self._append({"kind": "change", "change": asdict(change)})
        self.changes.append(change)

    def point(self, trial: str, schedule: int) -> Point | None:
        """Where a trial is: at its schedule's point, or at that of its last change."""
        points = [change.point for change in self.changes if change.trial == trial]
        return points[-1] if points else self.schedules[schedule].point

    def merge(self, labels: list[str]) -> None:
        self._append({"kind": "merge", "merge": labels})
        self.merged = labels

    def results(self, number: int) -> list[Ended]:
        """The ended trials of a schedule, or of the one that it repeats."""
        same = self.schedules[number].same_as
        return [ended for ended in self.ended.values() if ended.schedule == (number if same is None else same)]

    def _append(self, record: Mapping[str, object]) -> None:
        append_line(self._path, record, durable=True)
        self._written()
