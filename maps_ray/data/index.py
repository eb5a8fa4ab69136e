"""The index of a data set: what its shards hold, and the vectors of all episodes in two arrays.

It is computed once, in parallel on Ray where a cluster is there, and kept in the cache folder under the fingerprint of
the content: a second run, on a copy of the data or after a change of the spec, starts at once.

<cache>/index/<fingerprint>/
  scan.json                 what the format's reader needs of each shard
  <what is trained on>/     by transform and features
    action.npy state.npy    float32 (steps, D), episode after episode, memory-mapped
    statistics-<...>.json   of each selection of episodes that a run trained on
    stored-<...>.json       range of the actions before the transform
"""

from __future__ import annotations

import errno
import hashlib
import inspect
import json
import os
import shutil
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import numpy as np

from maps_ray import machine
from maps_ray.data.dataset_error import DatasetError
from maps_ray.data.formats import Dataset, Kind
from maps_ray.data.formats.base import scan_in_threads
from maps_ray.data.transforms import Transform
from maps_ray.files import sync, take_lock

Report = Callable[[str, int, int], None]
"""Called with what is being done, how many parts of it are done, and how many there are."""

Json = TypeVar("Json")
"""Values that JSON gives back as they were: no tuples."""
Content = TypeVar("Content")
Part = TypeVar("Part")
Result = TypeVar("Result")

# Raise it when what stands in the files changes its meaning.
_FORMAT = 2
_PARTS_PER_CPU = 4
# More shards than these are scanned on a cluster, not by a check that has to answer at once.
_SHARDS_AT_ONCE = 200
# A file that is missing, or cut short by a disk that was full or a machine that lost power: `json` and `numpy` raise
# these.
_NOT_THERE = (FileNotFoundError, ValueError, EOFError)
# Below these a cluster costs more than it saves.
_SHARDS_WORTH_TASKS = 16
_EPISODES_WORTH_TASKS = 500


def _silent(what: str, done: int, total: int) -> None:
    pass


class NotIndexed(DatasetError):
    """A data set of very many shards, seen for the first time, where there is no time to look through them."""


class Index:
    """The index of one data set at one place; cheap to make and to pickle.

    Args:
        folder: of the cache.
        report: told of progress.
        patient: look through any number of shards; else a scan that takes long raises `NotIndexed`.
    """

    def __init__(self, folder: Path, report: Report | None = None, patient: bool = True) -> None:
        self._folder, self._report, self._patient = folder / "index", report or _silent, patient
        self._fingerprints: dict[tuple[str, str], str] = {}

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_report": _silent, "_fingerprints": {}}

    def scan(self, dataset: Dataset, shards: Sequence[str]) -> Sequence[object]:
        """As `maps_ray.data.formats.Scan`: from the file, or computed and written."""
        path = self._of(dataset) / "scan.json"
        if not self._patient and len(shards) > _SHARDS_AT_ONCE and not path.is_file():
            raise NotIndexed(f"{dataset.path}: {len(shards)} shards were never looked through")
        return self.kept(path, lambda: _scan(dataset, shards, self._report))

    def vectors(self, dataset: Dataset, kinds: Sequence[Kind]) -> Vectors:
        """All vectors of a data set, each kind once for ever.

        Raises:
            DatasetError: they cannot be read.
        """
        folder = self._of(dataset) / _meaning(dataset)
        for kind in kinds:
            self._built(
                folder / f"{kind}.npy",
                lambda path, kind=kind: _write_vectors(dataset, kind, path, self._report),  # type: ignore[misc]
                _mapped,
            )
        return Vectors(folder, [episode.length for episode in dataset.episodes])

    def frame_fault(self, dataset: Dataset, camera: str) -> str | None:
        """The first fault of a camera's frames that can be found without decoding; looked for until there is none."""
        path = self._of(dataset) / f"{hashlib.sha256(camera.encode()).hexdigest()[:16]}.sound"
        fault = None if path.is_file() else dataset.frame_fault(camera, range(len(dataset.episodes)))
        if fault is None:
            self.kept(path, lambda: camera)
        return fault

    def kept(self, path: Path, make: Callable[[], Json]) -> Json:
        """JSON values that are computed once."""
        return self._built(
            path,
            lambda made: made.write_text(json.dumps(make()), encoding="utf-8"),
            lambda made: json.loads(made.read_text(encoding="utf-8")),
        )

    def _of(self, dataset: Dataset) -> Path:
        key = dataset.path, dataset.split
        if key not in self._fingerprints:
            self._fingerprints[key] = dataset.fingerprint()
        return self._folder / f"{self._fingerprints[key][:32]}-{_FORMAT}"

    def _built(self, path: Path, write: Callable[[Path], object], read: Callable[[Path], Content]) -> Content:
        """What `read` gives of a file that `write` makes where it is missing or damaged. One process of a node writes,
        others wait."""
        try:
            with suppress(*_NOT_THERE):
                return read(path)
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.with_suffix(".lock").open("w") as lock:
                take_lock(lock)
                # By now another process may have written it.
                with suppress(*_NOT_THERE):
                    return read(path)
                prefix = f".unfinished-{path.name}-"
                # Who has the lock is the only one to write: these are of a process that was killed.
                for left in path.parent.glob(f"{prefix}*"):
                    shutil.rmtree(left, ignore_errors=True)
                with tempfile.TemporaryDirectory(prefix=prefix, dir=path.parent) as partial:
                    made = Path(partial) / path.name
                    write(made)
                    sync(made)
                    os.replace(made, path)
                return read(path)
        except OSError as error:
            remedy = "free some space there" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "choose another folder"
            raise DatasetError(
                f"{self._folder}: cannot write the index ({error}); {remedy}: data.cache.folder or MAPS_RAY_CACHE"
            ) from None


class Vectors:
    """Actions and states of all episodes, memory-mapped: pages are shared by all processes of a node.

    Args:
        folder: with a file for each kind.
        lengths: of the episodes.
    """

    def __init__(self, folder: Path, lengths: Sequence[int]) -> None:
        self.folder = folder
        self._starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        self._open: dict[Kind, np.ndarray] = {}

    def __getstate__(self) -> dict[str, object]:
        # A memory map would be pickled as its whole content.
        return {**self.__dict__, "_open": {}}

    def all(self, kind: Kind) -> np.ndarray:
        """float32 (steps of all episodes, D), read-only."""
        if kind not in self._open:
            self._open[kind] = _mapped(self.folder / f"{kind}.npy")
        return self._open[kind]

    def episode(self, kind: Kind, index: int) -> np.ndarray:
        """float32 (T, D), read-only."""
        return self.all(kind)[self._starts[index] : self._starts[index + 1]]

    def select(self, kind: Kind, episodes: Sequence[int]) -> np.ndarray:
        """float32 (steps of the episodes named, D)."""
        if len(episodes) == len(self._starts) - 1:
            return self.all(kind)
        return np.concatenate([self.episode(kind, index) for index in episodes])

    def fault(self, kind: Kind, episodes: Iterable[int]) -> int | None:
        """The first episode that holds NaN or infinity."""
        whole = self.all(kind)
        bad = [np.flatnonzero(~np.isfinite(part).all(axis=1)) + at for at, part in _blocks(whole)]
        rows = np.concatenate(bad) if bad else np.empty(0, np.int64)
        broken = set((np.searchsorted(self._starts, rows, side="right") - 1).tolist())
        return next((index for index in episodes if index in broken), None)


def _mapped(path: Path) -> np.ndarray:
    array: np.ndarray = np.load(path, mmap_mode="r")
    return array


def _blocks(rows: np.ndarray, size: int = 1 << 18) -> Iterator[tuple[int, np.ndarray]]:
    for at in range(0, len(rows), size):
        yield at, rows[at : at + size]


def _meaning(dataset: Dataset) -> str:
    """What the vectors depend on besides the content: features, and the code of the transform."""
    parts = [dataset.feature("action"), dataset.feature("state") if dataset.has("state") else ""]
    if dataset.transform is not None:
        parts += [dataset.transform.name, _code(dataset.transform)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _code(transform: Transform) -> str:
    try:
        # The whole file: the function may call its neighbours.
        file = inspect.getsourcefile(transform.apply)
        return hashlib.sha256(Path(file).read_bytes()).hexdigest() if file else ""
    except (OSError, TypeError):
        return ""


def _scan(dataset: Dataset, shards: Sequence[str], report: Report) -> list[object]:
    if len(shards) < _SHARDS_WORTH_TASKS or not _on_ray():
        return scan_in_threads(dataset, shards)
    parts = _cut(list(shards))
    scanned = _tasks(_scan_part, dataset, parts, "scanning shards", report)
    return [scan for part in scanned for scan in part]


def _scan_part(dataset: Dataset, shards: Sequence[str]) -> list[object]:
    return scan_in_threads(dataset, shards)


def _write_vectors(dataset: Dataset, kind: Kind, path: Path, report: Report) -> None:
    total = sum(episode.length for episode in dataset.episodes)
    made = np.lib.format.open_memmap(path, "w+", np.float32, (total, dataset.width(kind)))
    episodes = list(range(len(dataset.episodes)))
    parts = _cut(episodes)
    what = f"reading {kind}s"
    if len(episodes) >= _EPISODES_WORTH_TASKS and _on_ray():
        read: Iterable[np.ndarray] = _tasks(_vectors_part, dataset, [(kind, part) for part in parts], what, report)
    else:
        read = (_vectors_part(dataset, (kind, part)) for part in parts)
    at = 0
    for number, rows in enumerate(read):
        if len(rows) and rows.shape[1] != made.shape[1]:
            raise DatasetError(
                f"{dataset.path}: {dataset.feature(kind)} has {rows.shape[1]} dimensions in one of episodes "
                f"{parts[number][0]} to {parts[number][-1]}, {made.shape[1]} in the first"
            )
        made[at : at + len(rows)] = rows
        at += len(rows)
        report(what, number + 1, len(parts))
    if at != total:
        raise DatasetError(f"{dataset.path}: {dataset.feature(kind)} has {at} steps, its episodes have {total}")
    made.flush()


def _vectors_part(dataset: Dataset, part: tuple[Kind, Sequence[int]]) -> np.ndarray:
    kind, episodes = part
    if not episodes:
        return np.empty((0, 0), np.float32)
    rows = [dataset.vectors(kind, index) for index in episodes]
    widths = {values.shape[1] for values in rows}
    if len(widths) > 1:
        odd = next(index for index, values in zip(episodes, rows, strict=True) if values.shape[1] != rows[0].shape[1])
        raise DatasetError(
            f"{dataset.path}: {dataset.feature(kind)} of {dataset.episodes[odd].name} has another width than that of "
            f"{dataset.episodes[episodes[0]].name}: {sorted(widths)}"
        )
    return np.concatenate(rows)


def _on_ray() -> bool:
    """Whether tasks can run: in a driver. A worker of a run holds the very CPUs that they would wait for."""
    # Where nobody has imported it there is no cluster.
    ray = sys.modules.get("ray")
    return bool(ray and ray.is_initialized() and ray.get_runtime_context().get_actor_id() is None)


def _cut(items: list[Part]) -> list[list[Part]]:
    """Consecutive parts, some for each CPU."""
    cpus = _cpus()
    size = max(1, -(-len(items) // (cpus * _PARTS_PER_CPU)))
    # One empty part of no items, so that an empty file is written as any other.
    return [items[at : at + size] for at in range(0, len(items), size)] or [[]]


def _cpus() -> int:
    if _on_ray():
        import ray

        return max(1, int(ray.cluster_resources().get("CPU", 1)))
    return machine.cores()


def _tasks(
    act: Callable[[Dataset, Part], Result], dataset: Dataset, parts: Sequence[Part], what: str, report: Report
) -> Iterator[Result]:
    """`act(dataset, part)` for each part as Ray tasks, results in order; an error is that of the task."""
    import ray

    task = ray.remote(num_cpus=1, max_retries=3)(act)
    shared = ray.put(dataset)
    pending = deque(task.remote(shared, part) for part in parts)
    try:
        while pending:
            # A result leaves Ray's object store, which is small, once it was used.
            yield ray.get(pending.popleft())
            report(what, len(parts) - len(pending), len(parts))
    except ray.exceptions.RayTaskError as error:
        raise (
            error.cause if isinstance(error.cause, DatasetError) else DatasetError(f"{dataset.path}: {error}")
        ) from None
    finally:
        for reference in pending:
            ray.cancel(reference)
