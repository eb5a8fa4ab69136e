"""LeRobotDataset v3: many episodes in a data file and a video; `meta/episodes` says which
(huggingface.co/docs/lerobot/lerobot-dataset-v3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

import pyarrow as pa

from maps_ray.data import layout as v3
from maps_ray.data.dataset_error import DatasetError
from maps_ray.data.formats.base import Names
from maps_ray.data.formats.lerobot import LeRobotFiles, Recording, Rows, Video, check_numbers, video_name
from maps_ray.data.formats.lerobot_info import (
    Info,
    column_values,
    expand,
    read_table,
    real_numbers,
    whole_numbers,
)
from maps_ray.data.storage import Storage
from maps_ray.data.transforms import Transform

_EPISODES = "meta/episodes"


class _Booked(TypedDict):
    """An episode as `meta/episodes` has it."""

    episode_index: int
    length: int
    file: str
    """Of its rows."""
    tasks: list[str]
    videos: dict[str, Video]
    extra: dict[str, object]


class LeRobotV3(LeRobotFiles):
    """See `Dataset`."""

    format = "lerobot_v3.0"
    _PLACE_OF_VIDEOS = "videos/{camera}/from_timestamp in meta/episodes"

    def __init__(self, storage: Storage, info: Info, split: str, transform: Transform | None, names: Names) -> None:
        super().__init__(storage, info, split, transform, names)
        self._where = storage.at(v3.INFO)
        self._tasks = _read_tasks(storage)
        self._table = self._read_episodes()
        self._booked = self._booked_files()
        self._check_totals()

    @property
    def shards(self) -> list[str]:
        return self.data_files()

    def data_files(self) -> list[str]:
        # A file that no episode is booked under may hold episodes that are booked under another.
        # Listed below the template's first folder alone, where that is fixed: videos may be very many.
        folder = self.info.data_path.split("/")[0]
        listed = self.storage.files("" if "{" in folder else folder)
        return list(dict.fromkeys([*self._booked, *(name for name in listed if _is_data(name))]))

    def scan(self, shard: str) -> object:
        try:
            return self._scan_rows(shard)
        except DatasetError:
            if shard in self._booked:
                raise
            # A leftover of an interrupted write; assembling finds out whether an episode is missing.
            return []

    def assemble(self, scans: Sequence[Any]) -> None:
        rows_of: dict[int, list[Rows]] = {}
        for file, runs in zip(self.data_files(), scans, strict=True):
            for number, first, length, tasks in runs:
                rows_of.setdefault(number, []).append(Rows(file, first, length, tuple((t, n) for t, n in tasks)))
        recordings = []
        for row in self._table:
            number, booked = row["episode_index"], row["file"]
            places = rows_of.get(number, [])
            # Two files with the same episode: the one that the metadata names.
            places = [rows for rows in places if rows.file == booked] or places
            if len(places) != 1:
                held = f"stands in {', '.join(rows.file for rows in places)}" if places else "stands in no data file"
                raise DatasetError(f"{self.path}: episode {number} of {_EPISODES} {held}; fetch or write it again")
            rows = places[0]
            if rows.length != row["length"]:
                raise DatasetError(
                    f"{self.storage.at(rows.file)}: episode {number} has {row['length']} frames in meta/episodes, but "
                    f"the file holds {rows.length} rows of it; fetch or write it again"
                )
            tasks = self._sentences(rows, self._tasks, row["tasks"], number)
            recordings.append(Recording(number, rows, tasks, row["videos"], row["extra"]))
        self._adopt(recordings)

    def _read_episodes(self) -> list[_Booked]:
        """Rows of meta/episodes, checked and in order."""
        files = [name for name in self.storage.files(_EPISODES) if name.endswith(".parquet")]
        if not files:
            raise DatasetError(f"{self.path}: no {_EPISODES}/*/*.parquet; the write or download was interrupted")
        rows = [row for file in files for row in self._episodes_of(file)]
        rows.sort(key=lambda row: row["episode_index"])
        check_numbers([row["episode_index"] for row in rows], self.storage.at(_EPISODES))
        return rows

    def _episodes_of(self, file: str) -> list[_Booked]:
        where = self.storage.at(file)
        place = ["data/chunk_index", "data/file_index"]
        required = ["episode_index", "length", *place]
        for camera in self.info.cameras("video"):
            required += [f"videos/{camera}/{part}" for part in ("chunk_index", "file_index", "from_timestamp")]
        ends = [f"videos/{camera}/to_timestamp" for camera in self.info.cameras("video")]
        table = read_table(self.storage, file, required, ["tasks", *ends], prefix="extra/")
        numbers = {
            name: (real_numbers if name.endswith("_timestamp") else whole_numbers)(table, name, where)
            for name in table.column_names
            if name in required
        }
        tasks = _sentence_lists(table, where) if "tasks" in table.column_names else [[] for _ in range(len(table))]
        extra = {n: column_values(table, n, where) for n in table.column_names if n.startswith("extra/")}
        for camera, end in zip(self.info.cameras("video"), ends, strict=True):
            if end in table.column_names:
                self._check_spans(numbers, real_numbers(table, end, where), camera, where)
        rows: list[_Booked] = []
        for i in range(len(table)):
            chunk, number = (numbers[name][i] for name in place)
            name = expand(self.info.data_path, "data_path", self._where, chunk_index=int(chunk), file_index=int(number))
            videos = {camera: self._video(camera, numbers, i) for camera in self.info.cameras("video")}
            rows.append(
                {
                    "episode_index": int(numbers["episode_index"][i]),
                    "length": int(numbers["length"][i]),
                    "file": name,
                    "tasks": tasks[i],
                    "videos": videos,
                    "extra": {name.removeprefix("extra/"): values[i] for name, values in extra.items()},
                }
            )
        return rows

    def _video(self, camera: str, numbers: Mapping[str, Sequence[float]], row: int) -> Video:
        chunk, file, start = (
            numbers[f"videos/{camera}/{part}"][row] for part in ("chunk_index", "file_index", "from_timestamp")
        )
        name = video_name(self.info, self._where, video_key=camera, chunk_index=int(chunk), file_index=int(file))
        return Video(name, start)

    def _check_spans(
        self, numbers: Mapping[str, Sequence[float]], ends: Sequence[float], camera: str, where: str
    ) -> None:
        """The span of a video that an episode has must be as long as its rows, at the rate of fps."""
        starts, fps = numbers[f"videos/{camera}/from_timestamp"], self.info.fps
        for number, start, end, length in zip(numbers["episode_index"], starts, ends, numbers["length"], strict=True):
            # Some writers end a span at its last frame, some one frame later.
            shown = (end - start) * fps
            if start < 0 or abs(shown - length) > 1.5:
                raise DatasetError(
                    f"{where}: episode {number} has {length:g} frames and {end - start:.4g} s of {camera} "
                    f"(from_timestamp {start:.4g}, to_timestamp {end:.4g}), which is {shown:.4g} frames at "
                    f"fps = {fps:g} of {v3.INFO}; correct fps or the timestamps"
                )

    def _booked_files(self) -> list[str]:
        return list(dict.fromkeys(row["file"] for row in self._table))

    def _check_totals(self) -> None:
        frames = sum(row["length"] for row in self._table)
        for field, counted in (("total_episodes", len(self._table)), ("total_frames", frames)):
            said = getattr(self.info, field)
            if said not in (None, counted):
                raise DatasetError(
                    f"{self.path}: {v3.INFO} says {field} = {said}, {_EPISODES} has {counted}; the write or "
                    "download was interrupted: fetch it again, or repair it by LeRobotWriter(..., append=True)"
                )


def _is_data(name: str) -> bool:
    return name.endswith(".parquet") and not name.startswith("meta/")


def _sentence_lists(table: pa.Table, where: str) -> list[list[str]]:
    """The column `tasks`: lists of sentences; a plain sentence counts as a list of one, null as none."""
    result = []
    for row, value in enumerate(column_values(table, "tasks", where)):
        sentences = [value] if isinstance(value, str) else [] if value is None else value
        if not isinstance(sentences, list) or not all(isinstance(sentence, str) for sentence in sentences):
            raise DatasetError(f"{where}: column 'tasks' is {value!r:.80} in row {row}, must be a list of sentences")
        result.append(sentences)
    return result


def _read_tasks(storage: Storage) -> dict[int, str] | None:
    """task_index -> sentence of meta/tasks.parquet; None where there is none."""
    if not storage.is_file(v3.TASKS):
        return None
    where = storage.at(v3.TASKS)
    # The sentences are the table's pandas index, which has a name or not.
    names = ["task", "__index_level_0__", "index"]
    table = read_table(storage, v3.TASKS, ["task_index"], names)
    column = next((name for name in names if name in table.column_names), None)
    if column is None:
        raise DatasetError(f"{where}: has no column of sentences; it is called 'task'")
    known: dict[int, str] = {}
    sentences = column_values(table, column, where)
    for row, (index, sentence) in enumerate(zip(whole_numbers(table, "task_index", where), sentences, strict=True)):
        if not isinstance(sentence, str):
            raise DatasetError(f"{where}: column {column!r} is {sentence!r:.80} in row {row}, must be a sentence")
        if known.setdefault(index, sentence) != sentence:
            raise DatasetError(f"{where}: task_index {index} stands twice, in row {row} for another sentence")
    return known
