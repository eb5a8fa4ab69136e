"""Writes demonstrations as a LeRobotDataset v3.0 folder that LeRobot itself loads."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa

from maps_ray.data import layout as v3
from maps_ray.data.dataset_error import DatasetError
from maps_ray.data.layout import (
    aggregate,
    column,
    image_stats,
    read_rows,
    vector_stats,
    write_parquet,
    write_tasks,
)
from maps_ray.data.video import VideoEncoder
from maps_ray.files import write_json

Scalar = bool | int | float | str


class LeRobotWriter:
    """Writes episodes; use it as a context manager, or call `close`.

    Episodes gather in one video per camera and one data file until `commit`, which runs by itself every
    `episodes_per_file` episodes and on `close`. A commit ends with the atomic replacement of `meta/info.json`: after a
    crash the folder holds what was committed last, or has no `meta/info.json` and is refused by the reader.
    `append=True` removes what a crash left behind and goes on.

    Args:
        root: folder to create; must be empty or missing unless `append`.
        fps: control steps per second.
        robot_type: recorded in `info.json`.
        cameras: name -> (height, width); stored as `observation.images.<name>`.
        state_names: names of the D dimensions of `observation.state`.
        action_names: names of the A dimensions of `action`.
        crf: x264 quality, see `VideoEncoder`.
        gop: key frame distance, see `VideoEncoder`.
        episodes_per_file: episodes in one video or data file at most.
        append: continue the data set at `root`, which must have the same features; a missing one is created.

    Raises:
        DatasetError: `root` is not empty, or differs in features from what is to be appended.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        cameras: Mapping[str, tuple[int, int]],
        state_names: Sequence[str],
        action_names: Sequence[str],
        fps: int = 20,
        robot_type: str = "panda",
        crf: int = 24,
        gop: int = 10,
        episodes_per_file: int = 50,
        append: bool = False,
    ) -> None:
        self.root = Path(root)
        self.fps = fps
        self._cameras = {v3.CAMERA_PREFIX + name: size for name, size in cameras.items()}
        self._crf, self._gop, self._episodes_per_file = crf, gop, episodes_per_file
        self._info = _new_info(fps, robot_type, self._cameras, state_names, action_names)
        self._tasks: dict[str, int] = {}
        self._episode_stats: list[dict[str, dict[str, np.ndarray]]] = []
        self._extra_names: list[str] | None = None
        self._file = 0
        self._pending: list[dict[str, object]] = []
        self._tables: list[pa.Table] = []
        self._encoders: dict[str, VideoEncoder] = {}
        if (self.root / v3.INFO).is_file() and append:
            self._continue()
        elif self.root.exists() and any(self.root.iterdir()):
            if not append:
                raise DatasetError(f"{self.root}: folder is not empty; give a new folder, or append=True to continue")
            self._remove_uncommitted()

    @property
    def total_episodes(self) -> int:
        """Episodes written so far, committed or not."""
        return int(self._info["total_episodes"]) + len(self._pending)

    def add_episode(
        self,
        task: str | Sequence[str],
        images: Mapping[str, np.ndarray],
        state: np.ndarray,
        actions: np.ndarray,
        extra: Mapping[str, Scalar] | None = None,
    ) -> int:
        """Appends one episode of T steps.

        Args:
            task: the instruction, or that of each step.
            images: camera name -> uint8 (T, H, W, 3), RGB, upright as the policy is to see them.
            state: (T, D), the proprioception before each action.
            actions: (T, A).
            extra: facts of the episode, kept in `meta/episodes` as `extra/<name>`; the same names in every episode.

        Returns:
            The episode's index.

        Raises:
            DatasetError: wrong cameras, shapes, lengths, names of `extra`, or a value that is NaN or infinite.
        """
        episode = self.total_episodes
        vectors = {
            v3.STATE: _finite(state, episode, "state"),
            v3.ACTION: _finite(actions, episode, "actions"),
        }
        keyed = {v3.CAMERA_PREFIX + name: array for name, array in images.items()}
        self._check(episode, task, vectors, keyed, extra or {})
        self._extra_names = sorted(extra or {})
        length = len(vectors[v3.ACTION])
        start = int(self._info["total_frames"]) + sum(table.num_rows for table in self._tables)
        sentences = [task] * length if isinstance(task, str) else list(task)
        tasks = list(dict.fromkeys(sentences))
        indices = {sentence: self._tasks.setdefault(sentence, len(self._tasks)) for sentence in tasks}
        columns: dict[str, np.ndarray] = {
            **vectors,
            "timestamp": (np.arange(length) / self.fps).astype(np.float32),
            "frame_index": np.arange(length),
            "episode_index": np.full(length, episode),
            "index": np.arange(start, start + length),
            "task_index": np.array([indices[sentence] for sentence in sentences]),
        }
        chunk, file = divmod(self._file, v3.FILES_PER_CHUNK)
        row: dict[str, object] = {
            "episode_index": episode,
            "tasks": tasks,
            "length": length,
            "data/chunk_index": chunk,
            "data/file_index": file,
            "dataset_from_index": start,
            "dataset_to_index": start + length,
        }
        stats = {name: vector_stats(values) for name, values in columns.items()}
        for key, array in keyed.items():
            encoder = self._encoder(key, chunk, file)
            row[f"videos/{key}/chunk_index"] = chunk
            row[f"videos/{key}/file_index"] = file
            row[f"videos/{key}/from_timestamp"] = encoder.frames / self.fps
            encoder.write(array)
            row[f"videos/{key}/to_timestamp"] = encoder.frames / self.fps
            stats[key] = image_stats(array)
        row |= {"meta/episodes/chunk_index": chunk, "meta/episodes/file_index": file}
        row |= {f"extra/{name}": value for name, value in (extra or {}).items()}
        row |= {f"stats/{name}/{k}": v.tolist() for name, kinds in stats.items() for k, v in kinds.items()}
        self._tables.append(pa.table({name: column(values) for name, values in columns.items()}))
        self._pending.append(row)
        self._episode_stats.append(stats)
        if len(self._pending) >= self._episodes_per_file:
            self.commit()
        return episode

    def commit(self) -> None:
        """Makes all episodes added so far part of the data set on disk."""
        if not self._pending:
            return
        # Before the tables: an MP4 has no index until it is closed.
        for encoder in self._encoders.values():
            encoder.close()
        self._encoders = {}
        chunk, file = divmod(self._file, v3.FILES_PER_CHUNK)
        data = self.root / v3.DATA.format(chunk_index=chunk, file_index=file)
        write_parquet(self._tables, data)
        episodes = self.root / v3.EPISODES.format(chunk_index=chunk, file_index=file)
        write_parquet([pa.Table.from_pylist(self._pending)], episodes)
        write_tasks(self._tasks, self.root / v3.TASKS)
        stats = aggregate(self._episode_stats)
        values = {n: {k: v.tolist() for k, v in s.items()} for n, s in stats.items()}
        write_json(self.root / v3.STATS, values, durable=False)
        self._info["total_episodes"] += len(self._pending)
        self._info["total_frames"] += sum(len(table) for table in self._tables)
        self._info["total_tasks"] = len(self._tasks)
        self._info["splits"] = {"train": f"0:{self._info['total_episodes']}"}
        write_json(self.root / v3.INFO, self._info, durable=False)
        self._pending, self._tables = [], []
        self._file += 1

    def close(self) -> None:
        """Commits; the data set is complete."""
        self.commit()

    def __enter__(self) -> LeRobotWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Whole episodes that were added before an error are sound.
        self.close()

    def _check(
        self,
        episode: int,
        task: str | Sequence[str],
        vectors: Mapping[str, np.ndarray],
        images: Mapping[str, np.ndarray],
        extra: Mapping[str, Scalar],
    ) -> None:
        if not all(sentence.strip() for sentence in ([task] if isinstance(task, str) else task)):
            raise DatasetError(f"episode {episode}: the task is empty")
        if set(images) != set(self._cameras):
            raise DatasetError(f"episode {episode}: cameras {sorted(images)}, the data set has {sorted(self._cameras)}")
        for key, values in vectors.items():
            wanted = self._info["features"][key]["shape"][0]
            if values.ndim != 2 or values.shape[1] != wanted:
                raise DatasetError(f"episode {episode}: {key} must have shape (T, {wanted}), got {values.shape}")
        for key, array in images.items():
            wanted = (*self._cameras[key], 3)
            if array.dtype != np.uint8 or array.shape[1:] != wanted:
                got = f"{array.dtype} {array.shape}"
                raise DatasetError(f"episode {episode}: {key} must be uint8 (T, {str(wanted)[1:]}, got {got}")
        lengths = {key: len(array) for key, array in {**vectors, **images}.items()}
        if not isinstance(task, str):
            lengths["tasks"] = len(task)
        if len(set(lengths.values())) != 1 or not lengths[v3.ACTION]:
            raise DatasetError(f"episode {episode}: lengths must be equal and not 0, got {lengths}")
        if self._extra_names is not None and sorted(extra) != self._extra_names:
            raise DatasetError(f"episode {episode}: extra has {sorted(extra)}, earlier episodes {self._extra_names}")

    def _encoder(self, key: str, chunk: int, file: int) -> VideoEncoder:
        if key not in self._encoders:
            path = self.root / v3.VIDEO.format(video_key=key, chunk_index=chunk, file_index=file)
            path.parent.mkdir(parents=True, exist_ok=True)
            self._encoders[key] = VideoEncoder(path, self._cameras[key], self.fps, self._crf, self._gop)
        return self._encoders[key]

    def _continue(self) -> None:
        info = json.loads((self.root / v3.INFO).read_text())
        for field in ("codebase_version", "fps", "robot_type", "features"):
            if info.get(field) != self._info[field]:
                raise DatasetError(
                    f"{self.root}: {field} is {info.get(field)}, cannot append episodes with {self._info[field]}"
                )
        self._info = info
        rows = [row for path in sorted(self.root.glob("meta/episodes/*/*.parquet")) for row in read_rows(path)]
        # info.json comes last in a commit: what it does not count is of one that never ended.
        rows = [row for row in rows if row["episode_index"] < info["total_episodes"]]
        tasks = read_rows(self.root / v3.TASKS)
        self._tasks = {row["task"]: row["task_index"] for row in tasks if row["task_index"] < info["total_tasks"]}
        self._file = 1 + max(row["data/chunk_index"] * v3.FILES_PER_CHUNK + row["data/file_index"] for row in rows)
        self._extra_names = sorted(name.removeprefix("extra/") for name in rows[0] if name.startswith("extra/"))
        self._episode_stats = [_stats_of(row) for row in rows]
        self._remove_uncommitted()

    def _remove_uncommitted(self) -> None:
        """Removes the files of a commit that never ended: those after the last committed file."""
        for pattern in ("data/chunk-*/file-*.*", "meta/episodes/chunk-*/file-*.*", "videos/*/chunk-*/file-*.mp4"):
            for path in self.root.glob(pattern):
                chunk, file = int(path.parent.name.split("-")[1]), int(path.stem.split("-")[1])
                if chunk * v3.FILES_PER_CHUNK + file >= self._file:
                    path.unlink()


def _new_info(
    fps: int,
    robot_type: str,
    cameras: Mapping[str, tuple[int, int]],
    state_names: Sequence[str],
    action_names: Sequence[str],
) -> dict[str, Any]:
    features: dict[str, dict[str, object]] = {
        key: {"dtype": "float32", "shape": [len(names)], "names": list(names)}
        for key, names in ((v3.STATE, state_names), (v3.ACTION, action_names))
    }
    for key, (height, width) in cameras.items():
        facts = {
            "video.height": height,
            "video.width": width,
            "video.codec": "h264",
            "video.pix_fmt": "yuv420p",
            "video.is_depth_map": False,
            "video.fps": fps,
            "video.channels": 3,
            "has_audio": False,
        }
        names = ["height", "width", "channels"]
        features[key] = {"dtype": "video", "shape": [height, width, 3], "names": names, "info": facts}
    # As LeRobot's `DEFAULT_FEATURES`.
    features |= {name: {"dtype": dtype, "shape": [1], "names": None} for name, dtype in v3.INDEX_FEATURES.items()}
    return {
        "codebase_version": v3.CODEBASE_VERSION,
        "robot_type": robot_type,
        "total_episodes": 0,
        "total_frames": 0,
        "total_tasks": 0,
        "chunks_size": v3.FILES_PER_CHUNK,
        # LeRobot asks for both; they bound what its own recorder appends to a file.
        "data_files_size_in_mb": 100,
        "video_files_size_in_mb": 500,
        "fps": fps,
        "splits": {},
        "data_path": v3.DATA,
        "video_path": v3.VIDEO,
        "features": features,
    }


def _finite(values: np.ndarray, episode: int, what: str) -> np.ndarray:
    array = np.asarray(values, dtype=np.float32)
    bad = np.argwhere(~np.isfinite(array))
    if len(bad):
        raise DatasetError(f"episode {episode}, frame {bad[0][0]}: {what} holds {array[tuple(bad[0])]}")
    return array


def _stats_of(row: Mapping[str, object]) -> dict[str, dict[str, np.ndarray]]:
    stats: dict[str, dict[str, np.ndarray]] = {}
    for name, value in row.items():
        if name.startswith("stats/"):
            _, feature, kind = name.split("/")
            stats.setdefault(feature, {})[kind] = np.asarray(value)
    return stats
