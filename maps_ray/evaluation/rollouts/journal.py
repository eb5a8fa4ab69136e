"""Finished episodes on disk, so that the same evaluation goes on after Ctrl-C or a lost machine.

`episodes.jsonl`: the first line says what the results depend on, the others are what simulators said of suites, and one
episode each. A line is on disk before its episode counts.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TextIO

from maps_ray.evaluation.rollouts.environment import SuiteFacts
from maps_ray.evaluation.rollouts.plan import Episode
from maps_ray.evaluation.rollouts.protocol import EpisodeResult
from maps_ray.evaluation.simulators.base import Suite, Task
from maps_ray.files import take_lock
from maps_ray.spec import Problem, SpecError

NAME = "episodes.jsonl"


class Journal:
    """Held by one evaluation at a time; use it in a `with` statement.

    Args:
        out: folder; made when missing.
        identity: all that the result of an episode depends on, besides the episode.

    Raises:
        SpecError: the folder holds episodes of another checkpoint or request, or another evaluation uses it.
    """

    def __init__(self, out: Path, identity: Mapping[str, object]) -> None:
        self.results: dict[Episode, EpisodeResult] = {}
        self.suites: dict[str, SuiteFacts] = {}
        # As it is read back: a tuple is a list there.
        self._identity = json.loads(json.dumps(identity))
        self._out = out
        try:
            out.mkdir(parents=True, exist_ok=True)
            self._file: TextIO = (out / NAME).open("a+", encoding="utf-8")
        except OSError as error:
            raise SpecError([Problem("--out", str(out), f"cannot be written: {error}")]) from None
        if not take_lock(self._file, wait_s=0):
            self._file.close()
            raise SpecError([Problem("--out", str(out), "another evaluation writes there; wait for it")]) from None
        try:
            self._read()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, result: EpisodeResult) -> None:
        """Records a finished episode; an episode that is there already keeps its first result."""
        if result.episode in self.results:
            return
        kept = {name: getattr(result, name) for name in ("success", "steps", "replans", "sub_goals", "seconds")}
        self._write({"episode": asdict(result.episode), **kept})
        self.results[result.episode] = result

    def add_suite(self, facts: SuiteFacts) -> None:
        """Records what a suite holds."""
        self._write({"suite": asdict(facts)})
        self.suites[facts.suite.name] = facts

    def _write(self, line: Mapping[str, object]) -> None:
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def _read(self) -> None:
        self._file.seek(0)
        text = self._file.read()
        whole = text[: text.rfind("\n") + 1]
        if len(whole) < len(text):
            # The line that was being written when the process was killed: its episode is run again.
            self._file.truncate(len(whole.encode()))
        lines = [json.loads(line) for line in whole.splitlines()]
        if not lines:
            self._write({"identity": self._identity})
            return
        self._check(lines[0].get("identity", {}))
        for line in lines[1:]:
            if "suite" in line:
                raw = line["suite"]
                tasks = tuple(Task(**task) for task in raw["tasks"])
                facts = SuiteFacts(Suite(**raw["suite"]), tasks, raw["action_dim"])
                self.suites[facts.suite.name] = facts
            else:
                episode = Episode(**line.pop("episode"))
                self.results[episode] = EpisodeResult(episode=episode, **line)

    def _check(self, recorded: Mapping[str, object]) -> None:
        different = [
            f"{name} was {recorded.get(name)!r}, now {self._identity.get(name)!r}"
            for name in sorted(recorded.keys() | self._identity.keys())
            if recorded.get(name) != self._identity.get(name)
        ]
        if different:
            message = f"it holds episodes of another evaluation ({'; '.join(different)}); choose another folder"
            raise SpecError([Problem("--out", str(self._out), message)])
