"""Reads a LeRobotDataset v3.0 folder: metadata and vectors by pyarrow; frames are left to `maps_ray.data.frames`.

Free of torch, so that a spec can be checked in a moment.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from maps_ray.data import layout
from maps_ray.data.errors import DatasetError
from maps_ray.spec import nearest

_EPISODE_COLUMNS = (
    "episode_index",
    "tasks",
    "length",
    "data/chunk_index",
    "data/file_index",
    "dataset_from_index",
    "dataset_to_index",
)


@dataclass(frozen=True)
class Span:
    """Where an episode's frames of one camera lie."""

    path: Path
    """MP4, or the parquet file for cameras stored as images."""
    start: float
    """Seconds into the video; for images, the row within the file."""


@dataclass(frozen=True)
class Episode:
    """One demonstration."""

    index: int
    task: str
    """The instruction; where an episode has several, the first."""
    length: int
    """Steps T."""
    data_path: Path
    spans: Mapping[str, Span]
    """Camera key -> its frames."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """What the writer recorded about the episode as `extra/<name>`."""


class LeRobotDataset:
    """An opened data set. Use `open`.

    Attributes:
        root: its folder.
        fps: control steps per second.
        features: name -> `{"dtype", "shape", "names", ...}` as in `meta/info.json`.
        episodes: all episodes, in order.
    """

    def __init__(self, root: Path, info: Mapping[str, Any], episodes: tuple[Episode, ...]) -> None:
        self.root = root
        self.fps = float(info["fps"])
        self.features: Mapping[str, Mapping[str, Any]] = info["features"]
        self.episodes = episodes
        self._columns: dict[str, dict[int, np.ndarray]] = {}

    @classmethod
    def open(cls, root: str | Path) -> LeRobotDataset:
        """Reads the metadata.

        Raises:
            DatasetError: no such folder, no or broken metadata, a version other than 3.x, or an unfinished write.
        """
        root = Path(root)
        if not root.is_dir():
            raise DatasetError(f"{root}: no such data set folder")
        info = _read_info(root)
        episodes = tuple(_read_episodes(root, info))
        dataset = cls(root, info, episodes)
        frames = sum(episode.length for episode in episodes)
        for field_, found in (("total_episodes", len(episodes)), ("total_frames", frames)):
            if info.get(field_, found) != found:
                raise DatasetError(
                    f"{root}: {layout.INFO} says {field_} = {info[field_]}, meta/episodes has {found}; the write or "
                    "download was interrupted: fetch it again, or repair it by LeRobotWriter(..., append=True)"
                )
        return dataset

    @property
    def tasks(self) -> list[str]:
        """Every task sentence once, in order of appearance."""
        return list(dict.fromkeys(episode.task for episode in self.episodes))

    @property
    def cameras(self) -> list[str]:
        """Keys of all cameras."""
        return [key for key, feature in self.features.items() if feature["dtype"] in ("video", "image")]

    def camera_key(self, name: str) -> str:
        """The feature that a camera's short or full name means.

        Raises:
            DatasetError: no such camera; names those there are.
        """
        for key in (layout.CAMERA_PREFIX + name, name, f"observation.{name}"):
            if key in self.cameras:
                return key
        names = [key.removeprefix(layout.CAMERA_PREFIX) for key in self.cameras]
        raise DatasetError(f"{self.root}: no camera {name!r}; {nearest(name, names)}")

    def width(self, name: str) -> int:
        """Number of dimensions of a vector feature such as `action`.

        Raises:
            DatasetError: no such feature; names those there are.
        """
        vectors = [key for key, feature in self.features.items() if feature["dtype"].startswith(("float", "int"))]
        vectors = [key for key in vectors if key not in layout.INDEX_FEATURES]
        if name not in vectors:
            raise DatasetError(f"{self.root}: no feature {name!r}; {nearest(name, vectors)}")
        shape = self.features[name]["shape"]
        if len(shape) != 1:
            raise DatasetError(f"{self.root}: {name} must be a vector, its shape is {tuple(shape)}")
        return int(shape[0])

    def vectors(self, name: str, episode: int) -> np.ndarray:
        """A vector feature of one episode: float32 (T, D).

        Raises:
            DatasetError: missing file or column, wrong width, or rows that do not match the episode.
        """
        columns = self._columns.setdefault(name, {})
        if episode not in columns:
            path = self.episodes[episode].data_path
            columns.update(self._read_vectors(path, name, [e for e in self.episodes if e.data_path == path]))
        return columns[episode]

    def finite_fault(self, name: str, episodes: Iterable[int]) -> str | None:
        """Names the first NaN or infinity of a feature by episode and frame; None when there is none."""
        for episode in episodes:
            bad = np.argwhere(~np.isfinite(self.vectors(name, episode)))
            if len(bad):
                frame, dimension = (int(i) for i in bad[0])
                value = self.vectors(name, episode)[frame, dimension]
                return f"{self.root}: {name} is {value} in episode {episode}, frame {frame}, dimension {dimension}"
        return None

    def _read_vectors(self, path: Path, name: str, episodes: list[Episode]) -> dict[int, np.ndarray]:
        width = self.width(name)
        table = read_parquet(path, [name, "episode_index", "frame_index"])
        values = _matrix(table[name].combine_chunks(), path, name, width)
        owner = _array(table["episode_index"].combine_chunks(), path)
        frame = _array(table["frame_index"].combine_chunks(), path)
        result = {}
        for episode in episodes:
            rows = np.flatnonzero(owner == episode.index)
            if not np.array_equal(frame[rows], np.arange(episode.length)):
                raise DatasetError(
                    f"{path}: episode {episode.index} has {episode.length} frames in meta/episodes, but the file holds "
                    f"{len(rows)} rows of it, or not in order; fetch or write it again"
                )
            result[episode.index] = values[rows]
        return result


def read_parquet(path: Path, columns: list[str], prefix: str = "") -> pa.Table:
    """Columns of a parquet file, and those whose name starts with `prefix` if there is one.

    Raises:
        DatasetError: missing or broken file, or a missing column; names those there are.
    """
    try:
        with pq.ParquetFile(path) as file:
            names = list(file.schema_arrow.names)
            for column in columns:
                if column not in names:
                    raise DatasetError(f"{path}: no column {column!r}; {nearest(column, names)}")
            return file.read(columns + [name for name in names if prefix and name.startswith(prefix)])
    except (OSError, pa.ArrowException) as error:
        raise DatasetError(f"{path}: cannot read ({error}); fetch or write it again") from None


def _matrix(column: pa.Array, path: Path, name: str, width: int) -> np.ndarray:
    """A column of lists (or of scalars, for width 1) as float32 (N, width)."""
    nested = pa.types.is_nested(column.type)
    lengths = _array(column.value_lengths(), path) if nested and not column.null_count else np.ones(len(column))
    if column.null_count or not len(column) or not (lengths == width).all():
        found = ", ".join(str(int(length)) for length in np.unique(lengths)[:5])
        raise DatasetError(f"{path}: {name} must have {width} dimensions in every row; found {found or 'no rows'}")
    flat = column.flatten() if nested else column
    if flat.null_count:
        flat = flat.cast(pa.float64()).fill_null(float("nan"))
    return _array(flat, path).astype(np.float32, copy=False).reshape(-1, width)


def _array(column: pa.Array, path: Path) -> np.ndarray:
    """A primitive column as numpy; `pa.Array.to_numpy` would import pandas, which takes longer than all the rest."""
    if column.null_count:
        raise DatasetError(f"{path}: a column holds nulls; write it again")
    return np.from_dlpack(column)


def _read_info(root: Path) -> dict[str, Any]:
    path = root / layout.INFO
    if not path.is_file():
        raise DatasetError(f"{root}: no {layout.INFO}; this is no LeRobotDataset, or its writing was interrupted")
    try:
        info: dict[str, Any] = dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise DatasetError(f"{path}: not readable as JSON ({error})") from None
    version = str(info.get("codebase_version"))
    if re.match(r"v?[12]\.", version):
        raise DatasetError(
            f"{root}: codebase_version {version} keeps one file per episode; convert it to v3.0 with LeRobot's "
            "convert_dataset_v21_to_v30 script (from v2.0, convert_dataset_v20_to_v21 first)"
        )
    if not re.match(r"v?3\.", version):
        raise DatasetError(f"{path}: codebase_version is {version!r}, this reader knows v3.x")
    missing = [name for name in ("fps", "features", "data_path") if not info.get(name)]
    if missing:
        raise DatasetError(f"{path}: lacks {', '.join(missing)}")
    for name, feature in info["features"].items():
        if (
            not isinstance(feature, dict)
            or not isinstance(feature.get("dtype"), str)
            or not isinstance(feature.get("shape"), list)
        ):
            raise DatasetError(f"{path}: feature {name} lacks dtype or shape")
        if feature["dtype"] == "video" and not info.get("video_path"):
            raise DatasetError(f"{path}: {name} is a video, but video_path is missing")
    return info


def _read_episodes(root: Path, info: Mapping[str, Any]) -> list[Episode]:
    paths = sorted(root.glob("meta/episodes/*/*.parquet"))
    if not paths:
        raise DatasetError(f"{root}: no meta/episodes/*/*.parquet; the write or download was interrupted")
    videos = [key for key, feature in info["features"].items() if feature["dtype"] == "video"]
    images = [key for key, feature in info["features"].items() if feature["dtype"] == "image"]
    columns = list(_EPISODE_COLUMNS)
    for key in videos:
        columns += [f"videos/{key}/{part}" for part in ("chunk_index", "file_index", "from_timestamp")]
    rows: list[dict[str, Any]] = []
    for path in paths:
        rows += read_parquet(path, columns, prefix="extra/").to_pylist()
    rows.sort(key=lambda row: row["episode_index"])
    if [row["episode_index"] for row in rows] != list(range(len(rows))):
        raise DatasetError(f"{root}: meta/episodes does not number the episodes 0..{len(rows) - 1} once each")

    first_row: dict[Path, int] = {}
    episodes = []
    for row in rows:
        place = {"chunk_index": row["data/chunk_index"], "file_index": row["data/file_index"]}
        data_path = root / info["data_path"].format(**place)
        start = first_row.setdefault(data_path, row["dataset_from_index"])
        spans = {key: Span(data_path, row["dataset_from_index"] - start) for key in images}
        for key in videos:
            place = {part: row[f"videos/{key}/{part}"] for part in ("chunk_index", "file_index")}
            video = root / info["video_path"].format(video_key=key, **place)
            spans[key] = Span(video, row[f"videos/{key}/from_timestamp"])
        if not row["tasks"]:
            raise DatasetError(f"{root}: episode {row['episode_index']} has no task")
        facts = {name.removeprefix("extra/"): value for name, value in row.items() if name.startswith("extra/")}
        episodes.append(Episode(row["episode_index"], row["tasks"][0], row["length"], data_path, spans, facts))
    return episodes
