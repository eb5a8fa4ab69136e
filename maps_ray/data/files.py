"""The files of a data set folder, each replaced as a whole: a reader sees the old content or the new."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq


def column(values: np.ndarray) -> pa.Array:
    """(N,) as a plain column, (N, D) as lists of fixed length."""
    if values.ndim == 1:
        return pa.array(values)
    return pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), values.shape[1])


def read_rows(path: Path) -> list[dict[str, Any]]:
    """All rows of a small parquet file."""
    return list(pq.read_table(path).to_pylist())


def write_parquet(tables: Sequence[pa.Table], path: Path) -> None:
    """One row group per table, so that one episode can be read alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with pq.ParquetWriter(partial, tables[0].schema) as writer:
        for table in tables:
            writer.write_table(table)
    os.replace(partial, path)


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


def write_json(value: Mapping[str, Any], path: Path) -> None:
    """Indented, so that a person can read it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, path)
