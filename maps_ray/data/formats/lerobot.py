"""What LeRobotDataset v2 and v3 share: rows that say which episode, frame and task they are, videos and stored images.

The rows are the truth. An episode's rows are found by `episode_index` and `frame_index`, its sentences by `task_index`
and the table of tasks; timestamps must agree with `fps`, or the videos would be paired with other actions.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import ClassVar

import numpy as np

from maps_ray.data import layout as v3
from maps_ray.data.dataset_error import DatasetError
from maps_ray.data.formats.base import Dataset, Episode, Handles, Names
from maps_ray.data.formats.lerobot_info import (
    Info,
    expand,
    indices,
    matrix,
    plain,
    read_table,
    vector_features,
    vector_width,
)
from maps_ray.data.formats.stored_images import StoredImages
from maps_ray.data.storage import Storage, content, digest
from maps_ray.data.transforms import Transform
from maps_ray.data.video import VideoReader, probe
from maps_ray.spec import nearest

# Steps that a frame may be shown early or late: within less than half of one, one frame alone can lie.
_OFF = 0.4
_VIDEOS_KEPT = 16
_TABLES_KEPT = 16
# Whose bytes are the data, besides those in meta/.
_CONTENT = (".parquet", ".mp4", ".png", ".jpg", ".jpeg")


@dataclass(frozen=True)
class Rows:
    """An episode in a data file, as its rows tell."""

    file: str
    first: int
    length: int
    tasks: tuple[tuple[int, int], ...]
    """(task_index, steps) in order; empty where the rows have no task_index."""


@dataclass(frozen=True)
class Video:
    """Where an episode's frames of one camera lie."""

    file: str
    start: float
    """Seconds into the video."""


@dataclass(frozen=True)
class Recording:
    """One episode: its rows, its sentences, its videos."""

    number: int
    """`episode_index`."""
    rows: Rows
    tasks: tuple[tuple[str, int], ...]
    """(sentence, steps) in order."""
    videos: Mapping[str, Video]
    extra: Mapping[str, object] = field(default_factory=dict)


class LeRobotFiles(Dataset):
    """Base of the two versions."""

    _PLACE_OF_VIDEOS: ClassVar[str]
    """What says where an episode's frames of `{camera}` lie."""

    def __init__(self, storage: Storage, info: Info, split: str, transform: Transform | None, names: Names) -> None:
        super().__init__(storage, split, transform, names)
        self.info = info
        self.fps = info.fps
        self.cameras = [name for name, feature in info.features.items() if feature.dtype in ("video", "image")]
        self.recordings: tuple[Recording, ...] = ()
        self._videos: Handles[VideoReader] = Handles(_VIDEOS_KEPT, VideoReader.close)
        self._tables: Handles[np.ndarray] = Handles(_TABLES_KEPT)
        self._images = StoredImages(storage)

    def stored_splits(self) -> list[str]:
        return list(dict.fromkeys(["train", *(self.info.splits or {})]))

    @abstractmethod
    def data_files(self) -> list[str]:
        """Parquet files of the data set."""

    def features(self) -> dict[str, int | None]:
        where = self.storage.at(v3.INFO)
        return {name: vector_width(self.info, name, where) for name in vector_features(self.info)}

    def no_vector(self, name: str) -> str | None:
        feature = None if name in self.features() else self.info.features.get(name)
        return f"{feature.dtype} of shape {tuple(feature.shape)}" if feature is not None else None

    def stored(self, names: Sequence[str], index: int) -> dict[str, np.ndarray]:
        rows = self.recordings[index].rows
        return {name: self._column(rows.file, name)[rows.first : rows.first + rows.length] for name in names}

    def stored_task(self, index: int, step: int) -> str:
        for sentence, steps in self.recordings[index].tasks:
            if step < steps:
                return sentence
            step -= steps
        raise IndexError(f"{self.path}: no step {step}")

    def stored_frame(self, camera: str, index: int, step: int) -> np.ndarray:
        recording = self.recordings[index]
        video = recording.videos.get(camera)
        if video is None:
            return self._images.image(recording.rows.file, camera, recording.rows.first + step)
        with self._videos.held(video.file, lambda: self._open_video(video.file)) as reader:
            return reader.frame(video.start + step / self.info.fps, _OFF / self.info.fps)

    def frame_fault(self, camera: str, episodes: Iterable[int]) -> str | None:
        """A video that is missing, unreadable, of another rate, or without a frame at a step of its episodes; an image
        that is neither stored nor to be found by its path."""
        camera = self.camera_key(camera)
        needed: dict[str, list[Recording]] = {}
        for index in episodes:
            recording = self.recordings[index]
            if camera in recording.videos:
                needed.setdefault(recording.videos[camera].file, []).append(recording)
        try:
            for file, recordings in needed.items():
                facts = probe(self.storage.path_or_file(file), self.storage.at(file))
                # Seconds are floats; what is meant is a frame.
                end, number = max(
                    (round(each.videos[camera].start * self.info.fps) + each.rows.length, each.number)
                    for each in recordings
                )
                if facts.frames < end:
                    return (
                        f"{self.storage.at(file)}: has {facts.frames} frames, episode {number} needs {end}; fetch or "
                        "write it again"
                    )
                self._check_rate(file, facts.rate, facts.frames)
                if len(facts.times):
                    for each in recordings:
                        self._check_shown(file, facts.times, each.videos[camera].start, each)
            if self.info.features[camera].dtype == "image":
                for file in dict.fromkeys(self.recordings[index].rows.file for index in episodes):
                    self._images.check(file, camera)
        except DatasetError as error:
            return str(error)
        return None

    def close(self) -> None:
        self._videos.clear()
        self._tables.clear()
        self._images.close()

    @staticmethod
    def short_name(camera: str) -> str:
        return camera.removeprefix(v3.CAMERA_PREFIX)

    def _with_prefixes(self, name: str) -> tuple[str, ...]:
        return (v3.CAMERA_PREFIX + name, name, f"observation.{name}")

    def fingerprint(self) -> str:
        files = self.storage.files()
        meta = [name for name in files if name.startswith("meta/")]
        others = [name for name in files if name.split("/")[0] != "meta" and name.endswith(_CONTENT)]
        parts: list[str | bytes] = [self.format, self.split]
        for name in meta:
            parts += [name, self.storage.read(name)]
        parts += content(self.storage, {name: files[name] for name in others})
        return digest(parts)

    def _scan_rows(self, file: str) -> list[list[object]]:
        """The episodes in a data file: [episode_index, first row, rows, [[task_index, steps], ...]].

        Raises:
            DatasetError: rows that are out of order, or whose timestamps contradict fps.
        """
        where = self.storage.at(file)
        table = read_table(self.storage, file, ["episode_index", "frame_index"], ["task_index", "timestamp"])
        owner, frame = (indices(table[name], name, where) for name in ("episode_index", "frame_index"))
        task = indices(table["task_index"], "task_index", where) if "task_index" in table.column_names else None
        edges = np.flatnonzero(np.diff(owner)) + 1
        starts = [0, *edges.tolist()] if len(owner) else []
        episodes: list[list[object]] = []
        for first, stop in zip(starts, [*starts[1:], len(owner)], strict=True):
            number = int(owner[first])
            if any(run[0] == number for run in episodes[-1:]) or number in {run[0] for run in episodes}:
                raise DatasetError(f"{where}: the rows of episode {number} do not stand together; write it again")
            if not np.array_equal(frame[first:stop], np.arange(stop - first)):
                raise DatasetError(
                    f"{where}: frame_index of episode {number} does not count from 0 to {stop - first - 1} in order: "
                    "rows are missing or out of order; fetch or write it again"
                )
            runs: list[list[int]] = []
            if task is not None:
                cuts = np.flatnonzero(np.diff(task[first:stop])) + 1
                bounds = [0, *cuts.tolist(), stop - first]
                runs = [[int(task[first + a]), b - a] for a, b in pairwise(bounds)]
            episodes.append([number, int(first), int(stop - first), runs])
        if "timestamp" in table.column_names and len(owner):
            self._check_times(plain(table["timestamp"], "timestamp", where), frame, owner, where)
        return episodes

    def _check_times(self, times: np.ndarray, frame: np.ndarray, owner: np.ndarray, where: str) -> None:
        times, fps = times.astype(np.float64), self.info.fps
        first = frame == 0
        # Without videos only the distances mean something.
        origin = 0.0 if self.info.cameras("video") else times[first][np.cumsum(first) - 1]
        off = np.abs(times - origin - frame / fps)
        worst = int(off.argmax()) if np.isfinite(off).all() else int(np.flatnonzero(~np.isfinite(off))[0])
        # Half a step off, another frame would be the nearer one. Not ">": NaN is refused too.
        if not off[worst] <= 0.5 / fps:
            same = np.diff(owner) == 0
            steps = np.diff(times)[same]
            rate = f" (a step of {np.median(steps):.4g} s: {1 / np.median(steps):.4g} fps)" if (steps > 0).any() else ""
            raise DatasetError(
                f"{where}: {v3.INFO} says fps = {fps:g}, but timestamp is {times[worst]:.4g} s at frame "
                f"{int(frame[worst])} of episode {int(owner[worst])}{rate}; correct fps or the timestamps"
            )

    def _sentences(
        self, rows: Rows, known: Mapping[int, str] | None, booked: Sequence[str], number: int
    ) -> tuple[tuple[str, int], ...]:
        """(sentence, steps) of an episode: by the rows' task_index where there is a table of tasks, else the one
        sentence that the metadata gives for the episode."""
        if known and rows.tasks:
            told: list[tuple[str, int]] = []
            for task, steps in rows.tasks:
                if task not in known:
                    raise DatasetError(
                        f"{self.storage.at(rows.file)}: task_index is {task} in episode {number}, the table of tasks "
                        f"in meta/ has {len(known)} entries without it; fetch or write it again"
                    )
                if booked and known[task] not in booked:
                    raise DatasetError(
                        f"{self.path}: the metadata of episode {number} says {booked[0]!r}, its rows have task_index "
                        f"{task}, which means {known[task]!r} in the table of tasks (meta/tasks): the two disagree; "
                        "correct one of them"
                    )
                told.append((known[task], steps))
            return tuple(told)
        sentences = list(dict.fromkeys(booked))
        if len(sentences) == 1:
            return ((sentences[0], rows.length),)
        why = "several tasks" if sentences else "no task"
        raise DatasetError(
            f"{self.path}: episode {number} has {why} in the metadata, and no task_index with a table of tasks says "
            "which; write meta/tasks and the column task_index"
        )

    def _adopt(self, recordings: Sequence[Recording]) -> None:
        """Keeps the recordings of the chosen split, in order."""
        for camera in self.info.cameras("video"):
            self._check_apart(camera, recordings)
        chosen = self._chosen(len(recordings))
        self.recordings = tuple(recording for recording in recordings if recording.number in chosen)
        self.episodes = tuple(
            Episode(
                place,
                recording.tasks[min(self._first_run(recording), len(recording.tasks) - 1)][0],
                self._steps(recording.rows.length),
                f"episode {recording.number}",
                recording.extra,
            )
            for place, recording in enumerate(self.recordings)
        )

    def _check_apart(self, camera: str, recordings: Sequence[Recording]) -> None:
        """No two episodes lie on the same frames of a video, as where a writer left every start at 0."""
        placed = sorted(recordings, key=lambda each: (each.videos[camera].file, each.videos[camera].start))
        for before, after in pairwise(placed):
            first, second = before.videos[camera], after.videos[camera]
            end = first.start + before.rows.length / self.info.fps
            # Some writers end a span at its last frame, and begin the next one there.
            if first.file == second.file and second.start < end - 1.5 / self.info.fps:
                raise DatasetError(
                    f"{self.storage.at(first.file)}: episodes {before.number} and {after.number} lie on the same "
                    f"frames, from {first.start:.4g} to {end:.4g} s and from {second.start:.4g} s on; correct "
                    f"{self._PLACE_OF_VIDEOS.format(camera=camera)}"
                )

    def _first_run(self, recording: Recording) -> int:
        skipped = self.transform.dropped[0] if self.transform else 0
        if not skipped:
            return 0
        ends = np.cumsum([steps for _, steps in recording.tasks])
        return int(np.searchsorted(ends, skipped, side="right"))

    def _chosen(self, total: int) -> range | set[int]:
        """Numbers of the episodes in the split: what `splits` of info.json gives it; `train` also has all that no
        split names, because writers forget to move its end."""
        ranges: dict[str, range] = {}
        for name, text in (self.info.splits or {}).items():
            start, _, stop = text.partition(":")
            # Not `isdigit`, which takes superscripts; and not long, for `int` refuses thousands of digits.
            if not (start.isdecimal() and stop.isdecimal() and len(start) < 16 and len(stop) < 16):
                raise DatasetError(f"{self.storage.at(v3.INFO)}: splits.{name} = {text!r}, must be 'start:stop'")
            ranges[name] = range(int(start), min(int(stop), total))
        if self.split == "train":
            others = {number for name, chosen in ranges.items() if name != "train" for number in chosen}
            return set(range(total)) - (others - set(ranges.get("train", ())))
        if self.split not in ranges:
            raise DatasetError(f"{self.path}: no split {self.split!r}; {nearest(self.split, [*ranges, 'train'])}")
        return ranges[self.split]

    def _column(self, file: str, name: str) -> np.ndarray:
        width = vector_width(self.info, name, self.storage.at(v3.INFO))

        def read() -> np.ndarray:
            table = read_table(self.storage, file, [name])
            return matrix(table[name], name, width, self.storage.at(file))

        return self._tables.get((file, name), read)

    def _open_video(self, file: str) -> VideoReader:
        reader = VideoReader(self.storage.path_or_file(file), self.storage.at(file))
        self._check_rate(file, reader.rate, reader.frames)
        return reader

    def _check_rate(self, file: str, rate: float | None, frames: int) -> None:
        # The mean rate of a video of two frames depends on how long the last one is shown.
        if rate and frames > 2 and abs(rate - self.info.fps) > 0.01 * self.info.fps:
            raise DatasetError(
                f"{self.storage.at(file)}: the video has {rate:.4g} frames a second, {v3.INFO} says fps = "
                f"{self.info.fps:g}; correct fps, or encode the video again"
            )

    def _check_shown(self, file: str, times: np.ndarray, start: float, recording: Recording) -> None:
        """Each step of an episode has a frame; a video that starts late, or drifts, would show those of other steps."""
        asked = start + np.arange(recording.rows.length) / self.info.fps
        shown = np.concatenate([[-np.inf], times, [np.inf]])
        after = np.searchsorted(shown, asked)
        off = np.minimum(shown[after] - asked, asked - shown[after - 1])
        wrong = np.flatnonzero(off > _OFF / self.info.fps)
        if len(wrong):
            step = int(wrong[0])
            closest = times[np.abs(times - asked[step]).argmin()]
            raise DatasetError(
                f"{self.storage.at(file)}: shows no frame at {asked[step]:.4g} s, where step {step} of episode "
                f"{recording.number} is by fps = {self.info.fps:g}; the nearest is at {closest:.4g} s: the video "
                "starts late, runs at another rate, or lacks frames; encode it again"
            )


def check_numbers(numbers: Sequence[int], where: str) -> None:
    """Raises `DatasetError` unless these, ascending, are 0, 1, 2, ..."""
    wrong = next((place for place, number in enumerate(numbers) if number != place), None)
    if wrong is not None:
        raise DatasetError(
            f"{where}: the episodes must be numbered 0 to {len(numbers) - 1}, once each; episode_index "
            f"{numbers[wrong]} comes in place of {wrong}: episodes were removed, or written twice; number them anew, "
            "their rows too"
        )


def video_name(info: Info, where: str, **values: int | str) -> str:
    """Name of a video by the template of info.json."""
    assert info.video_path is not None
    return expand(info.video_path, "video_path", where, **values)
