"""Collects demonstrations of the scripted expert as a LeRobotDataset v3.0.

Each attempt is simulated without cameras first. A successful one is replayed from the same initial state with cameras,
must succeed again, and is staged in a file of its own beside the data set; attempts start from the suite's recorded
initial states in their order. When every task has its episodes, the staged ones are appended to the data set in the
order of tasks and states. So an interrupted collection goes on where it was, and the number of workers changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from maps_ray.data import layout as v3
from maps_ray.data.dataset_error import DatasetError
from maps_ray.data.writer import LeRobotWriter
from maps_ray.evaluation.experts.attempts import chosen_tasks, solve
from maps_ray.evaluation.experts.motions import NoPlan
from maps_ray.evaluation.experts.recordings import open_recorded, recording
from maps_ray.evaluation.simulators.base import Simulator, Task
from maps_ray.evaluation.simulators.processes import run_in_processes
from maps_ray.files import replaced


@dataclass(frozen=True)
class Episode:
    """A successful demonstration of T steps; images and state at step t are those before action t."""

    task: str
    images: dict[str, NDArray[np.uint8]]
    """Camera name to RGB images, shape (T, size, size, 3)."""
    state: NDArray[np.float32]
    """Shape (T, D), see `Observation.proprio`; LIBERO's D is 8."""
    actions: NDArray[np.float32]
    """Shape (T, A) in the simulator's own convention; LIBERO's A is 7: deltas in [-1, 1], gripper -1 open, 1 closed."""


@dataclass(frozen=True)
class Tally:
    """How a task went so far."""

    index: int
    task: str
    present: int
    """Episodes that the data set had before."""
    attempts: int
    successes: int
    initial_states: int


@dataclass(frozen=True)
class _TaskJob:
    suite: str
    task: int
    present: int
    wanted: int
    """Further episodes."""
    first_state: int
    staging: Path
    seed: int
    image_size: int

    def __str__(self) -> str:
        return f"task {self.task} of {self.suite}"


def demonstrate(simulator: Simulator, task: int, initial_state: int, seed: int) -> Episode:
    """Lets the expert solve a task, and replays the solution with cameras.

    Args:
        simulator: its loaded state is changed.
        task: index of the task.
        initial_state: index of the recorded initial state.
        seed: of the noise; the same seed gives the same episode.

    Raises:
        NoPlan: the expert finds no way, or the goal does not hold at the end.
    """
    actions = solve(simulator, task, initial_state, seed)
    simulator.reset(task, initial_state)
    observations = []
    for action in actions:
        observations.append(simulator.observe())
        simulator.step(action[None])
    if not simulator.success:
        raise NoPlan(f"{simulator.tasks[task].name}: the replay of a success failed; the simulation is not repeatable")
    return Episode(
        task=observations[0].sentence,
        images={name: np.stack([seen.images[name] for seen in observations]) for name in simulator.cameras},
        state=np.stack([seen.proprio for seen in observations]),
        actions=np.stack(actions),
    )


def collect(
    out: Path,
    suite: str,
    tasks: Sequence[int] | None,
    episodes: int,
    *,
    workers: int,
    seed: int = 0,
    image_size: int = 128,
) -> Iterator[list[Tally]]:
    """Collects until `out` has `episodes` episodes of each task, or a task's initial states are used up.

    Args:
        out: the data set; created, or continued.
        suite: name of a suite of LIBERO, LIBERO-PRO or Metaworld.
        tasks: indices of the suite's tasks; None for all.
        episodes: successful episodes of each task, with those that `out` has already.
        workers: processes, about 1.8 GB each of LIBERO, 0.5 GB of Metaworld.
        seed: of the noise in the actions.
        image_size: side of the pictures in pixels.

    Yields:
        About once a second, the tally of this collection's attempts, task by task.

    Raises:
        SimulatorMissing: the simulator's extra or an OpenGL library is not installed.
        ValueError: unknown suite or task.
        DatasetError: `out` is no data set of the same features.
    """
    simulator = open_recorded(suite)
    listed, chosen = simulator.tasks, chosen_tasks(simulator, tasks)
    _check_same_features(out, suite, image_size)
    staging = out.with_name(out.name + ".staging")
    staging.mkdir(parents=True, exist_ok=True)
    present = _present(out, suite)
    for path in list(staging.glob(f"{suite}-*.npz")):
        if _state_of(path) in present:  # committed by a run that ended before it could clean up
            path.unlink()
    jobs = []
    for task in chosen:
        states = [state for known, state in present if known == task]
        first, wanted = max(states, default=-1) + 1, episodes - len(states)
        jobs.append(_TaskJob(suite, task, len(states), wanted, first, staging, seed, image_size))
    yield _tally(jobs, listed)
    for _ in run_in_processes(_attempt_task, [job for job in jobs if not _finished(job, listed)], workers):
        yield _tally(jobs, listed)
    tally = _tally(jobs, listed)
    staged = sorted(staging.glob(f"{suite}-*.npz"), key=_state_of)
    if staged:
        with _writer(out, suite, image_size) as writer:
            _append(writer, staged, suite)
    for path in staging.glob(f"{suite}-*"):
        path.unlink()
    if not any(staging.iterdir()):
        staging.rmdir()
    yield tally


def _attempt_task(job: _TaskJob) -> None:
    simulator = open_recorded(job.suite, job.image_size)
    try:
        while not _finished(job, simulator.tasks):
            state = job.first_state + len(_attempts(job))
            staged = job.staging / f"{job.suite}-{job.task:02d}-{state:02d}.npz"
            try:
                _save(staged, demonstrate(simulator, job.task, state, job.seed))
            except NoPlan as reason:
                staged.with_suffix(".failed").write_text(f"{reason}\n", encoding="utf-8")
    finally:
        simulator.close()


def _attempts(job: _TaskJob) -> list[Path]:
    kept = job.staging.glob(f"{job.suite}-{job.task:02d}-*")
    return [path for path in kept if path.suffix in (".npz", ".failed")]


def _finished(job: _TaskJob, tasks: Sequence[Task]) -> bool:
    attempts = _attempts(job)
    successes = sum(path.suffix == ".npz" for path in attempts)
    return successes >= job.wanted or job.first_state + len(attempts) >= tasks[job.task].initial_states


def _tally(jobs: Iterable[_TaskJob], tasks: Sequence[Task]) -> list[Tally]:
    tallies = []
    for job in jobs:
        attempts = _attempts(job)
        successes = sum(path.suffix == ".npz" for path in attempts)
        task = tasks[job.task]
        tallies.append(Tally(job.task, task.name, job.present, len(attempts), successes, task.initial_states))
    return tallies


def _save(path: Path, episode: Episode) -> None:
    # A stream: numpy would add its own ending to a name.
    with replaced(path) as partial, partial.open("wb") as stream:
        arrays: dict[str, Any] = {"task": episode.task, "state": episode.state, "actions": episode.actions}
        np.savez(stream, **arrays | episode.images)


def _writer(out: Path, suite: str, image_size: int) -> LeRobotWriter:
    kept = recording(suite)
    return LeRobotWriter(
        out,
        cameras=dict.fromkeys(kept.cameras, (image_size, image_size)),
        state_names=kept.state_names,
        action_names=kept.action_names,
        fps=kept.fps,
        robot_type=kept.robot,
        append=True,
    )


def _check_same_features(out: Path, suite: str, image_size: int) -> None:
    """Finds out before hours of work whether the episodes will fit into the data set.

    Raises:
        DatasetError: they will not.
    """
    if out.exists() and not out.is_dir():
        raise DatasetError(f"{out} is a file: name a folder for the data set")
    if (out / v3.INFO).is_file():
        _writer(out, suite, image_size)
    elif out.is_dir() and any(out.iterdir()):
        raise DatasetError(f"{out} is neither empty nor a LeRobotDataset: name another folder")


def _append(writer: LeRobotWriter, staged: Iterable[Path], suite: str) -> None:
    for path in staged:
        task, state = _state_of(path)
        with np.load(path) as episode:
            writer.add_episode(
                str(episode["task"]),
                {name: episode[name] for name in recording(suite).cameras},
                episode["state"],
                episode["actions"],
                extra={"suite": suite, "suite_task": task, "initial_state": state},
            )


def _present(out: Path, suite: str) -> set[tuple[int, int]]:
    """(task, initial state) of the suite's episodes in the data set."""
    names = ["extra/suite", "extra/suite_task", "extra/initial_state"]
    rows = []
    for path in sorted(out.glob("meta/episodes/*/*.parquet")):
        if missing := set(names) - set(pq.read_schema(path).names):
            raise DatasetError(f"{path} has no {', '.join(sorted(missing))}: {out} was not collected by this command")
        rows += [tuple(row[name] for name in names) for row in pq.read_table(path, columns=names).to_pylist()]
    return {(task, state) for name, task, state in rows if name == suite}


def _state_of(path: Path) -> tuple[int, int]:
    """(task, initial state) of a staged attempt."""
    task, state = path.stem.split("-")[1:]
    return int(task), int(state)
