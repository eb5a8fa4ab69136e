"""LeRobotDataset v2.0 and v2.1: one data file and one video for each episode, metadata in lines of JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, Field, ValidationError

from maps_ray.data import layout as v3
from maps_ray.data.dataset_error import DatasetError
from maps_ray.data.formats.base import Names
from maps_ray.data.formats.lerobot import LeRobotFiles, Recording, Rows, Video, check_numbers, video_name
from maps_ray.data.formats.lerobot_info import Info, expand, faults
from maps_ray.data.storage import Storage
from maps_ray.data.transforms import Transform

Model = TypeVar("Model", bound=BaseModel)

TASKS = "meta/tasks.jsonl"
EPISODES = "meta/episodes.jsonl"


# Strict numbers: pydantic would take "3", 3.0 and true for whole ones.
class _Task(BaseModel):
    task_index: int = Field(ge=0, strict=True)
    task: str


class _Episode(BaseModel):
    episode_index: int = Field(ge=0, lt=2**53, strict=True)
    tasks: list[str] | str | None = None
    length: int = Field(ge=0, strict=True)

    def sentences(self) -> list[str]:
        return [self.tasks] if isinstance(self.tasks, str) else self.tasks or []


class LeRobotV2(LeRobotFiles):
    """See `Dataset`."""

    _PLACE_OF_VIDEOS = "video_path in meta/info.json: each episode has a video of its own"

    def __init__(self, storage: Storage, info: Info, split: str, transform: Transform | None, names: Names) -> None:
        super().__init__(storage, info, split, transform, names)
        self.format = "lerobot_v2.0" if info.codebase_version.removeprefix("v").startswith("2.0") else "lerobot_v2.1"
        self._where = storage.at(v3.INFO)
        self._tasks: dict[int, str] = {}
        for task in _lines(storage, TASKS, _Task):
            if self._tasks.setdefault(task.task_index, task.task) != task.task:
                raise DatasetError(f"{storage.at(TASKS)}: task_index {task.task_index} stands twice")
        booked = sorted(_lines(storage, EPISODES, _Episode), key=lambda episode: episode.episode_index)
        check_numbers([episode.episode_index for episode in booked], storage.at(EPISODES))
        self._booked = booked
        frames = sum(episode.length for episode in booked)
        for field, counted in (("total_episodes", len(booked)), ("total_frames", frames)):
            said = getattr(info, field)
            if said not in (None, counted):
                raise DatasetError(
                    f"{self.path}: {v3.INFO} says {field} = {said}, {EPISODES} has {counted}; the write or download "
                    "was interrupted: fetch or write it again"
                )

    @property
    def shards(self) -> list[str]:
        return self.data_files()

    def data_files(self) -> list[str]:
        return [
            expand(self.info.data_path, "data_path", self._where, **self._place(episode.episode_index))
            for episode in self._booked
        ]

    def scan(self, shard: str) -> object:
        return self._scan_rows(shard)

    def assemble(self, scans: Sequence[Any]) -> None:
        recordings = []
        for booked, file, runs in zip(self._booked, self.data_files(), scans, strict=True):
            number = booked.episode_index
            mine = [run for run in runs if run[0] == number]
            held = sum(run[2] for run in mine)
            if len(mine) != 1 or held != booked.length or len(runs) != 1:
                others = sorted({run[0] for run in runs} - {number})
                also = f", and rows of episode {others[0]}" if others else ""
                raise DatasetError(
                    f"{self.storage.at(file)}: episode {number} has {booked.length} frames in {EPISODES}, but the file "
                    f"holds {held} rows of it{also}; fetch or write it again"
                )
            _, first, length, tasks = mine[0]
            rows = Rows(file, first, length, tuple((task, steps) for task, steps in tasks))
            sentences = self._sentences(rows, self._tasks, booked.sentences(), number)
            recordings.append(Recording(number, rows, sentences, self._videos_of(number)))
        self._adopt(recordings)

    def _videos_of(self, number: int) -> dict[str, Video]:
        place = self._place(number)
        return {
            camera: Video(video_name(self.info, self._where, video_key=camera, **place), 0.0)
            for camera in self.info.cameras("video")
        }

    def _place(self, number: int) -> dict[str, int]:
        return {"episode_chunk": number // self.info.chunks_size, "episode_index": number}


def _lines(storage: Storage, name: str, kind: type[Model]) -> Iterator[Model]:
    """The objects of a file of JSON lines.

    Raises:
        DatasetError: missing file, or a line that is not what it should be; names line and field.
    """
    # Not `splitlines`: sentences may hold U+2028 and others of which it makes an end of line, and JSON does not.
    for number, line in enumerate(storage.text(name).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{storage.at(name)}: line {number}"
        try:
            yield kind.model_validate(json.loads(line))
        except ValidationError as error:
            raise DatasetError(f"{where}: {faults(error)}") from None
        except (ValueError, RecursionError) as error:
            raise DatasetError(f"{where} is no JSON ({error}); fetch or write it again") from None
