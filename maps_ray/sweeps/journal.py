"""What a sweep has decided and what has ended, on disk before anything acts on it.

    <storage>/<name>/
      sweep.json       the resolved sweep spec
      base.yaml        the base run spec that every trial starts from
      journal.jsonl    one line for each schedule decided, each change of one in training, and each trial ended
      timeline.jsonl   nodes, trials pending and running, whenever one of them changes
      tune/            Ray Tune's own experiment folder
      scheduler.pkl    what the scheduler knows, which Tune does not store
      trials/          one run folder for each trial, like those of `maps-ray train`
      workers/         what Ray Train writes of each group of workers
      report.html

A driver that is killed loses nothing: a schedule is written before its first trial starts, and how a trial ended is
also in the trial's own folder.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from maps_ray.sweeps.schedules import Schedule

_OPEN: dict[Path, Journal] = {}
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
    proximity: dict[str, Any]
    point: dict[str, Any] | None = None
    """Where the searcher has it."""


class Journal:
    """The journal of one sweep; read when it is opened."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "journal.jsonl"
        self.schedules: dict[int, Schedule] = {}
        self.ended: dict[str, Ended] = {}
        self.changes: list[Change] = []
        self.merged: list[str] | None = None
        """Labels of the schedules whose weights are merged, once that is decided."""
        for line in self._lines():
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

    @classmethod
    def of(cls, folder: Path) -> Journal:
        """The one journal that this process has of a sweep: all who write it see what the others wrote."""
        if folder not in _OPEN:
            _OPEN[folder] = cls(folder)
        return _OPEN[folder]

    @classmethod
    def forget(cls, folder: Path) -> None:
        """Lets the next `of` read the sweep's file again."""
        _OPEN.pop(folder, None)

    def decide(self, schedule: Schedule) -> None:
        self._append({"kind": "schedule", "schedule": asdict(schedule)})
        self.schedules[schedule.number] = schedule

    def end(self, ended: Ended) -> None:
        self._append({"kind": "ended", "ended": asdict(ended)})
        self.ended[ended.trial] = ended

    def change(self, change: Change) -> None:
        self._append({"kind": "change", "change": asdict(change)})
        self.changes.append(change)

    def point(self, trial: str, schedule: int) -> dict[str, Any] | None:
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

    def _append(self, record: dict[str, Any]) -> None:
        with self._path.open("ab") as file:
            # A line that a kill cut short must not swallow this one.
            if file.tell() and not self._ends_with_newline():
                file.write(b"\n")
            file.write(json.dumps(record).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def _ends_with_newline(self) -> bool:
        with self._path.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read(1) == b"\n"

    def _lines(self) -> list[dict[str, Any]]:
        if not self._path.exists():
            return []
        found = []
        for line in self._path.read_text().splitlines():
            try:
                found.append(json.loads(line))
            except ValueError:
                continue
        return found
