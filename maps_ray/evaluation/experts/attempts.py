"""Attempts of the scripted experts without cameras: 2-3 s each, so that their success can be measured."""

from __future__ import annotations

import json
import tempfile
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from maps_ray.evaluation.experts.motions import NoPlan
from maps_ray.evaluation.experts.recordings import open_recorded, recording
from maps_ray.evaluation.simulators.base import Simulator
from maps_ray.evaluation.simulators.processes import run_in_processes


@dataclass(frozen=True)
class Attempt:
    """How one attempt at a task went."""

    task: int
    name: str
    initial_state: int
    steps: int
    """Actions until the goal held; 0 for a failure."""
    seconds: float
    """Wall clock, with the reset."""
    failure: str = ""
    """Why it failed; empty for a success."""


@dataclass(frozen=True)
class Summary:
    """How the attempts at one task went."""

    task: int
    name: str
    attempts: int
    successes: int
    mean_steps: float
    """Of the successes; 0 without one."""
    mean_seconds: float
    """Of all attempts."""


@dataclass(frozen=True)
class _Job:
    suite: str
    task: int
    attempts: int
    seed: int
    folder: Path

    def __str__(self) -> str:
        return f"task {self.task} of {self.suite}"


def solve(simulator: Simulator, task: int, initial_state: int, seed: int) -> list[NDArray[np.float32]]:
    """Lets the expert solve a task, without cameras.

    Args:
        simulator: its loaded state is changed.
        task: index of the task.
        initial_state: index of the recorded initial state.
        seed: of the noise; the same seed gives the same actions.

    Returns:
        The actions, each of shape (action_dim,), after which the goal holds.

    Raises:
        NoPlan: the expert finds no way or takes more steps than the suite allows, or the goal does not hold at the end.
    """
    # Not `hash`, which each process salts.
    suite = zlib.crc32(simulator.tasks[task].suite.encode())
    random = np.random.default_rng([seed, suite, task, initial_state])
    simulator.reset(task, initial_state)
    actions = []
    name = simulator.tasks[task].name
    for action in recording(simulator.suite.name).drive(simulator, random):
        simulator.step(action[None])
        actions.append(action)
        if len(actions) > simulator.suite.max_steps:
            raise NoPlan(f"{name}: not solved within the suite's {simulator.suite.max_steps} steps")
    if not simulator.success:
        raise NoPlan(f"{name}: the goal does not hold after {len(actions)} steps")
    return actions


def measure(
    suite: str, tasks: Sequence[int] | None, attempts: int, *, workers: int, seed: int = 0
) -> Iterator[list[Attempt]]:
    """Attempts each task from its first initial states and keeps nothing but how it went.

    Args:
        suite: the suite's name.
        tasks: indices of the suite's tasks; None for all.
        attempts: of each task; no more than it has initial states.
        workers: processes, about 1.8 GB each.
        seed: of the noise in the actions.

    Yields:
        About once a second, all attempts so far, in the order of tasks and states.

    Raises:
        SimulatorMissing: the `libero` extra or an OpenGL library is not installed.
        ValueError: unknown suite or task.
        ProcessDied: a process was killed.
    """
    chosen = chosen_tasks(open_recorded(suite), tasks)
    with tempfile.TemporaryDirectory(prefix="maps_ray-experts-") as name:
        jobs = [_Job(suite, task, attempts, seed, Path(name)) for task in chosen]
        for _ in run_in_processes(_attempt_job, jobs, workers):
            yield [
                Attempt(**json.loads(line))
                for path in sorted(Path(name).glob("*.jsonl"))
                for line in path.read_text(encoding="utf-8").splitlines()
            ]


def summarise(attempts: Sequence[Attempt]) -> list[Summary]:
    """One row for each task that was attempted, in the order of tasks."""
    rows = []
    for task in sorted({attempt.task for attempt in attempts}):
        own = [attempt for attempt in attempts if attempt.task == task]
        steps = [attempt.steps for attempt in own if not attempt.failure]
        seconds = sum(attempt.seconds for attempt in own) / len(own)
        rows.append(Summary(task, own[0].name, len(own), len(steps), sum(steps) / max(len(steps), 1), seconds))
    return rows


def chosen_tasks(simulator: Simulator, tasks: Sequence[int] | None) -> list[int]:
    """The tasks, sorted; all of the suite's for None.

    Raises:
        ValueError: the suite has no such task.
    """
    count = len(simulator.tasks)
    wrong = sorted(set(tasks or ()) - set(range(count)))
    if wrong:
        raise ValueError(f"{simulator.tasks[0].suite} has tasks 0..{count - 1}, not {', '.join(map(str, wrong))}")
    return list(range(count)) if tasks is None else sorted(set(tasks))


def _attempt_job(job: _Job) -> None:
    simulator = open_recorded(job.suite)
    try:
        # What loading a task costs belongs to no attempt.
        simulator.reset(job.task, 0)
        with (job.folder / f"{job.task:03d}.jsonl").open("a", encoding="utf-8") as stream:
            name = simulator.tasks[job.task].name
            for state in range(min(job.attempts, simulator.tasks[job.task].initial_states)):
                start = time.perf_counter()
                steps, failure = 0, ""
                try:
                    steps = len(solve(simulator, job.task, state, job.seed))
                except NoPlan as reason:
                    failure = str(reason)
                seconds = time.perf_counter() - start
                stream.write(json.dumps(asdict(Attempt(job.task, name, state, steps, seconds, failure))) + "\n")
                stream.flush()
    finally:
        simulator.close()
