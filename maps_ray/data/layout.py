"""A LeRobotDataset v3.0 folder: its names, its tables, each replaced as a whole, and its statistics of each feature.

The format: huggingface.co/docs/lerobot/lerobot-dataset-v3. Its statistics are of all data, unsplit. Training does not
use them; it normalises by `maps_ray.data.statistics`, which sees the train split only.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from maps_ray.files import replaced

CODEBASE_VERSION = "v3.0"
INFO = "meta/info.json"
STATS = "meta/stats.json"
TASKS = "meta/tasks.parquet"
EPISODES = "meta/episodes/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
DATA = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
VIDEO = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"

STATE = "observation.state"
ACTION = "action"
CAMERA_PREFIX = "observation.images."
# `DEFAULT_CHUNK_SIZE` of lerobot.datasets.
FILES_PER_CHUNK = 1000

INDEX_FEATURES = {
    "timestamp": "float32",
    "frame_index": "int64",
    "episode_index": "int64",
    "index": "int64",
    "task_index": "int64",
}
"""Columns that every data file has besides the recorded features."""


def column(values: np.ndarray) -> pa.Array:
    """(N,) as a plain column, (N, D) as lists of fixed length."""
    if values.ndim == 1:
        return pa.array(values)
    # As `datasets` stores LeRobot's vectors: a `Sequence` of a length.
    return pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), values.shape[1])


def read_rows(path: Path) -> list[dict[str, Any]]:
    """All rows of a small parquet file."""
    return list(pq.read_table(path).to_pylist())


def write_parquet(tables: Sequence[pa.Table], path: Path) -> None:
    """One row group per table, so that one episode can be read alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replaced(path) as partial, pq.ParquetWriter(partial, tables[0].schema) as writer:
        for table in tables:
            writer.write_table(table)


def write_tasks(tasks: Mapping[str, int], path: Path) -> None:
    """Sentences as the table's pandas index, as LeRobot expects it."""
    pandas = {
        "index_columns": ["task"],
        "column_indexes": [],
        "columns": [
            {"name": "task_index", "field_name": "task_index", "pandas_type": "int64", "numpy_type": "int64"},
            {"name": "task", "field_name": "task", "pandas_type": "unicode", "numpy_type": "object"},
        ],
    }
    table = pa.table({"task_index": pa.array(list(tasks.values()), pa.int64()), "task": list(tasks)})
    write_parquet([table.replace_schema_metadata({"pandas": json.dumps(pandas)})], path)


FeatureStats = dict[str, np.ndarray]
_IMAGES_SAMPLED = 32


def vector_stats(values: np.ndarray) -> FeatureStats:
    """min, max, mean, std over the steps of (T, D) or (T,) values, and their count; each of shape (D,) or (1,)."""
    rows = values.reshape(len(values), -1).astype(np.float64)
    return {
        "min": rows.min(0),
        "max": rows.max(0),
        "mean": rows.mean(0),
        "std": rows.std(0),
        "count": np.array([len(rows)]),
    }


def image_stats(images: np.ndarray) -> FeatureStats:
    """The same for uint8 (T, H, W, 3) frames scaled to 0..1, from evenly spaced frames; each of shape (3, 1, 1)."""
    count = min(len(images), _IMAGES_SAMPLED)
    chosen = images[np.linspace(0, len(images) - 1, count).round().astype(int)]
    stats = vector_stats(chosen.reshape(-1, 3) / 255.0)
    shaped = {kind: value.reshape(3, 1, 1) for kind, value in stats.items() if kind != "count"}
    # Of frames, not of pixels: so `lerobot.datasets.compute_stats` counts and weighs.
    return {**shaped, "count": np.array([count])}


def aggregate(episodes: Sequence[dict[str, FeatureStats]]) -> dict[str, FeatureStats]:
    """Statistics of all episodes from those of each: exact, by the law of total variance."""
    return {name: _aggregate([episode[name] for episode in episodes]) for name in episodes[0]}


def _aggregate(parts: Sequence[FeatureStats]) -> FeatureStats:
    mean, std = np.stack([part["mean"] for part in parts]), np.stack([part["std"] for part in parts])
    count = np.stack([part["count"] for part in parts]).astype(np.float64)
    weight = count.reshape(len(parts), *[1] * (mean.ndim - 1)) / count.sum()
    total = (weight * mean).sum(0)
    return {
        "min": np.min([part["min"] for part in parts], axis=0),
        "max": np.max([part["max"] for part in parts], axis=0),
        "mean": total,
        "std": np.sqrt((weight * (std**2 + (mean - total) ** 2)).sum(0)),
        "count": count.sum(0).astype(np.int64),
    }
